// Words for products of bytes on x86 without the int8 dot product instruction: a vector of kBytes bytes, and
// sums of neighbouring products, exact as long as the caller keeps them within 16 bits.
//
//   pairs16(a, b)     unsigned a times signed b, neighbours added: 16-bit lanes, which saturate
//   pairs32(a, b)     signed 16-bit lanes, neighbours added: 32-bit lanes
//   copy_sign(q, c)   q times the sign of c; what it gives where c is 0 is of no account
//   widen(p)          kBytes / 2 signed bytes as 16-bit lanes
//   unpack_low16(a, b), ...   lanes of a and b by turns, within 128 bits: of their low or high half
#pragma once
#include "lookup_vec.h"

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
#define NOGEMM_BYTE_WORDS

namespace nogemm::NOGEMM_NS {

#if defined(__AVX512F__)
using Bytes = __m512i;
NOGEMM_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
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
#else
using Bytes = __m256i;
NOGEMM_INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
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
#endif

inline constexpr int kBytes = static_cast<int>(sizeof(Bytes));

}  // namespace nogemm::NOGEMM_NS

#endif
