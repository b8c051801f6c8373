// Positions of patches given by the caller.

#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace mlomae {

// ids int64 [B, N] as one contiguous block, every one of them checked to lie in 0 to `patches` - 1.
torch::stable::Tensor checked_positions(const char* op, const char* argument,
                                        const torch::stable::Tensor& ids, int64_t patches);

// ids int64 [B, L] as one contiguous block, every row checked to be a permutation of 0 to L - 1.
torch::stable::Tensor checked_permutations(const char* op, const char* argument,
                                           const torch::stable::Tensor& ids);

}  // namespace mlomae
