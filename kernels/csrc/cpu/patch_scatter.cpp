// Puts kept tokens back in place, fills the gaps with the mask token, adds positions; and the gradients of
// that.

#include <algorithm>
#include <cstdint>
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
void scatter(const Tensor& output, const Tensor& latent, const Tensor& mask_token, const int64_t* ranks,
             const Tensor& decoder_pos_embed, const ScatterSizes& sizes) {
  const Rows<T> token(latent);
  const Rows<T> position(decoder_pos_embed);
  const T* mask = mask_token.const_data_ptr<T>();
  T* out = output.mutable_data_ptr<T>();
  const int64_t rows = 1 + sizes.patches;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / rows;
      const int64_t row = index % rows;
      const int64_t source = row == 0 ? 0 : 1 + ranks[image * sizes.patches + row - 1];
      const T* from = source <= sizes.kept ? token.at(image, source) : mask;
      add_rows(out + index * sizes.width, from, position.at(0, row), sizes.width);
    }
  };
  torch::stable::parallel_for(0, sizes.batch * rows, thread_grain(sizes.width), body);
}

// One pass over the gradient: copies the rows of kept tokens, and sums over the batch.
template <typename T>
void gather_gradients(const Tensor& d_latent, const Tensor& d_mask_token, const Tensor& d_pos,
                      const Tensor& grad, const int64_t* ranks, const ScatterSizes& sizes, bool need_pos) {
  const Rows<T> from(grad);
  T* latent = d_latent.mutable_data_ptr<T>();
  T* pos = need_pos ? d_pos.mutable_data_ptr<T>() : nullptr;
  const int64_t width = sizes.width;
  const RowBlocks blocks(1 + sizes.patches, width);
  // A block's share of the mask token's gradient; added up afterwards, in order of the blocks.
  std::vector<double> mask_sums(blocks.count() * width);
  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<double> kept(blocks.per_block * width);
    std::vector<double> removed(blocks.per_block * width);
    for (int64_t block = begin; block < end; ++block) {
      std::fill(kept.begin(), kept.end(), 0.0);
      std::fill(removed.begin(), removed.end(), 0.0);
      const int64_t first = blocks.begin(block);
      for (int64_t image = 0; image < sizes.batch; ++image) {
        for (int64_t row = first; row < blocks.end(block); ++row) {
          const int64_t target = row == 0 ? 0 : 1 + ranks[image * sizes.patches + row - 1];
          const T* values = from.at(image, row);
          if (target > sizes.kept) {
            accumulate_row(removed.data() + (row - first) * width, values, width);
            continue;
          }
          std::copy_n(values, width, latent + (image * (1 + sizes.kept) + target) * width);
          if (need_pos) accumulate_row(kept.data() + (row - first) * width, values, width);
        }
      }
      for (int64_t row = first; row < blocks.end(block); ++row) {
        double* row_removed = removed.data() + (row - first) * width;
        accumulate_row(mask_sums.data() + block * width, row_removed, width);
        if (!need_pos) continue;
        accumulate_row(row_removed, kept.data() + (row - first) * width, width);
        store_sums(pos + row * width, row_removed, width);
      }
    }
  };
  const int64_t grain = thread_grain(blocks.per_block * width * sizes.batch);
  torch::stable::parallel_for(0, blocks.count(), grain, body);
  for (int64_t block = 1; block < blocks.count(); ++block) {
    accumulate_row(mask_sums.data(), mask_sums.data() + block * width, width);
  }
  store_sums(d_mask_token.mutable_data_ptr<T>(), mask_sums.data(), width);
}

}  // namespace

Tensor patch_scatter(Tensor latent, Tensor mask_token, Tensor ids_restore, Tensor decoder_pos_embed) {
  const ScatterSizes sizes = check_patch_scatter(latent, mask_token, ids_restore, decoder_pos_embed);
  const Tensor ranks = checked_permutations("patch_scatter", "ids_restore", ids_restore);
  latent = with_rows(latent);
  mask_token = with_rows(mask_token);
  decoder_pos_embed = with_rows(decoder_pos_embed);
  Tensor output = new_output(latent, {sizes.batch, 1 + sizes.patches, sizes.width});
  for_dtype(latent.scalar_type(), [&](auto type) {
    scatter<decltype(type)>(output, latent, mask_token, ranks.const_data_ptr<int64_t>(), decoder_pos_embed,
                            sizes);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> patch_scatter_backward(Tensor grad, Tensor ids_restore, int64_t num_keep,
                                                          bool need_pos) {
  const ScatterSizes sizes = check_patch_scatter_backward(grad, ids_restore, num_keep);
  const Tensor ranks = checked_permutations("patch_scatter_backward", "ids_restore", ids_restore);
  grad = with_rows(grad);
  Tensor d_latent = new_output(grad, {sizes.batch, 1 + sizes.kept, sizes.width});
  Tensor d_mask_token = new_output(grad, {1, 1, sizes.width});
  Tensor d_pos = need_pos ? new_output(grad, {1, 1 + sizes.patches, sizes.width}) : new_output(grad, {0});
  for_dtype(grad.scalar_type(), [&](auto type) {
    gather_gradients<decltype(type)>(d_latent, d_mask_token, d_pos, grad, ranks.const_data_ptr<int64_t>(),
                                     sizes, need_pos);
  });
  return {d_latent, d_mask_token, d_pos};
}

}  // namespace mlomae
