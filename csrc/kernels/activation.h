// Activations of transformer feed-forward layers, a vector at a time.
#pragma once
#include "hire_format.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE F sigmoid(F v) {
  const F e = exp_neg(zero() - abs(v)), inverse = set1(1.0f) / (set1(1.0f) + e);
  return blend(lt(v, zero()), e * inverse, inverse);
}

// Phi(s): Abramowitz and Stegun 7.1.26, absolute error below 1e-7.
NOGEMM_INLINE F normal_cdf(F s) {
  const F z = abs(s) * set1(0.70710678118654752f);
  const F t = set1(1.0f) / fma(z, set1(0.3275911f), set1(1.0f));
  F p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F tail = p * t * exp_neg(zero() - z * z) * set1(0.5f);
  return blend(lt(s, zero()), tail, set1(1.0f) - tail);
}

NOGEMM_INLINE F activate(int64_t act, F s) {
  switch (act) {
    case kRelu:
      return max(zero(), s);
    case kRelu2: {
      const F r = max(zero(), s);
      return r * r;
    }
    case kGelu:
      return s * normal_cdf(s);
    case kGeluTanh: {
      const F cubic = fma(s * s * s, set1(0.044715f), s);
      return s * sigmoid(cubic * set1(1.5957691216057308f));
    }
    case kSilu:
      return s * sigmoid(s);
    default:
      return s * sigmoid(s * set1(1.702f));
  }
}

NOGEMM_INLINE F selection_key(int64_t key, F s) {
  if (key == kKeySigned) return s;
  if (key == kKeyRelu) return max(zero(), s);
  return abs(activate(key, s));
}
static_assert(int{kKeyGelu} == int{kGelu} && int{kKeyQuickGelu} == int{kQuickGelu},
              "keys and activations share codes");

}  // namespace nogemm::NOGEMM_NS
