// How tensors must lie in memory for the implementations of every device.

#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mlomae {

// The tensor itself if its last dimension has unit stride, else a contiguous copy.
inline torch::stable::Tensor with_rows(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) == 1 || tensor.size(last) <= 1) return tensor;
  return torch::stable::contiguous(tensor);
}

}  // namespace mlomae
