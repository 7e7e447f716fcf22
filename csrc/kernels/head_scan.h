// The rows of a vocabulary head that may hold the largest logit: estimates from codes, with a bound for each.
//
//     z[v] = shift + y8 . r8[v] + y4 . r4[v] + bias[v]      r8, r4: codes times a scale of the row
//     |logit[v] - z[v]| <= norm8 err8[v] + norm4 err4[v] + slack
//
// Codes lie as in packed/neurons/format.h: int8 for the leading coordinates, nibbles for the others. A token is in fixed
// point, two planes of bytes, so that its own rounding hardly counts. One pass keeps the rows whose upper bound reaches the
// best lower bound so far; the binding thins the lists once all parts are through.
#pragma once
#include "bundles.h"
#include "packed/head/scan.h"
#include "sketch.h"

namespace nogemm::NOGEMM_NS {

// A token in fixed point, x ~ scale * (254 high + low): two planes within +-127, because the products of bytes on x86
// without VNNI take no -128. Zeros behind the width. Returns the length of what rounding took off.
static float head_split(const float* x, int64_t width, int64_t padded, int8_t* planes, FixedToken* out) {
  float most = 0x1p-100f;
  for (int64_t i = 0; i < width; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  constexpr int32_t kPlanesMost = 254 * 127 + 126;
  const float scale = most / static_cast<float>(kPlanesMost);
  int32_t high_sum = 0, low_sum = 0;
  double lost = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float scaled = std::nearbyint(x[i] / scale), limit = static_cast<float>(kPlanesMost);
    const int32_t q = static_cast<int32_t>(scaled > limit ? limit : scaled < -limit ? -limit : scaled);
    const int32_t high = (q + (q < 0 ? -127 : 127)) / 254, low = q - 254 * high;
    planes[i] = static_cast<int8_t>(high);
    planes[padded + i] = static_cast<int8_t>(low);
    high_sum += high, low_sum += low;
    const double off = static_cast<double>(x[i]) - static_cast<double>(scale) * q;
    lost += off * off;
  }
  std::memset(planes + width, 0, static_cast<size_t>(padded - width));
  std::memset(planes + padded + width, 0, static_cast<size_t>(padded - width));
  *out = {planes, planes + padded, high_sum, low_sum, padded, scale};
  return static_cast<float>(std::sqrt(lost));
}

// The sums of a token's two planes with one group's codes, as floats: codes . (254 high + low) * scale.
template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void head_sums(const uint8_t* group, int64_t steps, const FixedToken* const* y, float* out) {
  alignas(64) int32_t sums[2 * TOKENS * kSketchRows];
  const int8_t* planes[2 * TOKENS];
  for (int t = 0; t < TOKENS; ++t) planes[2 * t] = y[t]->high, planes[2 * t + 1] = y[t]->low;
  sketch_sums<2 * TOKENS, NIBBLES>(group, steps, planes, sums);
  constexpr int32_t kOffset = NIBBLES ? 8 : kByteOffset;
  for (int t = 0; t < TOKENS; ++t) {
    const I high = set1(-kOffset * y[t]->high_sum), low = set1(-kOffset * y[t]->low_sum);
    const int32_t* own = sums + 2 * t * kSketchRows;
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      const F h = to_float(load(own + r) + high), l = to_float(load(own + kSketchRows + r) + low);
      store(out + t * kSketchRows + r, fma(h, set1(254.0f), l) * set1(y[t]->scale));
    }
  }
}

template <int TOKENS>
static void scan_group(const HeadCodes& w, int64_t group, HeadToken* const* tokens) {
  alignas(64) float eight[TOKENS * kSketchRows], four[TOKENS * kSketchRows];
  const FixedToken *y8[TOKENS], *y4[TOKENS];
  for (int t = 0; t < TOKENS; ++t) y8[t] = &tokens[t]->eight, y4[t] = &tokens[t]->four;
  head_sums<TOKENS, false>(w.eight + group * w.steps8 * 4 * kSketchRows, w.steps8, y8, eight);
  if (w.steps4 > 0) head_sums<TOKENS, true>(w.four + group * w.steps4 * 4 * kSketchRows, w.steps4, y4, four);
  const bf16* numbers = w.numbers + group * kHeadNumbers * kSketchRows;
  const int64_t first = group * kSketchRows;
  for (int t = 0; t < TOKENS; ++t) {
    HeadToken& own = *tokens[t];
    const F norm8 = set1(own.norm8), norm4 = set1(own.norm4), slack = set1(own.slack), shift = set1(own.shift);
    F best = set1(own.floor);
    uint64_t found = 0;
    alignas(64) float upper[kSketchRows];
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      F z = fma(load(eight + t * kSketchRows + r), load(numbers + r), shift);
      if (w.steps4 > 0) z = fma(load(four + t * kSketchRows + r), load(numbers + kSketchRows + r), z);
      if (w.bias != nullptr) z = z + load(w.bias + first + r);
      const F bound =
          fma(norm8, load(numbers + 2 * kSketchRows + r), fma(norm4, load(numbers + 3 * kSketchRows + r), slack));
      const F top = z + bound;
      best = max(z - bound, best);
      store(upper + r, top);
      // Against the floor before this group: rows that this group itself rules out are thinned later.
      const uint64_t bits = mask_bits(le(set1(own.floor), top));
      found |= bits << r;
    }
    alignas(64) float lanes[kLanes];
    store(lanes, best);
    for (int l = 0; l < kLanes; ++l) own.floor = lanes[l] > own.floor ? lanes[l] : own.floor;
    for (; found != 0; found &= found - 1) {
      const int r = __builtin_ctzll(found);
      if (first + r >= w.rows) break;
      own.index[own.count] = static_cast<int32_t>(first + r);
      own.upper[own.count++] = upper[r];
    }
  }
}

// Rows of groups [begin, end) for all tokens: each token's list, count and floor go on from where they are.
static void head_scan(const HeadCodes& w, int64_t begin, int64_t end, HeadToken* tokens, int64_t count) {
  for (int64_t g = begin; g < end; ++g) {
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) {
      HeadToken* const pair[2] = {tokens + t, tokens + t + 1};
      scan_group<2>(w, g, pair);
    }
    if (t < count) {
      HeadToken* const one[1] = {tokens + t};
      scan_group<1>(w, g, one);
    }
  }
}

// out[j] = <row begin + j, x> + bias: every row from begin to end. The sum's order is bundle_dots'.
template <class T>
static void head_rows(const BundleRows& rows, int64_t begin, int64_t end, const float* x, float* out) {
  for (int64_t j = begin; j < end; j += kRowsTogether) {
    int32_t index[kRowsTogether * 2];
    for (int r = 0; r < 2 * kRowsTogether; ++r)
      index[r] = static_cast<int32_t>(j + r < end ? j + r : end - 1);  // the second half is fetched ahead
    const int64_t count = end - j < kRowsTogether ? end - j : kRowsTogether;
    bundle_dots<T>(rows, index, 0, count, 2 * kRowsTogether, x, out + (j - begin));
  }
}

static constexpr nogemm::HeadKernels head_kernels() {
  nogemm::HeadKernels h{};
  h.split = head_split;
  h.scan = head_scan;
  h.dots[kF32] = bundle_dots<float>;
  h.dots[kBF16] = bundle_dots<bf16>;
  h.dots[kF16] = bundle_dots<fp16>;
  h.rows[kF32] = head_rows<float>;
  h.rows[kBF16] = head_rows<bf16>;
  h.rows[kF16] = head_rows<fp16>;
  return h;
}

}  // namespace nogemm::NOGEMM_NS
