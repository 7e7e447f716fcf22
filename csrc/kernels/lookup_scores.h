// Where lookups wait between hash and gather, and how int8 rows get their integer scores.
//
// A piece of `width` tokens keeps [lookup][token]: row indices (table * R + code) and scores. With int8 rows and VNNI the
// score times the row's scale becomes a 16-bit integer q in the token's own step, split into two signed bytes
// q = 256 high + low, four lookups to a 32-bit word: vpdpbusd then adds four rows at a time, exactly.
// Rows are stored plus 128 (the instruction wants one unsigned side), so 128 sum q must be taken off again: `excess`.
// The scale of q keeps 127 sum |q| below 2^31, so the whole sum is exact in 32 bits, in any order.
#pragma once
#include "lookup_codes.h"

namespace nogemm::NOGEMM_NS {

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
inline constexpr bool kIntegerScores = true;
#else
inline constexpr bool kIntegerScores = false;
#endif

// 127 * 256 lets the high byte stay a signed byte after rounding; from 512 lookups on the sum of all sets the limit.
NOGEMM_INLINE float score_max(int64_t lookups) {
  return lookups <= 512 ? 32512.0f : 16646144.0f / static_cast<float>(lookups);
}

struct Lookups {
  int32_t* index;  // [lookups][width]
  float* score;    // [lookups][width]; integer scores reuse the space: high, low, excess
  float* step;     // [width]: y = step * (integer sum - excess); NaN for a broken token
  int64_t count;   // lookups per token, padded to a multiple of 4
  int64_t width;

  [[gnu::always_inline]] int32_t* high() const { return reinterpret_cast<int32_t*>(score); }
  [[gnu::always_inline]] int32_t* low() const { return high() + count / 4 * width; }
  [[gnu::always_inline]] int32_t* excess() const { return low() + count / 4 * width; }
};

NOGEMM_INLINE int64_t padded_lookups(const LookupHeader& h) { return (h.lookups() + 3) / 4 * 4; }

// Bytes for the lookups of `width` tokens; the slack lets vector stores run past the end of the last lookup.
NOGEMM_INLINE int64_t lookups_bytes(const LookupHeader& h, int64_t width) {
  return ((padded_lookups(h) * 2 + 8) * width + 128) * 4;
}

NOGEMM_INLINE Lookups place_lookups(const LookupHeader& h, int64_t width, char* at) {
  Lookups l;
  l.count = padded_lookups(h);
  l.width = width;
  l.index = reinterpret_cast<int32_t*>(at);
  l.score = reinterpret_cast<float*>(l.index + l.count * width + 64);
  l.step = l.score + (l.count + 4) * width + 32;
  return l;
}

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)

NOGEMM_INLINE I split_low(I q) { return {_mm512_srai_epi32(_mm512_slli_epi32(q.v, 24), 24)}; }
NOGEMM_INLINE I split_high(I q, I low) { return {_mm512_srai_epi32(_mm512_sub_epi32(q.v, low.v), 8)}; }
NOGEMM_INLINE I join_bytes(const I* b) {
  const __m512i mask = _mm512_set1_epi32(255);
  const __m512i b0 = _mm512_and_si512(b[0].v, mask), b1 = _mm512_slli_epi32(_mm512_and_si512(b[1].v, mask), 8);
  const __m512i b2 = _mm512_slli_epi32(_mm512_and_si512(b[2].v, mask), 16), b3 = _mm512_slli_epi32(b[3].v, 24);
  return {_mm512_or_si512(_mm512_or_si512(b0, b1), _mm512_or_si512(b2, b3))};
}

// scores [count][width] of a tile -> integer scores. largest: magnitude bits per token.
NOGEMM_INLINE void tile_integer_scores(const Lookups& l, const float* scores, int64_t at, I largest) {
  const float limit = score_max(l.count);
  const F most = as_float(largest), inverse = set1(limit) / max(most, set1(1e-30f));
  store(l.step + at, most * set1(1.0f / limit) + most * zero());
  I sum = set1(int32_t{0});
  for (int64_t e = 0; e < l.count; e += 4) {
    I low[4], high[4];
    NOGEMM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const I q = to_int(load(scores + (e + i) * l.width + at) * inverse);
      sum = sum + q;
      low[i] = split_low(q);
      high[i] = split_high(q, low[i]);
    }
    store(l.high() + e / 4 * l.width + at, join_bytes(high));
    store(l.low() + e / 4 * l.width + at, join_bytes(low));
  }
  store(l.excess() + at, I{_mm512_slli_epi32(sum.v, 7)});
}

// The same for one token (width 1); `scores` holds count floats and zeros up to the next multiple of 16.
NOGEMM_INLINE void row_integer_scores(const Lookups& l, const float* scores) {
  I largest = set1(int32_t{0});
  for (int64_t e = 0; e < l.count; e += kLanes) largest = max(largest, magnitude(load(scores + e)));
  const float limit = score_max(l.count);
  const float most = bits_to_float(static_cast<uint32_t>(hmax(largest)));
  const float inverse = limit / (most > 1e-30f ? most : 1e-30f);
  *l.step = most * (1.0f / limit) + most * 0.0f;
  I sum = set1(int32_t{0});
  for (int64_t e = 0; e < l.count; e += kLanes) {
    const I q = to_int(load(scores + e) * set1(inverse)), low = split_low(q), high = split_high(q, low);
    const int words = static_cast<int>(l.count - e < kLanes ? (l.count - e) / 4 : 4);
    const __mmask16 bytes = static_cast<__mmask16>((1u << (4 * words)) - 1);
    _mm_mask_storeu_epi8(l.high() + e / 4, bytes, _mm512_cvtepi32_epi8(high.v));
    _mm_mask_storeu_epi8(l.low() + e / 4, bytes, _mm512_cvtepi32_epi8(low.v));
    sum = sum + q;
  }
  // Lane by lane and unsigned: the codes of a broken token are the least integers, and their sum wraps.
  alignas(64) uint32_t lanes[kLanes];
  _mm512_store_si512(lanes, sum.v);
  uint32_t total = 0;
  for (const uint32_t lane : lanes) total += lane;
  *l.excess() = static_cast<int32_t>(total << 7);
}

#else

NOGEMM_INLINE void tile_integer_scores(const Lookups&, const float*, int64_t, I) {}
NOGEMM_INLINE void row_integer_scores(const Lookups&, const float*) {}

#endif

}  // namespace nogemm::NOGEMM_NS
