// Activations of transformer feed-forward layers, a vector at a time.
#pragma once
#include "packed/host/activations.h"
#include "packed/neurons/format.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE F sigmoid(F v) {
  const F e = exp_neg(zero() - abs(v)), inverse = set1(1.0f) / (set1(1.0f) + e);
  return blend(lt(v, zero()), e * inverse, inverse);
}

// GELU is the exact one, z Phi(z). Phi(-|z|) = exp(-z^2 / 2) p(t) / 2 with t = 1 / (1 + c |z| / sqrt 2) and the
// polynomial of Hastings (Abramowitz and Stegun 7.1.26): below 8e-8 off, and exact in the limit on either side.
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

NOGEMM_INLINE F activate(int64_t act, F s) {
  switch (act) {
    case NOGEMM_RELU:
      return max(zero(), s);
    case NOGEMM_RELU2: {
      const F r = max(zero(), s);
      return r * r;
    }
    case NOGEMM_GELU:
      return gelu(s);
    case NOGEMM_GELU_TANH: {
      const F cubic = fma(s * s * s, set1(0.044715f), s);
      return s * sigmoid(cubic * set1(1.5957691216057308f));
    }
    case NOGEMM_SILU:
      return s * sigmoid(s);
    default:
      return s * sigmoid(s * set1(1.702f));
  }
}

NOGEMM_INLINE F selection_key(int64_t key, F s) { return key == kKeySigned ? s : abs(activate(key, s)); }

}  // namespace nogemm::NOGEMM_NS
