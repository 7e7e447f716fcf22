// What the machine can reach with this instruction set: multiply-adds from registers, and loads from a buffer.
//
// Chains are independent and long enough to hide latency (4 to 5 cycles, two units), and short enough for the registers.
// Each function returns what it did, so that the caller divides by its own clock; zero means "no such instruction here".
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

// FLOP of `loops` rounds of float32 multiply-adds.
static double roofline_fma_f32(int64_t loops) {
  F chain[kChains];
  F a = set1(0.999f), b = set1(1e-9f);
  for (F& c : chain) c = zero();
  for (int64_t i = 0; i < loops; ++i) {
    for (F& c : chain) c = fma(a, c, b);
  }
  for (F& c : chain) keep(c.v);
  return 2.0 * kLanes * kChains * static_cast<double>(loops);
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

// Bytes read by `repeats` passes over `count` floats; count a multiple of 8 vectors is used, the rest ignored.
static double roofline_load(const float* data, int64_t count, int64_t repeats) {
  constexpr int kStep = 8;
  F sum[kStep];
  for (F& s : sum) s = zero();
  const int64_t whole = count / (kStep * kLanes) * (kStep * kLanes);
  for (int64_t pass = 0; pass < repeats; ++pass) {
    for (int64_t i = 0; i < whole; i += kStep * kLanes) {
      for (int j = 0; j < kStep; ++j) sum[j] = sum[j] + load(data + i + j * kLanes);
    }
  }
  for (F& s : sum) keep(s.v);
  return 4.0 * static_cast<double>(whole) * static_cast<double>(repeats);
}

static constexpr RooflineKernels roofline_kernels() {
  return {roofline_fma_f32, roofline_dot_bf16, roofline_dot_i8, roofline_load};
}

}  // namespace nogemm::NOGEMM_NS
