// Integer scores of all neurons: a sketch of their weights (hire_format.h) times tokens rounded to int8.
//
//     s[n, f] = float(sum_c q[n, c] code[f, c]) * (scale_x[n] * scale[f]) + bias[f]
//
// The integer sums are exact, so scores are the same on every instruction set, for any batch and any cut.
// Codes are stored unsigned (plus 128, or plus 8), as the dot product instruction wants them; sum q times
// that is taken off again. Where signed bytes are multiplied, 128 is taken off on the way in.
#pragma once
#include "activation.h"
#include "byte_words.h"
#include "lookup_vec.h"
#include "packed/neurons/format.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kSketchTokens = 4;  // tokens per pass over a group of rows
#if defined(NOGEMM_BYTE_WORDS) || defined(NOGEMM_NEON)
inline constexpr int kByteOffset = 0;  // of int8 codes, as sketch_sums multiplies them: signed
#else
inline constexpr int kByteOffset = 128;  // unsigned
#endif

// codes[0..width) = x rounded to int8, zero behind; returns the scale. sum: of the codes. A token that is not
// finite gives zeros.
static float sketch_token(const float* x, int64_t width, int64_t padded, int8_t* codes, int32_t* sum) {
  F largest = zero(), poison = zero();
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const F v = load(x + i);
    largest = max(abs(v), largest);
    poison = fma(v, zero(), poison);
  }
  float top[kLanes], bad = hsum(poison), most = 0;
  store(top, largest);
  for (int l = 0; l < kLanes; ++l) most = top[l] > most ? top[l] : most;
  for (; i < width; ++i) {
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    bad += x[i] * 0.0f;
  }
  if (!(bad == 0.0f)) {
    std::memset(codes, 0, static_cast<size_t>(padded));
    *sum = 0;
    return 0.0f;
  }
  most = most > 0x1p-126f ? most : 0x1p-126f;
  const float inverse = 127.0f / most;
  int32_t total = 0;
  for (i = 0; i < width; ++i) {
    const float rounded = std::nearbyint(x[i] * inverse);  // within +-127, or one rounding beyond
    const int32_t code = rounded > 127.0f ? 127 : rounded < -127.0f ? -127 : static_cast<int32_t>(rounded);
    codes[i] = static_cast<int8_t>(code);
    total += code;
  }
  std::memset(codes + width, 0, static_cast<size_t>(padded - width));
  *sum = total;
  return most / 127.0f;
}

// The next group follows in memory. The hardware's own fetching stops at the end of every 4 KiB page, so the
// second-level cache is asked for pages beyond.
NOGEMM_INLINE void fetch_ahead(const uint8_t* p) {
  prefetch(p + 4096);
  prefetch_l2(p + 16384);
}

#if defined(__AVX512VNNI__) && !defined(NOGEMM_FORCE_SCALAR)

NOGEMM_INLINE __m512i dot_codes(__m512i acc, __m512i codes, __m512i q) {
  // By hand: gcc 12 copies the accumulator around the intrinsic.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
  return acc;
}

// Four bytes, repeated.
NOGEMM_INLINE __m512i load_word4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

template <int TOKENS, bool NIBBLES>
NOGEMM_INLINE void sketch_sums(const uint8_t* group, int64_t steps, const int8_t* const* q, int32_t* sums) {
  __m512i acc[TOKENS][4];
  for (int t = 0; t < TOKENS; ++t)
    for (int b = 0; b < 4; ++b) acc[t][b] = _mm512_setzero_si512();
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* p = group + s * 256;
    __m512i first[TOKENS], second[TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
      first[t] = load_word4(q[t] + s * (NIBBLES ? 8 : 4));
      if constexpr (NIBBLES) second[t] = load_word4(q[t] + s * 8 + 4);
    }
    NOGEMM_UNROLL
    for (int b = 0; b < 4; ++b) {
      const __m512i raw = _mm512_load_si512(p + 64 * b);
      fetch_ahead(p + 64 * b);
      const __m512i front = NIBBLES ? _mm512_and_si512(raw, low) : raw;
      const __m512i back = NIBBLES ? _mm512_and_si512(_mm512_srli_epi16(raw, 4), low) : raw;
      NOGEMM_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        acc[t][b] = dot_codes(acc[t][b], front, first[t]);
        if constexpr (NIBBLES) acc[t][b] = dot_codes(acc[t][b], back, second[t]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int b = 0; b < 4; ++b) _mm512_storeu_si512(sums + t * kSketchRows + 16 * b, acc[t][b]);
}

#elif defined(NOGEMM_NEON)

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

#elif defined(NOGEMM_BYTE_WORDS)

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

#else

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

#endif

template <int TOKENS>
static void sketch_group(const SketchRows& w, int64_t group, const SketchToken* tokens) {
  alignas(64) int32_t sums[TOKENS * kSketchRows];
  const int8_t* q[TOKENS];
  for (int t = 0; t < TOKENS; ++t) q[t] = tokens[t].codes;
  const uint8_t* codes = w.codes + group * w.steps * 4 * kSketchRows;
  if (w.nibbles) {
    sketch_sums<TOKENS, true>(codes, w.steps, q, sums);
  } else {
    sketch_sums<TOKENS, false>(codes, w.steps, q, sums);
  }
  const int64_t first = group * kSketchRows;
  for (int t = 0; t < TOKENS; ++t) {
    const I offset = set1((w.nibbles ? -8 : -kByteOffset) * tokens[t].sum);
    const F scale = set1(tokens[t].scale);
    for (int64_t r = 0; r < kSketchRows; r += kLanes) {
      const F sum = to_float(load(sums + t * kSketchRows + r) + offset);
      store(tokens[t].scores + first + r, sum * (scale * load(w.scale + first + r)) + load(w.bias + first + r));
    }
  }
}

// Scores of the rows of groups [begin, end) for all tokens.
static void sketch_rows(const SketchRows& w, int64_t begin, int64_t end, const SketchToken* tokens, int64_t count) {
  for (int64_t g = begin; g < end; ++g) {
    int64_t t = 0;
    for (; t + kSketchTokens <= count; t += kSketchTokens) sketch_group<kSketchTokens>(w, g, tokens + t);
    for (; t < count; ++t) sketch_group<1>(w, g, tokens + t);
  }
}

// In place: scores to what is ranked.
static void sketch_keys(int64_t key, float* scores, int64_t count) {
  if (key == kKeySigned) return;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    store_part(scores + i, selection_key(key, load_part(scores + i, n)), n);
  }
}

}  // namespace nogemm::NOGEMM_NS
