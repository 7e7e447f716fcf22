// Entries of H_mP = H_m x H_P, written from their definitions; shares no code with the kernels.
#pragma once
#include <cstdint>

namespace hadamard_reference {

inline int sylvester(int64_t i, int64_t j) {
  return __builtin_parityll(static_cast<unsigned long long>(i & j)) ? -1 : 1;
}

// Williamson's array for three, made symmetric: off the diagonal blocks H_4, on it -H_4 with one entry per row turned.
inline int entry_12(int64_t i, int64_t j) {
  if (i / 4 != j / 4) return sylvester(i % 4, j % 4);
  constexpr int64_t kTurned[4] = {1, 0, 2, 3};
  return j % 4 == kTurned[i % 4] ? sylvester(i % 4, j % 4) : -sylvester(i % 4, j % 4);
}

// Paley's C for nine elements a + b i of GF(9), 0 for a zero difference, with a first row and column of ones.
inline int conference(int64_t i, int64_t j) {
  if (i == j) return 0;
  if (i == 0 || j == 0) return 1;
  const int64_t p = i - 1, q = j - 1;
  return p / 3 == q / 3 || p % 3 == q % 3 ? 1 : -1;
}

inline int entry_20(int64_t i, int64_t j) {
  const int c = conference(i % 10, j % 10), unit = i % 10 == j % 10 ? 1 : 0;
  if (i < 10 && j < 10) return c + unit;
  return i < 10 || j < 10 ? c - unit : -c - unit;
}

inline int entry(int64_t order, int64_t power, int64_t i, int64_t j) {
  const int64_t p = i / power, q = j / power;
  const int outer = order == 12 ? entry_12(p, q) : order == 20 ? entry_20(p, q) : 1;
  return outer * sylvester(i % power, j % power);
}

inline int64_t order_of(int64_t width) {
  while (width % 2 == 0 && width != 12 && width != 20) width /= 2;
  return width;
}

}  // namespace hadamard_reference
