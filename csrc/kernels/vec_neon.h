// vec.h for AArch64 Advanced SIMD, the Armv8-A baseline: four lanes, thirty-two registers. Included by vec.h
// only.
#pragma once
#include <arm_neon.h>

namespace nogemm::NOGEMM_NS {

inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 32;

struct F {
  float32x4_t v;
};
struct I {
  int32x4_t v;
};
struct M {
  uint32x4_t v;  // all bits of a lane set or clear
};

// For each mask, the bytes of the lanes that are set, lowest first.
struct CompressBytes {
  uint8_t of[16][16];
};
static constexpr CompressBytes compress_bytes() {
  CompressBytes t{};
  for (int mask = 0; mask < 16; ++mask)
    for (int lane = 0, at = 0; lane < 4; ++lane)
      for (int byte = 0; (mask >> lane & 1) && byte < 4; ++byte)
        t.of[mask][at++] = static_cast<uint8_t>(4 * lane + byte);
  return t;
}
static constexpr CompressBytes kCompressBytes = compress_bytes();

NOGEMM_INLINE F zero() { return {vdupq_n_f32(0.0f)}; }
NOGEMM_INLINE F set1(float x) { return {vdupq_n_f32(x)}; }
NOGEMM_INLINE I set1(int32_t x) { return {vdupq_n_s32(x)}; }

// kLanes bytes in the low half; the vector load would read eight.
NOGEMM_INLINE uint8x8_t load_four_bytes(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return vreinterpret_u8_u32(vdup_n_u32(word));
}

NOGEMM_INLINE F load(const float* p) { return {vld1q_f32(p)}; }
NOGEMM_INLINE F load(const bf16* p) { return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(&p->bits)), 16))}; }
NOGEMM_INLINE F load(const fp16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
NOGEMM_INLINE F load(const int8_t* p) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(load_four_bytes(p)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
}
NOGEMM_INLINE I load(const int32_t* p) { return {vld1q_s32(p)}; }
// Lane by lane: a copy of unknown length would be a call, and some kernels load a part in their inner loop.
template <class T>
NOGEMM_INLINE F load_part(const T* p, int n) {
  T part[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if (i < n) part[i] = p[i];
  return load(part);
}

NOGEMM_INLINE uint16x4_t to_bf16(F a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  const uint16x4_t quiet = vorr_u16(vshrn_n_u32(u, 16), vdup_n_u16(0x40));
  return vbsl_u16(vmovn_u32(vceqq_f32(a.v, a.v)), rounded, quiet);
}
NOGEMM_INLINE void store(float* p, F a) { vst1q_f32(p, a.v); }
NOGEMM_INLINE void store(bf16* p, F a) { vst1_u16(&p->bits, to_bf16(a)); }
NOGEMM_INLINE void store(fp16* p, F a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }
NOGEMM_INLINE void store(int32_t* p, I a) { vst1q_s32(p, a.v); }
template <class T>
NOGEMM_INLINE void store_part(T* p, F a, int n) {
  T part[kLanes];
  store(part, a);
  for (int i = 0; i < kLanes; ++i)
    if (i < n) p[i] = part[i];
}
// No store goes past the caches here: the compiler has no intrinsic for the pair store that hints at it.
template <class T>
NOGEMM_INLINE void stream(T* p, F a) {
  store(p, a);
}
NOGEMM_INLINE void stream_fence() {}

NOGEMM_INLINE F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
NOGEMM_INLINE F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
NOGEMM_INLINE F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
NOGEMM_INLINE F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
NOGEMM_INLINE F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
NOGEMM_INLINE F fnma(F a, F b, F c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
// The second operand if either is NaN, as on every other instruction set; FMAX and FMAXNM know no sides.
NOGEMM_INLINE F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
NOGEMM_INLINE F min(F a, F b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
NOGEMM_INLINE F abs(F a) { return {vabsq_f32(a.v)}; }
NOGEMM_INLINE F sqrt(F a) { return {vsqrtq_f32(a.v)}; }
NOGEMM_INLINE F round_even(F a) { return {vrndnq_f32(a.v)}; }
NOGEMM_INLINE F with_sign(F magnitude, F sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v)}; }

NOGEMM_INLINE M gt(F a, F b) { return {vcgtq_f32(a.v, b.v)}; }
NOGEMM_INLINE M lt(F a, F b) { return {vcltq_f32(a.v, b.v)}; }
NOGEMM_INLINE M le(F a, F b) { return {vcleq_f32(a.v, b.v)}; }
NOGEMM_INLINE M eq(F a, F b) { return {vceqq_f32(a.v, b.v)}; }
NOGEMM_INLINE M either_nan(F a, F b) { return {vmvnq_u32(vandq_u32(vceqq_f32(a.v, a.v), vceqq_f32(b.v, b.v)))}; }
NOGEMM_INLINE M lt(I a, I b) { return {vcltq_s32(a.v, b.v)}; }
NOGEMM_INLINE M operator&(M a, M b) { return {vandq_u32(a.v, b.v)}; }
NOGEMM_INLINE M operator|(M a, M b) { return {vorrq_u32(a.v, b.v)}; }
NOGEMM_INLINE M operator~(M a) { return {vmvnq_u32(a.v)}; }
NOGEMM_INLINE uint32_t mask_bits(M m) {
  const uint32x4_t bit = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m.v, bit));
}
NOGEMM_INLINE F blend(M m, F a, F b) { return {vbslq_f32(m.v, a.v, b.v)}; }
NOGEMM_INLINE I blend(M m, I a, I b) { return {vbslq_s32(m.v, a.v, b.v)}; }

NOGEMM_INLINE I operator+(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
NOGEMM_INLINE I operator-(I a, I b) { return {vsubq_s32(a.v, b.v)}; }
NOGEMM_INLINE I operator|(I a, I b) { return {vorrq_s32(a.v, b.v)}; }
NOGEMM_INLINE I operator&(I a, I b) { return {vandq_s32(a.v, b.v)}; }
NOGEMM_INLINE I operator^(I a, I b) { return {veorq_s32(a.v, b.v)}; }
NOGEMM_INLINE M any_bit(I a, I b) { return {vtstq_s32(a.v, b.v)}; }
NOGEMM_INLINE F to_float(I a) { return {vcvtq_f32_s32(a.v)}; }

// p * 2^n for p in [0.5, 2) and an integral n in [-126, 1]. A NaN converts to 0; p carries it on.
NOGEMM_INLINE F scale_exponent(F p, F n) {
  const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23);
  return {vmulq_f32(p.v, vreinterpretq_f32_s32(e))};
}
// Written out: (0 + 1) + (2 + 3), whatever a compiler makes of the across-lanes intrinsic.
NOGEMM_INLINE float hsum(F a) {
  const float32x4_t pairs = vpaddq_f32(a.v, a.v);
  return vgetq_lane_f32(vpaddq_f32(pairs, pairs), 0);
}
// Sum of the lanes of each of kLanes vectors, as one vector: pairs are added while they are transposed.
NOGEMM_INLINE F hsum_each(const F* a) { return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))}; }
// Lane i swapped with lane i ^ STEP.
template <int STEP>
NOGEMM_INLINE F swap_lanes(F a) {
  if constexpr (STEP == 1) return {vrev64q_f32(a.v)};
  if constexpr (STEP == 2) return {vextq_f32(a.v, a.v, 2)};
  return a;
}
NOGEMM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
NOGEMM_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// 16-bit pairs, indexed loads, the transposition of words.
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
NOGEMM_INLINE void compress(int32_t* p, I a, M m) {
  const uint8x16_t bytes = vld1q_u8(kCompressBytes.of[mask_bits(m)]);
  vst1q_s32(p, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(a.v), bytes)));
}
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

}  // namespace nogemm::NOGEMM_NS
