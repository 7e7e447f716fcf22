// Rows of a matrix that each token names, many uses at a time: for large batches and for gradients.
//
//     dots    out[n, p] = <x[n], rows[i]>,   i = index[n, p]
//     sums    y[n] = sum_p weight[n, p] rows[i]
//     outer   grad[i] = sum over the (n, p) that name i of weight[n, p] x[n]
//
// Where few uses meet many rows, the kernels of bundles.h go token by token instead. Rows and tokens are both
// larger than the caches, so all three walk in slices of kSlice columns that are copied side by side first: a
// slice of the tokens (or of the rows) then fits the second-level cache. Dots and outer go row by row, each
// row's tokens in increasing order: no atomics, and each row is read, or written, once. Dots of a slice are
// added to those of the slices before, so the order of a sum does not depend on threads.
#pragma once
#include "gather_backward.h"
#include "neuron_shape.h"
#include "row_adam.h"

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE F load_upto(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : n <= 0 ? zero() : load_part(p, static_cast<int>(n));
}
template <class T>
NOGEMM_INLINE F load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : n <= 0 ? zero() : load_part(p, static_cast<int>(n));
}
template <class T>
NOGEMM_INLINE void store_upto(T* p, F a, int64_t n) {
  if (n >= kLanes) {
    store(p, a);
  } else if (n > 0) {
    store_part(p, a, static_cast<int>(n));
  }
}

// Rows [begin, end), one slice.
template <class T, bool DOTS, bool OUTER>
static void neuron_uses(const NeuronPass& p, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(p.rows);
  T* grad = static_cast<T*>(p.grad_rows);
  DotWriter writer{{}, 0, p.column > 0, DOTS ? p.dots + p.starts[begin] : nullptr};
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * p.width + p.column, left = p.width - p.column;
    F row[kSliceVectors], sum[kSliceVectors];
    for (int v = 0; v < kSliceVectors; ++v) {
      if (DOTS) row[v] = load_upto(rows + at + v * kLanes, left - v * kLanes);
      if (OUTER) sum[v] = zero();
    }
    for (int32_t e = p.starts[r]; e < p.starts[r + 1]; ++e) {
      const float* x = p.sliced + static_cast<int64_t>(p.token[e]) * kSlice;
      const F w = OUTER ? set1(p.weights[e]) : zero();
      F even = zero(), odd = zero();
      for (int v = 0; v < kSliceVectors; ++v) {
        const F xv = load(x + v * kLanes);
        if (OUTER) sum[v] = fma(xv, w, sum[v]);
        if (DOTS) (v % 2 == 0 ? even : odd) = fma(xv, row[v], v % 2 == 0 ? even : odd);
      }
      if (DOTS) writer.push(even + odd);
    }
    if (OUTER)
      for (int v = 0; v < kSliceVectors; ++v) store_upto(grad + at + v * kLanes, sum[v], left - v * kLanes);
  }
  if (DOTS) writer.finish();
}

// Tokens [begin, end), one slice: sliced holds the rows, [R][kSlice]. Even and odd places of a list are added
// up apart.
template <class T>
static void neuron_sums(const NeuronSums& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    F even[kSliceVectors], odd[kSliceVectors];
    for (int v = 0; v < kSliceVectors; ++v) even[v] = odd[v] = zero();
    const int32_t* index = p.index + n * p.visits;
    const float* weights = p.weights + n * p.visits;
    int64_t k = 0;
    for (; k + 2 <= p.visits; k += 2) {
      const F a = set1(index[k] < 0 ? 0.0f : weights[k]), b = set1(index[k + 1] < 0 ? 0.0f : weights[k + 1]);
      const float* first = p.sliced + static_cast<int64_t>(index[k] < 0 ? 0 : index[k]) * kSlice;
      const float* second = p.sliced + static_cast<int64_t>(index[k + 1] < 0 ? 0 : index[k + 1]) * kSlice;
      for (int v = 0; v < kSliceVectors; ++v) {
        even[v] = fma(load(first + v * kLanes), a, even[v]);
        odd[v] = fma(load(second + v * kLanes), b, odd[v]);
      }
    }
    if (k < p.visits && index[k] >= 0) {
      const F a = set1(weights[k]);
      const float* row = p.sliced + static_cast<int64_t>(index[k]) * kSlice;
      for (int v = 0; v < kSliceVectors; ++v) even[v] = fma(load(row + v * kLanes), a, even[v]);
    }
    T* y = static_cast<T*>(p.y) + n * p.width + p.column;
    for (int v = 0; v < kSliceVectors; ++v)
      store_upto(y + v * kLanes, even[v] + odd[v], p.width - p.column - v * kLanes);
  }
}

static constexpr NeuronKernels neuron_kernels() {
  NeuronKernels k{};
  k.slice = kSlice;
  k.copy[kF32] = gather_slice_grad<float>;
  k.copy[kBF16] = gather_slice_grad<bf16>;
  k.dots[kF32] = neuron_uses<float, true, false>;
  k.dots[kBF16] = neuron_uses<bf16, true, false>;
  k.outer[kF32] = neuron_uses<float, false, true>;
  k.outer[kBF16] = neuron_uses<bf16, false, true>;
  k.sums[kF32] = neuron_sums<float>;
  k.sums[kBF16] = neuron_sums<bf16>;
  k.adam = row_adam;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
