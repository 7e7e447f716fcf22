// vec_bytes.h without vectors, product by product. Included by vec_bytes.h only.
#pragma once
#include "vec_bytes_halves.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kByteOffset = 128;

template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void sketch_sums(const uint8_t* group, int64_t steps, const int8_t* const* q, int32_t* sums) {
  constexpr int kStep = NIBBLES ? 8 : 4;
  for (int i = 0; i < TOKENS * kSketchRows; ++i) sums[i] = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* p = group + s * 4 * kSketchRows;
    for (int t = 0; t < TOKENS; ++t) {
      int32_t* out = sums + t * kSketchRows;
      const int8_t* qs = q[t] + s * kStep;
      for (int r = 0; r < kSketchRows; ++r) {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) {
          const int32_t byte = p[4 * r + j];
          sum += NIBBLES ? (byte & 15) * qs[j] + (byte >> 4) * qs[4 + j] : byte * qs[j];
        }
        out[r] += sum;
      }
    }
  }
}

template <int ROWS>
NOGEMM_INLINE void fixed_dots(const int8_t* const* row, const FixedToken& x, const char* const* ahead, float* out) {
  for (int r = 0; r < ROWS; ++r) {
    int32_t h = 0, l = 0;
    for (int64_t c = 0; c < x.padded; c += 64) {
      prefetch(ahead[r] + c);
      for (int64_t i = c; i < c + 64; ++i) h += row[r][i] * x.high[i], l += row[r][i] * x.low[i];
    }
    out[r] = (static_cast<float>(h) * 256.0f + static_cast<float>(l)) * x.scale;
  }
}

template <bool NIBBLES, int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t first, int32_t second) {
  const int32_t q[4] = {low_half(first), first >> 16, low_half(second), second >> 16};
  const auto byte = [](const uint8_t* row, int b) -> int32_t {
    if (!NIBBLES) return row[b];
    const int32_t pair = row[b / kChunk * (kChunk / 2) + b % (kChunk / 2)];
    return b % kChunk < kChunk / 2 ? pair & 15 : pair >> 4;
  };
  for (int r = 0; r < 4; ++r)
    for (int b = 0; b < s.kVectors; ++b) s.sums[b] = s.sums[b] + I{q[r] * byte(p[r], b)};
}

template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>& s) {
  const RowSums<CH> stored = s;
  for (int b = 0; b < s.kVectors; ++b)
    s.sums[b - b % 64 + 16 * (b % 16 / 4) + 4 * (b % 64 / 16) + b % 4] = stored.sums[b];
}

}  // namespace nogemm::NOGEMM_NS
