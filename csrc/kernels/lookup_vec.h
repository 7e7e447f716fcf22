// Words that only the packed LookupFFN needs on top of vec.h: 16-bit dot products, bit-level maxima, strided and indexed
// loads, the transposition between "one token per row" and "one token per lane".
//
//   dot_pairs(acc, a, b)   acc + a.lo b.lo + a.hi b.hi, where every 32-bit lane holds two signed 16-bit numbers
//   pack_pair(lo, hi)      two vectors of small integers into one vector of such pairs
//   magnitude(x)           |x| as its bits: ordered like the numbers, with NaN and infinity above all (max() may drop a NaN)
//   transpose(p, stride, out, out_stride)   kLanes x kLanes 32-bit words
#pragma once
#include "vec.h"

// Unrolled before the compiler decides where arrays live: accumulators then stay in registers.
#define NOGEMM_UNROLL _Pragma("GCC unroll 16")

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE I load_word(const int32_t* p) { return set1(*p); }

#if defined(__AVX512F__) && !defined(NOGEMM_FORCE_SCALAR)

NOGEMM_INLINE I dot_pairs(I acc, I a, I b) {
#if defined(__AVX512VNNI__)
  // By hand: gcc 12 copies the accumulator before and after the intrinsic, which doubles the time of the inner loop.
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
#else
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
NOGEMM_INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
NOGEMM_INLINE I as_int(F a) { return {_mm512_castps_si512(a.v)}; }
NOGEMM_INLINE F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
NOGEMM_INLINE I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int BITS>
NOGEMM_INLINE I shift_left(I a) {
  return {_mm512_slli_epi32(a.v, BITS)};
}
NOGEMM_INLINE I shift_right16(I a) { return {_mm512_srai_epi32(a.v, 16)}; }
NOGEMM_INLINE I pack_pair(I lo, I hi) {
  return {_mm512_mask_blend_epi16(0xAAAAAAAAu, lo.v, _mm512_slli_epi32(hi.v, 16))};
}
NOGEMM_INLINE F gather(const float* base, I index) { return {_mm512_i32gather_ps(index.v, base, 4)}; }
NOGEMM_INLINE I lane_index() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
NOGEMM_INLINE I times(I a, int32_t b) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(b))}; }
NOGEMM_INLINE void store_narrow(int16_t* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
NOGEMM_INLINE int32_t hmax(I a) { return _mm512_reduce_max_epi32(a.v); }

NOGEMM_INLINE void transpose(const int32_t* p, int64_t stride, int32_t* out, int64_t out_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(p + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + c] holds, in quarter q, column 4 q + c of rows 4 g .. 4 g + 3: transpose the quarters over g.
  for (int c = 0; c < 4; ++c) {
    const __m512i lo01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), hi01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);
    const __m512i lo23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i hi23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(lo01, lo23, 0xDD));
    _mm512_storeu_si512(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(hi01, hi23, 0xDD));
  }
}

#elif defined(__AVX2__) && !defined(NOGEMM_FORCE_SCALAR)

NOGEMM_INLINE I dot_pairs(I acc, I a, I b) {
  // By hand for the reason given above.
  asm("vpaddd %1, %0, %0" : "+x"(acc.v) : "x"(_mm256_madd_epi16(a.v, b.v)));
  return acc;
}
NOGEMM_INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.v)}; }
NOGEMM_INLINE I as_int(F a) { return {_mm256_castps_si256(a.v)}; }
NOGEMM_INLINE F as_float(I a) { return {_mm256_castsi256_ps(a.v)}; }
NOGEMM_INLINE I max(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int BITS>
NOGEMM_INLINE I shift_left(I a) {
  return {_mm256_slli_epi32(a.v, BITS)};
}
NOGEMM_INLINE I shift_right16(I a) { return {_mm256_srai_epi32(a.v, 16)}; }
NOGEMM_INLINE I pack_pair(I lo, I hi) { return {_mm256_blend_epi16(lo.v, _mm256_slli_epi32(hi.v, 16), 0xAA)}; }
NOGEMM_INLINE F gather(const float* base, I index) { return {_mm256_i32gather_ps(base, index.v, 4)}; }
NOGEMM_INLINE I lane_index() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
NOGEMM_INLINE I times(I a, int32_t b) { return {_mm256_mullo_epi32(a.v, _mm256_set1_epi32(b))}; }
NOGEMM_INLINE void store_narrow(int16_t* p, I a) {
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
NOGEMM_INLINE int32_t hmax(I a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

NOGEMM_INLINE void transpose(const int32_t* p, int64_t stride, int32_t* out, int64_t out_stride) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i * stride));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c * out_stride),
                        _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 + c) * out_stride),
                        _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
  }
}

#elif defined(NOGEMM_NEON)

NOGEMM_INLINE I dot_pairs(I acc, I a, I b) {
  const int16x8_t x = vreinterpretq_s16_s32(a.v), y = vreinterpretq_s16_s32(b.v);
  return {vaddq_s32(acc.v, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)))};
}
// Out of range and NaN give the least integer, as on x86; by itself the conversion saturates and makes NaN 0.
NOGEMM_INLINE I to_int(F a) {
  const uint32x4_t below = vcltq_f32(a.v, vdupq_n_f32(2147483648.0f));
  return {vbslq_s32(below, vcvtnq_s32_f32(a.v), vdupq_n_s32(INT32_MIN))};
}
NOGEMM_INLINE I as_int(F a) { return {vreinterpretq_s32_f32(a.v)}; }
NOGEMM_INLINE F as_float(I a) { return {vreinterpretq_f32_s32(a.v)}; }
NOGEMM_INLINE I max(I a, I b) { return {vmaxq_s32(a.v, b.v)}; }
template <int BITS>
NOGEMM_INLINE I shift_left(I a) {
  return {vshlq_n_s32(a.v, BITS)};
}
NOGEMM_INLINE I shift_right16(I a) { return {vshrq_n_s32(a.v, 16)}; }
NOGEMM_INLINE I pack_pair(I lo, I hi) { return {vsliq_n_s32(lo.v, hi.v, 16)}; }
NOGEMM_INLINE F gather(const float* base, I index) {
  const float32x4_t lanes = {base[vgetq_lane_s32(index.v, 0)], base[vgetq_lane_s32(index.v, 1)],
                             base[vgetq_lane_s32(index.v, 2)], base[vgetq_lane_s32(index.v, 3)]};
  return {lanes};
}
NOGEMM_INLINE I lane_index() {
  const int32x4_t lanes = {0, 1, 2, 3};
  return {lanes};
}
NOGEMM_INLINE I times(I a, int32_t b) { return {vmulq_n_s32(a.v, b)}; }
NOGEMM_INLINE void store_narrow(int16_t* p, I a) { vst1_s16(p, vmovn_s32(a.v)); }
NOGEMM_INLINE int32_t hmax(I a) { return vmaxvq_s32(a.v); }

NOGEMM_INLINE void transpose(const int32_t* p, int64_t stride, int32_t* out, int64_t out_stride) {
  const int32x4_t r0 = vld1q_s32(p), r1 = vld1q_s32(p + stride);
  const int32x4_t r2 = vld1q_s32(p + 2 * stride), r3 = vld1q_s32(p + 3 * stride);
  const int64x2_t even01 = vreinterpretq_s64_s32(vtrn1q_s32(r0, r1)), odd01 = vreinterpretq_s64_s32(vtrn2q_s32(r0, r1));
  const int64x2_t even23 = vreinterpretq_s64_s32(vtrn1q_s32(r2, r3)), odd23 = vreinterpretq_s64_s32(vtrn2q_s32(r2, r3));
  vst1q_s32(out, vreinterpretq_s32_s64(vtrn1q_s64(even01, even23)));
  vst1q_s32(out + out_stride, vreinterpretq_s32_s64(vtrn1q_s64(odd01, odd23)));
  vst1q_s32(out + 2 * out_stride, vreinterpretq_s32_s64(vtrn2q_s64(even01, even23)));
  vst1q_s32(out + 3 * out_stride, vreinterpretq_s32_s64(vtrn2q_s64(odd01, odd23)));
}

#else

// Unsigned arithmetic: sums wrap like the vector instructions do, without undefined behaviour.
NOGEMM_INLINE int32_t low_half(int32_t a) { return static_cast<int16_t>(static_cast<uint16_t>(a)); }
NOGEMM_INLINE I dot_pairs(I acc, I a, I b) {
  const uint32_t low = static_cast<uint32_t>(low_half(a.v) * low_half(b.v));
  const uint32_t high = static_cast<uint32_t>((a.v >> 16) * (b.v >> 16));
  return {static_cast<int32_t>(static_cast<uint32_t>(acc.v) + low + high)};
}
// Out of range and NaN give the least integer, as the vector instructions do.
NOGEMM_INLINE I to_int(F a) {
  const bool fits = a.v >= -2147483648.0f && a.v < 2147483648.0f;
  return {fits ? static_cast<int32_t>(std::nearbyint(a.v)) : INT32_MIN};
}
NOGEMM_INLINE I as_int(F a) { return {static_cast<int32_t>(float_to_bits(a.v))}; }
NOGEMM_INLINE F as_float(I a) { return {bits_to_float(static_cast<uint32_t>(a.v))}; }
NOGEMM_INLINE I max(I a, I b) { return {a.v > b.v ? a.v : b.v}; }
template <int BITS>
NOGEMM_INLINE I shift_left(I a) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) << BITS)};
}
NOGEMM_INLINE I shift_right16(I a) { return {a.v >> 16}; }
NOGEMM_INLINE I pack_pair(I lo, I hi) {
  return {static_cast<int32_t>((static_cast<uint32_t>(lo.v) & 0xffffu) | (static_cast<uint32_t>(hi.v) << 16))};
}
NOGEMM_INLINE F gather(const float* base, I index) { return {base[index.v]}; }
NOGEMM_INLINE I lane_index() { return {0}; }
NOGEMM_INLINE I times(I a, int32_t b) { return {a.v * b}; }
NOGEMM_INLINE void store_narrow(int16_t* p, I a) { *p = static_cast<int16_t>(static_cast<uint16_t>(a.v)); }
NOGEMM_INLINE int32_t hmax(I a) { return a.v; }
NOGEMM_INLINE void transpose(const int32_t* p, int64_t, int32_t* out, int64_t) { *out = *p; }

#endif

NOGEMM_INLINE I magnitude(F a) { return as_int(a) & set1(INT32_MAX); }

}  // namespace nogemm::NOGEMM_NS
