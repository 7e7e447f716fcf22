// vec_bytes.h on x86 without the int8 dot product: neighbouring products are added in 16 bits, where they saturate, or,
// of 16-bit numbers, in 32. Bytes and its operations stand in vec_avx2.h and vec_avx512.h:
//
//   pairs16(a, b)     unsigned a times signed b, neighbours added: 16-bit lanes, exact as long as the caller keeps them
//                     within 16 bits
//   pairs32(a, b)     signed 16-bit lanes, neighbours added: 32-bit lanes
//   copy_sign(q, c)   q times the sign of c; what it gives where c is 0 is of no account
//   widen(p)          kBytes / 2 signed bytes as 16-bit lanes
//   unpack_low16(a, b), ...   lanes of a and b by turns, within 128 bits: of their low or high half
//
// Of two rows, the words, which are bytes of two columns, are interleaved; their even bytes, then their odd ones, are
// multiplied as pairs of 16-bit numbers: seven operations for 32 products where floats need twelve. Included by vec_bytes.h
// only.
#pragma once
#include "vec_bytes_halves.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kByteOffset = 0;
inline constexpr int kBytes = static_cast<int>(sizeof(Bytes));

// A nibble times an int8 is at most 15 * 127, so 16 bits hold four steps of two pairs each. An int8 code
// loses its 128 and gives its sign to the token: at most 128 * 127 twice, one pair in 16 bits.
template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void sketch_sums(const uint8_t* group, int64_t steps, const int8_t* const* q, int32_t* sums) {
  constexpr int kStep = NIBBLES ? 8 : 4, kChunk = NIBBLES ? 4 : 16, kVectors = 4 * kSketchRows / kBytes;
  constexpr int kHeld = kRegisters / 2 / TOKENS, kBlock = kHeld < kVectors ? kHeld : kVectors;
  const auto word = [](const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return set_dwords(four);
  };
  const Bytes low = set_bytes(15), top = set_bytes(-128), ones = set_words(1);
  for (int i = 0; i < TOKENS * kSketchRows; ++i) sums[i] = 0;
  for (int64_t begin = 0; begin < steps; begin += kChunk) {
    const int64_t end = begin + kChunk < steps ? begin + kChunk : steps;
    for (int first = 0; first < kVectors; first += kBlock) {
      Bytes acc[TOKENS][kBlock];
      for (int t = 0; t < TOKENS; ++t)
        for (int b = 0; b < kBlock; ++b) acc[t][b] = zero_bytes();
      for (int64_t s = begin; s < end; ++s) {
        const uint8_t* p = group + s * 4 * kSketchRows + first * kBytes;
        Bytes front[kBlock], back[kBlock];
        const auto unpack = [&](int b) {
          const Bytes raw = load_bytes(p + b * kBytes);
          if (b * kBytes % 64 == 0) fetch_ahead(p + b * kBytes);
          front[b] = NIBBLES ? bit_and(raw, low) : bit_xor(raw, top);
          back[b] = NIBBLES ? bit_and(shift_right4(raw), low) : magnitudes(front[b]);
        };
        if constexpr (TOKENS > 1) {
          NOGEMM_UNROLL
          for (int b = 0; b < kBlock; ++b) unpack(b);
        }
        NOGEMM_UNROLL
        for (int t = 0; t < TOKENS; ++t) {
          const Bytes front_q = word(q[t] + s * kStep), back_q = NIBBLES ? word(q[t] + s * kStep + 4) : front_q;
          NOGEMM_UNROLL
          for (int b = 0; b < kBlock; ++b) {
            if constexpr (TOKENS == 1) unpack(b);
            if constexpr (NIBBLES) {
              acc[t][b] = add16(acc[t][b], add16(pairs16(front[b], front_q), pairs16(back[b], back_q)));
            } else {
              acc[t][b] = add32(acc[t][b], pairs32(pairs16(back[b], copy_sign(front_q, front[b])), ones));
            }
          }
        }
      }
      for (int t = 0; t < TOKENS; ++t)
        for (int b = 0; b < kBlock; ++b) {
          int32_t* out = sums + t * kSketchRows + (first + b) * kLanes;
          store(out, I{add32(load(out).v, NIBBLES ? pairs32(acc[t][b], ones) : acc[t][b])});
        }
    }
  }
}

template <int ROWS>
NOGEMM_INLINE void fixed_dots(const int8_t* const* row, const FixedToken& x, const char* const* ahead, float* out) {
  Bytes high[ROWS], low[ROWS];
  for (int r = 0; r < ROWS; ++r) high[r] = low[r] = zero_bytes();
  for (int64_t c = 0; c < x.padded; c += 64) {
    for (int r = 0; r < ROWS; ++r) prefetch(ahead[r] + c);
    NOGEMM_UNROLL
    for (int64_t i = c; i < c + 64; i += kBytes / 2) {
      const Bytes a = widen(x.high + i), b = widen(x.low + i);
      NOGEMM_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const Bytes w = widen(row[r] + i);
        high[r] = add32(high[r], pairs32(w, a));
        low[r] = add32(low[r], pairs32(w, b));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    out[r] = (static_cast<float>(hsum32(high[r])) * 256.0f + static_cast<float>(hsum32(low[r]))) * x.scale;
}

template <bool NIBBLES, int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t first, int32_t second) {
  const I words[2] = {set1(first), set1(second)};
  const Bytes even = set_dwords(0x00ff00ff);
  NOGEMM_UNROLL
  for (int v = 0; v < s.kVectors; v += 4) NOGEMM_UNROLL
  for (int r = 0; r < 2; ++r) {
    constexpr int kParts = kChunk / kBytes;
    const int block = v / 4, half = block / kParts * (kChunk / 2), part = block % kParts;
    const auto bytes = [&](const uint8_t* row) {
      return NIBBLES ? load_nibbles(row + half, part) : load_bytes(row + block * kBytes);
    };
    const Bytes a = bytes(p[2 * r]), b = bytes(p[2 * r + 1]);
    const Bytes pairs[2] = {unpack_low16(a, b), unpack_high16(a, b)};
    NOGEMM_UNROLL
    for (int i = 0; i < 2; ++i) {
      s.sums[v + 2 * i] = dot_pairs(s.sums[v + 2 * i], I{bit_and(pairs[i], even)}, words[r]);
      s.sums[v + 2 * i + 1] = dot_pairs(s.sums[v + 2 * i + 1], I{shift_right8(pairs[i])}, words[r]);
    }
  }
}

// Vectors of even and of odd columns to four neighbours a lane; those of a chunk's parts side by side.
template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>& s) {
  constexpr int kParts = kChunk / kBytes;
  RowSums<CH> ordered;
  NOGEMM_UNROLL
  for (int c = 0; c < CH; ++c) NOGEMM_UNROLL
  for (int part = 0; part < kParts; ++part) NOGEMM_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Bytes a = s.sums[4 * (c * kParts + part) + 2 * i].v, b = s.sums[4 * (c * kParts + part) + 2 * i + 1].v;
    ordered.sums[(4 * c + 2 * i) * kParts + part] = {unpack_low32(a, b)};
    ordered.sums[(4 * c + 2 * i + 1) * kParts + part] = {unpack_high32(a, b)};
  }
  s = ordered;
}

}  // namespace nogemm::NOGEMM_NS
