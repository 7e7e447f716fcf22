// Sums of products of bytes, exact on every instruction set: what the kernels of int8 rows, sketches and fixed point are
// written in. One specialisation per instruction set, like vec.h.
//
//   sketch_sums<TOKENS, NIBBLES>(group, steps, q, sums)   codes of a group of kSketchRows rows times tokens rounded to int8;
//       the sums hold each code plus kByteOffset (plus 8 with NIBBLES), which the caller takes off again
//   fixed_dots<ROWS>(row, x, ahead, out)   int8 rows times a token in fixed point, as floats; `ahead`: rows to fetch
//   RowSums<CH>   sums of 64 CH columns of int8 rows, stored plus 128, or of int4 rows, plus 8, in the order of
//       packed/lookup/format.h, times integer scores q: start_sums, add_four<NIBBLES> (rows), finish_sums, and order_sums:
//       columns side by side. Before it, and between passes, sums lie in the order of the rows' bytes
//   join_scores(q, words)    q of four rows, kLanes tokens each, as the two words that add_four takes
//   store_scores(words, q)   q of kLanes rows of one token as the words of its memory
#pragma once
#include "packed/lookup/format.h"
#include "packed/neurons/format.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

// The next group follows in memory. The hardware's own fetching stops at the end of every 4 KiB page, so the
// second-level cache is asked for pages beyond.
NOGEMM_INLINE void fetch_ahead(const uint8_t* p) {
  prefetch(p + 4096);
  prefetch_l2(p + 16384);
}

template <int CH>
struct ColumnSums {
  static constexpr int kVectors = CH * kChunk / kLanes;
  I sums[kVectors];
};

template <int CH>
NOGEMM_INLINE void start_sums(ColumnSums<CH>& s, const int32_t* kept) {
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; ++v) s.sums[v] = kept == nullptr ? set1(int32_t{0}) : load(kept + v * kLanes);
}

}  // namespace nogemm::NOGEMM_NS

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)
#include "vec_bytes_vnni.h"
#elif defined(__AVX2__) && !defined(NOGEMM_FORCE_SCALAR)
#include "vec_bytes_pairs.h"
#elif defined(__ARM_NEON) && !defined(NOGEMM_FORCE_SCALAR)
#include "vec_bytes_neon.h"
#else
#include "vec_bytes_scalar.h"
#endif
