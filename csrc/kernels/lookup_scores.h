// Where lookups wait between hash and gather, and how int8 rows get their integer scores.
//
// A piece of `width` tokens keeps [lookup][token]: row indices (table * R + code) and scores. With int8 rows the score times
// the row's scale becomes a 16-bit integer q in the token's own step. Four lookups' q are two 32-bit words: two 16-bit
// numbers each, or with VNNI, where bytes are multiplied, the high and the low byte of all four (q = 256 high + low, both
// signed). RowSums (vec_bytes.h) adds four rows at a time, exactly. Rows are stored plus 128, those of int4 plus 8, so that
// often `total`, the sum of q, must be taken off again. The scale of q keeps 127 sum |q| below 2^31, so the whole sum is
// exact in 32 bits, in any order and on every instruction set.
#pragma once
#include "lookup_codes.h"
#include "vec_bytes.h"

namespace nogemm::NOGEMM_NS {

// 127 * 256 lets the high byte stay a signed byte after rounding; from 512 lookups on the sum of all sets the limit.
NOGEMM_INLINE float score_max(int64_t lookups) {
  return lookups <= 512 ? 32512.0f : 16646144.0f / static_cast<float>(lookups);
}

struct Lookups {
  int32_t* index;  // [lookups][width]
  float* score;    // [lookups][width]; integer scores reuse the space: words, total
  float* step;     // [width]: y = step * (integer sum - offset * total); NaN for a broken token
  int64_t count;   // lookups per token, padded to a multiple of 4
  int64_t width;

  // [count / 2][width]: two words of four lookups behind each other.
  [[gnu::always_inline]] int32_t* words() const { return reinterpret_cast<int32_t*>(score); }
  [[gnu::always_inline]] int32_t* total() const { return words() + count / 2 * width; }
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

// scores [count][width] of a tile, times the scales of their rows -> integer scores. Scaled here, not where the codes
// arise: the scales lie far apart in memory, and a short loop has more of them under way.
NOGEMM_INLINE void tile_integer_scores(const Lookups& l, int64_t lookups, const float* row_scale, float* scores,
                                       int64_t at) {
  I largest = set1(int32_t{0}), sum = set1(int32_t{0});
  for (int64_t e = 0; e < lookups; ++e) {
    float* score = scores + e * l.width + at;
    const F scaled = load(score) * gather(row_scale, load(l.index + e * l.width + at));
    largest = max(largest, magnitude(scaled));
    store(score, scaled);
  }
  const float limit = score_max(l.count);
  const F most = as_float(largest), inverse = set1(limit) / max(most, set1(1e-30f));
  store(l.step + at, most * set1(1.0f / limit) + most * zero());
  for (int64_t e = 0; e < l.count; e += 4) {
    I q[4], words[2];
    NOGEMM_UNROLL
    for (int i = 0; i < 4; ++i) {
      q[i] = to_int(load(scores + (e + i) * l.width + at) * inverse);
      sum = sum + q[i];
    }
    join_scores(q, words);
    int32_t* to = l.words() + e / 2 * l.width + at;
    store(to, words[0]);
    store(to + l.width, words[1]);
  }
  store(l.total() + at, sum);
}

// The same for one token (width 1), already scaled; `scores` holds count floats and zeros up to the next multiple of 16.
NOGEMM_INLINE void row_integer_scores(const Lookups& l, const float* scores) {
  I largest = set1(int32_t{0}), sum = set1(int32_t{0});
  for (int64_t e = 0; e < l.count; e += kLanes) largest = max(largest, magnitude(load(scores + e)));
  const float limit = score_max(l.count);
  const float most = bits_to_float(static_cast<uint32_t>(hmax(largest)));
  const float inverse = limit / (most > 1e-30f ? most : 1e-30f);
  *l.step = most * (1.0f / limit) + most * 0.0f;
  auto* words = reinterpret_cast<int16_t*>(l.words());  // two bytes a lookup, with VNNI too
  for (int64_t e = 0; e < l.count; e += kLanes) {
    const I q = to_int(load(scores + e) * set1(inverse));
    store_scores(words + e, q);  // may write up to kLanes - 4 lookups behind the last
    sum = sum + q;
  }
  // Lane by lane and unsigned: the codes of a broken token are the least integers, and their sum wraps.
  alignas(64) int32_t lanes[kLanes];
  store(lanes, sum);
  uint32_t total = 0;
  for (const int32_t lane : lanes) total += static_cast<uint32_t>(lane);
  *l.total() = static_cast<int32_t>(total);
}

}  // namespace nogemm::NOGEMM_NS
