// Sums of int8 rows times integer scores (lookup_scores.h), four rows at a time, exact. A row's bytes are stored plus 128 in
// the order of lookup_format.h, and in that order sums wait between passes.
//
//   with VNNI   the bytes of four rows are interleaved: one instruction multiplies four and adds them, once for the high
//               and once for the low bytes of q
//   x86         the words of two rows, which are bytes of two columns, are interleaved: their even bytes, then their odd
//               ones, are multiplied as pairs of 16-bit numbers: seven operations for 32 products where floats need twelve
//   others      row by row
//
//   RowSums<CH>   the sums of 64 CH columns: start, add_four, keep (for the next pass), order (columns side by side)
#pragma once
#include "byte_words.h"
#include "lookup_scores.h"

namespace nogemm::NOGEMM_NS {

template <int CH>
struct RowSums {
  static constexpr int kVectors = CH * kChunk / kLanes;
  I sums[kVectors];
#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
  I high[kVectors];  // of the high bytes of q
#endif
};

template <int CH>
NOGEMM_INLINE void start_sums(RowSums<CH>& s, const int32_t* kept) {
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; ++v) s.sums[v] = kept == nullptr ? set1(int32_t{0}) : load(kept + v * kLanes);
#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; ++v) s.high[v] = set1(int32_t{0});
#endif
}

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)

// acc + sum of four products, unsigned by signed bytes. By hand for the reason given at dot_pairs.
NOGEMM_INLINE I dot_bytes(I acc, __m512i bytes, I weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(bytes), "v"(weights.v));
  return acc;
}

template <int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t highs, int32_t lows) {
  const I h = set1(highs), w = set1(lows);
  NOGEMM_UNROLL
  for (int c = 0; c < CH; ++c) {
    const __m512i r0 = _mm512_loadu_si512(p[0] + c * 64), r1 = _mm512_loadu_si512(p[1] + c * 64);
    const __m512i r2 = _mm512_loadu_si512(p[2] + c * 64), r3 = _mm512_loadu_si512(p[3] + c * 64);
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

#elif defined(NOGEMM_BYTE_WORDS)

template <int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t first, int32_t second) {
  const I words[2] = {set1(first), set1(second)};
  const Bytes even = set_dwords(0x00ff00ff);
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; v += 4) NOGEMM_UNROLL
  for (int r = 0; r < 2; ++r) {
    const Bytes a = load_bytes(p[2 * r] + v / 4 * kBytes), b = load_bytes(p[2 * r + 1] + v / 4 * kBytes);
    const Bytes pairs[2] = {unpack_low16(a, b), unpack_high16(a, b)};
    NOGEMM_UNROLL
    for (int i = 0; i < 2; ++i) {
      s.sums[v + 2 * i] = dot_pairs(s.sums[v + 2 * i], I{bit_and(pairs[i], even)}, words[r]);
      s.sums[v + 2 * i + 1] = dot_pairs(s.sums[v + 2 * i + 1], I{shift_right8(pairs[i])}, words[r]);
    }
  }
}

template <int CH>
NOGEMM_INLINE void finish_sums(RowSums<CH>&) {}

// Vectors of even and of odd columns to four neighbours a lane; those of a chunk's parts side by side.
template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>& s) {
  constexpr int kParts = kChunk / kBytes;
  RowSums<CH> ordered;
  NOGEMM_UNROLL
  for (int c = 0; c < CH; ++c) NOGEMM_UNROLL
  for (int part = 0; part < kParts; ++part) NOGEMM_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Bytes a = s.sums[4 * (c * kParts + part) + 2 * i].v, b = s.sums[4 * (c * kParts + part) + 2 * i + 1].v;
    ordered.sums[(4 * c + 2 * i) * kParts + part] = {unpack_low32(a, b)};
    ordered.sums[(4 * c + 2 * i + 1) * kParts + part] = {unpack_high32(a, b)};
  }
  s = ordered;
}

#elif defined(NOGEMM_NEON)

template <int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t first, int32_t second) {
  const int16_t q[4] = {static_cast<int16_t>(first), static_cast<int16_t>(first >> 16), static_cast<int16_t>(second),
                        static_cast<int16_t>(second >> 16)};
  NOGEMM_UNROLL
  for (int c = 0; c < CH; ++c) NOGEMM_UNROLL
  for (int part = 0; part < 4; ++part) {
    I* sums = s.sums + 16 * c + part;
    NOGEMM_UNROLL
    for (int r = 0; r < 4; ++r) {
      const uint8x16_t bytes = vld1q_u8(p[r] + c * kChunk + 16 * part);
      const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
      const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
      sums[0].v = vmlal_n_s16(sums[0].v, vget_low_s16(low), q[r]);
      sums[4].v = vmlal_high_n_s16(sums[4].v, low, q[r]);
      sums[8].v = vmlal_n_s16(sums[8].v, vget_low_s16(high), q[r]);
      sums[12].v = vmlal_high_n_s16(sums[12].v, high, q[r]);
    }
  }
}

template <int CH>
NOGEMM_INLINE void finish_sums(RowSums<CH>&) {}

template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>&) {}  // kept as columns

#else

template <int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t first, int32_t second) {
  const int32_t q[4] = {low_half(first), first >> 16, low_half(second), second >> 16};
  for (int r = 0; r < 4; ++r)
    for (int b = 0; b < s.kVectors; ++b) s.sums[b] = s.sums[b] + I{q[r] * p[r][b]};
}

template <int CH>
NOGEMM_INLINE void finish_sums(RowSums<CH>&) {}

template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>& s) {
  const RowSums<CH> stored = s;
  for (int b = 0; b < s.kVectors; ++b)
    s.sums[b - b % 64 + 16 * (b % 16 / 4) + 4 * (b % 64 / 16) + b % 4] = stored.sums[b];
}

#endif

}  // namespace nogemm::NOGEMM_NS
