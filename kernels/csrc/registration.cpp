// Schemas and implementations of the native operators. The Python package decides when to call them.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mlomae_native, m) {
  m.def("select_patches(Tensor scores, int num_keep) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)");
}

STABLE_TORCH_LIBRARY_IMPL(mlomae_native, CPU, m) {
  m.impl("select_patches", TORCH_BOX(&mlomae::select_patches));
}
