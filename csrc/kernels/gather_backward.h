// Gradients of gather_accumulate.
//
//     grad_scores[n, t, f] = <grad[n], tables[t, code]>
//     grad_tables[t, r] = sum over the (n, f) that read row r of score[n, t, f] grad[n]
//
// The (token, neighbour) pairs of a table are sorted by row first (stable, so tokens stay in order). Then
// each row of the table is read once and its gradient written once, zeros included: no atomics, no clearing
// pass, and both gradients come from the same visit to grad[n]. grad is walked in slices of kSlice columns,
// copied side by side so that a slice of all tokens fits the second-level cache.
#pragma once
#include "gather_accumulate.h"

namespace nogemm::NOGEMM_NS {

// Rows are visited in order, but a slice of a row is too short for the hardware to see it: fetch so many
// ahead.
inline constexpr int64_t kRowsAhead = 16;

// Gradients above this size are written past the caches: they could not stay there anyway.
inline constexpr int64_t kStreamBytes = int64_t{16} << 20;

// order[i] = (n * k + f, score), sorted by row; row r's entries are [starts[r], starts[r + 1]). Returns the
// flat index of a code out of range (the first of this table), or -1; such an entry goes to row 0.
template <class S>
static int64_t gather_bucket(const GatherShape& shape, const int32_t* codes, const void* scores_void, int64_t table,
                             int32_t* starts, GatherEntry* order) {
  const S* scores = static_cast<const S*>(scores_void);
  const int64_t k = shape.neighbours, rows = shape.rows, stride = shape.tables * k;
  int64_t wrong = -1;
  for (int64_t r = 0; r <= rows; ++r) starts[r] = 0;
  // starts[r + 1] counts row r, is summed up to row r's end, and is moved back to row r's start as entries
  // are placed.
  for (int64_t n = 0; n < shape.tokens; ++n) {
    for (int64_t f = 0; f < k; ++f) {
      const int64_t flat = n * stride + table * k + f;
      const bool ok = static_cast<uint32_t>(codes[flat]) < static_cast<uint32_t>(rows);
      if (!ok && wrong < 0) wrong = flat;
      ++starts[ok ? codes[flat] + 1 : 1];
    }
  }
  for (int64_t r = 0; r < rows; ++r) starts[r + 1] += starts[r];
  for (int64_t n = shape.tokens - 1; n >= 0; --n) {
    for (int64_t f = k - 1; f >= 0; --f) {
      const int64_t flat = n * stride + table * k + f;
      const bool ok = static_cast<uint32_t>(codes[flat]) < static_cast<uint32_t>(rows);
      const int32_t at = --starts[ok ? codes[flat] + 1 : 1];
      order[at] = {static_cast<int32_t>(n * k + f), to_float(scores[flat])};
    }
  }
  // Every starts[r + 1] now holds row r's start: shift them down by one place.
  for (int64_t r = 0; r < rows; ++r) starts[r] = starts[r + 1];
  starts[rows] = static_cast<int32_t>(shape.tokens * k);
  return wrong;
}

template <class G>
static void gather_slice_grad(const GatherShape& shape, const void* grad_void, int64_t column, float* sliced,
                              int64_t begin, int64_t end) {
  const int64_t columns = slice_columns(shape, column);
  for (int64_t n = begin; n < end; ++n) {
    const G* grad = static_cast<const G*>(grad_void) + n * shape.width + column;
    for (int64_t c = 0; c < kSlice; c += kLanes) {
      const int64_t left = columns - c;
      store(sliced + n * kSlice + c, left >= kLanes ? load(grad + c)
                                     : left <= 0    ? zero()
                                                    : load_part(grad + c, static_cast<int>(left)));
    }
  }
}

// Collects one vector per entry and writes the sum of its lanes, kLanes entries at a time.
struct DotWriter {
  F pending[kLanes];
  int count;
  bool add;
  float* out;

  [[gnu::always_inline]] inline void push(F dot) {
    pending[kLanes == 1 ? 0 : count] = dot;
    if (++count == kLanes) {
      const F sums = hsum_each(pending);
      store(out, add ? load(out) + sums : sums);
      out += kLanes;
      count = 0;
    }
  }
  inline void finish() {
    if (kLanes == 1 || count == 0) return;  // a single lane never waits
    for (int i = count; i < kLanes; ++i) pending[i] = zero();
    const F sums = hsum_each(pending);
    store_part(out, add ? load_part(out, count) + sums : sums, count);
  }
};

// One table, columns [column, column + VECTORS * kLanes); sliced points at this part of the slice. With `add`
// the dots of the columns before are in `dots` already.
template <int VECTORS, bool PART, bool ONE, class T>
static void backward_columns(const GatherShape& shape, const int32_t* starts, const GatherEntry* order,
                             const float* NOGEMM_RESTRICT sliced, const T* NOGEMM_RESTRICT tables, int64_t table,
                             int64_t column, T* NOGEMM_RESTRICT grad_tables, float* dots, bool add, int last) {
  const int64_t width = shape.width;
  const uint32_t k = static_cast<uint32_t>(shape.neighbours);
  const bool streaming = shape.tables * shape.rows * width * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  DotWriter writer{{}, 0, add, dots};
  for (int64_t r = 0; r < shape.rows; ++r) {
    const int64_t number = table * shape.rows + r, at = number * width + column;
    if (number + kRowsAhead < shape.tables * shape.rows) {
      const char* ahead = reinterpret_cast<const char*>(tables + at + kRowsAhead * width);
      constexpr int64_t kBytes = VECTORS * kLanes * static_cast<int64_t>(sizeof(T));
      for (int64_t b = 0; b < kBytes; b += 64) prefetch(ahead + b);
    }
    F row[VECTORS], sum[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      row[v] = PART ? load_part(tables + at, last) : load(tables + at + v * kLanes);
      sum[v] = zero();
    }
    for (int32_t i = starts[r]; i < starts[r + 1]; ++i) {
      const uint32_t index = static_cast<uint32_t>(order[i].index);
      const float* g = sliced + static_cast<int64_t>(ONE ? index : index / k) * kSlice;
      const F w = set1(order[i].weight);
      F even = zero(), odd = zero();
      for (int v = 0; v < VECTORS; ++v) {
        const F gv = load(g + v * kLanes);
        sum[v] = fma(gv, w, sum[v]);
        F& dot = v % 2 == 0 ? even : odd;
        dot = fma(gv, row[v], dot);
      }
      writer.push(VECTORS > 1 ? even + odd : even);
    }
    for (int v = 0; v < VECTORS; ++v) {
      T* out = grad_tables + at + v * kLanes;
      if (PART) {
        store_part(out, sum[v], last);
      } else if (streaming) {
        stream(out, sum[v]);
      } else {
        store(out, sum[v]);
      }
    }
  }
  writer.finish();
  if (streaming) stream_fence();
}

template <int VECTORS, bool PART, class T>
static void backward_any(const GatherShape& shape, const int32_t* starts, const GatherEntry* order, const float* sliced,
                         const T* tables, int64_t table, int64_t column, T* grad_tables, float* dots, bool add,
                         int last) {
  if (shape.neighbours == 1) {
    backward_columns<VECTORS, PART, true>(shape, starts, order, sliced, tables, table, column, grad_tables, dots, add,
                                          last);
  } else {
    backward_columns<VECTORS, PART, false>(shape, starts, order, sliced, tables, table, column, grad_tables, dots, add,
                                           last);
  }
}

template <class T>
static void gather_backward(const GatherShape& shape, const int32_t* starts, const GatherEntry* order,
                            const float* sliced, const void* tables_void, int64_t table, int64_t column,
                            void* grad_void, float* dots) {
  const T* tables = static_cast<const T*>(tables_void);
  T* grad = static_cast<T*>(grad_void);
  const int64_t columns = slice_columns(shape, column);
  if (columns == kSlice) {
    backward_any<kSliceVectors, false>(shape, starts, order, sliced, tables, table, column, grad, dots, column > 0, 0);
    return;
  }
  constexpr int kHalf = kSliceVectors / 2;
  int64_t c = 0;
  for (; c + kHalf * kLanes <= columns; c += kHalf * kLanes) {
    backward_any<kHalf, false>(shape, starts, order, sliced + c, tables, table, column + c, grad, dots, column + c > 0,
                               0);
  }
  for (; c < columns; c += kLanes) {
    const int last = static_cast<int>(columns - c < kLanes ? columns - c : kLanes);
    backward_any<1, true>(shape, starts, order, sliced + c, tables, table, column + c, grad, dots, column + c > 0,
                          last);
  }
}

// by_token[n * k + f] = the dot product of that pair, for one table.
static void gather_unsort(const GatherShape& shape, const GatherEntry* order, const float* dots, float* by_token) {
  const int64_t count = shape.tokens * shape.neighbours;
  for (int64_t i = 0; i < count; ++i) by_token[order[i].index] = dots[i];
}

// grad_scores[n][t][f] = by_token[t][n * k + f] for tokens [begin, end): a transposition in small blocks.
template <class S>
static void gather_score_grad(const GatherShape& shape, const float* by_token, void* grad_void, int64_t begin,
                              int64_t end) {
  constexpr int64_t kBlock = 8;
  S* grad = static_cast<S*>(grad_void);
  const int64_t k = shape.neighbours, T = shape.tables, per_table = shape.tokens * k;
  for (int64_t n0 = begin; n0 < end; n0 += kBlock) {
    const int64_t n1 = n0 + kBlock < end ? n0 + kBlock : end;
    for (int64_t t = 0; t < T; ++t) {
      const float* in = by_token + t * per_table;
      for (int64_t n = n0; n < n1; ++n) {
        for (int64_t f = 0; f < k; ++f) from_float(in[n * k + f], grad[(n * T + t) * k + f]);
      }
    }
  }
}

static constexpr GatherKernels gather_kernels() {
  GatherKernels g{};
  g.slice = kSlice;
  g.plan[kF32] = gather_plan<float>;
  g.plan[kBF16] = gather_plan<bf16>;
  g.forward[kF32] = gather_forward<float>;
  g.forward[kBF16] = gather_forward<bf16>;
  g.forward[kI8] = gather_forward<int8_t>;
  g.finish[kF32] = gather_finish<float>;
  g.finish[kBF16] = gather_finish<bf16>;
  g.bucket[kF32] = gather_bucket<float>;
  g.bucket[kBF16] = gather_bucket<bf16>;
  g.slice_grad[kF32] = gather_slice_grad<float>;
  g.slice_grad[kBF16] = gather_slice_grad<bf16>;
  g.backward[kF32] = gather_backward<float>;
  g.backward[kBF16] = gather_backward<bf16>;
  g.unsort = gather_unsort;
  g.score_grad[kF32] = gather_score_grad<float>;
  g.score_grad[kBF16] = gather_score_grad<bf16>;
  return g;
}

}  // namespace nogemm::NOGEMM_NS
