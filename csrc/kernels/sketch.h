// Integer scores of all neurons: a sketch of their weights (packed/neurons/format.h) times tokens rounded to int8.
//
//     s[n, f] = float(sum_c q[n, c] code[f, c]) * (scale_x[n] * scale[f]) + bias[f]
//
// The integer sums are exact, so scores are the same on every instruction set, for any batch and any cut.
// Codes are stored unsigned (plus 128, or plus 8), as the dot product instruction wants them; sum q times
// that is taken off again. Where signed bytes are multiplied, 128 is taken off on the way in.
#pragma once
#include "activation.h"
#include "packed/neurons/format.h"
#include "vec_bytes.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kSketchTokens = 4;  // tokens per pass over a group of rows

// codes[0..width) = x rounded to int8, zero behind; returns the scale. sum: of the codes. A token that is not
// finite gives zeros.
static float sketch_token(const float* x, int64_t width, int64_t padded, int8_t* codes, int32_t* sum) {
  F largest = zero(), poison = zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const F v = load(x + i);
    largest = max(abs(v), largest);
    poison = fma(v, zero(), poison);
  }
  float top[kLanes], bad = hsum(poison), most = 0;
  store(top, largest);
  for (int l = 0; l < kLanes; ++l) most = top[l] > most ? top[l] : most;
  for (; i < width; ++i) {
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    bad += x[i] * 0.0f;
  }
  if (!(bad == 0.0f)) {
    std::memset(codes, 0, static_cast<size_t>(padded));
    *sum = 0;
    return 0.0f;
  }
  most = most > 0x1p-119f ? most : 0x1p-119f;  // below: neither the step nor its inverse is a normal number
  const float inverse = 127.0f / most;
  int32_t total = 0;
  for (i = 0; i < width; ++i) {
    const float rounded = std::nearbyint(x[i] * inverse);  // within +-127, or one rounding beyond
    const int32_t code = rounded > 127.0f ? 127 : rounded < -127.0f ? -127 : static_cast<int32_t>(rounded);
    codes[i] = static_cast<int8_t>(code);
    total += code;
  }
  std::memset(codes + width, 0, static_cast<size_t>(padded - width));
  *sum = total;
  return most / 127.0f;
}

template <int TOKENS>
static void sketch_group(const SketchRows& w, int64_t group, const SketchToken* tokens) {
  alignas(64) int32_t sums[TOKENS * kSketchRows];
  const int8_t* q[TOKENS];
  for (int t = 0; t < TOKENS; ++t) q[t] = tokens[t].codes;
  const uint8_t* codes = w.codes + group * w.steps * 4 * kSketchRows;
  if (w.nibbles) {
    sketch_sums<TOKENS, true>(codes, w.steps, q, sums);
  } else {
    sketch_sums<TOKENS, false>(codes, w.steps, q, sums);
  }
  const int64_t first = group * kSketchRows;
  for (int t = 0; t < TOKENS; ++t) {
    const I offset = set1((w.nibbles ? -8 : -kByteOffset) * tokens[t].sum);
    const F scale = set1(tokens[t].scale);
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      const F sum = to_float(load(sums + t * kSketchRows + r) + offset);
      store(tokens[t].scores + first + r, sum * (scale * load(w.scale + first + r)) + load(w.bias + first + r));
    }
  }
}

// Scores of the rows of groups [begin, end) for all tokens.
static void sketch_rows(const SketchRows& w, int64_t begin, int64_t end, const SketchToken* tokens, int64_t count) {
  for (int64_t g = begin; g < end; ++g) {
    int64_t t = 0;
    for (; t + kSketchTokens <= count; t += kSketchTokens) sketch_group<kSketchTokens>(w, g, tokens + t);
    for (; t < count; ++t) sketch_group<1>(w, g, tokens + t);
  }
}

// In place: scores to what is ranked.
static void sketch_keys(int64_t key, float* scores, int64_t count) {
  if (key == kKeySigned) return;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    store_part(scores + i, selection_key(key, load_part(scores + i, n)), n);
  }
}

}  // namespace nogemm::NOGEMM_NS
