// Hadamard matrices of order 12 and 20 on vectors: a[i] becomes sum_j H[i][j] a[j]. Both are symmetric, so H H = m I.
//
//   H_12 = (J_3 - 2 I_3) x H_4 + 2 I_3 x D,   D e = (e_1, e_0, -e_2, e_3)
//          Williamson's array for three (1944), columns permuted and negated until it is symmetric.
//   H_20 = [[C + I, C - I], [C - I, -C - I]],   C = [[0, 1'], [1, S]],   S = 2 (I_3 x J_3 + J_3 x I_3) - J_9 - 3 I_9
//          Paley's second construction (1933) for the field of nine elements a + b i: the difference of two of them is a
//          square where exactly one of a, b agrees.
//
// J is all ones. 56 operations instead of 132, and 112 instead of 380.
#pragma once
#include "vec.h"

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE void order_12(F* a) {
  F sum[4], rest[12];  // rest = (H_4 - D) x of each four; an output is the sum of all H_4 x less twice its own rest
  for (int g = 0; g < 3; ++g) {
    const F *x = a + 4 * g, e = x[0] + x[1], f = x[0] - x[1], p = x[2] + x[3], q = x[2] - x[3];
    const F y[4] = {e + p, f + q, e - p, f - q};
    for (int i = 0; i < 4; ++i) sum[i] = g == 0 ? y[i] : sum[i] + y[i];
    rest[4 * g] = x[0] + p;
    rest[4 * g + 1] = q - x[1];
    rest[4 * g + 2] = e - x[3];
    rest[4 * g + 3] = f - x[2];
  }
  for (int i = 0; i < 12; ++i) a[i] = fnma(set1(2.0f), rest[i], sum[i % 4]);
}

// out = C x: S sums the rows and columns of nine numbers as a square.
NOGEMM_INLINE void conference_10(const F* x, F* out) {
  F row[3], column[3];
  for (int i = 0; i < 3; ++i) {
    row[i] = x[1 + 3 * i] + x[2 + 3 * i] + x[3 + 3 * i];
    column[i] = x[1 + i] + x[4 + i] + x[7 + i];
  }
  out[0] = row[0] + row[1] + row[2];
  const F first = x[0] - out[0];
  for (int i = 0; i < 3; ++i) row[i] = fma(set1(2.0f), row[i], first);
  for (int i = 0; i < 9; ++i) {
    const F lines = fma(set1(2.0f), column[i % 3], row[i / 3]);
    out[1 + i] = fnma(set1(3.0f), x[1 + i], lines);
  }
}

NOGEMM_INLINE void order_20(F* a) {
  F sum[10], difference[10], top[10], bottom[10];
  for (int i = 0; i < 10; ++i) {
    sum[i] = a[i] + a[10 + i];
    difference[i] = a[i] - a[10 + i];
  }
  conference_10(sum, top);
  conference_10(difference, bottom);
  for (int i = 0; i < 10; ++i) {
    a[i] = top[i] + difference[i];
    a[10 + i] = bottom[i] - sum[i];
  }
}

template <int ORDER>
NOGEMM_INLINE void order_step(F* a) {
  static_assert(ORDER == 12 || ORDER == 20);
  if constexpr (ORDER == 12) {
    order_12(a);
  } else {
    order_20(a);
  }
}

}  // namespace nogemm::NOGEMM_NS
