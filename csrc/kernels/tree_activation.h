// GELU, ReLU and SiLU of a vector.
//
// GELU is the exact one, z Phi(z). Phi(-|z|) = exp(-z^2 / 2) p(t) / 2 with t = 1 / (1 + c |z| / sqrt 2) and
// the polynomial of Hastings (Abramowitz and Stegun 7.1.26): below 8e-8 off, and exact in the limit on either
// side.
#pragma once
#include "../tree_pack.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE F gelu(F z) {
  const F size = abs(z);
  const F t = set1(1.0f) / fma(size, set1(0.3275911f * 0.70710678f), set1(1.0f));
  F p = set1(0.5f * 1.061405429f);
  p = fma(p, t, set1(0.5f * -1.453152027f));
  p = fma(p, t, set1(0.5f * 1.421413741f));
  p = fma(p, t, set1(0.5f * -0.284496736f));
  p = fma(p, t, set1(0.5f * 0.254829592f));
  const F tail = p * t * exp_neg(size * size * set1(-0.5f)) * z;
  return blend(gt(z, zero()), z - tail, tail);
}

NOGEMM_INLINE F silu(F z) {
  const F e = exp_neg(zero() - abs(z));
  const F share = z / (set1(1.0f) + e);
  return blend(gt(z, zero()), share, share * e);
}

NOGEMM_INLINE F tree_activation(F z, int64_t kind) {
  if (kind == NOGEMM_TREE_GELU) return gelu(z);
  if (kind == NOGEMM_TREE_SILU) return silu(z);
  return blend(gt(z, zero()), z, z * zero());  // z * 0 keeps a NaN
}

}  // namespace nogemm::NOGEMM_NS
