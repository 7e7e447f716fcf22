// Block products and butterflies of the packed projection, in two shapes:
//
//   tile   NV vectors of tokens side by side, memory [feature][token]: broadcast one weight, multiply NV token vectors.
//          Nothing is shuffled and every weight is used NV * kLanes times.
//   rows   up to 4 tokens, memory [token][feature]: features in lanes, one weight vector used once per token. For batches
//          too small to fill lanes with tokens; the weights stream through once.
//
// Word: float for fp32 weights, int32_t (a pair of 16-bit inputs) for fixed point; a block has `steps` words of input.
#pragma once
#include "hadamard_steps.h"
#include "packed/lookup/format.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

// What differs between fp32 and fixed point: the accumulator, one step, and the way back to float.
struct FloatStep {
  using Word = float;
  using Acc = F;
  static constexpr int kInputs = 1;
  NOGEMM_INLINE Acc none() { return zero(); }
  NOGEMM_INLINE Acc step(Acc acc, Acc w, Acc x) { return fma(w, x, acc); }
  NOGEMM_INLINE F finish(Acc acc, F) { return acc; }
};
struct FixedStep {
  using Word = int32_t;
  using Acc = I;
  static constexpr int kInputs = 2;
  NOGEMM_INLINE Acc none() { return set1(int32_t{0}); }
  NOGEMM_INLINE Acc step(Acc acc, Acc w, Acc x) { return dot_pairs(acc, w, x); }
  NOGEMM_INLINE F finish(Acc acc, F scale) { return to_float(acc) * scale; }
};

// Outputs per pass: enough independent sums to hide the latency of an FMA, few enough to stay in registers.
template <int NV>
inline constexpr int kTileOutputs = kRegisters == 32 ? (NV == 1 ? 16 : 8) : 4;

// out[o][token] = scale[o] * sum_i w[i][o] in[i][token]. The next block's weights follow in memory. They will be read a few
// outputs at a time, which no hardware foresees, so they are fetched meanwhile; 48 tokens hide the wait by themselves.
template <class S, int NV>
NOGEMM_INLINE void tile_product(const typename S::Word* w, const float* scale, int64_t steps, int64_t outputs,
                                const typename S::Word* in, float* out) {
  constexpr int NO = kTileOutputs<NV>, NT = NV * kLanes;
  const auto* next = reinterpret_cast<const char*>(w + steps * outputs);
  for (int64_t o = 0; o < outputs; o += NO) {
    if constexpr (NT <= 32)
      for (int64_t at = o * steps * 4; at < (o + NO) * steps * 4; at += 64) prefetch(next + at);
    typename S::Acc acc[NO][NV];
    NOGEMM_UNROLL
    for (int q = 0; q < NO; ++q) NOGEMM_UNROLL
    for (int v = 0; v < NV; ++v) acc[q][v] = S::none();
    for (int64_t i = 0; i < steps; ++i) {
      typename S::Acc x[NV];
      NOGEMM_UNROLL
      for (int v = 0; v < NV; ++v) x[v] = load(in + i * NT + v * kLanes);
      const typename S::Word* wi = w + i * outputs + o;
      NOGEMM_UNROLL
      for (int q = 0; q < NO; ++q) {
        const typename S::Acc wq = set1(wi[q]);
        NOGEMM_UNROLL
        for (int v = 0; v < NV; ++v) acc[q][v] = S::step(acc[q][v], wq, x[v]);
      }
    }
    NOGEMM_UNROLL
    for (int q = 0; q < NO; ++q) NOGEMM_UNROLL
    for (int v = 0; v < NV; ++v) store(out + (o + q) * NT + v * kLanes, S::finish(acc[q][v], set1(scale[o + q])));
  }
}

template <class S, int NTOK, int NV>
NOGEMM_INLINE void rows_pass(const typename S::Word* w, const float* scale, int64_t steps, int64_t outputs,
                             const typename S::Word* in, int64_t in_stride, float* out, int64_t out_stride) {
  typename S::Acc acc[NTOK][NV];
  NOGEMM_UNROLL
  for (int n = 0; n < NTOK; ++n) NOGEMM_UNROLL
  for (int v = 0; v < NV; ++v) acc[n][v] = S::none();
  for (int64_t i = 0; i < steps; ++i) {
    typename S::Acc wi[NV];
    NOGEMM_UNROLL
    for (int v = 0; v < NV; ++v) wi[v] = load(w + i * outputs + v * kLanes);
    NOGEMM_UNROLL
    for (int n = 0; n < NTOK; ++n) {
      const typename S::Acc x = set1(in[n * in_stride + i]);
      NOGEMM_UNROLL
      for (int v = 0; v < NV; ++v) acc[n][v] = S::step(acc[n][v], wi[v], x);
    }
  }
  NOGEMM_UNROLL
  for (int n = 0; n < NTOK; ++n) NOGEMM_UNROLL
  for (int v = 0; v < NV; ++v) store(out + n * out_stride + v * kLanes, S::finish(acc[n][v], load(scale + v * kLanes)));
}

// out[token][o] = scale[o] * sum_i w[i][o] in[token][i]
template <class S, int NTOK>
NOGEMM_INLINE void rows_product(const typename S::Word* w, const float* scale, int64_t steps, int64_t outputs,
                                const typename S::Word* in, int64_t in_stride, float* out, int64_t out_stride) {
  constexpr int NV = kRegisters == 32 ? 4 : 8 / NTOK;  // one token: 64 outputs, weights are read as they lie
  int64_t o = 0;
  for (; o + NV * kLanes <= outputs; o += NV * kLanes)
    rows_pass<S, NTOK, NV>(w + o, scale + o, steps, outputs, in, in_stride, out + o, out_stride);
  for (; o < outputs; o += kLanes)
    rows_pass<S, NTOK, 1>(w + o, scale + o, steps, outputs, in, in_stride, out + o, out_stride);
}

// LEVELS butterfly levels over 2^LEVELS runs of `span` floats, in registers; `groups` such sets behind each other.
// With MAX, largest[v] collects the magnitude bits of the results (v = vector position modulo NV).
template <int LEVELS, int NV, bool MAX>
NOGEMM_INLINE void butterfly_pass(float* x, int64_t groups, int64_t span, I* largest) {
  constexpr int R = 1 << LEVELS;
  for (int64_t g = 0; g < groups; ++g) {
    float* base = x + g * span * R;
    for (int64_t at = 0; at < span; at += NV * kLanes) {
      for (int v = 0; v < NV; ++v) {
        float* p = base + at + v * kLanes;
        F a[R];
        NOGEMM_UNROLL
        for (int i = 0; i < R; ++i) a[i] = load(p + i * span);
        NOGEMM_UNROLL
        for (int half = 1; half < R; half *= 2) NOGEMM_UNROLL
        for (int i = 0; i < R; ++i)
          if (!(i & half)) {
            const F sum = a[i] + a[i + half], difference = a[i] - a[i + half];
            a[i] = sum;
            a[i + half] = difference;
          }
        if constexpr (LEVELS > 0) NOGEMM_UNROLL
        for (int i = 0; i < R; ++i) store(p + i * span, a[i]);
        if constexpr (MAX) NOGEMM_UNROLL
        for (int i = 0; i < R; ++i) largest[v] = max(largest[v], magnitude(a[i]));
      }
    }
  }
}

template <int NV, bool MAX>
NOGEMM_INLINE void butterfly_levels(int levels, float* x, int64_t groups, int64_t span, I* largest) {
  if (levels == 0) butterfly_pass<0, NV, MAX>(x, groups, span, largest);
  if (levels == 1) butterfly_pass<1, NV, MAX>(x, groups, span, largest);
  if (levels == 2) butterfly_pass<2, NV, MAX>(x, groups, span, largest);
  if (levels == 3) butterfly_pass<3, NV, MAX>(x, groups, span, largest);
  if constexpr (kRegisters == 32)
    if (levels == 4) butterfly_pass<4, NV, MAX>(x, groups, span, largest);
}

// The factor of order ORDER over as many runs of `span` floats. Its own function: a body of some hundred operations that
// six places share.
template <int ORDER, int NV, bool MAX>
[[gnu::noinline]] static void order_pass(float* x, int64_t span, I* largest) {
  for (int64_t at = 0; at < span; at += NV * kLanes)
    for (int v = 0; v < NV; ++v) {
      float* p = x + at + v * kLanes;
      F a[ORDER];
      NOGEMM_UNROLL
      for (int i = 0; i < ORDER; ++i) a[i] = load(p + i * span);
      order_step<ORDER>(a);
      NOGEMM_UNROLL
      for (int i = 0; i < ORDER; ++i) store(p + i * span, a[i]);
      if constexpr (MAX) NOGEMM_UNROLL
      for (int i = 0; i < ORDER; ++i) largest[v] = max(largest[v], magnitude(a[i]));
    }
}

// The Hadamard matrix of order `order` 2^j between whole blocks of `span` floats, unnormalised (its factor sits in the
// weights): the power of two first, so that the last pass sees the results.
template <int NV, bool MAX>
NOGEMM_INLINE void butterflies(float* x, int64_t blocks, int64_t order, int64_t span, I* largest) {
  constexpr int kMost = kRegisters == 32 ? 4 : 3;
  const int last = order == 1 ? kMost : 0;  // levels left for the last pass
  int left = 0;
  while ((order << left) < blocks) ++left;
  while (left > last) {
    const int levels = left - last < kMost ? left - last : kMost;
    blocks >>= levels;
    left -= levels;
    butterfly_levels<NV, false>(levels, x, blocks, span, largest);
    span <<= levels;
  }
  if (order == 12) return order_pass<12, NV, MAX>(x, span, largest);
  if (order == 20) return order_pass<20, NV, MAX>(x, span, largest);
  if (left > 0 || MAX) butterfly_levels<NV, MAX>(left, x, blocks >> left, span, largest);
}

// [feature][token] floats -> [feature / 2][token] pairs of 16-bit integers, each token in its own step.
template <int NV>
NOGEMM_INLINE void tile_quantise(const float* x, int64_t features, const F* inverse, int32_t* out) {
  constexpr int NT = NV * kLanes;
  for (int64_t f = 0; f < features; f += 2)
    for (int v = 0; v < NV; ++v) {
      const I lo = to_int(load(x + f * NT + v * kLanes) * inverse[v]);
      const I hi = to_int(load(x + (f + 1) * NT + v * kLanes) * inverse[v]);
      store(out + f / 2 * NT + v * kLanes, pack_pair(lo, hi));
    }
}

NOGEMM_INLINE void row_quantise(const float* x, int64_t features, float inverse, int16_t* out) {
  for (int64_t f = 0; f < features; f += kLanes) store_narrow(out + f, to_int(load(x + f) * set1(inverse)));
}

}  // namespace nogemm::NOGEMM_NS
