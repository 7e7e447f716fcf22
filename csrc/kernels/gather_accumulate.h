// Weighted sums of table rows, one or more rows per table and token.
//
//     y[n] = sum_t sum_f score[n, t, f] row_scale[t, code] tables[t, code],   code = codes[n, t, f]
//
// A table (R rows of D columns) is larger than the first-level cache and all tables together are larger than
// the last one, so the walk is: a slice of kSlice columns; a group of tables whose slices fit the
// second-level cache together; the tokens. The sums of a token's slice stay in registers over a group. What a
// (group, token) needs is put side by side beforehand: the plan.
//
//   plan   for group g, token n: min(group, T - g group) * k entries, groups one after the other, tokens
//   within them sums   [N][kSlice] float32, contiguous, so that the walk over the tokens touches few pages
//
// A token's sum runs over tables in increasing order with fused multiply-adds, whatever the cut: the same for
// any batch or thread count.
#pragma once
#include "gather_shape.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

// 64 columns (16 without SIMD): the sums of 4096 tokens then take 1 MiB and stay in the second-level cache
// with the rows.
inline constexpr int kSliceVectors = kLanes == 1 ? 16 : 64 / kLanes;
inline constexpr int kSlice = kSliceVectors * kLanes;

NOGEMM_INLINE int64_t group_tables(const GatherShape& shape, int64_t first) {
  return shape.tables - first < shape.group ? shape.tables - first : shape.group;
}

NOGEMM_INLINE int64_t slice_columns(const GatherShape& shape, int64_t column) {
  return shape.width - column < kSlice ? shape.width - column : kSlice;
}

// Rows come in random order: fetch the slice of the row that is so many additions away. More than the core's
// out-of-order window finds by itself.
inline constexpr int64_t kEntriesAhead = 16;

// plan[group][n][slot] = (row within the group's tables, weight). Returns the flat index of the first code
// out of range, or -1; such a code is replaced by row 0, so that nothing outside the tables is read even if
// the caller went on.
template <class S>
static int64_t gather_plan(const GatherShape& shape, const int32_t* codes, const void* scores_void,
                           const float* row_scale, GatherEntry* plan, int64_t begin, int64_t end) {
  const S* scores = static_cast<const S*>(scores_void);
  const int64_t k = shape.neighbours;
  int64_t wrong = -1;
  for (int64_t n = begin; n < end; ++n) {
    int64_t flat = n * shape.tables * k;
    for (int64_t first = 0; first < shape.tables; first += shape.group) {
      const int64_t count = group_tables(shape, first);
      GatherEntry* out = plan + (first * shape.tokens + n * count) * k;
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t f = 0; f < k; ++f, ++flat, ++out) {
          int32_t code = codes[flat];
          if (static_cast<uint32_t>(code) >= static_cast<uint32_t>(shape.rows)) {
            if (wrong < 0) wrong = flat;
            code = 0;
          }
          float weight = to_float(scores[flat]);
          if (row_scale != nullptr) weight *= row_scale[(first + t) * shape.rows + code];
          *out = {static_cast<int32_t>(t * shape.rows + code), weight};
        }
      }
    }
  }
  return wrong;
}

// Rows of the next group, to be fetched into the second-level cache while the current one is being used.
template <class T>
struct Ahead {
  const T* next;      // first row of the next group, at the slice's column; null when there is none
  int64_t rows;       // how many rows it has
  int64_t per_token;  // how many of them to fetch per token
  int64_t done;

  [[gnu::always_inline]] inline void fetch(int64_t width, int64_t bytes) {
    for (int64_t stop = done + per_token < rows ? done + per_token : rows; done < stop; ++done) {
      const char* row = reinterpret_cast<const char*>(next + done * width);
      // Every second line: the hardware fetches lines in pairs, and the few outstanding misses of a core are
      // what limits this.
      for (int64_t b = 0; b < bytes; b += 128) prefetch_l2(row + b);
    }
  }
};

// Columns [column, column + VECTORS * kLanes) for tokens [begin, end); sums points at this part of the slice.
template <int VECTORS, bool PART, class T>
static void gather_columns(const GatherShape& shape, const GatherEntry* plan, const T* tables, int64_t column,
                           float* sums, int64_t begin, int64_t end, int last) {
  const int64_t k = shape.neighbours, width = shape.width, bytes = VECTORS * kLanes * static_cast<int64_t>(sizeof(T));
  // Worth it only where most rows of a table will be read.
  const bool dense_reads = (end - begin) * k >= 2 * shape.rows;
  for (int64_t first = 0; first < shape.tables; first += shape.group) {
    const int64_t count = group_tables(shape, first);
    const T* base = tables + first * shape.rows * width + column;
    const GatherEntry* entry = plan + (first * shape.tokens + begin * count) * k;
    const GatherEntry* group_end = entry + (end - begin) * count * k;
    Ahead<T> ahead{};
    if (dense_reads && first + count < shape.tables) {
      ahead.next = base + count * shape.rows * width;
      ahead.rows = group_tables(shape, first + count) * shape.rows;
      ahead.per_token = (ahead.rows + end - begin - 1) / (end - begin);
    }
    for (int64_t n = begin; n < end; ++n) {
      float* out = sums + n * kSlice;
      F sum[VECTORS];
      for (int v = 0; v < VECTORS; ++v) sum[v] = first == 0 ? zero() : load(out + v * kLanes);
      for (const GatherEntry* stop = entry + count * k; entry < stop; ++entry) {
        const GatherEntry* later = entry + kEntriesAhead < group_end ? entry + kEntriesAhead : entry;
        const char* later_row = reinterpret_cast<const char*>(base + later->index * width);
        for (int64_t b = 0; b < bytes; b += 64) prefetch(later_row + b);
        const T* row = base + entry->index * width;
        const F w = set1(entry->weight);
        for (int v = 0; v < VECTORS; ++v) {
          const T* p = row + v * kLanes;
          sum[v] = fma(PART ? load_part(p, last) : load(p), w, sum[v]);
        }
      }
      for (int v = 0; v < VECTORS; ++v) store(out + v * kLanes, sum[v]);
      ahead.fetch(width, bytes);
    }
  }
}

template <class T>
static void gather_forward(const GatherShape& shape, const GatherEntry* plan, const void* tables_void, int64_t column,
                           float* sums, int64_t begin, int64_t end) {
  const T* tables = static_cast<const T*>(tables_void);
  const int64_t columns = slice_columns(shape, column);
  if (columns == kSlice) return gather_columns<kSliceVectors, false>(shape, plan, tables, column, sums, begin, end, 0);
  constexpr int kHalf = kSliceVectors / 2;
  int64_t c = 0;
  for (; c + kHalf * kLanes <= columns; c += kHalf * kLanes) {
    gather_columns<kHalf, false>(shape, plan, tables, column + c, sums + c, begin, end, 0);
  }
  for (; c < columns; c += kLanes) {
    const int last = static_cast<int>(columns - c < kLanes ? columns - c : kLanes);
    gather_columns<1, true>(shape, plan, tables, column + c, sums + c, begin, end, last);
  }
}

template <class Y>
static void gather_finish(const GatherShape& shape, const float* sums, int64_t column, void* y_void, int64_t begin,
                          int64_t end) {
  const int64_t columns = slice_columns(shape, column);
  for (int64_t n = begin; n < end; ++n) {
    Y* y = static_cast<Y*>(y_void) + n * shape.width + column;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F s = load(sums + n * kSlice + c);
      if (columns - c >= kLanes) {
        store(y + c, s);
      } else {
        store_part(y + c, s, static_cast<int>(columns - c));
      }
    }
  }
}

}  // namespace nogemm::NOGEMM_NS
