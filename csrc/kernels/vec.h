// The vector vocabulary every kernel is written in: one specialisation per instruction set, chosen by the
// flags a file is built with. A file in csrc/isa defines NOGEMM_NS (scalar, avx2, ...) before including this;
// everything lives in nogemm::NOGEMM_NS, so two objects built with different flags never share a symbol (no
// ODR trap).
//
//   F, I, M      a vector of kLanes floats, of kLanes int32, a mask of kLanes bits
//   load, store  T = float, bf16, fp16 or int8 (load only) <-> F; *_part touch only the first n lanes (others read as 0)
//   arithmetic   + - * /, fma(a,b,c) = a b + c, fnma = c - a b, min max abs, comparisons -> M
//   either_nan   either_nan(a, b): lanes where a or b is NaN
//   blend        blend(m, a, b) = m ? a : b
//   exp_neg      e^x for x <= 0, relative error below 2e-7, 0 below -87.3, NaN for NaN
//   hsum         sum of the lanes in a fixed order
//   dot_pairs(acc, a, b)   acc + a.lo b.lo + a.hi b.hi, where every 32-bit lane holds two signed 16-bit numbers
//   pack_pair(lo, hi)      two vectors of small integers into one vector of such pairs
//   magnitude(x)           |x| as its bits: ordered like the numbers, NaN and infinity above all (max() may drop a NaN)
//   compress(p, a, m)      the lanes of a that m has, side by side from p; all kLanes words there are written
//   transpose(p, stride, out, out_stride)   kLanes x kLanes 32-bit words: "a token a row" to "a token a lane"
//
// vec_bytes.h has the words for sums of products of bytes, vec_peak.h those that measure an instruction set.
//
// float <-> bf16 rounds to nearest even and keeps subnormals and NaN on every instruction set:
// `vcvtneps2bf16` would flush subnormals, and results would then differ between instruction sets for no
// reason.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtype.h"

#ifndef NOGEMM_NS
#error "define NOGEMM_NS to the name of the instruction set before including vec.h"
#endif

#define NOGEMM_INLINE [[gnu::always_inline]] static inline
#define NOGEMM_RESTRICT __restrict__
// Unrolled before the compiler decides where arrays live: accumulators then stay in registers.
#define NOGEMM_UNROLL _Pragma("GCC unroll 16")

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

NOGEMM_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}

NOGEMM_INLINE float to_float(float x) { return x; }
NOGEMM_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
NOGEMM_INLINE float to_float(int8_t x) { return static_cast<float>(x); }

// Exponent rebias by one multiplication: 2^112 moves half's exponent to float's and normalises subnormals on
// the way.
NOGEMM_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t special = rest >= 0x0f800000u ? 0x70000000u : 0u;  // infinity and NaN keep the all-ones exponent
  const float scaled = bits_to_float(rest) * 0x1p112f;
  return bits_to_float(sign | (special ? (rest | 0x7f800000u) : float_to_bits(scaled)));
}

NOGEMM_INLINE void from_float(float x, float& out) { out = x; }
NOGEMM_INLINE void from_float(float x, bf16& out) {
  const uint32_t u = float_to_bits(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? ((u >> 16) | 0x40u) : ((u + 0x7fffu + ((u >> 16) & 1u)) >> 16));
}
NOGEMM_INLINE void from_float(float x, fp16& out) {
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u;
  } else if (a >= 0x477ff000u) {
    h = 0x7c00u;  // rounds past the largest half
  } else if (a < 0x38800000u) {
    h = float_to_bits(bits_to_float(a) + 0.5f) -
        0x3f000000u;  // subnormal: the float adder rounds to a multiple of 2^-24
  } else {
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | h);
}

}  // namespace nogemm::NOGEMM_NS

#if defined(__AVX512F__) && !defined(NOGEMM_FORCE_SCALAR)
#include "vec_avx512.h"
#elif defined(__AVX2__) && !defined(NOGEMM_FORCE_SCALAR)
#include "vec_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(NOGEMM_FORCE_SCALAR)
#include "vec_neon.h"
#else
#include "vec_scalar.h"
#endif

namespace nogemm::NOGEMM_NS {

// e^x for x <= 0. x = n ln2 + r with |r| <= ln2 / 2; e^r by its Taylor polynomial to degree 7 (remainder 5e-9
// relative); 2^n is put into the exponent. Below -87.3 the result would be subnormal and is given as 0. NaN
// survives because the final blend compares x, and because r is NaN.
NOGEMM_INLINE F exp_neg(F x) {
  const F n = round_even(x * set1(1.44269504088896341f));
  F r = fnma(n, set1(0.693145751953125f), x);  // ln2 in two parts: the first has 15 bits, so n * part is exact
  r = fnma(n, set1(1.42860682e-6f), r);
  F p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return blend(lt(x, set1(-87.3f)), zero(), scale_exponent(p, n));
}

NOGEMM_INLINE I load_word(const int32_t* p) { return set1(*p); }
NOGEMM_INLINE I magnitude(F a) { return as_int(a) & set1(INT32_MAX); }

NOGEMM_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) prefetch(static_cast<const char*>(row) + b);
}

}  // namespace nogemm::NOGEMM_NS
