// The error of one predicted patch, and its gradient. The pixels of the patch go through a buffer that stays
// in the first level of cache, so that they and the prediction are read from memory once.

#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "vector_loops.h"

namespace mlomae {

// How the pixels of every patch lie in memory: rows of `side` neighbours.
struct PatchLayout {
  int64_t side;
  int64_t channels;
  int64_t channel_stride;
  int64_t row_stride;
  int64_t numbers() const { return side * side * channels; }
};

// The first pixel of a patch, and its prediction.
template <typename Pred, typename Pixel>
struct PredictedPatch {
  const Pixel* pixels;
  const Pred* guess;
};

// The map x -> (x - shift) * scale from pixels to what is to be predicted.
template <typename Number>
struct Normalisation {
  Number shift = 0;
  Number scale = 1;
  Number operator()(Number x) const { return (x - shift) * scale; }
};

// The sum of term(0) to term(count - 1) in a fixed order: kLanes independent sums, then a tree.
template <int64_t kLanes, typename Number, typename Term>
inline Number sum_in_lanes(int64_t count, const Term& term) {
  Number lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Many lanes hide the latency of an addition; in a small patch adding up the lanes would be most of the work.
template <typename Number, typename Term>
inline Number sum_of(int64_t count, const Term& term) {
  return count < 64 ? sum_in_lanes<4, Number>(count, term) : sum_in_lanes<16, Number>(count, term);
}

template <typename Pixel, typename Number>
inline void read_row(const Pixel* __restrict pixels, const PatchLayout& layout, Number* __restrict numbers) {
  if (layout.channels == 3) {  // the case that compilers turn into shuffles
    const Pixel* __restrict second = pixels + layout.channel_stride;
    const Pixel* __restrict third = second + layout.channel_stride;
    for (int64_t column = 0; column < layout.side; ++column) {
      numbers[3 * column] = to_number(pixels[column]);
      numbers[3 * column + 1] = to_number(second[column]);
      numbers[3 * column + 2] = to_number(third[column]);
    }
    return;
  }
  for (int64_t channel = 0; channel < layout.channels; ++channel, pixels += layout.channel_stride) {
    for (int64_t column = 0; column < layout.side; ++column) {
      numbers[column * layout.channels + channel] = to_number(pixels[column]);
    }
  }
}

inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// Fills `numbers` in the order (row, column, channel), the channel varying fastest. Meanwhile it asks for the
// next patch: its rows are short and far apart, which no processor foresees.
template <typename Pred, typename Pixel, typename Number>
inline void read_patch(const PredictedPatch<Pred, Pixel>& patch, const PredictedPatch<Pred, Pixel>& next,
                       const PatchLayout& layout, Number* numbers) {
  constexpr int64_t kLine = 64 / sizeof(Pred);  // a cache line's worth of the prediction
  const int64_t row_numbers = layout.side * layout.channels;
  if (layout.numbers() < kLine) {  // several patches share a line: nothing to ask for
    for (int64_t row = 0; row < layout.side; ++row) {
      read_row(patch.pixels + row * layout.row_stride, layout, numbers + row * row_numbers);
    }
    return;
  }
  for (int64_t row = 0; row < layout.side; ++row) {
    const Pixel* next_row = next.pixels + row * layout.row_stride;
    for (int64_t channel = 0; channel < layout.channels; ++channel) {
      prefetch(next_row + channel * layout.channel_stride);
    }
    for (int64_t i = 0; i < row_numbers; i += kLine) prefetch(next.guess + row * row_numbers + i);
    read_row(patch.pixels + row * layout.row_stride, layout, numbers + row * row_numbers);
  }
}

// To (x - mean) / sqrt(var + 1e-6), unbiased variance.
template <typename Number>
inline Normalisation<Number> normalisation_of(const Number* numbers, int64_t count) {
  const Number mean = sum_of<Number>(count, [=](int64_t i) { return numbers[i]; }) / count;
  const Number squares = sum_of<Number>(count, [=](int64_t i) {
    const Number centred = numbers[i] - mean;
    return centred * centred;
  });
  // Keeps the division finite on a patch of one colour (the constant of the MAE objective).
  constexpr Number kEpsilon = 1e-6;
  return {mean, 1 / std::sqrt(squares / (count - 1) + kEpsilon)};
}

template <typename Pred, typename Number>
inline Number mean_square(const Pred* guess, const Number* target, Normalisation<Number> normalised,
                          int64_t count) {
  const Number sum = sum_of<Number>(count, [=](int64_t i) {
    const Number difference = to_number(guess[i]) - normalised(target[i]);
    return difference * difference;
  });
  return sum / count;
}

// The mean squared error of a patch. `buffer` has room for its numbers; `next` is the patch that follows.
template <typename Pred, typename Pixel>
MLOMAE_VECTOR_LOOPS ComputeT<Pred> patch_error(const PredictedPatch<Pred, Pixel>& patch,
                                               const PredictedPatch<Pred, Pixel>& next,
                                               const PatchLayout& layout, bool norm_pix,
                                               ComputeT<Pred>* buffer) {
  using Number = ComputeT<Pred>;
  const int64_t count = layout.numbers();
  read_patch(patch, next, layout, buffer);
  const auto normalised = norm_pix ? normalisation_of(buffer, count) : Normalisation<Number>();
  return mean_square(patch.guess, buffer, normalised, count);
}

// Writes `factor` times the derivative of patch_error by the prediction; returns the error if asked for.
template <typename Pred, typename Pixel>
MLOMAE_VECTOR_LOOPS ComputeT<Pred> patch_error_gradient(const PredictedPatch<Pred, Pixel>& patch,
                                                        const PredictedPatch<Pred, Pixel>& next,
                                                        const PatchLayout& layout, bool norm_pix,
                                                        ComputeT<Pred>* __restrict buffer,
                                                        ComputeT<Pred> factor, Pred* __restrict gradient,
                                                        bool need_error) {
  using Number = ComputeT<Pred>;
  const int64_t count = layout.numbers();
  read_patch(patch, next, layout, buffer);
  const auto normalised = norm_pix ? normalisation_of(buffer, count) : Normalisation<Number>();
  const Pred* __restrict guess = patch.guess;
  const Number scale = factor * 2 / count;
  for (int64_t i = 0; i < count; ++i) {
    gradient[i] = from_number<Pred>(scale * (to_number(guess[i]) - normalised(buffer[i])));
  }
  return need_error ? mean_square(patch.guess, buffer, normalised, count) : Number(0);
}

}  // namespace mlomae
