// Compares a kernel's output with the reference. The function jumps where a bit of z, or the order of two neighbours,
// changes; within `near` of such a place both sides are right, and the comparison takes the better one and counts it.
#pragma once
#include <cstdio>

#include "lookup_reference.h"

namespace lookup_reference {

struct Tolerance {
  double relative;  // |y - y*| / |y* - bias|, Euclidean
  double near;      // of z, in units of its root mean square
};

inline Tolerance tolerance(int64_t mode) {
  return mode == NOGEMM_LOOKUP_FP32 ? Tolerance{2e-5, 1e-4} : Tolerance{1.5e-2, 1.5e-2};
}

struct Verdict {
  double error = 0;   // largest of a token
  int64_t taken = 0;  // the other side of a jump was taken this often
};

inline bool same_codes(const std::vector<Choice>& a, const std::vector<Choice>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].code != b[i].code) return false;
  return true;
}

inline double norm_of(const std::vector<double>& v) {
  double sum = 0;
  for (double f : v) sum += f * f;
  return std::sqrt(sum);
}

// Moves the z of one table across the jump that explains the residual best; false if none explains any of it.
inline bool take_other_side(const Model& m, int64_t mode, std::vector<double>& z, double near,
                            std::vector<double>& residual) {
  const int64_t bits = m.shape.bits;
  std::vector<double> best = residual, moved;
  for (int64_t i = 0; i < m.shape.tables * bits; ++i)
    for (double move : {-near, near}) {
      const int64_t table = i / bits;
      const double* from = z.data() + table * bits;
      std::vector<double> to(from, from + bits), tried = residual;
      to[static_cast<size_t>(i % bits)] += move;
      if (same_codes(choices(m.shape, from), choices(m.shape, to.data()))) continue;
      add_table(m, mode, table, from, 1, tried);
      add_table(m, mode, table, to.data(), -1, tried);
      if (norm_of(tried) >= norm_of(best)) continue;
      best = tried;
      moved = z;
      moved[static_cast<size_t>(i)] += move;
    }
  if (moved.empty()) return false;
  residual = best;
  z = moved;
  return true;
}

inline Verdict compare(const Model& m, int64_t mode, const float* x, const float* y, int64_t tokens) {
  const Shape& s = m.shape;
  const Tolerance allowed = tolerance(mode);
  Verdict verdict;
  for (int64_t n = 0; n < tokens; ++n) {
    std::vector<double> z = projected(m, x + n * s.d);
    const double near = allowed.near * norm_of(z) / std::sqrt(static_cast<double>(z.size()));
    std::vector<double> sum(static_cast<size_t>(s.d_out), 0.0), residual(sum.size());
    for (int64_t t = 0; t < s.tables; ++t) add_table(m, mode, t, z.data() + t * s.bits, 1, sum);
    const double size = norm_of(sum) + 0.05 * std::sqrt(static_cast<double>(s.d_out));  // y is rounded with its bias
    for (size_t i = 0; i < sum.size(); ++i) residual[i] = y[n * s.d_out + i] - m.out_bias[i] - sum[i];
    while (norm_of(residual) / size > allowed.relative / 2 && verdict.taken < 1000 &&
           take_other_side(m, mode, z, near, residual))
      ++verdict.taken;
    const double error = norm_of(residual) / size;
    if (!(error <= verdict.error) && !std::isnan(verdict.error)) verdict.error = error;  // a NaN stays
  }
  return verdict;
}

}  // namespace lookup_reference
