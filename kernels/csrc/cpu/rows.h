// Rows of numbers that lie side by side in memory, for every floating dtype. Sums over the batch are in float64.

#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../errors.h"
#include "../layout.h"
#include "numbers.h"
#include "vector_loops.h"

namespace mlomae {

// Calls body(T{}) with the C++ type of a dtype that has passed the checks.
template <typename Body>
void for_dtype(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      refuse("mlomae_native", "dtype", toString(dtype), ", expected a checked floating dtype");
  }
}

// A tensor [B, R, D] as rows of D numbers.
template <typename T>
class Rows {
 public:
  explicit Rows(const torch::stable::Tensor& tensor)
      : data_(tensor.const_data_ptr<T>()), batch_stride_(tensor.stride(0)), row_stride_(tensor.stride(1)) {}

  const T* at(int64_t image, int64_t row) const { return data_ + image * batch_stride_ + row * row_stride_; }

 private:
  const T* data_;
  int64_t batch_stride_;
  int64_t row_stride_;
};

// A tensor [B, N] of any strides.
template <typename T>
class Table {
 public:
  explicit Table(const torch::stable::Tensor& tensor)
      : data_(tensor.const_data_ptr<T>()), row_stride_(tensor.stride(0)), column_stride_(tensor.stride(1)) {}

  T at(int64_t row, int64_t column) const { return data_[row * row_stride_ + column * column_stride_]; }

 private:
  const T* data_;
  int64_t row_stride_;
  int64_t column_stride_;
};

template <typename T>
MLOMAE_VECTOR_LOOPS void add_rows(T* __restrict out, const T* __restrict left, const T* __restrict right,
                                  int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = from_number<T>(to_number(left[i]) + to_number(right[i]));
}

template <typename T>
MLOMAE_VECTOR_LOOPS void accumulate_row(double* __restrict sums, const T* __restrict row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += to_number(row[i]);
}

template <typename T>
MLOMAE_VECTOR_LOOPS void store_sums(T* __restrict out, const double* __restrict sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = from_number<T>(static_cast<ComputeT<T>>(sums[i]));
}

// Below this many numbers a second thread costs more than it saves.
constexpr int64_t kNumbersPerThread = 16384;

// The least count of items of `numbers` numbers each that is worth a thread.
inline int64_t thread_grain(int64_t numbers) {
  return std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers));
}

}  // namespace mlomae
