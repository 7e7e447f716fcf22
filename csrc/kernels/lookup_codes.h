// From z to lookups: which rows, and how much of each. One lane is one (token, table).
//
// A constant score is 1 / T for every table's code.
// u_j = |z_j|, A = sum u, P = prod 1 / (1 + exp(-2 u_j)). The code's bit j (most significant first) is z_j > 0. The
// neighbour that flips the bits F has weight P exp(-2 sum_F u) and, for the gelu score, A - 2 sum_F u in front.
#pragma once
#include "packed/lookup/format.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

struct Encoded {
  I code[4];
  F score[4];
};

// e^(-2u) for u >= 0 as 2^n 2^r, |r| <= 1/2. 2^r by the polynomial with p(0) = 1 of least largest relative error: 1.1e-7 with
// degree 5; 2.8e-6 with degree 4, which is enough where scores are rounded to 16 bits. u stops at 43: 2^n stays normal.
template <bool FINE>
NOGEMM_INLINE F exp_minus_twice(F u) {
  const F t = min(u, set1(43.0f)) * set1(-2.88539008177792681f);
  const F n = round_even(t);
  const F r = t - n;
  F p;
  if constexpr (FINE) {
    p = fma(set1(1.326472725e-3f), r, set1(9.671512786e-3f));
    p = fma(p, r, set1(5.550733744e-2f));
    p = fma(p, r, set1(2.402224208e-1f));
    p = fma(p, r, set1(6.931469776e-1f));
  } else {
    p = fma(set1(9.582853236e-3f), r, set1(5.590642594e-2f));
    p = fma(p, r, set1(2.402409862e-1f));
    p = fma(p, r, set1(6.931241933e-1f));
  }
  return scale_exponent(fma(p, r, set1(1.0f)), n);
}

// The three smallest u seen so far with their masks. Equal u: the smaller mask first, and masks fall from bit to bit.
struct Smallest {
  F u[3];
  I mask[3];
};

NOGEMM_INLINE void see_one(Smallest& s, F u, I mask) {
  const M first = le(u, s.u[0]);
  s.u[0] = blend(first, u, s.u[0]);
  s.mask[0] = blend(first, mask, s.mask[0]);
}

NOGEMM_INLINE void see(Smallest& s, F u, I mask) {
  const M first = le(u, s.u[0]), second = le(u, s.u[1]), third = le(u, s.u[2]);
  s.u[2] = blend(second, s.u[1], blend(third, u, s.u[2]));
  s.mask[2] = blend(second, s.mask[1], blend(third, mask, s.mask[2]));
  s.u[1] = blend(first, s.u[0], blend(second, u, s.u[1]));
  s.mask[1] = blend(first, s.mask[0], blend(second, mask, s.mask[1]));
  s.u[0] = blend(first, u, s.u[0]);
  s.mask[0] = blend(first, mask, s.mask[0]);
}

NOGEMM_INLINE F score_of(bool gelu, F a, F p, F broken) { return (gelu ? a * p : p) + broken; }

template <bool FINE>
NOGEMM_INLINE void add_neighbour(Encoded& out, int f, bool gelu, F a, F p, F sum, I mask, F broken) {
  out.code[f] = out.code[0] ^ mask;
  out.score[f] = score_of(gelu, a - sum - sum, p * exp_minus_twice<FINE>(sum), broken);
}

// bit(j) gives z_j of the lanes' tables.
template <bool FINE, class Bit>
NOGEMM_INLINE void encode(int bits, int neighbours, bool gelu, Bit bit, Encoded& out) {
  F a = zero(), product = set1(1.0f);
  I code = set1(int32_t{0});
  const F huge = set1(3.0e38f);
  Smallest small = {{huge, huge, huge}, {set1(0), set1(0), set1(0)}};
  for (int j = 0; j < bits; ++j) {
    const F z = bit(j), u = abs(z);
    const I mask = set1(int32_t{1} << (bits - 1 - j));
    code = blend(gt(z, zero()), code | mask, code);
    a = a + u;
    product = fma(product, exp_minus_twice<FINE>(u), product);
    if (neighbours == 2) see_one(small, u, mask);
    if (neighbours > 2) see(small, u, mask);
  }
  const F p = set1(1.0f) / product;
  const F broken = a * zero();  // NaN if any z is NaN or infinite, else 0
  out.code[0] = code;
  out.score[0] = score_of(gelu, a, p, broken);
  if (neighbours > 1) add_neighbour<FINE>(out, 1, gelu, a, p, small.u[0], small.mask[0], broken);
  if (neighbours > 2) {
    add_neighbour<FINE>(out, 2, gelu, a, p, small.u[1], small.mask[1], broken);
    const F both = small.u[0] + small.u[1];
    const I pair = small.mask[0] | small.mask[1];
    const M single = lt(small.u[2], both) | (eq(small.u[2], both) & lt(small.mask[2], pair));
    add_neighbour<FINE>(out, 3, gelu, a, p, blend(single, small.u[2], both), blend(single, small.mask[2], pair),
                        broken);
  }
}

// Codes alone. A z that is NaN or infinite still shows in the score.
template <class Bit>
NOGEMM_INLINE void encode_signs(int bits, F score, Bit bit, Encoded& out) {
  I code = set1(int32_t{0});
  for (int j = 0; j < bits; ++j) {
    const F z = bit(j);
    code = blend(gt(z, zero()), code | set1(int32_t{1} << (bits - 1 - j)), code);
    score = fma(z, zero(), score);
  }
  out.code[0] = code;
  out.score[0] = score;
}

// What the layer asks for: 16-bit scores need less of the exponential.
template <class Bit>
NOGEMM_INLINE void encode_lookups(const LookupHeader& h, Bit bit, Encoded& out) {
  if (h.score == NOGEMM_LOOKUP_CONSTANT) {
    encode_signs(h.bits, set1(1.0f / static_cast<float>(h.tables)), bit, out);
  } else if (h.integers()) {
    encode<false>(h.bits, h.neighbours, h.score == NOGEMM_LOOKUP_GELU, bit, out);
  } else {
    encode<true>(h.bits, h.neighbours, h.score == NOGEMM_LOOKUP_GELU, bit, out);
  }
}

}  // namespace nogemm::NOGEMM_NS
