// One block of threads per row; each thread moves packs of 16 bytes where rows are aligned to them, single
// numbers elsewhere. Sums over the batch are made by one thread per pack, in float64 and in order: no atomics,
// the same bits every time.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "moves.h"

namespace mlomae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPackBytes = 16;

// `count` numbers that are read and written at once.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

__device__ float wide(float x) { return x; }
__device__ double wide(double x) { return x; }
__device__ float wide(__half x) { return __half2float(x); }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds once, to nearest.
template <typename T>
__device__ T narrow(double x) {
  return static_cast<T>(x);
}
template <>
__device__ __half narrow<__half>(double x) {
  return __double2half(x);
}
template <>
__device__ __nv_bfloat16 narrow<__nv_bfloat16>(double x) {
  return __double2bfloat16(x);
}

template <typename T>
__device__ T sum_of(T a, T b) {
  // The float32 sum of two 16-bit numbers, and of two float32, rounded to T.
  return narrow<T>(static_cast<double>(wide(a) + wide(b)));
}

template <typename T, int count>
struct View {
  using P = Pack<T, count>;
  __device__ static const P* at(const Rows& rows, int64_t image, int64_t row) {
    return reinterpret_cast<const P*>(static_cast<const T*>(rows.data) + image * rows.batch_stride +
                                      row * rows.row_stride);
  }
  __device__ static P* at(void* data, int64_t row, int64_t packs_per_row) {
    return static_cast<P*>(data) + row * packs_per_row;
  }
  __device__ static P filled(float value) {
    P pack;
    for (int i = 0; i < count; ++i) pack.values[i] = narrow<T>(value);
    return pack;
  }
  __device__ static P add(P a, const P& b) {
    for (int i = 0; i < count; ++i) a.values[i] = sum_of(a.values[i], b.values[i]);
    return a;
  }
  __device__ static void accumulate(double* sums, const P& pack) {
    for (int i = 0; i < count; ++i) sums[i] += static_cast<double>(wide(pack.values[i]));
  }
  __device__ static P rounded(const double* sums) {
    P pack;
    for (int i = 0; i < count; ++i) pack.values[i] = narrow<T>(sums[i]);
    return pack;
  }
};

template <typename T, int count>
__global__ void gather_kernel(void* out, Rows tokens, Rows position, const int64_t* ids, Rows cls,
                              Sizes sizes, int64_t packs) {
  using V = View<T, count>;
  const int64_t rows = sizes.prefix + sizes.kept;
  const int64_t image = blockIdx.x / rows;
  const int64_t rank = blockIdx.x % rows - sizes.prefix;
  const int64_t id = rank < 0 ? 0 : ids[image * sizes.kept + rank];
  const bool found = id >= 0 && id < sizes.patches;
  auto* to = V::at(out, blockIdx.x, packs);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    auto pack = V::filled(NAN);
    if (rank < 0) {
      pack = V::at(cls, 0, 0)[i];
    } else if (found) {
      pack = V::at(tokens, image, id)[i];
      if (position.data) pack = V::add(pack, V::at(position, 0, id)[i]);
    }
    to[i] = pack;
  }
}

__global__ void slots_kernel(int32_t* slots, const int64_t* ids, Sizes sizes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= sizes.batch * sizes.kept) return;
  const int64_t id = ids[index];
  if (id < 0 || id >= sizes.patches) return;
  slots[index / sizes.kept * sizes.patches + id] = static_cast<int32_t>(index % sizes.kept);
}

template <typename T, int count>
__global__ void gather_backward_kernel(void* d_tokens, const int32_t* slots, Rows grad, Sizes sizes,
                                       int64_t packs) {
  using V = View<T, count>;
  const int32_t slot = slots[blockIdx.x];
  const int64_t image = blockIdx.x / sizes.patches;
  const auto* from = slot < 0 ? nullptr : V::at(grad, image, sizes.prefix + slot);
  auto* to = V::at(d_tokens, blockIdx.x, packs);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) to[i] = from ? from[i] : V::filled(0);
}

// Block 0 … L - 1: a position; block L: the class token.
template <typename T, int count>
__global__ void gather_sums_kernel(void* d_pos, void* d_cls, const int32_t* slots, Rows grad, Sizes sizes,
                                   int64_t packs) {
  using V = View<T, count>;
  const int64_t patch = blockIdx.x;
  const bool is_cls = patch == sizes.patches;
  if (is_cls ? !d_cls : !d_pos) return;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= packs) return;
  double sums[count] = {};
  for (int64_t image = 0; image < sizes.batch; ++image) {
    const int64_t slot = is_cls ? -sizes.prefix : slots[image * sizes.patches + patch];
    if (is_cls || slot >= 0) V::accumulate(sums, V::at(grad, image, sizes.prefix + slot)[i]);
  }
  (is_cls ? V::at(d_cls, 0, packs) : V::at(d_pos, patch, packs))[i] = V::rounded(sums);
}

template <typename T, int count>
__global__ void scatter_kernel(void* out, Rows latent, Rows mask_token, const int64_t* ranks, Rows position,
                               Sizes sizes, int64_t packs) {
  using V = View<T, count>;
  const int64_t rows = 1 + sizes.patches;
  const int64_t image = blockIdx.x / rows;
  const int64_t row = blockIdx.x % rows;
  const int64_t rank = row == 0 ? -1 : ranks[image * sizes.patches + row - 1];
  const bool found = rank < sizes.patches && (row == 0 || rank >= 0);
  const auto* from = rank < sizes.kept ? V::at(latent, image, 1 + rank) : V::at(mask_token, 0, 0);
  auto* to = V::at(out, blockIdx.x, packs);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    to[i] = found ? V::add(from[i], V::at(position, 0, row)[i]) : V::filled(NAN);
  }
}

template <typename T, int count>
__global__ void scatter_backward_kernel(void* d_latent, Rows grad, const int64_t* ranks, Sizes sizes,
                                        int64_t packs) {
  using V = View<T, count>;
  const int64_t rows = 1 + sizes.patches;
  const int64_t image = blockIdx.x / rows;
  const int64_t row = blockIdx.x % rows;
  const int64_t rank = row == 0 ? -1 : ranks[image * sizes.patches + row - 1];
  if (rank >= sizes.kept || (row > 0 && rank < 0)) return;
  const auto* from = V::at(grad, image, row);
  auto* to = V::at(d_latent, image * (1 + sizes.kept) + 1 + rank, packs);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) to[i] = from[i];
}

// Sums over the batch of one row: all images for its position, those without it for the mask token.
template <typename T, int count>
__global__ void scatter_sums_kernel(void* d_pos, double* partial, Rows grad, const int64_t* ranks,
                                    Sizes sizes, int64_t packs) {
  using V = View<T, count>;
  const int64_t row = blockIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (i >= packs) return;
  double all[count] = {};
  double masked[count] = {};
  for (int64_t image = 0; image < sizes.batch; ++image) {
    const bool is_masked = row > 0 && ranks[image * sizes.patches + row - 1] >= sizes.kept;
    if (!is_masked && !d_pos) continue;
    const auto pack = V::at(grad, image, row)[i];
    V::accumulate(all, pack);
    if (is_masked) V::accumulate(masked, pack);
  }
  for (int j = 0; j < count; ++j) partial[(row * packs + i) * count + j] = masked[j];
  if (d_pos) V::at(d_pos, row, packs)[i] = V::rounded(all);
}

template <typename T>
__global__ void mask_token_kernel(void* d_mask_token, const double* partial, Sizes sizes) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= sizes.width) return;
  double sum = 0;
  for (int64_t row = 0; row <= sizes.patches; ++row) sum += partial[row * sizes.width + column];
  static_cast<T*>(d_mask_token)[column] = narrow<T>(sum);
}

unsigned blocks_for(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

template <typename T>
bool fits_packs(const Rows& rows) {
  constexpr int64_t count = kPackBytes / sizeof(T);
  return reinterpret_cast<uintptr_t>(rows.data) % kPackBytes == 0 && rows.batch_stride % count == 0 &&
         rows.row_stride % count == 0;
}

// Calls body(T{}, count): count is how many numbers a thread moves at once.
template <typename Body, typename... All>
void dispatch(Kind kind, int64_t width, const Body& body, const All&... rows) {
  const auto typed = [&](auto type) {
    using T = decltype(type);
    constexpr int count = kPackBytes / sizeof(T);
    if (width % count == 0 && (fits_packs<T>(rows) && ...)) {
      body(type, std::integral_constant<int, count>{});
    } else {
      body(type, std::integral_constant<int, 1>{});
    }
  };
  switch (kind) {
    case Kind::kFloat: return typed(float{});
    case Kind::kDouble: return typed(double{});
    case Kind::kBFloat16: return typed(__nv_bfloat16{});
    case Kind::kHalf: return typed(__half{});
  }
}

}  // namespace

int gather(Kind kind, void* out, Rows tokens, Rows position, const int64_t* ids, Rows cls, Sizes sizes,
           void* stream) {
  const auto rows = static_cast<unsigned>(sizes.batch * (sizes.prefix + sizes.kept));
  const auto body = [&](auto type, auto count) {
    using T = decltype(type);
    gather_kernel<T, count><<<rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        out, tokens, position, ids, cls, sizes, sizes.width / count);
  };
  if (rows) dispatch(kind, sizes.width, body, tokens, position, cls);
  return cudaGetLastError();
}

int gather_backward(Kind kind, void* d_tokens, void* d_pos, void* d_cls, int32_t* slots, Rows grad,
                    const int64_t* ids, Sizes sizes, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t rows = sizes.batch * sizes.patches;
  if (rows) cudaMemsetAsync(slots, 0xFF, rows * sizeof(int32_t), queue);  // -1
  if (sizes.batch * sizes.kept) {
    slots_kernel<<<blocks_for(sizes.batch * sizes.kept), kThreads, 0, queue>>>(slots, ids, sizes);
  }
  const auto body = [&](auto type, auto count) {
    using T = decltype(type);
    const int64_t packs = sizes.width / count;
    if (rows) {
      gather_backward_kernel<T, count>
          <<<static_cast<unsigned>(rows), kThreads, 0, queue>>>(d_tokens, slots, grad, sizes, packs);
    }
    const dim3 grid(static_cast<unsigned>(sizes.patches + 1), blocks_for(packs));
    if (d_pos || d_cls) {
      gather_sums_kernel<T, count><<<grid, kThreads, 0, queue>>>(d_pos, d_cls, slots, grad, sizes, packs);
    }
  };
  if (sizes.width) dispatch(kind, sizes.width, body, grad);
  return cudaGetLastError();
}

int scatter(Kind kind, void* out, Rows latent, Rows mask_token, const int64_t* ranks, Rows position,
            Sizes sizes, void* stream) {
  const auto rows = static_cast<unsigned>(sizes.batch * (1 + sizes.patches));
  const auto body = [&](auto type, auto count) {
    using T = decltype(type);
    scatter_kernel<T, count><<<rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        out, latent, mask_token, ranks, position, sizes, sizes.width / count);
  };
  if (rows) dispatch(kind, sizes.width, body, latent, mask_token, position);
  return cudaGetLastError();
}

int scatter_backward(Kind kind, void* d_latent, void* d_mask_token, void* d_pos, double* partial, Rows grad,
                     const int64_t* ranks, Sizes sizes, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto rows = static_cast<unsigned>(sizes.batch * (1 + sizes.patches));
  const auto body = [&](auto type, auto count) {
    using T = decltype(type);
    const int64_t packs = sizes.width / count;
    if (rows) {
      scatter_backward_kernel<T, count>
          <<<rows, kThreads, 0, queue>>>(d_latent, grad, ranks, sizes, packs);
    }
    const dim3 grid(static_cast<unsigned>(sizes.patches + 1), blocks_for(packs));
    scatter_sums_kernel<T, count><<<grid, kThreads, 0, queue>>>(d_pos, partial, grad, ranks, sizes, packs);
    mask_token_kernel<T>
        <<<blocks_for(sizes.width), kThreads, 0, queue>>>(d_mask_token, partial, sizes);
  };
  if (sizes.width) dispatch(kind, sizes.width, body, grad);
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace mlomae::cuda
