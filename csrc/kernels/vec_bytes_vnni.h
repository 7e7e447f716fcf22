// vec_bytes.h with AVX512-VNNI: one instruction multiplies four unsigned by four signed bytes and adds them.
//
// Of four rows, each column's bytes are interleaved to one lane, and multiplied once with the high and once with the low
// bytes of q. Included by vec_bytes.h only.
#pragma once

namespace nogemm::NOGEMM_NS {

inline constexpr int kByteOffset = 128;

NOGEMM_INLINE __m512i dot_codes(__m512i acc, __m512i codes, __m512i q) {
  // By hand: gcc 12 copies the accumulator around the intrinsic.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
  return acc;
}

// Four bytes, repeated.
NOGEMM_INLINE __m512i load_word4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void sketch_sums(const uint8_t* group, int64_t steps, const int8_t* const* q, int32_t* sums) {
  __m512i acc[TOKENS][4];
  for (int t = 0; t < TOKENS; ++t)
    for (int b = 0; b < 4; ++b) acc[t][b] = _mm512_setzero_si512();
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* p = group + s * 256;
    __m512i first[TOKENS], second[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      first[t] = load_word4(q[t] + s * (NIBBLES ? 8 : 4));
      if constexpr (NIBBLES) second[t] = load_word4(q[t] + s * 8 + 4);
    }
    NOGEMM_UNROLL
    for (int b = 0; b < 4; ++b) {
      const __m512i raw = _mm512_load_si512(p + 64 * b);
      fetch_ahead(p + 64 * b);
      const __m512i front = NIBBLES ? _mm512_and_si512(raw, low) : raw;
      const __m512i back = NIBBLES ? _mm512_and_si512(_mm512_srli_epi16(raw, 4), low) : raw;
      NOGEMM_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        acc[t][b] = dot_codes(acc[t][b], front, first[t]);
        if constexpr (NIBBLES) acc[t][b] = dot_codes(acc[t][b], back, second[t]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int b = 0; b < 4; ++b) _mm512_storeu_si512(sums + t * kSketchRows + 16 * b, acc[t][b]);
}

template <int ROWS>
NOGEMM_INLINE void fixed_dots(const int8_t* const* row, const FixedToken& x, const char* const* ahead, float* out) {
  __m512i high[ROWS], low[ROWS];
  for (int r = 0; r < ROWS; ++r) high[r] = low[r] = _mm512_setzero_si512();
  const __m512i offset = _mm512_set1_epi8(-128);
  for (int64_t c = 0; c < x.padded; c += 64) {
    const __m512i a = _mm512_loadu_si512(x.high + c), b = _mm512_loadu_si512(x.low + c);
    NOGEMM_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      prefetch(ahead[r] + c);
      const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(row[r] + c), offset);
      high[r] = dot_codes(high[r], w, a);
      low[r] = dot_codes(low[r], w, b);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const int32_t h = _mm512_reduce_add_epi32(high[r]) - 128 * x.high_sum;
    const int32_t l = _mm512_reduce_add_epi32(low[r]) - 128 * x.low_sum;
    out[r] = (static_cast<float>(h) * 256.0f + static_cast<float>(l)) * x.scale;
  }
}

NOGEMM_INLINE I low_byte(I q) { return {_mm512_srai_epi32(_mm512_slli_epi32(q.v, 24), 24)}; }
NOGEMM_INLINE I high_byte(I q, I low) { return {_mm512_srai_epi32(_mm512_sub_epi32(q.v, low.v), 8)}; }
NOGEMM_INLINE I join_bytes(const I* b) {
  const __m512i mask = _mm512_set1_epi32(255);
  const __m512i b0 = _mm512_and_si512(b[0].v, mask), b1 = _mm512_slli_epi32(_mm512_and_si512(b[1].v, mask), 8);
  const __m512i b2 = _mm512_slli_epi32(_mm512_and_si512(b[2].v, mask), 16), b3 = _mm512_slli_epi32(b[3].v, 24);
  return {_mm512_or_si512(_mm512_or_si512(b0, b1), _mm512_or_si512(b2, b3))};
}
NOGEMM_INLINE void join_scores(const I* q, I* words) {
  I low[4], high[4];
  NOGEMM_UNROLL
  for (int i = 0; i < 4; ++i) {
    low[i] = low_byte(q[i]);
    high[i] = high_byte(q[i], low[i]);
  }
  words[0] = join_bytes(high);
  words[1] = join_bytes(low);
}
NOGEMM_INLINE void store_scores(int16_t* words, I q) {
  const I low = low_byte(q);
  const __m128i highs = _mm512_cvtepi32_epi8(high_byte(q, low).v), lows = _mm512_cvtepi32_epi8(low.v);
  auto* to = reinterpret_cast<__m128i*>(words);
  _mm_storeu_si128(to, _mm_unpacklo_epi32(highs, lows));
  _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(highs, lows));
}

template <int CH>
struct RowSums : ColumnSums<CH> {
  I high[ColumnSums<CH>::kVectors];  // of the high bytes of q
};

template <int CH>
NOGEMM_INLINE void start_sums(RowSums<CH>& s, const int32_t* kept) {
  start_sums(static_cast<ColumnSums<CH>&>(s), kept);
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; ++v) s.high[v] = set1(int32_t{0});
}

// acc + sum of four products, unsigned by signed bytes. By hand for the reason given at dot_pairs.
NOGEMM_INLINE I dot_bytes(I acc, __m512i bytes, I weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(bytes), "v"(weights.v));
  return acc;
}

template <bool NIBBLES, int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t highs, int32_t lows) {
  const I h = set1(highs), w = set1(lows);
  NOGEMM_UNROLL
  for (int c = 0; c < CH; ++c) {
    const auto bytes = [c](const uint8_t* row) {
      return NIBBLES ? load_nibbles(row + c * 32, 0) : _mm512_loadu_si512(row + c * 64);
    };
    const __m512i r0 = bytes(p[0]), r1 = bytes(p[1]), r2 = bytes(p[2]), r3 = bytes(p[3]);
    const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
    const __m512i d = _mm512_unpacklo_epi8(r2, r3), f = _mm512_unpackhi_epi8(r2, r3);
    const __m512i four[4] = {_mm512_unpacklo_epi16(a, d), _mm512_unpackhi_epi16(a, d), _mm512_unpacklo_epi16(b, f),
                             _mm512_unpackhi_epi16(b, f)};
    NOGEMM_UNROLL
    for (int q = 0; q < 4; ++q) {
      s.high[c * 4 + q] = dot_bytes(s.high[c * 4 + q], four[q], h);
      s.sums[c * 4 + q] = dot_bytes(s.sums[c * 4 + q], four[q], w);
    }
  }
}

template <int CH>
NOGEMM_INLINE void finish_sums(RowSums<CH>& s) {
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; ++v) s.sums[v] = s.sums[v] + shift_left<8>(s.high[v]);
}

template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>&) {}  // four rows' bytes fill a column's lane

}  // namespace nogemm::NOGEMM_NS
