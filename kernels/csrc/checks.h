// Checks of arguments that hold on every device. Each names the operator and the argument, what it got and
// what it expected, and returns the sizes that the implementation works with.
//
// Letters in shapes: B batch, L patches of an image, K kept patches, D width, C channels,
// P = patch_size * patch_size * C numbers of one patch, N patches with a prediction.

#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace mlomae {

struct GatherSizes {
  int64_t batch;
  int64_t patches;
  int64_t kept;
  int64_t width;
  int64_t prefix;  // tokens before the patches: 1 with a class token, else 0
};

GatherSizes check_patch_gather(const torch::stable::Tensor& tokens,
                               const std::optional<torch::stable::Tensor>& pos_embed,
                               const torch::stable::Tensor& ids_keep,
                               const std::optional<torch::stable::Tensor>& cls_token);

GatherSizes check_patch_gather_backward(const torch::stable::Tensor& grad,
                                        const torch::stable::Tensor& ids_keep, int64_t num_patches,
                                        bool has_cls);

struct ScatterSizes {
  int64_t batch;
  int64_t patches;
  int64_t kept;
  int64_t width;
};

ScatterSizes check_patch_scatter(const torch::stable::Tensor& latent, const torch::stable::Tensor& mask_token,
                                 const torch::stable::Tensor& ids_restore,
                                 const torch::stable::Tensor& decoder_pos_embed);

ScatterSizes check_patch_scatter_backward(const torch::stable::Tensor& grad,
                                          const torch::stable::Tensor& ids_restore, int64_t num_keep);

struct LossSizes {
  int64_t batch;
  int64_t predicted;  // N
  int64_t patches;    // L
  int64_t columns;    // patches beside each other
  int64_t channels;
  int64_t patch_size;
  int64_t numbers;  // P
};

LossSizes check_masked_patch_loss(const char* op, const torch::stable::Tensor& pred,
                                  const torch::stable::Tensor& images, const torch::stable::Tensor& removed,
                                  const std::optional<torch::stable::Tensor>& weights, int64_t patch_size,
                                  bool norm_pix);

// The dtype of a loss: float64 for float64 predictions, else float32.
torch::headeronly::ScalarType loss_dtype(const torch::stable::Tensor& pred);

// Shape [batch, predicted] in the dtype of the loss, on the device of `pred`: weights and gradients.
void check_per_patch(const char* op, const char* argument, const torch::stable::Tensor& tensor,
                     const LossSizes& sizes, const torch::stable::Tensor& pred);

void check_select_patches(const torch::stable::Tensor& scores, int64_t num_keep);

}  // namespace mlomae
