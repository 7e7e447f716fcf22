// vec.h for one lane: plain C++, any CPU. Included by vec.h only.
#pragma once

namespace nogemm::NOGEMM_NS {

inline constexpr int kLanes = 1;
inline constexpr int kRegisters = 16;  // a guess at what the compiler has; only tile sizes depend on it

struct F {
  float v;
};
struct I {
  int32_t v;
};
struct M {
  bool v;
};

NOGEMM_INLINE F zero() { return {0.0f}; }
NOGEMM_INLINE F set1(float x) { return {x}; }
NOGEMM_INLINE I set1(int32_t x) { return {x}; }

template <class T>
NOGEMM_INLINE F load(const T* p) {
  return {to_float(*p)};
}
template <class T>
NOGEMM_INLINE F load_part(const T* p, int n) {
  return {n > 0 ? to_float(*p) : 0.0f};
}
template <class T>
NOGEMM_INLINE void store(T* p, F a) {
  from_float(a.v, *p);
}
template <class T>
NOGEMM_INLINE void store_part(T* p, F a, int n) {
  if (n > 0) from_float(a.v, *p);
}
template <class T>
NOGEMM_INLINE void stream(T* p, F a) {
  store(p, a);
}
NOGEMM_INLINE void stream_fence() {}
NOGEMM_INLINE I load(const int32_t* p) { return {*p}; }
NOGEMM_INLINE void store(int32_t* p, I a) { *p = a.v; }

NOGEMM_INLINE F operator+(F a, F b) { return {a.v + b.v}; }
NOGEMM_INLINE F operator-(F a, F b) { return {a.v - b.v}; }
NOGEMM_INLINE F operator*(F a, F b) { return {a.v * b.v}; }
NOGEMM_INLINE F operator/(F a, F b) { return {a.v / b.v}; }
// Two roundings: without an FMA instruction a fused one would be a library call of some 50 ns.
NOGEMM_INLINE F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
NOGEMM_INLINE F fnma(F a, F b, F c) { return {c.v - a.v * b.v}; }
NOGEMM_INLINE F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
NOGEMM_INLINE F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
NOGEMM_INLINE F abs(F a) { return {std::fabs(a.v)}; }
NOGEMM_INLINE F sqrt(F a) { return {std::sqrt(a.v)}; }
NOGEMM_INLINE F round_even(F a) { return {std::nearbyint(a.v)}; }
NOGEMM_INLINE F with_sign(F magnitude, F sign) { return {std::copysign(magnitude.v, sign.v)}; }

NOGEMM_INLINE M gt(F a, F b) { return {a.v > b.v}; }
NOGEMM_INLINE M lt(F a, F b) { return {a.v < b.v}; }
NOGEMM_INLINE M le(F a, F b) { return {a.v <= b.v}; }
NOGEMM_INLINE M eq(F a, F b) { return {a.v == b.v}; }
NOGEMM_INLINE M either_nan(F a, F b) { return {a.v != a.v || b.v != b.v}; }
NOGEMM_INLINE M lt(I a, I b) { return {a.v < b.v}; }
NOGEMM_INLINE M operator&(M a, M b) { return {a.v && b.v}; }
NOGEMM_INLINE M operator|(M a, M b) { return {a.v || b.v}; }
NOGEMM_INLINE M operator~(M a) { return {!a.v}; }
NOGEMM_INLINE uint32_t mask_bits(M m) { return m.v ? 1u : 0u; }
NOGEMM_INLINE F blend(M m, F a, F b) { return m.v ? a : b; }
NOGEMM_INLINE I blend(M m, I a, I b) { return m.v ? a : b; }

// Unsigned arithmetic: sums wrap like the vector instructions do, without undefined behaviour.
NOGEMM_INLINE I operator+(I a, I b) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) + static_cast<uint32_t>(b.v))};
}
NOGEMM_INLINE I operator-(I a, I b) {
  return {static_cast<int32_t>(static_cast<uint32_t>(a.v) - static_cast<uint32_t>(b.v))};
}
NOGEMM_INLINE I operator|(I a, I b) { return {a.v | b.v}; }
NOGEMM_INLINE I operator&(I a, I b) { return {a.v & b.v}; }
NOGEMM_INLINE I operator^(I a, I b) { return {a.v ^ b.v}; }
NOGEMM_INLINE M any_bit(I a, I b) { return {(a.v & b.v) != 0}; }
NOGEMM_INLINE F to_float(I a) { return {static_cast<float>(a.v)}; }

// p * 2^n for p in [0.5, 2) and an integral n in [-126, 1].
NOGEMM_INLINE F scale_exponent(F p, F n) {
  const float bounded = n.v > -127.0f ? n.v : -127.0f;  // NaN fails the comparison; p carries it on
  return {p.v * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(bounded) + 127) << 23)};
}
NOGEMM_INLINE float hsum(F a) { return a.v; }
// Sum of the lanes of each of kLanes vectors, as one vector.
NOGEMM_INLINE F hsum_each(const F* a) { return a[0]; }
// Lane i swapped with lane i ^ STEP; there is nothing to swap in a single lane.
template <int STEP>
NOGEMM_INLINE F swap_lanes(F a) {
  return a;
}
NOGEMM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
NOGEMM_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// 16-bit pairs, indexed loads, the transposition of words.
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
NOGEMM_INLINE void compress(int32_t* p, I a, M) { *p = a.v; }
NOGEMM_INLINE int32_t hmax(I a) { return a.v; }
NOGEMM_INLINE void transpose(const int32_t* p, int64_t, int32_t* out, int64_t) { *out = *p; }

}  // namespace nogemm::NOGEMM_NS
