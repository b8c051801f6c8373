#include "ids.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../errors.h"

namespace mlomae {

using torch::stable::Tensor;

Tensor checked_positions(const char* op, const char* argument, const Tensor& ids, int64_t patches) {
  Tensor block = torch::stable::contiguous(ids);
  const int64_t* begin = block.const_data_ptr<int64_t>();
  const int64_t* end = begin + block.numel();
  const auto outside = [patches](int64_t id) {
    return static_cast<uint64_t>(id) >= static_cast<uint64_t>(patches);
  };
  bool any = false;
  for (const int64_t* id = begin; id != end; ++id) any |= outside(*id);
  if (any) {
    refuse(op, argument, *std::find_if(begin, end, outside), ", expected 0 to ", patches - 1);
  }
  return block;
}

Tensor checked_permutations(const char* op, const char* argument, const Tensor& ids) {
  const int64_t patches = ids.size(1);
  Tensor block = checked_positions(op, argument, ids, patches);
  const int64_t* row = block.const_data_ptr<int64_t>();
  std::vector<uint8_t> seen(patches);
  for (int64_t image = 0; image < ids.size(0); ++image, row += patches) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t patch = 0; patch < patches; ++patch) {
      if (seen[row[patch]]) {
        refuse(op, argument, "repeated ranks in row ", image, ", expected each of 0 to ", patches - 1,
               " once");
      }
      seen[row[patch]] = 1;
    }
  }
  return block;
}

}  // namespace mlomae
