// Rows that each token names: dot products with them, weighted sums of them, and gradients into them.
//
//     dot    out[n, p] = sum_d x[n, d] rows[index[n, p], d]
//     sum    y[n] = sum_p weight[n, p] rows[index[n, p]]
//     outer  grad[r] = sum over the pairs (n, p) with index[n, p] = r of weight[n, p] x[n]
//
// Which rows come next is known, so they are fetched while the present ones are used. Every sum runs in an
// order that depends on the row's length and on p alone: the same for any batch and number of threads.
#pragma once
#include "neuron_shape.h"
#include "row_adam.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int64_t kLine = 64;

NOGEMM_INLINE void prefetch_row(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  for (int64_t b = 0; b < bytes; b += kLine) prefetch(p + b);
}

// <row, x> in float32: four running sums, so that the additions do not wait for each other.
template <class T, class X>
NOGEMM_INLINE float row_dot(const T* row, const X* x, int64_t width) {
  F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
    s0 = fma(load(row + d), load(x + d), s0);
    s1 = fma(load(row + d + kLanes), load(x + d + kLanes), s1);
    s2 = fma(load(row + d + 2 * kLanes), load(x + d + 2 * kLanes), s2);
    s3 = fma(load(row + d + 3 * kLanes), load(x + d + 3 * kLanes), s3);
  }
  for (; d + kLanes <= width; d += kLanes) s0 = fma(load(row + d), load(x + d), s0);
  if (d < width) {
    const int last = static_cast<int>(width - d);
    s1 = fma(load_part(row + d, last), load_part(x + d, last), s1);
  }
  return hsum((s0 + s1) + (s2 + s3));
}

template <class T>
static void neuron_dot(const NeuronShape& s, const void* x_void, const int32_t* index, const void* rows_void,
                       void* out_void, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(x_void), *rows = static_cast<const T*>(rows_void);
  T* out = static_cast<T*>(out_void);
  const int64_t pairs = end * s.visits, bytes = s.width * static_cast<int64_t>(sizeof(T));
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t p = 0; p < s.visits; ++p) {
      const int64_t i = n * s.visits + p;
      if (i + 2 < pairs) prefetch_row(rows + index[i + 2] * s.width, bytes);
      from_float(row_dot(rows + index[i] * s.width, x + n * s.width, s.width), out[i]);
    }
  }
}

// VECTORS * kLanes columns of one token's sum; `ahead`: the next token's rows, whose columns are fetched.
template <int VECTORS, class T>
NOGEMM_INLINE void sum_columns(const T* weight, const int32_t* index, const int32_t* ahead, const T* rows,
                               int64_t width, int64_t visits, T* y) {
  F sum[VECTORS];
  for (int v = 0; v < VECTORS; ++v) sum[v] = zero();
  constexpr int64_t kBytes = VECTORS * kLanes * static_cast<int64_t>(sizeof(T));
  for (int64_t p = 0; p < visits; ++p) {
    if (ahead != nullptr) {
      const char* next = reinterpret_cast<const char*>(rows + ahead[p] * width);
      for (int64_t b = 0; b < kBytes; b += kLine) prefetch(next + b);
    }
    const T* row = rows + index[p] * width;
    const F w = set1(to_float(weight[p]));
    for (int v = 0; v < VECTORS; ++v) sum[v] = fma(load(row + v * kLanes), w, sum[v]);
  }
  for (int v = 0; v < VECTORS; ++v) store(y + v * kLanes, sum[v]);
}

template <class T>
static void neuron_sum(const NeuronShape& s, const void* weight_void, const int32_t* index,
                       const void* rows_void, void* y_void, int64_t begin, int64_t end) {
  const T *weight = static_cast<const T*>(weight_void), *rows = static_cast<const T*>(rows_void);
  T* y = static_cast<T*>(y_void);
  constexpr int kWide = 8;
  for (int64_t n = begin; n < end; ++n) {
    const T* w = weight + n * s.visits;
    const int32_t* at = index + n * s.visits;
    const int32_t* ahead = n + 1 < end ? at + s.visits : nullptr;
    T* out = y + n * s.width;
    int64_t d = 0;
    for (; d + kWide * kLanes <= s.width; d += kWide * kLanes)
      sum_columns<kWide>(w, at, ahead, rows + d, s.width, s.visits, out + d);
    for (; d + kLanes <= s.width; d += kLanes)
      sum_columns<1>(w, at, ahead, rows + d, s.width, s.visits, out + d);
    if (d < s.width) {
      const int last = static_cast<int>(s.width - d);
      F sum = zero();
      for (int64_t p = 0; p < s.visits; ++p)
        sum = fma(load_part(rows + at[p] * s.width + d, last), set1(to_float(w[p])), sum);
      store_part(out + d, sum, last);
    }
  }
}

// Sorts all pairs by row: starts[R + 1], order[N P], tokens in increasing order inside a row. Returns the
// first flat index whose row is outside [0, R), or -1; then nothing else is valid.
template <class T>
static int64_t neuron_sort(const NeuronShape& s, const int32_t* index, const void* weight_void,
                           int32_t* starts, NeuronEntry* order) {
  const T* weight = static_cast<const T*>(weight_void);
  const int64_t pairs = s.tokens * s.visits;
  for (int64_t r = 0; r <= s.rows; ++r) starts[r] = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    if (static_cast<uint32_t>(index[i]) >= static_cast<uint64_t>(s.rows)) return i;
    ++starts[index[i] + 1];
  }
  for (int64_t r = 0; r < s.rows; ++r) starts[r + 1] += starts[r];
  int64_t i = 0;
  for (int64_t n = 0; n < s.tokens; ++n) {
    for (int64_t p = 0; p < s.visits; ++p, ++i)
      order[starts[index[i]]++] = {static_cast<int32_t>(n), to_float(weight[i])};
  }
  for (int64_t r = s.rows; r > 0; --r) starts[r] = starts[r - 1];
  starts[0] = 0;
  return -1;
}

// One column slice of the gradient. sliced [N][slice] is x's slice in float32; `out` points at the slice's
// first column of the first row of the result. With `visited` the result holds those rows only, else all of
// them, zeros where nobody came.
template <class T>
static void neuron_outer(const NeuronShape& s, const int32_t* starts, const NeuronEntry* order,
                         const float* sliced, int64_t slice, const int32_t* visited, int64_t results,
                         void* out_void, int64_t columns) {
  T* out = static_cast<T*>(out_void);
  constexpr int kMost = kLanes == 1 ? 16 : 64 / kLanes;
  for (int64_t v = 0; v < results; ++v) {
    const int64_t r = visited == nullptr ? v : visited[v];
    F sum[kMost];
    for (int c = 0; c < kMost; ++c) sum[c] = zero();
    for (int32_t i = starts[r]; i < starts[r + 1]; ++i) {
      const float* x = sliced + order[i].token * slice;
      const F w = set1(order[i].weight);
      for (int c = 0; c < kMost; ++c) sum[c] = fma(load(x + c * kLanes), w, sum[c]);
    }
    T* to = out + v * s.width;
    for (int c = 0; c < kMost && c * kLanes < columns; ++c) {
      const int64_t left = columns - c * kLanes;
      if (left >= kLanes) {
        store(to + c * kLanes, sum[c]);
      } else {
        store_part(to + c * kLanes, sum[c], static_cast<int>(left));
      }
    }
  }
}

static constexpr NeuronKernels neuron_kernels() {
  NeuronKernels k{};
  k.dot[kF32] = neuron_dot<float>;
  k.dot[kBF16] = neuron_dot<bf16>;
  k.sum[kF32] = neuron_sum<float>;
  k.sum[kBF16] = neuron_sum<bf16>;
  k.sort[kF32] = neuron_sort<float>;
  k.sort[kBF16] = neuron_sort<bf16>;
  k.outer[kF32] = neuron_outer<float>;
  k.outer[kBF16] = neuron_outer<bf16>;
  k.adam = row_adam;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
