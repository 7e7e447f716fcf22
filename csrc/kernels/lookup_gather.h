// Sums of table rows for the packed LookupFFN: one column slice, some tokens, some lookups.
//
// The accumulators of a slice stay in registers over all lookups of a pass. A pass is one token and all its lookups, or,
// in large batches, a group of tables whose slice fits the L2 cache: then sums wait in memory between groups.
#pragma once
#include "lookup_scores.h"

namespace nogemm::NOGEMM_NS {

// Chunks of 64 columns whose fp32 sums fit the registers beside a row and a score.
inline constexpr int kPassChunks = kRegisters == 32 && kLanes == 16 ? 2 : 1;

struct GatherPass {
  const char* rows;         // the slice
  int64_t row_bytes;
  int64_t chunks;           // width of the slice / 64
  int64_t columns;          // columns of y in the slice
  const float* bias;        // of the slice
  int64_t from, to;         // lookups, multiples of 4 for integer scores
  bool first, last;         // start from zero; add the bias and write y
  float* sums;              // [token][sums_stride] between passes
  int64_t sums_stride;
  const char* next_rows;    // AHEAD: the rows wanted after the last token's (null: none)
  const char* soon;         // memory wanted in the next pass, fetched into L2 a little per token
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
NOGEMM_INLINE void fetch_ahead(const char* rows, int64_t row_bytes, const int32_t* index) {
  if constexpr (AHEAD) {
    const char* p = rows + *index * row_bytes;
    for (int64_t at = 0; at < row_bytes; at += 64) prefetch_l2(p + at);
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
  for (int q = 0; q < vectors; q += 2 * kHalf)
    NOGEMM_UNROLL
    for (int w = 0; w < kHalf; ++w) {
      const I pair = load(words + (q / 2 + w) * kLanes);
      acc[q + w] = fma(score, as_float(shift_left16(pair)), acc[q + w]);
      acc[q + w + kHalf] = fma(score, as_float(pair & set1(static_cast<int32_t>(0xffff0000u))), acc[q + w + kHalf]);
    }
}
// Bytes in stored order, still plus 128: the caller takes 128 sum(score) off and puts the columns in order.
NOGEMM_INLINE void add_row(const uint8_t* p, F score, F* acc, int vectors) {
  for (int q = 0; q < vectors; ++q) acc[q] = fma(score, load_u8(p + q * kLanes), acc[q]);
}

template <class Row, int CH, bool AHEAD>
NOGEMM_INLINE void add_lookups(const GatherPass& g, const Lookups& l, int64_t token, int64_t chunk, const char* next_rows,
                               int64_t next_token, F* acc) {
  constexpr int kVectors = CH * kChunk / kLanes;
  const char* rows = g.rows + chunk * kChunk * static_cast<int64_t>(sizeof(Row));
  F total = zero();
  for (int64_t e = g.from; e < g.to; ++e) {
    const int64_t at = e * l.width + token;
    fetch_ahead<AHEAD>(next_rows, g.row_bytes, l.index + e * l.width + next_token);
    const F score = set1(l.score[at]);
    if constexpr (sizeof(Row) == 1) total = total + score;
    add_row(reinterpret_cast<const Row*>(rows + l.index[at] * g.row_bytes), score, acc, kVectors);
  }
  if constexpr (sizeof(Row) == 1)
    for (int q = 0; q < kVectors; ++q) acc[q] = fnma(total, set1(128.0f), acc[q]);
}

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)

// acc + sum of four products, unsigned by signed bytes. By hand for the reason given at dot_pairs.
NOGEMM_INLINE __m512i dot_bytes(__m512i acc, __m512i bytes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(bytes), "v"(weights));
  return acc;
}

// acc += sum of q * stored bytes, four rows at a time; exact.
template <int CH, bool AHEAD>
NOGEMM_INLINE void add_lookups_integer(const GatherPass& g, const Lookups& l, int64_t token, const char* next_rows,
                                       int64_t next_token, __m512i* acc) {
  constexpr int64_t kRowBytes = CH * kChunk;  // one pass covers the slice, so the row's length is known
  __m512i high[CH * 4];
  NOGEMM_UNROLL
  for (int q = 0; q < CH * 4; ++q) high[q] = _mm512_setzero_si512();
  const int64_t width = l.width;
  const int32_t* index = l.index + g.from * width + token;
  const int32_t *highs = l.high() + g.from / 4 * width + token, *lows = l.low() + g.from / 4 * width + token;
  for (int64_t left = (g.to - g.from) / 4; left > 0; --left) {
    const char* p[4] = {g.rows + index[0] * kRowBytes, g.rows + index[width] * kRowBytes,
                        g.rows + index[2 * width] * kRowBytes, g.rows + index[3 * width] * kRowBytes};
    if constexpr (AHEAD) {
      const int32_t* next = index - token + next_token;
      NOGEMM_UNROLL
      for (int i = 0; i < 4; ++i) fetch_ahead<true>(next_rows, kRowBytes, next + i * width);
    }
    const __m512i h = _mm512_set1_epi32(*highs), s = _mm512_set1_epi32(*lows);
    index += 4 * width;
    highs += width;
    lows += width;
    NOGEMM_UNROLL
    for (int c = 0; c < CH; ++c) {
      const __m512i r0 = _mm512_loadu_si512(p[0] + c * 64), r1 = _mm512_loadu_si512(p[1] + c * 64);
      const __m512i r2 = _mm512_loadu_si512(p[2] + c * 64), r3 = _mm512_loadu_si512(p[3] + c * 64);
      const __m512i a = _mm512_unpacklo_epi8(r0, r1), b = _mm512_unpackhi_epi8(r0, r1);
      const __m512i d = _mm512_unpacklo_epi8(r2, r3), f = _mm512_unpackhi_epi8(r2, r3);
      const __m512i four[4] = {_mm512_unpacklo_epi16(a, d), _mm512_unpackhi_epi16(a, d), _mm512_unpacklo_epi16(b, f),
                               _mm512_unpackhi_epi16(b, f)};
      NOGEMM_UNROLL
      for (int q = 0; q < 4; ++q) {
        high[c * 4 + q] = dot_bytes(high[c * 4 + q], four[q], h);
        acc[c * 4 + q] = dot_bytes(acc[c * 4 + q], four[q], s);
      }
    }
  }
  NOGEMM_UNROLL
  for (int q = 0; q < CH * 4; ++q) acc[q] = _mm512_add_epi32(acc[q], _mm512_slli_epi32(high[q], 8));
}

#endif

// Sums in the order of the columns (int8 rows without VNNI arrive in stored order).
template <class Row, int CH>
NOGEMM_INLINE void order_columns(F* acc) {
  if constexpr (sizeof(Row) == 1 && !kIntegerScores) {
    constexpr int kVectors = CH * kChunk / kLanes;
    alignas(64) float stored[CH * kChunk], ordered[CH * kChunk];
    for (int q = 0; q < kVectors; ++q) store(stored + q * kLanes, acc[q]);
    for (int c = 0; c < CH * kChunk; ++c) {
      const int in64 = c % 64;
      ordered[c] = stored[c - in64 + 16 * (in64 % 16 / 4) + 4 * (in64 / 16) + in64 % 4];
    }
    for (int q = 0; q < kVectors; ++q) acc[q] = load(ordered + q * kLanes);
  }
}

// y[column ...] = value, as far as the slice has columns.
NOGEMM_INLINE void finish_columns(const GatherPass& g, const Output& y, int64_t token, int64_t column, F value) {
  const int64_t left = g.columns - column, at = token * y.stride + column;
  const F sum = value + load(g.bias + column);
  if (y.dtype == 0) store_columns(reinterpret_cast<float*>(y.y) + at, sum, left);
  if (y.dtype == 1) store_columns(reinterpret_cast<bf16*>(y.y) + at, sum, left);
  if (y.dtype == 2) store_columns(reinterpret_cast<fp16*>(y.y) + at, sum, left);
}

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)

template <int CH, bool AHEAD>
NOGEMM_INLINE void gather_token_integer(const GatherPass& g, const Lookups& l, int64_t token, int32_t* sums,
                                        const Output& y, const char* next_rows, int64_t next_token) {
  __m512i acc[CH * 4];
  NOGEMM_UNROLL
  for (int q = 0; q < CH * 4; ++q) acc[q] = g.first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + q * kLanes);
  add_lookups_integer<CH, AHEAD>(g, l, token, next_rows, next_token, acc);
  if (!g.last) {
    NOGEMM_UNROLL
    for (int q = 0; q < CH * 4; ++q) _mm512_storeu_si512(sums + q * kLanes, acc[q]);
    return;
  }
  const __m512i excess = _mm512_set1_epi32(l.excess()[token]);
  const F step = set1(l.step[token]);
  NOGEMM_UNROLL
  for (int q = 0; q < CH * 4; ++q)
    finish_columns(g, y, token, q * kLanes, to_float(I{_mm512_sub_epi32(acc[q], excess)}) * step);
}

#endif

template <class Row, int CH, bool AHEAD>
NOGEMM_INLINE void gather_token(const GatherPass& g, const Lookups& l, int64_t token, int64_t chunk, float* sums,
                                const Output& y, const char* next_rows, int64_t next_token) {
#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
  if constexpr (sizeof(Row) == 1)
    return gather_token_integer<CH, AHEAD>(g, l, token, reinterpret_cast<int32_t*>(sums), y, next_rows, next_token);
#endif
  constexpr int kVectors = CH * kChunk / kLanes;
  F acc[kVectors];
  NOGEMM_UNROLL
  for (int q = 0; q < kVectors; ++q) acc[q] = zero();
  add_lookups<Row, CH, AHEAD>(g, l, token, chunk, next_rows, next_token, acc);
  order_columns<Row, CH>(acc);
  float* kept = sums + chunk * kChunk;
  if (!g.first)
    for (int q = 0; q < kVectors; ++q) acc[q] = acc[q] + load(kept + q * kLanes);
  if (!g.last) {
    for (int q = 0; q < kVectors; ++q) store(kept + q * kLanes, acc[q]);
    return;
  }
  for (int q = 0; q < kVectors; ++q) finish_columns(g, y, token, chunk * kChunk + q * kLanes, acc[q]);
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
