// What vec_bytes_pairs.h, vec_bytes_neon.h and vec_bytes_scalar.h share: the score q of a row stays one 16-bit number, and a
// row's sums are complete as they arise.
#pragma once

namespace nogemm::NOGEMM_NS {

template <int CH>
using RowSums = ColumnSums<CH>;

template <int CH>
NOGEMM_INLINE void finish_sums(RowSums<CH>&) {}

NOGEMM_INLINE void join_scores(const I* q, I* words) {
  words[0] = pack_pair(q[0], q[1]);
  words[1] = pack_pair(q[2], q[3]);
}
NOGEMM_INLINE void store_scores(int16_t* words, I q) { store_narrow(words, q); }

}  // namespace nogemm::NOGEMM_NS
