// From tokens to lookups: LayerNorm, projection, codes and scores.
//
// tile_hash: NV * kLanes tokens, one per lane. rows_hash: up to 4 tokens, features in lanes, tables in lanes at the end.
// Both compute the same function with the same rounding of inputs and weights; sums differ in their order only.
#pragma once
#include "lookup_project.h"
#include "lookup_scores.h"
#include "packed/host/round_up.h"

namespace nogemm::NOGEMM_NS {

struct Layer {
  const LookupHeader* h;
  const char* at;
  NOGEMM_INLINE const float* floats(const Layer& l, int64_t offset) {
    return reinterpret_cast<const float*>(l.at + offset);
  }
};

// Rows of x, `stride` elements apart.
struct Tokens {
  const char* x;
  int64_t dtype;  // NOGEMM_X_*: 0 fp32, 1 bf16, 2 fp16
  int64_t stride;
};

// Scratch of one worker; sizes in hash_scratch_bytes.
struct HashScratch {
  float* rows;         // kLanes tokens as rows, floats
  int32_t* row_words;  // the same in fixed point
  char* input;         // words [input][token]
  char* current;
  float* wide;    // z or the widest intermediate, with 16 features of room in front
  float* scores;  // before they become integers
};

inline constexpr int kRowTokens = 4;

// Words per token, padded so that the transposition never needs a tail.
NOGEMM_INLINE int64_t input_words(const LookupHeader& h) {
  return round_up(h.fixed_point ? h.in_width() / 2 : h.in_width(), 16);
}
NOGEMM_INLINE int64_t widest(const LookupHeader& h) {
  return h.in_width() > h.out_width() ? h.in_width() : h.out_width();
}
NOGEMM_INLINE int64_t z_room(const LookupHeader& h) { return (int64_t{h.tables} + 16) * h.bits + h.out_width() + 16; }

NOGEMM_INLINE int64_t place_hash_scratch(const LookupHeader& h, int64_t width, char* at, HashScratch* s) {
  int64_t used = 0;
  const auto take = [&used, at](int64_t bytes) {
    char* p = at + used;
    used += round_up(bytes, 64);
    return p;
  };
  const int64_t tokens = width > kRowTokens ? width : kRowTokens, rows = kLanes > kRowTokens ? kLanes : kRowTokens;
  const int64_t wide = (widest(h) + h.blocks + 16) * tokens * 4, z = z_room(h) * kRowTokens * 4;
  HashScratch scratch;
  scratch.rows = reinterpret_cast<float*>(take(rows * round_up(h.in_width(), 16) * 4));
  scratch.row_words = reinterpret_cast<int32_t*>(take(rows * input_words(h) * 4));
  const int64_t input = input_words(h) * tokens * 4, row_buffer = widest(h) * kRowTokens * 4;
  scratch.input = take(input > row_buffer ? input : row_buffer);
  const int64_t current = h.fixed_point ? input_words(h) * tokens * 4 : wide;
  scratch.current = take(current > wide ? current : wide);
  scratch.wide = reinterpret_cast<float*>(take(wide > z ? wide : z));
  scratch.scores = reinterpret_cast<float*>(take((padded_lookups(h) + 32) * tokens * 4));
  if (s) *s = scratch;
  return used;
}

// One row of x as in_width floats, zero behind d, normalised if the layer does so.
template <class X>
static void prepare_row_of(const Layer& l, const X* x, float* out) {
  const LookupHeader& h = *l.h;
  const int64_t full = h.d / kLanes * kLanes;
  const int tail = static_cast<int>(h.d - full);
  F sum = zero();
  for (int64_t i = 0; i < full; i += kLanes) {
    const F v = load(x + i);
    store(out + i, v);
    sum = sum + v;
  }
  for (int64_t i = full; i < h.in_width(); i += kLanes) store(out + i, zero());
  if (tail > 0) {
    const F v = load_part(x + full, tail);
    store(out + full, v);
    sum = sum + v;
  }
  if (!h.norm) return;
  const F mean = set1(hsum(sum) / static_cast<float>(h.d));
  F squares = zero();
  for (int64_t i = 0; i < full; i += kLanes) {
    const F v = load(out + i) - mean;
    squares = fma(v, v, squares);
  }
  if (tail > 0) {
    float part[kLanes] = {};
    store_part(part, load(out + full) - mean, tail);
    const F v = load(part);
    squares = fma(v, v, squares);
  }
  const F deviation = sqrt(set1(hsum(squares) / static_cast<float>(h.d) + h.eps));
  const F inverse = set1(1.0f) / deviation;
  const float *gamma = Layer::floats(l, h.gamma), *beta = Layer::floats(l, h.beta);
  for (int64_t i = 0; i < h.in_width(); i += kLanes)
    store(out + i, fma((load(out + i) - mean) * inverse, load(gamma + i), load(beta + i)));
}

NOGEMM_INLINE void prepare_row(const Layer& l, const Tokens& t, int64_t token, float* out) {
  if (t.dtype == NOGEMM_X_FP32) prepare_row_of(l, reinterpret_cast<const float*>(t.x) + token * t.stride, out);
  if (t.dtype == NOGEMM_X_BF16) prepare_row_of(l, reinterpret_cast<const bf16*>(t.x) + token * t.stride, out);
  if (t.dtype == NOGEMM_X_FP16) prepare_row_of(l, reinterpret_cast<const fp16*>(t.x) + token * t.stride, out);
}

// A token's step and the NaN that a broken token must show: 0 for a finite token.
struct Step {
  float scale, poison;
};

NOGEMM_INLINE Step fix_row(const LookupHeader& h, const float* row, int16_t* out) {
  I largest = set1(int32_t{0});
  for (int64_t i = 0; i < h.in_width(); i += kLanes) largest = max(largest, magnitude(load(row + i)));
  const float most = bits_to_float(static_cast<uint32_t>(hmax(largest)));
  const float bounded = most > 1e-30f ? most : 1e-30f;
  row_quantise(row, h.in_width(), h.act_max / bounded, out);
  return {bounded * (1.0f / h.act_max), most * 0.0f};
}

// Where the weights of one (repeat, round) are.
template <class S>
struct Round {
  const typename S::Word* weights;
  const float* scale;
  int64_t block_words, steps;
};

template <class S>
NOGEMM_INLINE Round<S> round_of(const Layer& l, int64_t repeat, int64_t round) {
  const LookupHeader& h = *l.h;
  const int64_t first = (repeat * h.rounds + round) * h.blocks;
  Round<S> r;
  r.steps = h.block_in / S::kInputs;
  r.block_words = r.steps * h.block_out;
  r.weights = reinterpret_cast<const typename S::Word*>(l.at + h.weights) + first * r.block_words;
  r.scale = Layer::floats(l, h.weight_scale) + first * h.block_out;
  return r;
}

}  // namespace nogemm::NOGEMM_NS
