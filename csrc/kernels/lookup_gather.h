// Sums of table rows for the packed LookupFFN: one column slice, some tokens, some lookups.
//
// The accumulators of a slice stay in registers over all lookups of a pass. A pass is one token and all its lookups, or,
// in large batches, a group of tables whose slice fits the L2 cache: then sums wait in memory between groups.
#pragma once
#include "lookup_scores.h"
#include "vec_bytes.h"

namespace nogemm::NOGEMM_NS {

// Chunks of 64 columns whose fp32 sums fit the registers beside a row and a score.
inline constexpr int kPassChunks = kRegisters == 32 && kLanes == 16 ? 2 : 1;

// A kind of row, beside float, bf16 and uint8_t: two columns in a byte (packed/lookup/format.h).
struct Nibbles {};

template <class Row>
inline constexpr bool kNibbles = false;
template <>
inline constexpr bool kNibbles<Nibbles> = true;

// Bytes of so many columns.
template <class Row>
NOGEMM_INLINE int64_t bytes_of(int64_t columns) {
  return kNibbles<Row> ? columns / 2 : columns * static_cast<int64_t>(sizeof(Row));
}

struct GatherPass {
  const char* rows;  // the slice
  int64_t row_bytes;
  int64_t chunks;     // width of the slice / 64
  int64_t columns;    // columns of y in the slice
  const float* bias;  // of the slice
  int64_t from, to;   // lookups, multiples of 4
  bool first, last;   // start from zero; add the bias and write y
  float* sums;        // [token][sums_stride] between passes
  int64_t sums_stride;
  const char* next_rows;  // AHEAD: the rows wanted after the last token's (null: none)
  const char* soon;       // memory wanted in the next pass, fetched into L2 a little per token
  int64_t soon_bytes;
};

// Rows of y, d_out elements apart, at the slice's first column.
struct Output {
  char* y;
  int64_t dtype;  // as Tokens::dtype
  int64_t stride;
};

template <class Y>
NOGEMM_INLINE void store_columns(Y* y, F value, int64_t left) {
  if (left >= kLanes) {
    store(y, value);
  } else if (left > 0) {
    store_part(y, value, static_cast<int>(left));
  }
}

// Tells the cache which rows come next: the same lookup of the next token.
template <bool AHEAD>
NOGEMM_INLINE void fetch_ahead(const char* rows, int64_t row_bytes, int64_t bytes, const int32_t* index) {
  if constexpr (AHEAD) {
    const char* p = rows + *index * row_bytes;
    for (int64_t at = 0; at < bytes; at += 64) prefetch_l2(p + at);
  }
}

NOGEMM_INLINE void add_row(const float* p, F score, F* acc, int vectors) {
  NOGEMM_UNROLL
  for (int q = 0; q < vectors; ++q) acc[q] = fma(score, load(p + q * kLanes), acc[q]);
}
NOGEMM_INLINE void add_row(const bf16* p, F score, F* acc, int vectors) {
  constexpr int kHalf = 16 / kLanes;  // vectors of words in 32 columns
  const auto* words = reinterpret_cast<const int32_t*>(p);
  NOGEMM_UNROLL
  for (int q = 0; q < vectors; q += 2 * kHalf) NOGEMM_UNROLL
  for (int w = 0; w < kHalf; ++w) {
    const I pair = load(words + (q / 2 + w) * kLanes);
    acc[q + w] = fma(score, as_float(shift_left<16>(pair)), acc[q + w]);
    acc[q + w + kHalf] = fma(score, as_float(pair & set1(static_cast<int32_t>(0xffff0000u))), acc[q + w + kHalf]);
  }
}

// What a pass over columns first .. first + 64 CH of a slice reads and fetches.
struct PassRows {
  const char* rows;
  const char* next_rows;
  int64_t token, next_token;
};

template <class Row, int CH, bool AHEAD>
NOGEMM_INLINE void add_lookups(const GatherPass& g, const Lookups& l, const PassRows& pass, F* acc) {
  constexpr int kVectors = CH * kChunk / kLanes;
  constexpr int64_t kBytesRead = CH * kChunk * static_cast<int64_t>(sizeof(Row));
  for (int64_t e = g.from; e < g.to; ++e) {
    const int64_t at = e * l.width + pass.token;
    fetch_ahead<AHEAD>(pass.next_rows, g.row_bytes, kBytesRead, l.index + e * l.width + pass.next_token);
    const auto* row = reinterpret_cast<const Row*>(pass.rows + l.index[at] * g.row_bytes);
    add_row(row, set1(l.score[at]), acc, kVectors);
  }
}

// The same for int8 and int4 rows: integers, four rows at a time.
template <class Row, int CH, bool AHEAD>
NOGEMM_INLINE void add_lookups(const GatherPass& g, const Lookups& l, const PassRows& pass, RowSums<CH>& sums) {
  const int64_t width = l.width, read = bytes_of<Row>(CH * kChunk), row_bytes = kPassChunks > 1 ? read : g.row_bytes;
  const int32_t* index = l.index + g.from * width + pass.token;
  const int32_t* words = l.words() + g.from / 2 * width + pass.token;
  for (int64_t left = (g.to - g.from) / 4; left > 0; --left) {
    const uint8_t* p[4];
    NOGEMM_UNROLL
    for (int i = 0; i < 4; ++i) {
      p[i] = reinterpret_cast<const uint8_t*>(pass.rows) + index[i * width] * row_bytes;
      fetch_ahead<AHEAD>(pass.next_rows, row_bytes, read, index - pass.token + pass.next_token + i * width);
    }
    add_four<kNibbles<Row>>(sums, p, words[0], words[width]);
    index += 4 * width;
    words += 2 * width;
  }
  finish_sums(sums);
}

// y[column ...] = value, as far as the slice has columns.
NOGEMM_INLINE void finish_columns(const GatherPass& g, const Output& y, int64_t token, int64_t column, F value) {
  const int64_t left = g.columns - column, at = token * y.stride + column;
  const F sum = value + load(g.bias + column);
  if (y.dtype == NOGEMM_X_FP32) store_columns(reinterpret_cast<float*>(y.y) + at, sum, left);
  if (y.dtype == NOGEMM_X_BF16) store_columns(reinterpret_cast<bf16*>(y.y) + at, sum, left);
  if (y.dtype == NOGEMM_X_FP16) store_columns(reinterpret_cast<fp16*>(y.y) + at, sum, left);
}

template <class Row, int CH, bool AHEAD>
NOGEMM_INLINE void gather_token_integer(const GatherPass& g, const Lookups& l, const PassRows& pass, int64_t column,
                                        int32_t* kept, const Output& y) {
  RowSums<CH> acc;
  start_sums(acc, g.first ? nullptr : kept);
  add_lookups<Row, CH, AHEAD>(g, l, pass, acc);
  if (!g.last) {
    NOGEMM_UNROLL
    for (int v = 0; v < acc.kVectors; ++v) store(kept + v * kLanes, acc.sums[v]);
    return;
  }
  order_sums(acc);
  // Unsigned: the total of a broken token is any number.
  const I excess = set1(static_cast<int32_t>(static_cast<uint32_t>(l.total()[pass.token]) << (kNibbles<Row> ? 3 : 7)));
  const F step = set1(l.step[pass.token]);
  NOGEMM_UNROLL
  for (int v = 0; v < acc.kVectors; ++v)
    finish_columns(g, y, pass.token, column + v * kLanes, to_float(acc.sums[v] - excess) * step);
}

template <class Row, int CH, bool AHEAD>
NOGEMM_INLINE void gather_token(const GatherPass& g, const Lookups& l, int64_t token, int64_t chunk, float* sums,
                                const Output& y, const char* next_rows, int64_t next_token) {
  const int64_t column = chunk * kChunk, offset = bytes_of<Row>(column);
  const PassRows pass = {g.rows + offset, next_rows + offset, token, next_token};
  float* kept = sums + column;
  if constexpr (sizeof(Row) == 1) {
    return gather_token_integer<Row, CH, AHEAD>(g, l, pass, column, reinterpret_cast<int32_t*>(kept), y);
  } else {
    constexpr int kVectors = CH * kChunk / kLanes;
    F acc[kVectors];
    NOGEMM_UNROLL
    for (int q = 0; q < kVectors; ++q) acc[q] = zero();
    add_lookups<Row, CH, AHEAD>(g, l, pass, acc);
    if (!g.first)
      for (int q = 0; q < kVectors; ++q) acc[q] = acc[q] + load(kept + q * kLanes);
    if (!g.last) {
      for (int q = 0; q < kVectors; ++q) store(kept + q * kLanes, acc[q]);
      return;
    }
    for (int q = 0; q < kVectors; ++q) finish_columns(g, y, token, column + q * kLanes, acc[q]);
  }
}

// Tokens [0, tokens) of a piece; y and sums point at the piece's first token.
template <class Row, bool AHEAD>
static void gather_tokens(const GatherPass& g, const Lookups& l, int64_t tokens, const Output& y) {
  for (int64_t n = 0; n < tokens; ++n) {
    const int64_t fetched = g.soon_bytes * n / tokens / 64 * 64, fetch = g.soon_bytes * (n + 1) / tokens;
    for (int64_t at = fetched; at < fetch; at += 64) prefetch_l2(g.soon + at);
    const bool more = n + 1 < tokens;
    const char* next_rows = more || g.next_rows == nullptr ? g.rows : g.next_rows;
    const int64_t next = more ? n + 1 : 0;
    float* sums = g.sums + n * g.sums_stride;
    int64_t chunk = 0;
    if constexpr (kPassChunks > 1)
      for (; chunk + kPassChunks <= g.chunks; chunk += kPassChunks)
        gather_token<Row, kPassChunks, AHEAD>(g, l, n, chunk, sums, y, next_rows, next);
    for (; chunk < g.chunks; ++chunk) gather_token<Row, 1, AHEAD>(g, l, n, chunk, sums, y, next_rows, next);
  }
}

}  // namespace nogemm::NOGEMM_NS
