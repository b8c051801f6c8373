#include "checks.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "errors.h"

namespace mlomae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;  // in an expected shape: every size will do

template <typename Sizes>
std::string in_brackets(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator;
    size == kAny ? text << "any" : text << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

void check_shape(const char* op, const char* argument, const Tensor& tensor,
                 std::initializer_list<int64_t> expected) {
  const auto got = tensor.sizes();
  bool same = got.size() == expected.size();
  for (size_t axis = 0; same && axis < got.size(); ++axis) {
    const int64_t size = expected.begin()[axis];
    same = size == kAny || size == got[axis];
  }
  if (!same) refuse(op, argument, "shape ", in_brackets(got), ", expected ", in_brackets(expected));
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType expected) {
  const ScalarType got = tensor.scalar_type();
  if (got != expected) refuse(op, argument, toString(got), ", expected ", toString(expected));
}

void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  const ScalarType got = tensor.scalar_type();
  const bool floating = got == ScalarType::Float || got == ScalarType::Double ||
                        got == ScalarType::BFloat16 || got == ScalarType::Half;
  if (!floating) refuse(op, argument, toString(got), ", expected Float, Double, BFloat16 or Half");
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& first) {
  const auto got = tensor.device();
  const auto expected = first.device();
  if (got != expected) refuse(op, argument, "another device, expected that of the first argument");
}

// A tensor that must have the dtype and the device of the first argument.
void check_alike(const char* op, const char* argument, const Tensor& tensor, const Tensor& first,
                 std::initializer_list<int64_t> shape) {
  check_device(op, argument, tensor, first);
  check_dtype(op, argument, tensor, first.scalar_type());
  check_shape(op, argument, tensor, shape);
}

void check_ids(const char* op, const char* argument, const Tensor& ids, const Tensor& first,
               std::initializer_list<int64_t> shape) {
  check_device(op, argument, ids, first);
  check_dtype(op, argument, ids, ScalarType::Long);
  check_shape(op, argument, ids, shape);
}

void check_count(const char* op, const char* argument, int64_t got, int64_t low, int64_t high) {
  if (got < low || got > high) refuse(op, argument, got, ", expected ", low, " to ", high);
}

}  // namespace

GatherSizes check_patch_gather(const Tensor& tokens, const std::optional<Tensor>& pos_embed,
                               const Tensor& ids_keep, const std::optional<Tensor>& cls_token) {
  constexpr const char* op = "patch_gather";
  check_floating(op, "tokens", tokens);
  check_shape(op, "tokens", tokens, {kAny, kAny, kAny});
  const int64_t batch = tokens.size(0);
  const int64_t patches = tokens.size(1);
  const int64_t width = tokens.size(2);
  check_ids(op, "ids_keep", ids_keep, tokens, {batch, kAny});
  if (pos_embed) check_alike(op, "pos_embed", *pos_embed, tokens, {1, patches, width});
  if (cls_token) check_alike(op, "cls_token", *cls_token, tokens, {1, 1, width});
  return {batch, patches, ids_keep.size(1), width, cls_token ? 1 : 0};
}

GatherSizes check_patch_gather_backward(const Tensor& grad, const Tensor& ids_keep, int64_t num_patches,
                                        bool has_cls) {
  constexpr const char* op = "patch_gather_backward";
  check_floating(op, "grad", grad);
  check_shape(op, "grad", grad, {kAny, kAny, kAny});
  check_ids(op, "ids_keep", ids_keep, grad, {grad.size(0), kAny});
  const int64_t prefix = has_cls ? 1 : 0;
  const int64_t kept = ids_keep.size(1);
  check_shape(op, "grad", grad, {grad.size(0), prefix + kept, grad.size(2)});
  check_count(op, "num_patches", num_patches, 0, std::numeric_limits<int32_t>::max());
  return {grad.size(0), num_patches, kept, grad.size(2), prefix};
}

ScatterSizes check_patch_scatter(const Tensor& latent, const Tensor& mask_token, const Tensor& ids_restore,
                                 const Tensor& decoder_pos_embed) {
  constexpr const char* op = "patch_scatter";
  check_floating(op, "latent", latent);
  check_shape(op, "latent", latent, {kAny, kAny, kAny});
  const int64_t batch = latent.size(0);
  const int64_t width = latent.size(2);
  check_ids(op, "ids_restore", ids_restore, latent, {batch, kAny});
  const int64_t patches = ids_restore.size(1);
  check_count(op, "latent", latent.size(1), 1, 1 + patches);
  check_alike(op, "mask_token", mask_token, latent, {1, 1, width});
  check_alike(op, "decoder_pos_embed", decoder_pos_embed, latent, {1, 1 + patches, width});
  return {batch, patches, latent.size(1) - 1, width};
}

ScatterSizes check_patch_scatter_backward(const Tensor& grad, const Tensor& ids_restore, int64_t num_keep) {
  constexpr const char* op = "patch_scatter_backward";
  check_floating(op, "grad", grad);
  check_shape(op, "grad", grad, {kAny, kAny, kAny});
  check_ids(op, "ids_restore", ids_restore, grad, {grad.size(0), kAny});
  const int64_t patches = ids_restore.size(1);
  check_shape(op, "grad", grad, {grad.size(0), 1 + patches, grad.size(2)});
  check_count(op, "num_keep", num_keep, 0, patches);
  return {grad.size(0), patches, num_keep, grad.size(2)};
}

ScalarType loss_dtype(const Tensor& pred) {
  return pred.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_per_patch(const char* op, const char* argument, const Tensor& tensor, const LossSizes& sizes,
                     const Tensor& pred) {
  check_device(op, argument, tensor, pred);
  check_dtype(op, argument, tensor, loss_dtype(pred));
  check_shape(op, argument, tensor, {sizes.batch, sizes.predicted});
}

LossSizes check_masked_patch_loss(const char* op, const Tensor& pred, const Tensor& images,
                                  const Tensor& removed, const std::optional<Tensor>& weights,
                                  int64_t patch_size, bool norm_pix) {
  check_floating(op, "pred", pred);
  check_device(op, "images", images, pred);
  // Pixels stay in float32 when the network computes in 16 bits.
  const bool in_16_bits =
      pred.scalar_type() == ScalarType::BFloat16 || pred.scalar_type() == ScalarType::Half;
  if (!in_16_bits || images.scalar_type() != ScalarType::Float) {
    check_dtype(op, "images", images, pred.scalar_type());
  }
  check_shape(op, "images", images, {kAny, kAny, kAny, kAny});
  const int64_t batch = images.size(0);
  const int64_t channels = images.size(1);
  const int64_t height = images.size(2);
  const int64_t width = images.size(3);
  check_count(op, "patch_size", patch_size, 1, std::max<int64_t>(1, std::min(height, width)));
  if (height % patch_size || width % patch_size) {
    refuse(op, "images", height, " x ", width, " pixels, expected multiples of ", patch_size, " (patch_size)");
  }
  const int64_t columns = width / patch_size;
  const int64_t patches = height / patch_size * columns;
  const int64_t numbers = patch_size * patch_size * channels;
  if (norm_pix && numbers < 2) {
    refuse(op, "patch_size", patch_size, " with norm_pix, expected patches of 2 or more numbers");
  }
  check_device(op, "removed", removed, pred);
  const ScalarType kind = removed.scalar_type();
  if (kind != ScalarType::Float && kind != ScalarType::Long) {
    refuse(op, "removed", toString(kind), ", expected Float (a mask) or Long (positions)");
  }
  check_shape(op, "removed", removed, {batch, kind == ScalarType::Float ? patches : kAny});
  const int64_t predicted = removed.size(1);
  check_shape(op, "pred", pred, {batch, predicted, numbers});
  const LossSizes sizes{batch, predicted, patches, columns, channels, patch_size, numbers};
  if (weights) check_per_patch(op, "weights", *weights, sizes, pred);
  return sizes;
}

void check_select_patches(const Tensor& scores, int64_t num_keep) {
  constexpr const char* op = "select_patches";
  check_floating(op, "scores", scores);
  check_shape(op, "scores", scores, {kAny, kAny});
  check_count(op, "num_keep", num_keep, 1, scores.size(1));
  check_count(op, "scores", scores.size(1), 1, std::numeric_limits<uint32_t>::max());
}

}  // namespace mlomae
