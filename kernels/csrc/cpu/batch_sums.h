// Sums of rows over the batch, such as the gradient of a position that all images share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "rows.h"

namespace mlomae {

// Sums that stay in the first two levels of cache while the batch runs past them.
constexpr int64_t kSumsPerBlock = 4096;

// The blocks that `count` output rows of `width` numbers are summed in. They depend on shapes only, so that
// results do not depend on the number of threads.
struct RowBlocks {
  RowBlocks(int64_t count, int64_t width)
      : rows(count), per_block(std::max<int64_t>(1, kSumsPerBlock / std::max<int64_t>(1, width))) {}

  int64_t count() const { return (rows + per_block - 1) / per_block; }
  int64_t begin(int64_t block) const { return block * per_block; }
  int64_t end(int64_t block) const { return std::min(rows, begin(block) + per_block); }

  int64_t rows;
  int64_t per_block;
};

}  // namespace mlomae
