// Words that only roofline.h needs: dot products that some instruction sets have, in chains.
//
// Chains are independent and long enough to hide latency (4 to 5 cycles, two units), and short enough for the registers.
#pragma once
#include "vec.h"

namespace nogemm::NOGEMM_NS {

// One lane has no vector registers to fill: eight chains fit everywhere. AArch64 cores have up to four units.
inline constexpr int kChains = kLanes == 1 ? 8 : kLanes == 4 ? 24 : 12;

// The compiler may neither drop nor hoist a chain whose value it cannot know.
template <typename T>
NOGEMM_INLINE void keep(T& value) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

// FLOP of `loops` rounds of bfloat16 dot products (pairs, float32 sums).
static double roofline_dot_bf16([[maybe_unused]] int64_t loops) {
#if defined(__AVX512BF16__) && !defined(NOGEMM_FORCE_SCALAR)
  __m512 chain[kChains];
  __m512i bits = _mm512_set1_epi16(0x3c00);
  keep(bits);
  const __m512bh a = (__m512bh)bits;
  for (__m512& c : chain) c = _mm512_setzero_ps();
  for (int64_t i = 0; i < loops; ++i) {
    for (__m512& c : chain) c = _mm512_dpbf16_ps(c, a, a);
  }
  for (__m512& c : chain) keep(c);
  return 64.0 * kChains * static_cast<double>(loops);
#else
  return 0.0;
#endif
}

// Operations of `loops` rounds of int8 dot products (fours, int32 sums).
static double roofline_dot_i8([[maybe_unused]] int64_t loops) {
#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
  __m512i chain[kChains];
  __m512i a = _mm512_set1_epi8(1);
  keep(a);
  for (__m512i& c : chain) c = _mm512_setzero_si512();
  for (int64_t i = 0; i < loops; ++i) {
    for (__m512i& c : chain) c = _mm512_dpbusd_epi32(c, a, a);
  }
  for (__m512i& c : chain) keep(c);
  return 128.0 * kChains * static_cast<double>(loops);
#else
  return 0.0;
#endif
}

}  // namespace nogemm::NOGEMM_NS
