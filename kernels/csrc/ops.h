// The operators of the CPU; their schemas stand in registration.cpp, their meaning in checks.h's letters.

#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace mlomae {

using torch::stable::Tensor;

// scores floating [B, L] -> ids_keep int64 [B, num_keep], ids_restore int64 [B, L], mask float32 [B, L].
std::tuple<Tensor, Tensor, Tensor> select_patches(Tensor scores, int64_t num_keep);

// tokens [B, L, D], pos_embed [1, L, D], ids_keep int64 [B, K], cls_token [1, 1, D] -> [B, (1) + K, D].
Tensor patch_gather(Tensor tokens, std::optional<Tensor> pos_embed, Tensor ids_keep,
                    std::optional<Tensor> cls_token);

// grad [B, (1) + K, D] -> gradients of tokens, pos_embed and cls_token; [0] for one that is not asked for.
std::tuple<Tensor, Tensor, Tensor> patch_gather_backward(Tensor grad, Tensor ids_keep, int64_t num_patches,
                                                         bool has_cls, bool need_pos);

// latent [B, 1 + K, D], mask_token [1, 1, D], ids_restore int64 [B, L], decoder_pos_embed [1, 1 + L, D]
// -> [B, 1 + L, D].
Tensor patch_scatter(Tensor latent, Tensor mask_token, Tensor ids_restore, Tensor decoder_pos_embed);

// grad [B, 1 + L, D] -> gradients of latent, mask_token and decoder_pos_embed ([0] if not asked for).
std::tuple<Tensor, Tensor, Tensor> patch_scatter_backward(Tensor grad, Tensor ids_restore, int64_t num_keep,
                                                          bool need_pos);

// pred [B, N, P], images [B, C, H, W], removed float32 [B, L] (a mask, N = L) or int64 [B, N] (positions),
// weights [B, N] -> [B, N].
Tensor masked_patch_loss(Tensor pred, Tensor images, Tensor removed, std::optional<Tensor> weights,
                         int64_t patch_size, bool norm_pix);

// grad [B, N] -> gradients of pred and of weights ([0] without weights).
std::tuple<Tensor, Tensor> masked_patch_loss_backward(Tensor grad, Tensor pred, Tensor images, Tensor removed,
                                                      std::optional<Tensor> weights, int64_t patch_size,
                                                      bool norm_pix);

}  // namespace mlomae
