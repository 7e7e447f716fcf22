// Products with the blocks of a block-diagonal matrix, and their gradients.
//
//     y[n, o] = sum_i x[n, i] matrix[i, o]            apply: one block, a range of tokens
//     grad_weight[o, i] = sum_n grad[n, o] x[n, i]    weight_grad: one block, all tokens
//
// Outputs lie in the lanes, a tile of kTileTokens x kTileVectors accumulators stays in registers, and each
// step broadcasts one input per token. Every output is one chain of fma in increasing i, in whichever tile it
// falls: a token's result does not depend on the other tokens.
#pragma once
#include "vec.h"

namespace nogemm::NOGEMM_NS {

// Accumulators + one row of the matrix + one broadcast fit the registers.
inline constexpr int kTileTokens = kRegisters == 32 ? 6 : kLanes == 1 ? 2 : 6;
inline constexpr int kTileVectors = kRegisters == 32 ? 4 : kLanes == 1 ? 4 : 2;
// Inputs of a tile that are converted to float32 at a time.
inline constexpr int kInnerChunk = 64;
// Tokens whose x and grad stay in the first-level cache in weight_grad.
inline constexpr int kTokenChunk = 64;

// A view of `rows` x `count` values as float32: the tensor itself, or a converted copy of it.
template <int ROWS>
NOGEMM_INLINE const float* as_float(const float* x, int64_t, int64_t, float*) {
  return x;
}
template <int ROWS, class T>
NOGEMM_INLINE const float* as_float(const T* x, int64_t stride, int64_t count, float* copy) {
  for (int r = 0; r < ROWS; ++r) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(copy + r * kInnerChunk + i, load(x + r * stride + i));
    for (; i < count; ++i) copy[r * kInnerChunk + i] = to_float(x[r * stride + i]);
  }
  return copy;
}

template <class T>
inline constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;

// TOKENS x (VECTORS * kLanes) outputs; with PART the last vector has only `last` lanes.
template <int TOKENS, int VECTORS, bool PART, class T>
static void product_tile(const T* NOGEMM_RESTRICT x, int64_t x_stride, const float* NOGEMM_RESTRICT matrix,
                         int64_t outer, T* NOGEMM_RESTRICT y, int64_t y_stride, int64_t inner, int last) {
  F sum[TOKENS][VECTORS];
  for (auto& row : sum) {
    for (F& s : row) s = zero();
  }
  [[maybe_unused]] float copy[TOKENS * kInnerChunk];
  const int64_t chunk = kIsFloat<T> ? inner : kInnerChunk;
  for (int64_t begin = 0; begin < inner; begin += chunk) {
    const int64_t count = inner - begin < chunk ? inner - begin : chunk;
    const float* in = as_float<TOKENS>(x + begin, x_stride, count, copy);
    const int64_t in_stride = kIsFloat<T> ? x_stride : kInnerChunk;
    const float* row = matrix + begin * outer;
    for (int64_t i = 0; i < count; ++i, row += outer) {
      F w[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        w[v] = PART && v == VECTORS - 1 ? load_part(row + v * kLanes, last) : load(row + v * kLanes);
      }
      for (int t = 0; t < TOKENS; ++t) {
        const F b = set1(in[t * in_stride + i]);
        for (int v = 0; v < VECTORS; ++v) sum[t][v] = fma(b, w[v], sum[t][v]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int v = 0; v < VECTORS; ++v) {
      T* out = y + t * y_stride + v * kLanes;
      if (PART && v == VECTORS - 1) {
        store_part(out, sum[t][v], last);
      } else {
        store(out, sum[t][v]);
      }
    }
  }
}

// All tokens for one column tile.
template <int VECTORS, bool PART, class T>
static void product_columns(const T* x, int64_t x_stride, const float* matrix, int64_t outer, T* y, int64_t y_stride,
                            int64_t tokens, int64_t inner, int last) {
  int64_t n = 0;
  for (; n + kTileTokens <= tokens; n += kTileTokens) {
    product_tile<kTileTokens, VECTORS, PART>(x + n * x_stride, x_stride, matrix, outer, y + n * y_stride, y_stride,
                                             inner, last);
  }
  for (; n < tokens; ++n) {
    product_tile<1, VECTORS, PART>(x + n * x_stride, x_stride, matrix, outer, y + n * y_stride, y_stride, inner, last);
  }
}

template <class T>
static void product_apply(const void* x_void, int64_t x_stride, const float* matrix, void* y_void, int64_t y_stride,
                          int64_t tokens, int64_t inner, int64_t outer) {
  const T* x = static_cast<const T*>(x_void);
  T* y = static_cast<T*>(y_void);
  int64_t o = 0;
  for (; o + kTileVectors * kLanes <= outer; o += kTileVectors * kLanes) {
    product_columns<kTileVectors, false>(x, x_stride, matrix + o, outer, y + o, y_stride, tokens, inner, 0);
  }
  if constexpr (kTileVectors > 2) {
    if (o + 2 * kLanes <= outer) {
      product_columns<2, false>(x, x_stride, matrix + o, outer, y + o, y_stride, tokens, inner, 0);
      o += 2 * kLanes;
    }
  }
  for (; o < outer; o += kLanes) {
    const int last = static_cast<int>(outer - o < kLanes ? outer - o : kLanes);
    product_columns<1, true>(x, x_stride, matrix + o, outer, y + o, y_stride, tokens, inner, last);
  }
}

// Adds a tile of ROWS x (VECTORS * kLanes) of grad_weight over one chunk of tokens; grad holds ROWS values
// per token.
template <int ROWS, int VECTORS, bool PART, class T>
static void weight_tile(const float* NOGEMM_RESTRICT grad, int64_t grad_stride, const T* NOGEMM_RESTRICT x,
                        int64_t x_stride, float* NOGEMM_RESTRICT sums, int64_t inner, int64_t tokens, int last) {
  F sum[ROWS][VECTORS];
  for (auto& row : sum) {
    for (F& s : row) s = zero();
  }
  for (int64_t n = 0; n < tokens; ++n) {
    F in[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const T* p = x + n * x_stride + v * kLanes;
      in[v] = PART && v == VECTORS - 1 ? load_part(p, last) : load(p);
    }
    for (int r = 0; r < ROWS; ++r) {
      const F g = set1(grad[n * grad_stride + r]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = fma(g, in[v], sum[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      float* out = sums + r * inner + v * kLanes;
      if (PART && v == VECTORS - 1) {
        store_part(out, load_part(out, last) + sum[r][v], last);
      } else {
        store(out, load(out) + sum[r][v]);
      }
    }
  }
}

// ROWS rows of grad_weight over one chunk of tokens.
template <int ROWS, class T>
static void weight_rows(const T* grad, int64_t grad_stride, const T* x, int64_t x_stride, float* sums, int64_t tokens,
                        int64_t inner) {
  [[maybe_unused]] float copy[kTokenChunk * ROWS];
  const float* g;
  int64_t g_stride;
  if constexpr (kIsFloat<T>) {
    g = grad;
    g_stride = grad_stride;
  } else {
    for (int64_t n = 0; n < tokens; ++n) {
      for (int r = 0; r < ROWS; ++r) copy[n * ROWS + r] = to_float(grad[n * grad_stride + r]);
    }
    g = copy;
    g_stride = ROWS;
  }
  int64_t i = 0;
  for (; i + kTileVectors * kLanes <= inner; i += kTileVectors * kLanes) {
    weight_tile<ROWS, kTileVectors, false>(g, g_stride, x + i, x_stride, sums + i, inner, tokens, 0);
  }
  for (; i < inner; i += kLanes) {
    const int last = static_cast<int>(inner - i < kLanes ? inner - i : kLanes);
    weight_tile<ROWS, 1, true>(g, g_stride, x + i, x_stride, sums + i, inner, tokens, last);
  }
}

template <class T>
static void product_weight_grad(const void* grad_void, int64_t grad_stride, const void* x_void, int64_t x_stride,
                                void* grad_weight, float* scratch, int64_t tokens, int64_t outer, int64_t inner) {
  float* sums = scratch;
  if constexpr (kIsFloat<T>) sums = static_cast<float*>(grad_weight);
  for (int64_t i = 0; i < outer * inner; ++i) sums[i] = 0.0f;
  for (int64_t begin = 0; begin < tokens; begin += kTokenChunk) {
    const int64_t count = tokens - begin < kTokenChunk ? tokens - begin : kTokenChunk;
    const T* grad = static_cast<const T*>(grad_void) + begin * grad_stride;
    const T* x = static_cast<const T*>(x_void) + begin * x_stride;
    int64_t o = 0;
    for (; o + kTileTokens <= outer; o += kTileTokens) {
      weight_rows<kTileTokens>(grad + o, grad_stride, x, x_stride, sums + o * inner, count, inner);
    }
    for (; o < outer; ++o) weight_rows<1>(grad + o, grad_stride, x, x_stride, sums + o * inner, count, inner);
  }
  if constexpr (!kIsFloat<T>) {
    for (int64_t i = 0; i < outer * inner; ++i) from_float(sums[i], static_cast<T*>(grad_weight)[i]);
  }
}

template <class T>
static void product_transpose(const void* weight, float* matrix, int64_t outer, int64_t inner) {
  const T* w = static_cast<const T*>(weight);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) matrix[i * outer + o] = to_float(w[o * inner + i]);
  }
}

template <class T>
static void product_widen(const void* weight, float* matrix, int64_t count) {
  for (int64_t i = 0; i < count; ++i) matrix[i] = to_float(static_cast<const T*>(weight)[i]);
}

static constexpr BlockProductKernels block_product_kernels() {
  BlockProductKernels k{};
  k.transpose[kF32] = product_transpose<float>;
  k.transpose[kBF16] = product_transpose<bf16>;
  k.widen[kF32] = product_widen<float>;
  k.widen[kBF16] = product_widen<bf16>;
  k.apply[kF32] = product_apply<float>;
  k.apply[kBF16] = product_apply<bf16>;
  k.weight_grad[kF32] = product_weight_grad<float>;
  k.weight_grad[kBF16] = product_weight_grad<bf16>;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
