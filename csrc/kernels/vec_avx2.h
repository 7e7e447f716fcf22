// vec.h for AVX2 + FMA + F16C (x86-64-v3): eight lanes, sixteen registers. Included by vec.h only.
#pragma once
#include <immintrin.h>

namespace nogemm::NOGEMM_NS {

inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;

struct F {
  __m256 v;
};
struct I {
  __m256i v;
};
struct M {
  __m256 v;  // all bits of a lane set or clear
};

// For each mask, the lanes that are set, a byte each, lowest first.
struct CompressLanes {
  uint64_t of[256];
};
static constexpr CompressLanes compress_lanes() {
  CompressLanes t{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, at = 0; lane < 8; ++lane)
      if (mask >> lane & 1) t.of[mask] |= static_cast<uint64_t>(lane) << (8 * at++);
  return t;
}
static constexpr CompressLanes kCompressLanes = compress_lanes();

NOGEMM_INLINE F zero() { return {_mm256_setzero_ps()}; }
NOGEMM_INLINE F set1(float x) { return {_mm256_set1_ps(x)}; }
NOGEMM_INLINE I set1(int32_t x) { return {_mm256_set1_epi32(x)}; }

NOGEMM_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

NOGEMM_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
NOGEMM_INLINE F load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
NOGEMM_INLINE F load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
NOGEMM_INLINE F load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
NOGEMM_INLINE F load_part(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
template <class T>
NOGEMM_INLINE F load_part(const T* p, int n) {
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n < kLanes ? n : kLanes) * sizeof(T));
  return load(part);
}
NOGEMM_INLINE I load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }

NOGEMM_INLINE __m128i to_bf16(F a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
NOGEMM_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
NOGEMM_INLINE void store(bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
NOGEMM_INLINE void store(fp16* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
NOGEMM_INLINE void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
NOGEMM_INLINE void store_part(float* p, F a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
template <class T>
NOGEMM_INLINE void store_part(T* p, F a, int n) {
  T part[kLanes];
  store(part, a);
  std::memcpy(p, part, static_cast<size_t>(n < kLanes ? n : kLanes) * sizeof(T));
}
// Past the caches when the address allows: for results far larger than the caches.
NOGEMM_INLINE void stream(float* p, F a) {
  if ((reinterpret_cast<uintptr_t>(p) & 31) == 0) {
    _mm256_stream_ps(p, a.v);
  } else {
    store(p, a);
  }
}
template <class T>
NOGEMM_INLINE void stream(T* p, F a) {
  store(p, a);
}
NOGEMM_INLINE void stream_fence() { _mm_sfence(); }

NOGEMM_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
NOGEMM_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
NOGEMM_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
NOGEMM_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
NOGEMM_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
NOGEMM_INLINE F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
NOGEMM_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
NOGEMM_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
NOGEMM_INLINE F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
NOGEMM_INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
NOGEMM_INLINE F round_even(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
NOGEMM_INLINE F with_sign(F magnitude, F sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}

NOGEMM_INLINE M gt(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
NOGEMM_INLINE M lt(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
NOGEMM_INLINE M le(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
NOGEMM_INLINE M eq(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
NOGEMM_INLINE M either_nan(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)}; }
NOGEMM_INLINE M lt(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
NOGEMM_INLINE M operator&(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
NOGEMM_INLINE M operator|(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
NOGEMM_INLINE M operator~(M a) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
NOGEMM_INLINE uint32_t mask_bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.v)); }
NOGEMM_INLINE F blend(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
NOGEMM_INLINE I blend(M m, I a, I b) { return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))}; }

NOGEMM_INLINE I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
NOGEMM_INLINE I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
NOGEMM_INLINE I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
NOGEMM_INLINE I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
NOGEMM_INLINE I operator^(I a, I b) { return {_mm256_xor_si256(a.v, b.v)}; }
NOGEMM_INLINE M any_bit(I a, I b) {
  const __m256i none = _mm256_cmpeq_epi32(_mm256_and_si256(a.v, b.v), _mm256_setzero_si256());
  return ~M{_mm256_castsi256_ps(none)};
}
NOGEMM_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }

// p * 2^n for p in [0.5, 2) and an integral n in [-126, 1].
NOGEMM_INLINE F scale_exponent(F p, F n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(e))};
}
NOGEMM_INLINE float hsum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}
// Sum of the lanes of each of kLanes vectors, as one vector: pairs are added while they are transposed.
NOGEMM_INLINE F hsum_each(const F* a) {
  const __m256 q0 = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  const __m256 q1 = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(q0, q1, 0x20), _mm256_permute2f128_ps(q0, q1, 0x31))};
}
// Lane i swapped with lane i ^ STEP.
template <int STEP>
NOGEMM_INLINE F swap_lanes(F a) {
  if constexpr (STEP == 1) return {_mm256_permute_ps(a.v, 0xB1)};
  if constexpr (STEP == 2) return {_mm256_permute_ps(a.v, 0x4E)};
  if constexpr (STEP == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
  return a;
}
NOGEMM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
NOGEMM_INLINE void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// 16-bit pairs, indexed loads, the transposition of words.
NOGEMM_INLINE I dot_pairs(I acc, I a, I b) {
  // By hand: gcc 12 copies the accumulator before and after the intrinsic, which doubles the time of the inner loop.
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
NOGEMM_INLINE void compress(int32_t* p, I a, M m) {
  const uint64_t lanes = kCompressLanes.of[mask_bits(m)];
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(a.v, order));
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

// Bytes, for vec_bytes_pairs.h.
using Bytes = __m256i;
NOGEMM_INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
// Part 0 or 1 of 64 columns in nibbles, as bytes.
NOGEMM_INLINE Bytes load_nibbles(const uint8_t* p, int part) {
  const Bytes raw = load_bytes(p);
  return _mm256_and_si256(part == 0 ? raw : _mm256_srli_epi16(raw, 4), _mm256_set1_epi8(15));
}
NOGEMM_INLINE Bytes zero_bytes() { return _mm256_setzero_si256(); }
NOGEMM_INLINE Bytes set_bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
NOGEMM_INLINE Bytes set_words(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
NOGEMM_INLINE Bytes set_dwords(int32_t x) { return _mm256_set1_epi32(x); }
NOGEMM_INLINE Bytes bit_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
NOGEMM_INLINE Bytes bit_xor(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
NOGEMM_INLINE Bytes shift_right4(Bytes a) { return _mm256_srli_epi16(a, 4); }
NOGEMM_INLINE Bytes shift_right8(Bytes a) { return _mm256_srli_epi16(a, 8); }
NOGEMM_INLINE Bytes unpack_low16(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
NOGEMM_INLINE Bytes unpack_high16(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
NOGEMM_INLINE Bytes unpack_low32(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
NOGEMM_INLINE Bytes unpack_high32(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
NOGEMM_INLINE Bytes add16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
NOGEMM_INLINE Bytes add32(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
NOGEMM_INLINE Bytes pairs16(Bytes a, Bytes b) { return _mm256_maddubs_epi16(a, b); }
NOGEMM_INLINE Bytes pairs32(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
NOGEMM_INLINE Bytes magnitudes(Bytes a) { return _mm256_abs_epi8(a); }
NOGEMM_INLINE Bytes copy_sign(Bytes q, Bytes c) { return _mm256_sign_epi8(q, c); }
NOGEMM_INLINE Bytes widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NOGEMM_INLINE int32_t hsum32(Bytes a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

}  // namespace nogemm::NOGEMM_NS
