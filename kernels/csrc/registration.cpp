// Schemas of the native operators, and their CPU implementations. The Python package decides when to call
// them; _C_cuda.so adds implementations to the same schemas.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(mlomae_native, m) {
  m.def("select_patches(Tensor scores, int num_keep) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)");
  m.def("patch_gather(Tensor tokens, Tensor? pos_embed, Tensor ids_keep, Tensor? cls_token) -> Tensor");
  m.def(
      "patch_gather_backward(Tensor grad, Tensor ids_keep, int num_patches, bool has_cls, bool need_pos)"
      " -> (Tensor tokens, Tensor pos_embed, Tensor cls_token)");
  m.def(
      "patch_scatter(Tensor latent, Tensor mask_token, Tensor ids_restore, Tensor decoder_pos_embed)"
      " -> Tensor");
  m.def(
      "patch_scatter_backward(Tensor grad, Tensor ids_restore, int num_keep, bool need_pos)"
      " -> (Tensor latent, Tensor mask_token, Tensor decoder_pos_embed)");
  m.def(
      "masked_patch_loss(Tensor pred, Tensor images, Tensor removed, Tensor? weights, int patch_size,"
      " bool norm_pix) -> Tensor");
  m.def(
      "masked_patch_loss_backward(Tensor grad, Tensor pred, Tensor images, Tensor removed, Tensor? weights,"
      " int patch_size, bool norm_pix) -> (Tensor pred, Tensor weights)");
}

STABLE_TORCH_LIBRARY_IMPL(mlomae_native, CPU, m) {
  m.impl("select_patches", TORCH_BOX(&mlomae::select_patches));
  m.impl("patch_gather", TORCH_BOX(&mlomae::patch_gather));
  m.impl("patch_gather_backward", TORCH_BOX(&mlomae::patch_gather_backward));
  m.impl("patch_scatter", TORCH_BOX(&mlomae::patch_scatter));
  m.impl("patch_scatter_backward", TORCH_BOX(&mlomae::patch_scatter_backward));
  m.impl("masked_patch_loss", TORCH_BOX(&mlomae::masked_patch_loss));
  m.impl("masked_patch_loss_backward", TORCH_BOX(&mlomae::masked_patch_loss_backward));
}
