#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

namespace mlomae {

// A new, uninitialised, contiguous tensor, by default with the dtype of `like`.
torch::stable::Tensor new_output(const torch::stable::Tensor& like,
                                 torch::headeronly::IntHeaderOnlyArrayRef size,
                                 std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

}  // namespace mlomae
