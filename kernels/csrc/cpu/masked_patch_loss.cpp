// The mean squared error of every removed patch, and its gradients.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../checks.h"
#include "../ops.h"
#include "ids.h"
#include "memory.h"
#include "patches.h"
#include "rows.h"

namespace mlomae {
namespace {

using torch::headeronly::ScalarType;

// Calls body(Pred{}, Pixel{}) with the types of the two tensors.
template <typename Body>
void for_dtypes(const Tensor& pred, const Tensor& images, const Body& body) {
  for_dtype(pred.scalar_type(), [&](auto type) {
    using Pred = decltype(type);
    if (images.scalar_type() == pred.scalar_type()) {
      body(Pred{}, Pred{});
    } else if constexpr (sizeof(Pred) == 2) {
      body(Pred{}, float{});
    }
  });
}

// Which patch every prediction belongs to: given by positions, or by a mask over all patches.
class RemovedPatches {
 public:
  RemovedPatches(const char* op, const Tensor& removed, const LossSizes& sizes) {
    if (removed.scalar_type() == ScalarType::Float) {
      mask_.emplace(removed);
    } else {
      checked_ = checked_positions(op, "removed", removed, sizes.patches);
      positions_.emplace(*checked_);
    }
  }

  static constexpr int64_t kKept = -1;

  // The patch that a prediction belongs to, or kKept.
  int64_t at(int64_t image, int64_t index) const {
    if (positions_) return positions_->at(image, index);
    return mask_->at(image, index) == 0 ? kKept : index;
  }

 private:
  std::optional<Tensor> checked_;
  std::optional<Table<float>> mask_;
  std::optional<Table<int64_t>> positions_;
};

// The predictions of removed patches, in order of their position: image * predicted + index.
template <typename Pred, typename Pixel>
class Predictions {
 public:
  struct Item {
    int64_t position;
    int64_t image;
    int64_t index;
    PredictedPatch<Pred, Pixel> patch;
  };

  Predictions(const Tensor& pred, const Tensor& images, const RemovedPatches& removed, const LossSizes& sizes)
      : guesses_(pred),
        planes_(images),
        removed_(removed),
        sizes_(sizes),
        layout_{sizes.patch_size, sizes.channels, images.stride(1), images.stride(2)} {}

  const PatchLayout& layout() const { return layout_; }

  // Calls visit(item, patch of the item after it) for every removed patch at begin to end - 1.
  template <typename Visit>
  void for_each(int64_t begin, int64_t end, const Visit& visit) const {
    Item item = first_removed(begin, end);
    while (item.position < end) {
      const Item after = first_removed(item.position + 1, end);
      visit(item, after.position < end ? after.patch : item.patch);
      item = after;
    }
  }

 private:
  Item first_removed(int64_t position, int64_t end) const {
    if (position >= end) return {end, 0, 0, {}};
    int64_t image = position / sizes_.predicted;
    int64_t index = position % sizes_.predicted;
    for (; position < end; ++position, ++index) {
      if (index == sizes_.predicted) {
        index = 0;
        ++image;
      }
      const int64_t patch = removed_.at(image, index);
      if (patch == RemovedPatches::kKept) continue;
      // Small patches spend much of their time here, and a division of 32 bits costs half of one of 64.
      const auto grid_row = static_cast<uint32_t>(patch) / static_cast<uint32_t>(sizes_.columns);
      const int64_t column = patch - grid_row * sizes_.columns;
      const Pixel* pixels =
          planes_.at(image, 0) + grid_row * layout_.side * layout_.row_stride + column * layout_.side;
      return {position, image, index, {pixels, guesses_.at(image, index)}};
    }
    return {end, 0, 0, {}};
  }

  Rows<Pred> guesses_;
  Rows<Pixel> planes_;
  const RemovedPatches& removed_;
  LossSizes sizes_;
  PatchLayout layout_;
};

template <typename Pred, typename Pixel>
void loss(const Tensor& output, const Predictions<Pred, Pixel>& predictions,
          const std::optional<Tensor>& weights, const LossSizes& sizes, bool norm_pix) {
  using Number = ComputeT<Pred>;
  const auto weight = weights ? std::optional<Table<Number>>(*weights) : std::nullopt;
  Number* out = output.mutable_data_ptr<Number>();
  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<Number> buffer(sizes.numbers);
    std::fill(out + begin, out + end, Number(0));
    predictions.for_each(begin, end, [&](const auto& item, const auto& next) {
      const Number error = patch_error(item.patch, next, predictions.layout(), norm_pix, buffer.data());
      out[item.position] = weight ? error * weight->at(item.image, item.index) : error;
    });
  };
  torch::stable::parallel_for(0, sizes.batch * sizes.predicted, thread_grain(sizes.numbers), body);
}

template <typename Pred, typename Pixel>
void loss_gradients(const Tensor& d_pred, const Tensor& d_weights, const Tensor& grad,
                    const Predictions<Pred, Pixel>& predictions, const std::optional<Tensor>& weights,
                    const LossSizes& sizes, bool norm_pix) {
  using Number = ComputeT<Pred>;
  const Table<Number> incoming(grad);
  const auto weight = weights ? std::optional<Table<Number>>(*weights) : std::nullopt;
  Pred* out = d_pred.mutable_data_ptr<Pred>();
  Number* out_weights = weights ? d_weights.mutable_data_ptr<Number>() : nullptr;
  const int64_t count = sizes.numbers;
  const auto body = [&](int64_t begin, int64_t end) {
    std::vector<Number> buffer(count);
    if (out_weights) std::fill(out_weights + begin, out_weights + end, Number(0));
    int64_t written = begin;
    predictions.for_each(begin, end, [&](const auto& item, const auto& next) {
      std::fill(out + written * count, out + item.position * count, Pred(0));
      written = item.position + 1;
      const Number above = incoming.at(item.image, item.index);
      const Number factor = weight ? above * weight->at(item.image, item.index) : above;
      const Number error =
          patch_error_gradient(item.patch, next, predictions.layout(), norm_pix, buffer.data(), factor,
                               out + item.position * count, out_weights != nullptr);
      if (out_weights) out_weights[item.position] = above * error;
    });
    std::fill(out + written * count, out + end * count, Pred(0));
  };
  torch::stable::parallel_for(0, sizes.batch * sizes.predicted, thread_grain(count), body);
}

}  // namespace

Tensor masked_patch_loss(Tensor pred, Tensor images, Tensor removed, std::optional<Tensor> weights,
                         int64_t patch_size, bool norm_pix) {
  constexpr const char* op = "masked_patch_loss";
  const LossSizes sizes = check_masked_patch_loss(op, pred, images, removed, weights, patch_size, norm_pix);
  const RemovedPatches patches(op, removed, sizes);
  pred = with_rows(pred);
  images = with_rows(images);
  Tensor output = new_output(pred, {sizes.batch, sizes.predicted}, loss_dtype(pred));
  for_dtypes(pred, images, [&](auto guess, auto pixel) {
    const Predictions<decltype(guess), decltype(pixel)> predictions(pred, images, patches, sizes);
    loss(output, predictions, weights, sizes, norm_pix);
  });
  return output;
}

std::tuple<Tensor, Tensor> masked_patch_loss_backward(Tensor grad, Tensor pred, Tensor images, Tensor removed,
                                                      std::optional<Tensor> weights, int64_t patch_size,
                                                      bool norm_pix) {
  constexpr const char* op = "masked_patch_loss_backward";
  const LossSizes sizes = check_masked_patch_loss(op, pred, images, removed, weights, patch_size, norm_pix);
  check_per_patch(op, "grad", grad, sizes, pred);
  const RemovedPatches patches(op, removed, sizes);
  pred = with_rows(pred);
  images = with_rows(images);
  Tensor d_pred = new_output(pred, {sizes.batch, sizes.predicted, sizes.numbers});
  Tensor d_weights = weights ? new_output(grad, {sizes.batch, sizes.predicted}) : new_output(grad, {0});
  for_dtypes(pred, images, [&](auto guess, auto pixel) {
    const Predictions<decltype(guess), decltype(pixel)> predictions(pred, images, patches, sizes);
    loss_gradients(d_pred, d_weights, grad, predictions, weights, sizes, norm_pix);
  });
  return {d_pred, d_weights};
}

}  // namespace mlomae
