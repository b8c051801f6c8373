// Numbers of every floating dtype, converted to and from what they are computed in: float32, or float64 for
// float64.

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace mlomae {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// What numbers of type T are computed in.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using ComputeT = typename Compute<T>::type;

// torch converts float16 by branches, which keep a loop from being vectorised. These choose by masks.
inline int32_t choose(bool condition, int32_t yes, int32_t no) {
  const int32_t mask = -static_cast<int32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// From the exponent of float16 to that of float32.
constexpr int32_t kBias = (127 - 15) << 23;

inline float float_from_half(uint16_t half) {
  constexpr int32_t kHalfExponent = 0x1F << 23;  // moved to where float32 has its own
  const int32_t sign = static_cast<int32_t>(static_cast<uint32_t>(half & 0x8000) << 16);
  const int32_t magnitude = (half & 0x7FFF) << 13;
  const int32_t exponent = magnitude & kHalfExponent;
  const int32_t special = choose(exponent == kHalfExponent, kBias, 0);  // infinity and NaN
  const int32_t normal = magnitude + kBias + special;
  // A subnormal number counts steps of 2^-24: behind the exponent of 2^-14 it reads 2^-14 too much.
  constexpr int32_t kLeast = kBias + (1 << 23);
  const int32_t subnormal =
      std::bit_cast<int32_t>(std::bit_cast<float>(magnitude + kLeast) - std::bit_cast<float>(kLeast));
  return std::bit_cast<float>(sign | choose(exponent == 0, subnormal, normal));
}

// Rounds to nearest, ties to even.
inline uint16_t half_from_float(float number) {
  constexpr int32_t kInfinity = 0xFF << 23;
  constexpr int32_t kLeastNormal = kBias + (1 << 23);
  constexpr int32_t kOverflow = 0x477FF000;  // 65520, halfway from the largest float16 to the next step
  const uint32_t bits = std::bit_cast<uint32_t>(number);
  const int32_t sign = static_cast<int32_t>(bits >> 16) & 0x8000;
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFF);
  const int32_t rounded = (magnitude - kBias + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  // At 0.5 the steps of float32 are those of a subnormal float16: the addition rounds to them.
  const int32_t subnormal = std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126 << 23);
  const int32_t finite = choose(magnitude < kLeastNormal, subnormal, rounded);
  const int32_t special = choose(magnitude > kInfinity, 0x7E00, 0x7C00);
  return static_cast<uint16_t>(sign | choose(magnitude < kOverflow, finite, special));
}

template <typename T>
inline ComputeT<T> to_number(T value) {
  if constexpr (std::is_same_v<T, Half>) {
    return float_from_half(value.x);
  } else {
    return static_cast<ComputeT<T>>(value);
  }
}

template <typename T>
inline T from_number(ComputeT<T> number) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half(half_from_float(number), Half::from_bits());
  } else {
    return static_cast<T>(number);
  }
}

}  // namespace mlomae
