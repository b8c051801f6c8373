// Picks the kept tokens, adds positions, prepends the class token; and the gradients of that.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../ops.h"
#include "batch_sums.h"
#include "ids.h"
#include "memory.h"
#include "rows.h"

namespace mlomae {
namespace {

template <typename T>
void gather(const Tensor& output, const Tensor& tokens, const std::optional<Tensor>& pos_embed,
            const int64_t* ids, const std::optional<Tensor>& cls_token, const GatherSizes& sizes) {
  const Rows<T> token(tokens);
  const std::optional<Rows<T>> position = pos_embed ? std::optional<Rows<T>>(*pos_embed) : std::nullopt;
  const T* cls = cls_token ? cls_token->const_data_ptr<T>() : nullptr;
  T* out = output.mutable_data_ptr<T>();
  const int64_t rows = sizes.prefix + sizes.kept;
  torch::stable::parallel_for(
      0, sizes.batch * rows, thread_grain(sizes.width), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t image = index / rows;
          const int64_t rank = index % rows - sizes.prefix;
          T* to = out + index * sizes.width;
          if (rank < 0) {
            std::copy_n(cls, sizes.width, to);
            continue;
          }
          const int64_t id = ids[image * sizes.kept + rank];
          if (position) {
            add_rows(to, token.at(image, id), position->at(0, id), sizes.width);
          } else {
            std::copy_n(token.at(image, id), sizes.width, to);
          }
        }
      });
}

// For every patch of every image the ranks it was kept with, in ascending order: more than one where
// ids_keep repeats a patch.
class RanksOfPatches {
 public:
  RanksOfPatches(const int64_t* ids, const GatherSizes& sizes)
      : sizes_(sizes), first_(sizes.batch * sizes.patches, kNone), next_(sizes.batch * sizes.kept) {
    for (int64_t image = 0; image < sizes.batch; ++image) {
      for (int64_t rank = sizes.kept - 1; rank >= 0; --rank) {
        int64_t& first = first_[image * sizes.patches + ids[image * sizes.kept + rank]];
        next_[image * sizes.kept + rank] = first;
        first = rank;
      }
    }
  }

  static constexpr int64_t kNone = -1;
  int64_t first(int64_t image, int64_t patch) const { return first_[image * sizes_.patches + patch]; }
  int64_t next(int64_t image, int64_t rank) const { return next_[image * sizes_.kept + rank]; }

 private:
  GatherSizes sizes_;
  std::vector<int64_t> first_;
  std::vector<int64_t> next_;
};

template <typename T>
void scatter_gradients(const Tensor& d_tokens, const Rows<T>& grad, const RanksOfPatches& ranks,
                       const GatherSizes& sizes) {
  T* out = d_tokens.mutable_data_ptr<T>();
  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<double> sums(sizes.width);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / sizes.patches;
      const int64_t rank = ranks.first(image, index % sizes.patches);
      T* to = out + index * sizes.width;
      if (rank == RanksOfPatches::kNone) {
        std::fill_n(to, sizes.width, T(0));
      } else if (ranks.next(image, rank) == RanksOfPatches::kNone) {
        std::copy_n(grad.at(image, sizes.prefix + rank), sizes.width, to);
      } else {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t each = rank; each != RanksOfPatches::kNone; each = ranks.next(image, each)) {
          accumulate_row(sums.data(), grad.at(image, sizes.prefix + each), sizes.width);
        }
        store_sums(to, sums.data(), sizes.width);
      }
    }
  };
  torch::stable::parallel_for(0, sizes.batch * sizes.patches, thread_grain(sizes.width), body);
}

// Sums over the batch. Row 0 of `out` is the class token's if there is one.
template <typename T>
void sum_gradients(T* out_pos, T* out_cls, const Rows<T>& grad, const RanksOfPatches& ranks,
                   const GatherSizes& sizes) {
  const int64_t first_row = out_cls ? -1 : 0;
  const int64_t row_count = (out_pos ? sizes.patches : 0) - first_row;
  const RowBlocks blocks(row_count, sizes.width);
  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<double> sums(blocks.per_block * sizes.width);
    for (int64_t block = begin; block < end; ++block) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t image = 0; image < sizes.batch; ++image) {
        double* to = sums.data();
        for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row, to += sizes.width) {
          const int64_t patch = row + first_row;
          if (patch < 0) {
            accumulate_row(to, grad.at(image, 0), sizes.width);
            continue;
          }
          for (int64_t each = ranks.first(image, patch); each != RanksOfPatches::kNone;
               each = ranks.next(image, each)) {
            accumulate_row(to, grad.at(image, sizes.prefix + each), sizes.width);
          }
        }
      }
      const double* from = sums.data();
      for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row, from += sizes.width) {
        const int64_t patch = row + first_row;
        store_sums(patch < 0 ? out_cls : out_pos + patch * sizes.width, from, sizes.width);
      }
    }
  };
  const int64_t grain = thread_grain(blocks.per_block * sizes.width * sizes.batch);
  torch::stable::parallel_for(0, blocks.count(), grain, body);
}

}  // namespace

Tensor patch_gather(Tensor tokens, std::optional<Tensor> pos_embed, Tensor ids_keep,
                    std::optional<Tensor> cls_token) {
  const GatherSizes sizes = check_patch_gather(tokens, pos_embed, ids_keep, cls_token);
  const Tensor ids = checked_positions("patch_gather", "ids_keep", ids_keep, sizes.patches);
  tokens = with_rows(tokens);
  if (pos_embed) pos_embed = with_rows(*pos_embed);
  if (cls_token) cls_token = with_rows(*cls_token);
  Tensor output = new_output(tokens, {sizes.batch, sizes.prefix + sizes.kept, sizes.width});
  for_dtype(tokens.scalar_type(), [&](auto type) {
    gather<decltype(type)>(output, tokens, pos_embed, ids.const_data_ptr<int64_t>(), cls_token, sizes);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> patch_gather_backward(Tensor grad, Tensor ids_keep, int64_t num_patches,
                                                         bool has_cls, bool need_pos) {
  const GatherSizes sizes = check_patch_gather_backward(grad, ids_keep, num_patches, has_cls);
  const Tensor ids = checked_positions("patch_gather_backward", "ids_keep", ids_keep, sizes.patches);
  grad = with_rows(grad);
  Tensor d_tokens = new_output(grad, {sizes.batch, sizes.patches, sizes.width});
  Tensor d_pos = need_pos ? new_output(grad, {1, sizes.patches, sizes.width}) : new_output(grad, {0});
  Tensor d_cls = has_cls ? new_output(grad, {1, 1, sizes.width}) : new_output(grad, {0});
  const RanksOfPatches ranks(ids.const_data_ptr<int64_t>(), sizes);
  for_dtype(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Rows<T> rows(grad);
    scatter_gradients<T>(d_tokens, rows, ranks, sizes);
    sum_gradients<T>(need_pos ? d_pos.mutable_data_ptr<T>() : nullptr,
                     has_cls ? d_cls.mutable_data_ptr<T>() : nullptr, rows, ranks, sizes);
  });
  return {d_tokens, d_pos, d_cls};
}

}  // namespace mlomae
