// Stable ascending selection of patches, one row (image) at a time.
//
// A score and its position become one key whose order is that of the stable sort: the score first, mapped to
// an integer whose unsigned order is numeric order, then the position. All keys of a row differ, so any sort
// of them gives the stable sort of scores. Scores of up to 32 bits and the position fit into one integer.

#include <algorithm>
#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../checks.h"
#include "../ops.h"
#include "rows.h"

namespace mlomae {
namespace {

using torch::headeronly::ScalarType;

// Below this many scores a second thread costs more than it saves.
constexpr int64_t kScoresPerThread = 4096;

// Clearing and summing the histograms of a radix sort pays from about this many patches.
constexpr int64_t kRadixFrom = 32;

using NarrowKey = uint64_t;

struct WideKey {
  uint64_t score;
  int64_t position;
  auto operator<=>(const WideKey&) const = default;
};

template <typename Bits, typename Score>
Bits ordered_bits(Score score) {
  static_assert(sizeof(Bits) == sizeof(Score));
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  if (score != score) return std::numeric_limits<Bits>::max();  // NaN of either sign ranks last
  score += Score{0};                                            // -0.0 becomes 0.0
  Bits bits;
  std::memcpy(&bits, &score, sizeof bits);
  return (bits & kSign) ? ~bits : bits | kSign;
}

NarrowKey make_key(float score, int64_t position) {
  return static_cast<NarrowKey>(ordered_bits<uint32_t>(score)) << 32 | static_cast<NarrowKey>(position);
}

WideKey make_key(double score, int64_t position) { return {ordered_bits<uint64_t>(score), position}; }

int64_t position_of(NarrowKey key) { return static_cast<uint32_t>(key); }

int64_t position_of(const WideKey& key) { return key.position; }

// Radix sort by the score half, least significant byte first; `keys` start in order of position, which
// each pass keeps among equal bytes. `spare` has the size of `keys`.
void radix_sort(std::vector<NarrowKey>& keys, std::vector<NarrowKey>& spare) {
  constexpr int kBytes = 4;
  std::array<std::array<uint32_t, 256>, kBytes> starts{};
  const auto byte_of = [](NarrowKey key, int byte) { return (key >> (32 + 8 * byte)) & 0xFF; };
  for (const NarrowKey key : keys) {
    for (int byte = 0; byte < kBytes; ++byte) ++starts[byte][byte_of(key, byte)];
  }
  for (int byte = 0; byte < kBytes; ++byte) {
    std::exclusive_scan(starts[byte].begin(), starts[byte].end(), starts[byte].begin(), 0u);
    for (const NarrowKey key : keys) spare[starts[byte][byte_of(key, byte)]++] = key;
    keys.swap(spare);
  }
}

template <typename Key>
void sort_keys(std::vector<Key>& keys, std::vector<Key>& spare) {
  if constexpr (std::is_same_v<Key, NarrowKey>) {
    if (static_cast<int64_t>(keys.size()) >= kRadixFrom) return radix_sort(keys, spare);
  }
  std::sort(keys.begin(), keys.end());
}

template <typename Score>
void select(const Tensor& scores, const Tensor& ids_keep, const Tensor& ids_restore, const Tensor& mask) {
  using Key = decltype(make_key(ComputeT<Score>{}, 0));
  const Table<Score> score(scores);
  const int64_t patches = scores.size(1);
  const int64_t num_keep = ids_keep.size(1);
  int64_t* keep = ids_keep.mutable_data_ptr<int64_t>();
  int64_t* restore = ids_restore.mutable_data_ptr<int64_t>();
  float* removed = mask.mutable_data_ptr<float>();
  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<Key> keys(patches);
    std::vector<Key> spare(patches);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < patches; ++column) {
        keys[column] = make_key(to_number(score.at(row, column)), column);
      }
      sort_keys(keys, spare);
      for (int64_t rank = 0; rank < patches; ++rank) {
        const int64_t position = position_of(keys[rank]);
        if (rank < num_keep) keep[row * num_keep + rank] = position;
        restore[row * patches + position] = rank;
        removed[row * patches + position] = rank < num_keep ? 0.0f : 1.0f;
      }
    }
  };
  const int64_t grain = std::max<int64_t>(1, kScoresPerThread / patches);
  torch::stable::parallel_for(0, scores.size(0), grain, body);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> select_patches(Tensor scores, int64_t num_keep) {
  check_select_patches(scores, num_keep);
  const int64_t batch = scores.size(0);
  const int64_t patches = scores.size(1);
  Tensor ids_keep = torch::stable::new_empty(scores, {batch, num_keep}, ScalarType::Long);
  Tensor ids_restore = torch::stable::new_empty(scores, {batch, patches}, ScalarType::Long);
  Tensor mask = torch::stable::new_empty(scores, {batch, patches}, ScalarType::Float);
  for_dtype(scores.scalar_type(),
            [&](auto type) { select<decltype(type)>(scores, ids_keep, ids_restore, mask); });
  return {ids_keep, ids_restore, mask};
}

}  // namespace mlomae
