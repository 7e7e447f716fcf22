// Codes and scores of soft codes z, and the gradient of z.
//
//     u_j = |z_j|,  code = sum_j [z_j > 0] 2^(K-1-j),  A = sum_j u_j,  P = prod_j 1 / (1 + exp(-2 u_j))
//     for a set F of flipped bits: s_F = sum_F u,  a_F = A - 2 s_F,  p_F = P exp(-2 s_F),  score = a_F p_F
//     (gelu) or p_F dz_j = sum_F grad_F p_F (S_Fj + a_F (S_Fj - tanh z_j)) (gelu) or grad_F p_F (S_Fj - tanh
//     z_j), S_Fj = +-1 by bit j of code F
//
// Tables lie in the lanes: one step handles kLanes tables of one token, so everything is vertical. No
// logarithm and no sigmoid: one exponential per bit, one division per table. A table with a NaN or an
// infinity gets score NaN and gradient NaN.
#pragma once
#include "vec.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kMaxBits = 30;  // codes are int32; the product of 30 factors (1 + e) <= 2 stays finite
inline constexpr float kLargest = 3.402823466e38f;

// The soft codes of up to kLanes tables, bit-major: bit j of lane l at [j * kLanes + l]; absent lanes hold 0.
struct SoftCodes {
  alignas(64) float z[kMaxBits * kLanes];
};

template <class T>
NOGEMM_INLINE void load_soft_codes(const T* z, int count, int bits, SoftCodes& out) {
  if (count < kLanes) {
    for (int i = 0; i < bits * kLanes; ++i) out.z[i] = 0.0f;
  }
  for (int l = 0; l < count; ++l) {
    for (int j = 0; j < bits; ++j) out.z[j * kLanes + l] = to_float(z[l * bits + j]);
  }
}

NOGEMM_INLINE F not_a_number() { return set1(bits_to_float(0x7fc00000u)); }

struct Flip {
  F sum;
  I mask;
};

// The three bits of least u in increasing order (ties: the smaller mask first). Bits are offered from the
// last to the first, so masks come in increasing order and a strict comparison keeps the earlier one.
struct SmallestFlips {
  Flip best[3];

  NOGEMM_INLINE SmallestFlips start() {
    const Flip none{set1(HUGE_VALF), set1(0)};
    return {{none, none, none}};
  }

  [[gnu::always_inline]] inline void offer(F u, I mask) {
    M smaller = lt(set1(1.0f), zero());
    for (Flip& b : best) {
      smaller = smaller | lt(u, b.sum);  // once placed, the rest moves down, also past an equal sum
      const Flip old = b;
      b = {blend(smaller, u, old.sum), blend(smaller, mask, old.mask)};
      u = blend(smaller, old.sum, u);
      mask = blend(smaller, old.mask, mask);
    }
  }

  // The k nearest sets are {}, {1st}, {2nd} and then the third bit or the first two together.
  [[gnu::always_inline]] inline Flip fourth() const {
    const F pair_sum = best[0].sum + best[1].sum;
    const I pair = best[0].mask | best[1].mask;
    const M nearer = lt(pair_sum, best[2].sum) | (eq(pair_sum, best[2].sum) & lt(pair, best[2].mask));
    return {blend(nearer, pair_sum, best[2].sum), blend(nearer, pair, best[2].mask)};
  }
};

// Writes lane l of the F-th result at out[l * neighbours + f].
template <class T>
NOGEMM_INLINE void scatter_lanes(const float* lanes, int count, int neighbours, T* out) {
  for (int l = 0; l < count; ++l) from_float(lanes[l], out[l * neighbours]);
}

template <int NEIGHBOURS, class T>
static void hash_tile(const T* z, int count, int bits, bool gelu, int32_t* codes, T* scores) {
  SoftCodes soft;
  load_soft_codes(z, count, bits, soft);
  F total = zero(), product = set1(1.0f);
  I code = set1(0);
  M finite = le(zero(), zero());
  [[maybe_unused]] SmallestFlips flips = SmallestFlips::start();
  for (int j = bits - 1; j >= 0; --j) {
    const I place = set1(int32_t{1} << (bits - 1 - j));
    const F zj = load(soft.z + j * kLanes), u = abs(zj);
    const F e = exp_neg(u * set1(-2.0f));
    product = fma(product, e, product);
    total = total + u;
    code = blend(gt(zj, zero()), code | place, code);
    const M ok = le(u, set1(kLargest));
    finite = finite & ok;
    if constexpr (NEIGHBOURS > 1) flips.offer(blend(ok, u, set1(kLargest)), place);
  }
  const F p = set1(1.0f) / product;
  alignas(64) int32_t code_lanes[kLanes];
  alignas(64) float score_lanes[kLanes];
  for (int f = 0; f < NEIGHBOURS; ++f) {
    F score = gelu ? total * p : p;
    I flipped = code;
    if (f > 0) {
      const Flip flip = f < 3 ? flips.best[f - 1] : flips.fourth();
      const F twice = flip.sum + flip.sum;
      const F near = p * exp_neg(zero() - twice);
      score = gelu ? (total - twice) * near : near;
      flipped = code ^ flip.mask;
    }
    store(score_lanes, blend(finite, score, not_a_number()));
    store(code_lanes, flipped);
    for (int l = 0; l < count; ++l) codes[l * NEIGHBOURS + f] = code_lanes[l];
    scatter_lanes(score_lanes, count, NEIGHBOURS, scores + f);
  }
}

template <class T>
static void hash_forward(const void* z_void, int32_t* codes, void* scores_void, int64_t tokens, int64_t tables,
                         int bits, int neighbours, bool gelu) {
  const T* z = static_cast<const T*>(z_void);
  T* scores = static_cast<T*>(scores_void);
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t t = 0; t < tables; t += kLanes) {
      const int count = static_cast<int>(tables - t < kLanes ? tables - t : kLanes);
      const int64_t at = n * tables + t;
      const T* zt = z + at * bits;
      int32_t* c = codes + at * neighbours;
      T* s = scores + at * neighbours;
      if (neighbours == 1) {
        hash_tile<1>(zt, count, bits, gelu, c, s);
      } else if (neighbours == 2) {
        hash_tile<2>(zt, count, bits, gelu, c, s);
      } else {
        hash_tile<4>(zt, count, bits, gelu, c, s);
      }
    }
  }
}

template <class T>
static void hash_backward_tile(const T* grad, const T* z, const int32_t* codes, T* grad_z, int count, int bits,
                               int neighbours, bool gelu) {
  SoftCodes soft, slope;  // slope: tanh z until the end, then the gradient
  alignas(64) float sums[kMaxBits * kLanes];
  load_soft_codes(z, count, bits, soft);
  F total = zero(), p = set1(1.0f);
  M finite = le(zero(), zero());
  for (int j = 0; j < bits; ++j) {
    const F zj = load(soft.z + j * kLanes), u = abs(zj);
    const F e = exp_neg(u * set1(-2.0f));
    const F sigmoid = set1(1.0f) / (set1(1.0f) + e);
    total = total + u;
    p = p * sigmoid;
    finite = finite & le(u, set1(kLargest));
    store(slope.z + j * kLanes, with_sign((set1(1.0f) - e) * sigmoid, zj));
    store(sums + j * kLanes, zero());
  }
  alignas(64) int32_t base_lanes[kLanes] = {}, code_lanes[kLanes] = {};
  alignas(64) float grad_lanes[kLanes] = {};
  F tanh_weight = zero();
  for (int l = 0; l < count; ++l) base_lanes[l] = codes[l * neighbours];
  for (int f = 0; f < neighbours; ++f) {
    for (int l = 0; l < count; ++l) {
      code_lanes[l] = codes[l * neighbours + f];
      grad_lanes[l] = to_float(grad[l * neighbours + f]);
    }
    const I code = load(code_lanes), flips = code ^ load(base_lanes);
    F sum = zero();
    for (int j = 0; j < bits; ++j) {
      const M flipped = any_bit(flips, set1(int32_t{1} << (bits - 1 - j)));
      sum = sum + blend(flipped, abs(load(soft.z + j * kLanes)), zero());
    }
    const F twice = sum + sum;
    const F near = load(grad_lanes) * (p * exp_neg(zero() - twice));
    const F outer = gelu ? near * (total - twice) : near;  // weight of (S - tanh)
    const F weight = gelu ? near + outer : near;           // weight of S
    tanh_weight = tanh_weight + outer;
    for (int j = 0; j < bits; ++j) {
      const M set = any_bit(code, set1(int32_t{1} << (bits - 1 - j)));
      float* at = sums + j * kLanes;
      store(at, load(at) + blend(set, weight, zero() - weight));
    }
  }
  for (int j = 0; j < bits; ++j) {
    float* at = slope.z + j * kLanes;
    const F g = fnma(load(at), tanh_weight, load(sums + j * kLanes));
    store(at, blend(finite, g, not_a_number()));
  }
  for (int l = 0; l < count; ++l) {
    for (int j = 0; j < bits; ++j) from_float(slope.z[j * kLanes + l], grad_z[l * bits + j]);
  }
}

template <class T>
static void hash_backward(const void* grad, const void* z, const int32_t* codes, void* grad_z, int64_t tokens,
                          int64_t tables, int bits, int neighbours, bool gelu) {
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t t = 0; t < tables; t += kLanes) {
      const int count = static_cast<int>(tables - t < kLanes ? tables - t : kLanes);
      const int64_t at = n * tables + t;
      hash_backward_tile(static_cast<const T*>(grad) + at * neighbours, static_cast<const T*>(z) + at * bits,
                         codes + at * neighbours, static_cast<T*>(grad_z) + at * bits, count, bits, neighbours, gelu);
    }
  }
}

static constexpr HashCodesKernels hash_codes_kernels() {
  HashCodesKernels k{};
  k.forward[kF32] = hash_forward<float>;
  k.forward[kBF16] = hash_forward<bf16>;
  k.backward[kF32] = hash_backward<float>;
  k.backward[kBF16] = hash_backward<bf16>;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
