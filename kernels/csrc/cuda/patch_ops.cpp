// Gather and scatter on a GPU: checks, outputs and the current stream around the launches of moves.h, and their
// registration under the schemas of registration.cpp.

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../checks.h"
#include "../errors.h"
#include "../layout.h"
#include "moves.h"

namespace mlomae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cuda::Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cuda::Kind::kFloat;
    case ScalarType::Double:
      return cuda::Kind::kDouble;
    case ScalarType::BFloat16:
      return cuda::Kind::kBFloat16;
    default:
      return cuda::Kind::kHalf;
  }
}

cuda::Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

cuda::Rows rows_of(const std::optional<Tensor>& tensor) {
  return tensor ? rows_of(*tensor) : cuda::Rows{nullptr, 0, 0};
}

void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* op, int error) {
  if (error != 0) refuse(op, "launch", cuda::error_text(error), ", expected success");
}

Tensor patch_gather(Tensor tokens, std::optional<Tensor> pos_embed, Tensor ids_keep,
                    std::optional<Tensor> cls_token) {
  const GatherSizes s = check_patch_gather(tokens, pos_embed, ids_keep, cls_token);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  tokens = with_rows(tokens);
  if (pos_embed) pos_embed = with_rows(*pos_embed);
  if (cls_token) cls_token = with_rows(*cls_token);
  const Tensor ids = torch::stable::contiguous(ids_keep);
  Tensor out = torch::stable::new_empty(tokens, {s.batch, s.prefix + s.kept, s.width});
  check_launch("patch_gather",
               cuda::gather(kind_of(tokens), out.mutable_data_ptr(), rows_of(tokens), rows_of(pos_embed),
                            ids.const_data_ptr<int64_t>(), rows_of(cls_token),
                            {s.batch, s.patches, s.kept, s.width, s.prefix}, stream_of(tokens)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> patch_gather_backward(Tensor grad, Tensor ids_keep, int64_t num_patches,
                                                         bool has_cls, bool need_pos) {
  const GatherSizes s = check_patch_gather_backward(grad, ids_keep, num_patches, has_cls);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  grad = with_rows(grad);
  const Tensor ids = torch::stable::contiguous(ids_keep);
  Tensor d_tokens = torch::stable::new_empty(grad, {s.batch, s.patches, s.width});
  Tensor d_pos = need_pos ? torch::stable::new_empty(grad, {1, s.patches, s.width})
                          : torch::stable::new_empty(grad, {0});
  Tensor d_cls =
      has_cls ? torch::stable::new_empty(grad, {1, 1, s.width}) : torch::stable::new_empty(grad, {0});
  Tensor slots = torch::stable::new_empty(grad, {s.batch, s.patches}, ScalarType::Int);
  check_launch("patch_gather_backward",
               cuda::gather_backward(kind_of(grad), d_tokens.mutable_data_ptr(),
                                     need_pos ? d_pos.mutable_data_ptr() : nullptr,
                                     has_cls ? d_cls.mutable_data_ptr() : nullptr,
                                     slots.mutable_data_ptr<int32_t>(), rows_of(grad),
                                     ids.const_data_ptr<int64_t>(),
                                     {s.batch, s.patches, s.kept, s.width, s.prefix}, stream_of(grad)));
  return {d_tokens, d_pos, d_cls};
}

Tensor patch_scatter(Tensor latent, Tensor mask_token, Tensor ids_restore, Tensor decoder_pos_embed) {
  const ScatterSizes s = check_patch_scatter(latent, mask_token, ids_restore, decoder_pos_embed);
  const torch::stable::accelerator::DeviceGuard guard(latent.get_device_index());
  latent = with_rows(latent);
  mask_token = with_rows(mask_token);
  decoder_pos_embed = with_rows(decoder_pos_embed);
  const Tensor ranks = torch::stable::contiguous(ids_restore);
  Tensor out = torch::stable::new_empty(latent, {s.batch, 1 + s.patches, s.width});
  check_launch("patch_scatter",
               cuda::scatter(kind_of(latent), out.mutable_data_ptr(), rows_of(latent), rows_of(mask_token),
                             ranks.const_data_ptr<int64_t>(), rows_of(decoder_pos_embed),
                             {s.batch, s.patches, s.kept, s.width, 1}, stream_of(latent)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> patch_scatter_backward(Tensor grad, Tensor ids_restore, int64_t num_keep,
                                                          bool need_pos) {
  const ScatterSizes s = check_patch_scatter_backward(grad, ids_restore, num_keep);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  grad = with_rows(grad);
  const Tensor ranks = torch::stable::contiguous(ids_restore);
  Tensor d_latent = torch::stable::new_empty(grad, {s.batch, 1 + s.kept, s.width});
  Tensor d_mask_token = torch::stable::new_empty(grad, {1, 1, s.width});
  Tensor d_pos = need_pos ? torch::stable::new_empty(grad, {1, 1 + s.patches, s.width})
                          : torch::stable::new_empty(grad, {0});
  Tensor partial = torch::stable::new_empty(grad, {1 + s.patches, s.width}, ScalarType::Double);
  check_launch("patch_scatter_backward",
               cuda::scatter_backward(kind_of(grad), d_latent.mutable_data_ptr(),
                                      d_mask_token.mutable_data_ptr(),
                                      need_pos ? d_pos.mutable_data_ptr() : nullptr,
                                      partial.mutable_data_ptr<double>(), rows_of(grad),
                                      ranks.const_data_ptr<int64_t>(),
                                      {s.batch, s.patches, s.kept, s.width, 1}, stream_of(grad)));
  return {d_latent, d_mask_token, d_pos};
}

}  // namespace
}  // namespace mlomae

STABLE_TORCH_LIBRARY_IMPL(mlomae_native, CUDA, m) {
  m.impl("patch_gather", TORCH_BOX(&mlomae::patch_gather));
  m.impl("patch_gather_backward", TORCH_BOX(&mlomae::patch_gather_backward));
  m.impl("patch_scatter", TORCH_BOX(&mlomae::patch_scatter));
  m.impl("patch_scatter_backward", TORCH_BOX(&mlomae::patch_scatter_backward));
}
