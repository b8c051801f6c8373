#pragma once

#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace mlomae {

// scores float32 [B, L] -> ids_keep int64 [B, num_keep], ids_restore int64 [B, L], mask float32 [B, L].
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> select_patches(
    torch::stable::Tensor scores, int64_t num_keep);

}  // namespace mlomae
