// One Adam step for some rows of a float32 matrix, each with its own arrears; every row once, so rows may be
// cut anywhere.
//
//     p <- shrink p - drift m / (sqrt v + eps);   m <- fade1 m + (1 - beta1) g;   v <- fade2 v + (1 - beta2)
//     g^2 p <- keep p - step m / (root sqrt v + eps)
#pragma once
#include "neuron_shape.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

struct AdamRow {
  F shrink, drift, fade1, fade2, new1, new2, step, root, eps, keep;

  [[gnu::always_inline]] inline void apply(F& p, F& m, F& v, F g) const {
    p = fnma(drift, m / (sqrt(v) + eps), p * shrink);
    m = fma(new1, g, fade1 * m);
    v = fma(new2, g * g, fade2 * v);
    p = fnma(step, m / fma(root, sqrt(v), eps), keep * p);
  }
};

static void row_adam(const RowAdam& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = a.index[i] * a.width;
    float *p = a.param + at, *m = a.mean + at, *v = a.square + at;
    const float *g = a.grad + i * a.width, *due = a.arrears + 4 * i;
    const AdamRow row{set1(due[0]),         set1(due[1]), set1(due[2]), set1(due[3]), set1(1.0f - a.beta1),
                      set1(1.0f - a.beta2), set1(a.step), set1(a.root), set1(a.eps),  set1(a.keep)};
    int64_t d = 0;
    for (; d + kLanes <= a.width; d += kLanes) {
      F pd = load(p + d), md = load(m + d), vd = load(v + d);
      row.apply(pd, md, vd, load(g + d));
      store(p + d, pd);
      store(m + d, md);
      store(v + d, vd);
    }
    if (d < a.width) {
      const int last = static_cast<int>(a.width - d);
      F pd = load_part(p + d, last), md = load_part(m + d, last), vd = load_part(v + d, last);
      row.apply(pd, md, vd, load_part(g + d, last));
      store_part(p + d, pd, last);
      store_part(m + d, md, last);
      store_part(v + d, vd, last);
    }
  }
}

}  // namespace nogemm::NOGEMM_NS
