// vec.h for AVX-512 F/BW/DQ/VL (x86-64-v4): sixteen lanes, thirty-two registers. Included by vec.h only.
#pragma once
#include <immintrin.h>

namespace nogemm::NOGEMM_NS {

inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct M {
  __mmask16 v;
};

NOGEMM_INLINE F zero() { return {_mm512_setzero_ps()}; }
NOGEMM_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
NOGEMM_INLINE I set1(int32_t x) { return {_mm512_set1_epi32(x)}; }

NOGEMM_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>(n >= kLanes ? 0xffffu : (1u << n) - 1u); }

NOGEMM_INLINE F widen(__m256i bf) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf), 16))}; }
NOGEMM_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
NOGEMM_INLINE F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
NOGEMM_INLINE F load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
NOGEMM_INLINE F load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
NOGEMM_INLINE F load_part(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
NOGEMM_INLINE F load_part(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
NOGEMM_INLINE F load_part(const fp16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
NOGEMM_INLINE F load_part(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}
NOGEMM_INLINE I load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }

NOGEMM_INLINE __m256i to_bf16(F a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
NOGEMM_INLINE __m256i to_fp16(F a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
NOGEMM_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
NOGEMM_INLINE void store(bf16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
NOGEMM_INLINE void store(fp16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_fp16(a)); }
NOGEMM_INLINE void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
NOGEMM_INLINE void store_part(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
NOGEMM_INLINE void store_part(bf16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }
NOGEMM_INLINE void store_part(fp16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_fp16(a)); }
// Past the caches when the address allows: for results far larger than the caches.
NOGEMM_INLINE void stream(float* p, F a) {
  if ((reinterpret_cast<uintptr_t>(p) & 63) == 0) {
    _mm512_stream_ps(p, a.v);
  } else {
    store(p, a);
  }
}
template <class T>
NOGEMM_INLINE void stream(T* p, F a) {
  store(p, a);
}
NOGEMM_INLINE void stream_fence() { _mm_sfence(); }

NOGEMM_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
NOGEMM_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
NOGEMM_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
NOGEMM_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
NOGEMM_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
NOGEMM_INLINE F fnma(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
NOGEMM_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
NOGEMM_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
NOGEMM_INLINE F abs(F a) { return {_mm512_abs_ps(a.v)}; }
NOGEMM_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
NOGEMM_INLINE F round_even(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
NOGEMM_INLINE F with_sign(F magnitude, F sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}

NOGEMM_INLINE M gt(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
NOGEMM_INLINE M lt(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
NOGEMM_INLINE M le(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
NOGEMM_INLINE M eq(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
NOGEMM_INLINE M either_nan(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
NOGEMM_INLINE M lt(I a, I b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
NOGEMM_INLINE M operator&(M a, M b) { return {static_cast<__mmask16>(a.v & b.v)}; }
NOGEMM_INLINE M operator|(M a, M b) { return {static_cast<__mmask16>(a.v | b.v)}; }
NOGEMM_INLINE M operator~(M a) { return {static_cast<__mmask16>(~a.v)}; }
NOGEMM_INLINE uint32_t mask_bits(M m) { return m.v; }
NOGEMM_INLINE F blend(M m, F a, F b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
NOGEMM_INLINE I blend(M m, I a, I b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

NOGEMM_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
NOGEMM_INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
NOGEMM_INLINE I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
NOGEMM_INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
NOGEMM_INLINE I operator^(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
NOGEMM_INLINE M any_bit(I a, I b) { return {_mm512_test_epi32_mask(a.v, b.v)}; }
NOGEMM_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }

// p * 2^n for p in [0.5, 2) and an integral n; one instruction here.
NOGEMM_INLINE F scale_exponent(F p, F n) { return {_mm512_scalef_ps(p.v, n.v)}; }

NOGEMM_INLINE float hsum(F a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
// Within each 128-bit quarter: [sum of a, of b, of c, of d].
NOGEMM_INLINE __m512 hsum_quarters(F a, F b, F c, F d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
}
// Sum of the lanes of each of kLanes vectors, as one vector: pairs are added while they are transposed.
NOGEMM_INLINE F hsum_each(const F* a) {
  const __m512 q0 = hsum_quarters(a[0], a[1], a[2], a[3]), q1 = hsum_quarters(a[4], a[5], a[6], a[7]);
  const __m512 q2 = hsum_quarters(a[8], a[9], a[10], a[11]), q3 = hsum_quarters(a[12], a[13], a[14], a[15]);
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(q0, q1, 0x88), _mm512_shuffle_f32x4(q0, q1, 0xDD));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(q2, q3, 0x88), _mm512_shuffle_f32x4(q2, q3, 0xDD));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xDD))};
}
// Lane i swapped with lane i ^ STEP.
template <int STEP>
NOGEMM_INLINE F swap_lanes(F a) {
  if constexpr (STEP == 1) return {_mm512_permute_ps(a.v, 0xB1)};
  if constexpr (STEP == 2) return {_mm512_permute_ps(a.v, 0x4E)};
  if constexpr (STEP == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xB1)};
  if constexpr (STEP == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4E)};
  return a;
}
NOGEMM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
NOGEMM_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// 16-bit pairs, indexed loads, the transposition of words.
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
// To a register first: compressing straight into memory is microcoded on Zen.
NOGEMM_INLINE void compress(int32_t* p, I a, M m) { _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m.v, a.v)); }
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

// Bytes, for vec_bytes_pairs.h.
using Bytes = __m512i;
NOGEMM_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
// 64 columns in nibbles, as bytes; there is one part.
NOGEMM_INLINE Bytes load_nibbles(const uint8_t* p, int) {
  const Bytes twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const Bytes shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shift), _mm512_set1_epi8(15));
}
NOGEMM_INLINE Bytes zero_bytes() { return _mm512_setzero_si512(); }
NOGEMM_INLINE Bytes set_bytes(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
NOGEMM_INLINE Bytes set_words(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
NOGEMM_INLINE Bytes set_dwords(int32_t x) { return _mm512_set1_epi32(x); }
NOGEMM_INLINE Bytes bit_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
NOGEMM_INLINE Bytes bit_xor(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
NOGEMM_INLINE Bytes shift_right4(Bytes a) { return _mm512_srli_epi16(a, 4); }
NOGEMM_INLINE Bytes shift_right8(Bytes a) { return _mm512_srli_epi16(a, 8); }
NOGEMM_INLINE Bytes unpack_low16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
NOGEMM_INLINE Bytes unpack_high16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
NOGEMM_INLINE Bytes unpack_low32(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
NOGEMM_INLINE Bytes unpack_high32(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
NOGEMM_INLINE Bytes add16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
NOGEMM_INLINE Bytes add32(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
NOGEMM_INLINE Bytes pairs16(Bytes a, Bytes b) { return _mm512_maddubs_epi16(a, b); }
NOGEMM_INLINE Bytes pairs32(Bytes a, Bytes b) { return _mm512_madd_epi16(a, b); }
NOGEMM_INLINE Bytes magnitudes(Bytes a) { return _mm512_abs_epi8(a); }
NOGEMM_INLINE Bytes copy_sign(Bytes q, Bytes c) {
  return _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(c), _mm512_setzero_si512(), q);
}
NOGEMM_INLINE Bytes widen(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
NOGEMM_INLINE int32_t hsum32(Bytes a) { return _mm512_reduce_add_epi32(a); }

}  // namespace nogemm::NOGEMM_NS
