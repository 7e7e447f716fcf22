// vec_bytes.h for AArch64: the baseline multiplies signed by signed bytes to 16 bits. Rows are added one by one. Included
// by vec_bytes.h only.
#pragma once
#include "vec_bytes_halves.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kByteOffset = 0;

// Signed by signed bytes is all the baseline has. |code q| <= 128 * 127, so the sum of two products stays in
// 16 bits.
template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void sketch_sums(const uint8_t* group, int64_t steps, const int8_t* const* q, int32_t* sums) {
  constexpr int kStep = NIBBLES ? 8 : 4, kBlock = TOKENS == 1 ? 16 : 4;  // vectors of four rows in registers
  const auto word = [](const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  };
  for (int first = 0; first < kSketchRows / 4; first += kBlock) {
    int32x4_t acc[TOKENS][kBlock];
    for (int t = 0; t < TOKENS; ++t)
      for (int b = 0; b < kBlock; ++b) acc[t][b] = vdupq_n_s32(0);
    for (int64_t s = 0; s < steps; ++s) {
      const uint8_t* p = group + s * 4 * kSketchRows + 16 * first;
      int8x16_t front_q[TOKENS], back_q[TOKENS];
      for (int t = 0; t < TOKENS; ++t) {
        front_q[t] = word(q[t] + s * kStep);
        if constexpr (NIBBLES) back_q[t] = word(q[t] + s * kStep + 4);
      }
      NOGEMM_UNROLL
      for (int b = 0; b < kBlock; ++b) {
        const uint8x16_t raw = vld1q_u8(p + 16 * b);
        if (b % 4 == 0) fetch_ahead(p + 16 * b);
        const int8x16_t front =
            vreinterpretq_s8_u8(NIBBLES ? vandq_u8(raw, vdupq_n_u8(15)) : veorq_u8(raw, vdupq_n_u8(128)));
        const int8x16_t back = vreinterpretq_s8_u8(vshrq_n_u8(raw, 4));
        NOGEMM_UNROLL
        for (int t = 0; t < TOKENS; ++t) {
          int16x8_t low = vmull_s8(vget_low_s8(front), vget_low_s8(front_q[t])),
                    high = vmull_high_s8(front, front_q[t]);
          if constexpr (NIBBLES) {
            low = vmlal_s8(low, vget_low_s8(back), vget_low_s8(back_q[t]));
            high = vmlal_high_s8(high, back, back_q[t]);
          }
          acc[t][b] = vpadalq_s16(acc[t][b], vpaddq_s16(low, high));
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t)
      for (int b = 0; b < kBlock; ++b) vst1q_s32(sums + t * kSketchRows + 4 * (first + b), acc[t][b]);
  }
}

template <int ROWS>
NOGEMM_INLINE void fixed_dots(const int8_t* const* row, const FixedToken& x, const char* const* ahead, float* out) {
  const auto add = [](int32x4_t acc, int8x16_t a, int8x16_t b) {
    return vpadalq_s16(vpadalq_s16(acc, vmull_s8(vget_low_s8(a), vget_low_s8(b))), vmull_high_s8(a, b));
  };
  int32x4_t high[ROWS], low[ROWS];
  for (int r = 0; r < ROWS; ++r) high[r] = low[r] = vdupq_n_s32(0);
  for (int64_t c = 0; c < x.padded; c += 64) {
    for (int r = 0; r < ROWS; ++r) prefetch(ahead[r] + c);
    for (int64_t i = c; i < c + 64; i += 16) {
      const int8x16_t a = vld1q_s8(x.high + i), b = vld1q_s8(x.low + i);
      NOGEMM_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const int8x16_t w = vld1q_s8(row[r] + i);
        high[r] = add(high[r], w, a);
        low[r] = add(low[r], w, b);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const float h = static_cast<float>(vaddvq_s32(high[r])), l = static_cast<float>(vaddvq_s32(low[r]));
    out[r] = (h * 256.0f + l) * x.scale;
  }
}

template <bool NIBBLES, int CH>
NOGEMM_INLINE void add_four(RowSums<CH>& s, const uint8_t* const* p, int32_t first, int32_t second) {
  const int16_t q[4] = {static_cast<int16_t>(first), static_cast<int16_t>(first >> 16), static_cast<int16_t>(second),
                        static_cast<int16_t>(second >> 16)};
  NOGEMM_UNROLL
  for (int c = 0; c < CH; ++c) NOGEMM_UNROLL
  for (int part = 0; part < 4; ++part) {
    I* sums = s.sums + 16 * c + part;
    NOGEMM_UNROLL
    for (int r = 0; r < 4; ++r) {
      uint8x16_t bytes;
      if constexpr (NIBBLES) {
        const uint8x16_t pairs = vld1q_u8(p[r] + c * (kChunk / 2) + 16 * (part % 2));
        bytes = part < 2 ? vandq_u8(pairs, vdupq_n_u8(15)) : vshrq_n_u8(pairs, 4);
      } else {
        bytes = vld1q_u8(p[r] + c * kChunk + 16 * part);
      }
      const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
      const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
      sums[0].v = vmlal_n_s16(sums[0].v, vget_low_s16(low), q[r]);
      sums[4].v = vmlal_high_n_s16(sums[4].v, low, q[r]);
      sums[8].v = vmlal_n_s16(sums[8].v, vget_low_s16(high), q[r]);
      sums[12].v = vmlal_high_n_s16(sums[12].v, high, q[r]);
    }
  }
}

template <int CH>
NOGEMM_INLINE void order_sums(RowSums<CH>&) {}  // kept as columns

}  // namespace nogemm::NOGEMM_NS
