// Stable ascending selection of patches, one row (image) at a time.
//
// A score and its position are packed into one integer whose order is that of the stable sort: the score
// in the upper half, mapped so that unsigned order is numeric order, the position in the lower half. All
// keys of a row differ, so any sort of these integers gives the stable sort of scores.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../ops.h"

namespace mlomae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many scores a second thread costs more than it saves.
constexpr int64_t kScoresPerThread = 4096;

// Clearing and summing the histograms of a radix sort pays from about this many patches.
constexpr int64_t kRadixFrom = 32;

uint64_t sort_key(float score, int64_t position) {
  constexpr uint32_t kSign = 0x80000000u;
  uint32_t bits;
  if (score != score) {
    bits = std::numeric_limits<uint32_t>::max();  // NaN of either sign ranks last
  } else {
    score += 0.0f;  // -0.0 becomes 0.0
    std::memcpy(&bits, &score, sizeof bits);
    bits = (bits & kSign) ? ~bits : bits | kSign;
  }
  return (static_cast<uint64_t>(bits) << 32) | static_cast<uint64_t>(position);
}

// Radix sort by the score half, least significant byte first; `keys` start in order of position, which
// each pass keeps among equal bytes. `spare` has the size of `keys`.
void sort_by_score(std::vector<uint64_t>& keys, std::vector<uint64_t>& spare) {
  constexpr int kBytes = 4;
  std::array<std::array<uint32_t, 256>, kBytes> starts{};
  const auto byte_of = [](uint64_t key, int byte) { return (key >> (32 + 8 * byte)) & 0xFF; };
  for (const uint64_t key : keys) {
    for (int byte = 0; byte < kBytes; ++byte) ++starts[byte][byte_of(key, byte)];
  }
  for (int byte = 0; byte < kBytes; ++byte) {
    std::exclusive_scan(starts[byte].begin(), starts[byte].end(), starts[byte].begin(), 0u);
    for (const uint64_t key : keys) spare[starts[byte][byte_of(key, byte)]++] = key;
    keys.swap(spare);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_patches(Tensor scores, int64_t num_keep) {
  STD_TORCH_CHECK(scores.dim() == 2, "select_patches: scores: expected 2 dimensions");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float, "select_patches: scores: expected float32");
  const int64_t batch = scores.size(0);
  const int64_t patches = scores.size(1);
  STD_TORCH_CHECK(0 <= num_keep && num_keep <= patches, "select_patches: num_keep: expected 0 to L");
  STD_TORCH_CHECK(patches <= std::numeric_limits<uint32_t>::max(), "select_patches: too many patches");

  Tensor ids_keep = torch::stable::new_empty(scores, {batch, num_keep}, ScalarType::Long);
  Tensor ids_restore = torch::stable::new_empty(scores, {batch, patches}, ScalarType::Long);
  Tensor mask = torch::stable::new_empty(scores, {batch, patches}, ScalarType::Float);

  const float* score = scores.const_data_ptr<float>();
  const int64_t row_stride = scores.stride(0);
  const int64_t column_stride = scores.stride(1);
  int64_t* keep = ids_keep.mutable_data_ptr<int64_t>();
  int64_t* restore = ids_restore.mutable_data_ptr<int64_t>();
  float* removed = mask.mutable_data_ptr<float>();

  const int64_t grain = std::max<int64_t>(1, kScoresPerThread / std::max<int64_t>(1, patches));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(patches);
    std::vector<uint64_t> spare(patches);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < patches; ++column) {
        keys[column] = sort_key(score[row * row_stride + column * column_stride], column);
      }
      if (patches < kRadixFrom) {
        std::sort(keys.begin(), keys.end());
      } else {
        sort_by_score(keys, spare);
      }
      for (int64_t rank = 0; rank < patches; ++rank) {
        const int64_t position = static_cast<uint32_t>(keys[rank]);
        if (rank < num_keep) keep[row * num_keep + rank] = position;
        restore[row * patches + position] = rank;
        removed[row * patches + position] = rank < num_keep ? 0.0f : 1.0f;
      }
    }
  });
  return {ids_keep, ids_restore, mask};
}

}  // namespace mlomae
