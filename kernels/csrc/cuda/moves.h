// Launches of the kernels that move and sum rows on a GPU. Pointers and sizes only: no torch, so that nvcc
// compiles nothing of it.
//
// Letters: B batch, L patches, K kept patches, D width, C = 1 with a class token, else 0. Rows are D numbers
// side by side; strides are in numbers.

#pragma once

#include <cstdint>

namespace mlomae::cuda {

enum class Kind { kFloat, kDouble, kBFloat16, kHalf };

// A tensor [B, rows, D] or [1, rows, D] with D side by side.
struct Rows {
  const void* data;
  int64_t batch_stride;
  int64_t row_stride;
};

struct Sizes {
  int64_t batch;
  int64_t patches;  // L
  int64_t kept;     // K
  int64_t width;    // D
  int64_t prefix;   // C
};

// All return what cudaGetLastError says after the launches. `stream` is a cudaStream_t.

// position and cls may hold no data. ids [B, K].
int gather(Kind kind, void* out, Rows tokens, Rows position, const int64_t* ids, Rows cls, Sizes sizes,
           void* stream);

// slots is scratch [B, L]; d_pos and d_cls may be null.
int gather_backward(Kind kind, void* d_tokens, void* d_pos, void* d_cls, int32_t* slots, Rows grad,
                    const int64_t* ids, Sizes sizes, void* stream);

// ranks [B, L].
int scatter(Kind kind, void* out, Rows latent, Rows mask_token, const int64_t* ranks, Rows position,
            Sizes sizes, void* stream);

// partial is scratch [1 + L, D] in float64; d_pos may be null.
int scatter_backward(Kind kind, void* d_latent, void* d_mask_token, void* d_pos, double* partial, Rows grad,
                     const int64_t* ranks, Sizes sizes, void* stream);

// What an error returned above means.
const char* error_text(int error);

}  // namespace mlomae::cuda
