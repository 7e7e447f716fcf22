// The rows of a vocabulary head that may hold the largest logit: estimates from codes, with a bound for each.
//
//     z[v] = shift + y8 . r8[v] + y4 . r4[v] + bias[v]      r8, r4: codes times a scale of the row
//     |logit[v] - z[v]| <= norm8 err8[v] + norm4 err4[v] + slack
//
// Codes lie as in packed/neurons/format.h: int8 for the leading coordinates, nibbles for the others. A token is in fixed
// point: two planes of bytes for the leading coordinates, one for the others, whose codes are the coarser ones anyway.
// scan keeps the rows whose upper bound reaches the best lower bound so far; the binding thins the lists once all parts
// are through. estimate writes all estimates, of a part of the coordinates if it is told so.
#pragma once
#include "bundles.h"
#include "packed/head/scan.h"
#include "sketch.h"

namespace nogemm::NOGEMM_NS {

// A token in fixed point, x ~ scale * (254 high + low), or scale * high: planes within +-127, because the products of
// bytes on x86 without VNNI take no -128. Zeros behind the width. Returns the length of what rounding took off.
template <bool TWO>
static float head_split(const float* x, int64_t width, int64_t padded, int8_t* planes, FixedToken* out) {
  float most = 0x1p-100f;
  for (int64_t i = 0; i < width; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
  constexpr int32_t kMost = TWO ? 254 * 127 + 126 : 127;
  const float scale = most / static_cast<float>(kMost);
  int32_t high_sum = 0, low_sum = 0;
  double lost = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float scaled = std::nearbyint(x[i] / scale), limit = static_cast<float>(kMost);
    const int32_t q = static_cast<int32_t>(scaled > limit ? limit : scaled < -limit ? -limit : scaled);
    const int32_t high = TWO ? (q + (q < 0 ? -127 : 127)) / 254 : q, low = TWO ? q - 254 * high : 0;
    planes[i] = static_cast<int8_t>(high);
    if (TWO) planes[padded + i] = static_cast<int8_t>(low);
    high_sum += high, low_sum += low;
    const double off = static_cast<double>(x[i]) - static_cast<double>(scale) * q;
    lost += off * off;
  }
  std::memset(planes + width, 0, static_cast<size_t>(padded - width));
  if (TWO) std::memset(planes + padded + width, 0, static_cast<size_t>(padded - width));
  *out = {planes, TWO ? planes + padded : nullptr, high_sum, low_sum, padded, scale};
  return static_cast<float>(std::sqrt(lost));
}

// out[t][r] = the token's coordinates times the codes of a group's rows, before the rows' scales.
template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void head_sums(const uint8_t* group, int64_t steps, const FixedToken* const* y, float* out) {
  constexpr int kPlanes = NIBBLES ? 1 : 2, kOffset = NIBBLES ? 8 : kByteOffset;
  alignas(64) int32_t sums[kPlanes * TOKENS * kSketchRows];
  const int8_t* planes[kPlanes * TOKENS];
  for (int t = 0; t < TOKENS; ++t) {
    planes[kPlanes * t] = y[t]->high;
    if constexpr (!NIBBLES) planes[2 * t + 1] = y[t]->low;
  }
  sketch_sums<kPlanes * TOKENS, NIBBLES>(group, steps, planes, sums);
  for (int t = 0; t < TOKENS; ++t) {
    const I high = set1(-kOffset * y[t]->high_sum), low = set1(-kOffset * y[t]->low_sum);
    const F scale = set1(y[t]->scale);
    const int32_t* own = sums + kPlanes * t * kSketchRows;
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      const F h = to_float(load(own + r) + high);
      if constexpr (NIBBLES) {
        store(out + t * kSketchRows + r, h * scale);
      } else {
        const F l = to_float(load(own + kSketchRows + r) + low);
        store(out + t * kSketchRows + r, fma(h, set1(254.0f), l) * scale);
      }
    }
  }
}

// z[r] += added[first + r]; rows behind the last one can never be chosen.
NOGEMM_INLINE void head_add(const float* added, int64_t first, int64_t rows, float* z) {
  if (first + kSketchRows <= rows) {
    for (int64_t r = 0; r < kSketchRows; r += kLanes) store(z + r, load(z + r) + load(added + first + r));
    return;
  }
  for (int64_t r = 0; r < kSketchRows; ++r)
    z[r] = first + r < rows ? z[r] + added[first + r] : -std::numeric_limits<float>::infinity();
}

// z[t][r]: the estimates of a group's rows for each token.
template <int TOKENS>
NOGEMM_INLINE void head_estimates(const HeadCodes& w, int64_t group, const HeadToken* tokens, float* z) {
  alignas(64) float four[TOKENS * kSketchRows] = {}, rest[TOKENS * kSketchRows] = {};
  const FixedToken *y8[TOKENS], *y4[TOKENS], *y_rest[TOKENS];
  for (int t = 0; t < TOKENS; ++t) y8[t] = &tokens[t].eight, y4[t] = &tokens[t].four, y_rest[t] = &tokens[t].rest;
  constexpr int kPair = TOKENS < 2 ? 1 : 2;  // two planes each: more tokens at once have no registers
  for (int t = 0; t < TOKENS; t += kPair)
    head_sums<kPair, false>(w.eight + group * w.steps8 * 4 * kSketchRows, w.steps8, y8 + t, z + t * kSketchRows);
  if (w.steps4 > 0) head_sums<TOKENS, true>(w.four + group * w.steps4 * 4 * kSketchRows, w.steps4, y4, four);
  if (w.steps_rest > 0)
    head_sums<TOKENS, true>(w.rest + group * w.steps_rest * 4 * kSketchRows, w.steps_rest, y_rest, rest);
  const bf16* numbers = w.numbers + group * kHeadNumbers * kSketchRows;
  for (int t = 0; t < TOKENS; ++t) {
    float* own = z + t * kSketchRows;
    const F shift = set1(tokens[t].shift);
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      const F others = load(four + t * kSketchRows + r) + load(rest + t * kSketchRows + r);
      const F leading = fma(load(own + r), load(numbers + r), shift);
      store(own + r, fma(others, load(numbers + kSketchRows + r), leading));
    }
    if (w.bias != nullptr) head_add(w.bias, group * kSketchRows, w.rows, own);
    if (tokens[t].noise != nullptr) head_add(tokens[t].noise, group * kSketchRows, w.rows, own);
  }
}

// Appends the rows of a group that are found.
NOGEMM_INLINE void head_append(HeadToken& own, uint64_t found, int64_t first, int64_t rows, const float* value) {
  for (; found != 0; found &= found - 1) {
    const int r = __builtin_ctzll(found);
    if (first + r >= rows) break;
    own.list[own.count++] = {value[r], static_cast<int32_t>(first + r)};
  }
}

NOGEMM_INLINE float head_floor(const float* floor) {
  float value;
  __atomic_load(floor, &value, __ATOMIC_RELAXED);
  return value;
}

// The floor ends as the largest of all bounds, whatever the threads do meanwhile.
NOGEMM_INLINE void raise_floor(float* floor, float bound) {
  float seen = head_floor(floor);
  while (bound > seen && !__atomic_compare_exchange(floor, &seen, &bound, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    continue;
}

template <int TOKENS>
static void scan_group(const HeadCodes& w, int64_t group, HeadToken* tokens) {
  alignas(64) float z[TOKENS * kSketchRows];
  head_estimates<TOKENS>(w, group, tokens, z);
  const bf16* error8 = w.numbers + (group * kHeadNumbers + 2) * kSketchRows;
  const bf16* error4 = error8 + kSketchRows;
  for (int t = 0; t < TOKENS; ++t) {
    HeadToken& own = tokens[t];
    const F norm8 = set1(own.norm8), norm4 = set1(own.norm4), slack = set1(own.slack);
    const F floor = set1(head_floor(own.floor));
    F best = floor;
    uint64_t found = 0;
    alignas(64) float upper[kSketchRows];
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      const F estimate = load(z + t * kSketchRows + r);
      const F bound = fma(norm8, load(error8 + r), fma(norm4, load(error4 + r), slack));
      const F top = estimate + bound;
      best = max(estimate - bound, best);
      store(upper + r, top);
      // Against the floor before this group: rows that this group itself rules out are thinned later.
      found |= static_cast<uint64_t>(mask_bits(le(floor, top))) << r;
    }
    if (mask_bits(lt(floor, best)) != 0) {
      alignas(64) float lanes[kLanes];
      store(lanes, best);
      for (int l = 0; l < kLanes; ++l) raise_floor(own.floor, lanes[l]);
    }
    head_append(own, found, group * kSketchRows, w.rows, upper);
  }
}

template <int TOKENS>
static void estimate_group(const HeadCodes& w, int64_t group, const HeadToken* tokens) {
  alignas(64) float z[TOKENS * kSketchRows];
  head_estimates<TOKENS>(w, group, tokens, z);
  const int64_t first = group * kSketchRows, left = w.rows - first < kSketchRows ? w.rows - first : kSketchRows;
  for (int t = 0; t < TOKENS; ++t)
    std::memcpy(tokens[t].estimates + first, z + t * kSketchRows, static_cast<size_t>(left) * sizeof(float));
}

// Groups [begin, end) for all tokens, some at a time.
template <class Some, class One>
NOGEMM_INLINE void head_groups(int64_t begin, int64_t end, int64_t count, Some some, One one) {
  for (int64_t g = begin; g < end; ++g) {
    int64_t t = 0;
    for (; t + kSketchTokens <= count; t += kSketchTokens) some(g, t);
    for (; t < count; ++t) one(g, t);
  }
}

// Each token's list and count go on from where they are.
static void head_scan(const HeadCodes& w, int64_t begin, int64_t end, HeadToken* tokens, int64_t count) {
  head_groups(
      begin, end, count, [=](int64_t g, int64_t t) { scan_group<kSketchTokens>(w, g, tokens + t); },
      [=](int64_t g, int64_t t) { scan_group<1>(w, g, tokens + t); });
}

static void head_estimate(const HeadCodes& w, int64_t begin, int64_t end, HeadToken* tokens, int64_t count) {
  head_groups(
      begin, end, count, [=](int64_t g, int64_t t) { estimate_group<kSketchTokens>(w, g, tokens + t); },
      [=](int64_t g, int64_t t) { estimate_group<1>(w, g, tokens + t); });
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
  h.split = head_split<true>;
  h.round = head_split<false>;
  h.scan = head_scan;
  h.estimate = head_estimate;
  h.dots[kF32] = bundle_dots<float>;
  h.dots[kBF16] = bundle_dots<bf16>;
  h.dots[kF16] = bundle_dots<fp16>;
  h.rows[kF32] = head_rows<float>;
  h.rows[kBF16] = head_rows<bf16>;
  h.rows[kF16] = head_rows<fp16>;
  return h;
}

}  // namespace nogemm::NOGEMM_NS
