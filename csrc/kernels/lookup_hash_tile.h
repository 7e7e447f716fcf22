// The hash with one token per lane (see lookup_hash.h).
#pragma once
#include "lookup_hash.h"

namespace nogemm::NOGEMM_NS {

template <int NV>
struct TileState {
  F scale[NV];  // a word of `input` times this is x
  F poison[NV];
};

// Reads tokens, normalises, turns rows into lanes. Lanes behind `tokens` hold zeros.
template <class S, int NV>
NOGEMM_INLINE void tile_input(const Layer& l, const Tokens& x, int64_t start, int64_t tokens, const HashScratch& s,
                              TileState<NV>& state) {
  const LookupHeader& h = *l.h;
  constexpr bool kFixed = S::kInputs == 2;
  const int64_t words = input_words(h), row_floats = round_up(h.in_width(), 16);
  int32_t* rows = kFixed ? s.row_words : reinterpret_cast<int32_t*>(s.rows);
  const int64_t row_words = kFixed ? words : row_floats;
  for (int v = 0; v < NV; ++v) {
    alignas(64) float scale[kLanes], poison[kLanes];
    for (int n = 0; n < kLanes; ++n) {
      const int64_t token = v * kLanes + n;
      float* row = s.rows + n * row_floats;
      scale[n] = poison[n] = 0.0f;
      if (token >= tokens) {
        for (int64_t i = 0; i < row_words; ++i) rows[n * row_words + i] = 0;
        continue;
      }
      prepare_row(l, x, start + token, row);
      if constexpr (kFixed) {
        const Step step = fix_row(h, row, reinterpret_cast<int16_t*>(rows + n * row_words));
        scale[n] = step.scale;
        poison[n] = step.poison;
      }
    }
    auto* input = reinterpret_cast<int32_t*>(s.input) + v * kLanes;
    for (int64_t c = 0; c < words; c += kLanes) transpose(rows + c, row_words, input + c * NV * kLanes, NV * kLanes);
    state.scale[v] = load(scale);
    state.poison[v] = load(poison);
  }
}

template <int NV>
NOGEMM_INLINE F tile_x(const LookupHeader& h, const char* input, int64_t c, int v, const TileState<NV>& state) {
  constexpr int NT = NV * kLanes;
  if (!h.fixed_point) return load(reinterpret_cast<const float*>(input) + c * NT + v * kLanes);
  const I pair = load(reinterpret_cast<const int32_t*>(input) + c / 2 * NT + v * kLanes);
  return to_float(shift_right16(c % 2 ? pair : shift_left<16>(pair))) * state.scale[v];
}

// A block of the wide buffer has one feature of zeros behind it: without it the butterflies' 2^k streams, a power of two
// apart, would fall on the same cache sets (5x slower with 16 blocks).
NOGEMM_INLINE int64_t wide_block(const LookupHeader& h) { return int64_t{h.block_out} + 1; }

// All rounds of one repeat; returns z before scale, residual and bias (blocks wide_block apart), and the scale.
template <class S, int NV>
NOGEMM_INLINE float* tile_repeat(const Layer& l, int64_t repeat, const HashScratch& s, TileState<NV>& state, F* scale) {
  const LookupHeader& h = *l.h;
  constexpr int NT = NV * kLanes;
  constexpr bool kFixed = S::kInputs == 2;
  using Word = typename S::Word;
  float* wide = s.wide + 16 * NT;
  float* other = reinterpret_cast<float*>(s.current) + (kFixed ? 0 : 16 * NT);
  const Word* in = reinterpret_cast<const Word*>(s.input);
  const int64_t span = wide_block(h) * NT;
  for (int v = 0; v < NV; ++v) scale[v] = state.scale[v];
  for (int64_t round = 0; round < h.rounds; ++round) {
    const Round<S> r = round_of<S>(l, repeat, round);
    const int64_t used = round == 0 ? h.active_blocks : h.blocks;
    const int64_t in_block = !kFixed && round > 0 ? span : r.steps * NT;
    for (int64_t b = 0; b < used; ++b) {
      float* out = wide + b * span;
      tile_product<S, NV>(r.weights + b * r.block_words, r.scale + b * h.block_out, r.steps, h.block_out,
                          in + b * in_block, out);
      for (int v = 0; v < NV; ++v) store(out + (h.block_out * NV + v) * kLanes, zero());
    }
    for (int64_t i = used * span; i < h.blocks * span; i += kLanes) store(wide + i, zero());
    if (!kFixed || round + 1 == h.rounds) {
      butterflies<NV, false>(wide, h.blocks, h.order, span, nullptr);
      if (round + 1 == h.rounds) return wide;
      in = reinterpret_cast<const Word*>(wide);
      float* swap = wide;
      wide = other;
      other = swap;
      continue;
    }
    I largest[NV];
    for (int v = 0; v < NV; ++v) largest[v] = set1(int32_t{0});
    butterflies<NV, true>(wide, h.blocks, h.order, span, largest);
    F inverse[NV];
    for (int v = 0; v < NV; ++v) {
      const F most = as_float(largest[v]), bounded = max(most, set1(1e-30f));
      inverse[v] = set1(h.act_max) / bounded;
      scale[v] = scale[v] * (bounded * set1(1.0f / h.act_max));
      state.poison[v] = state.poison[v] + most * zero();
    }
    for (int64_t b = 0; b < h.blocks; ++b)
      tile_quantise<NV>(wide + b * span, h.block_out, inverse,
                        reinterpret_cast<int32_t*>(s.current) + b * (h.block_out / 2) * NT);
    in = reinterpret_cast<const Word*>(s.current);
  }
  return wide;
}

// z = scale * raw + bias + keep * x for the first `columns` columns of a repeat, in place and without gaps.
template <int NV>
NOGEMM_INLINE void tile_finish(const Layer& l, int64_t repeat, int64_t columns, const HashScratch& s,
                               const TileState<NV>& state, const F* scale, float* z) {
  const LookupHeader& h = *l.h;
  const float* bias = Layer::floats(l, h.proj_bias) + repeat * h.columns;
  int64_t c = 0;
  for (int64_t b = 0; c < columns; ++b) {
    const float* raw = z + b * wide_block(h) * NV * kLanes;
    for (int64_t f = 0; f < h.block_out && c < columns; ++f, ++c)
      for (int v = 0; v < NV; ++v) {
        const F value = load(raw + (f * NV + v) * kLanes), shift = set1(bias[c]);
        F sum = h.fixed_point ? fma(value, scale[v], shift) : value + shift;
        if (h.residual) sum = fma(tile_x<NV>(h, s.input, c, v, state), set1(h.keep), sum);
        store(z + (c * NV + v) * kLanes, sum);
      }
  }
}

// Codes and scores of one table; z points at the table's first bit.
template <int NV>
NOGEMM_INLINE void tile_encode(const Layer& l, int64_t table, const float* z, const TileState<NV>& state, float* scores,
                               const Lookups& out) {
  const LookupHeader& h = *l.h;
  float* to = h.integers() ? scores : out.score;
  for (int v = 0; v < NV; ++v) {
    Encoded e;
    const auto bit = [z, v](int j) { return load(z + (j * NV + v) * kLanes); };
    encode_lookups(h, bit, e);
    for (int f = 0; f < h.neighbours; ++f) {
      const int64_t at = (table * h.neighbours + f) * out.width + v * kLanes;
      const I index = e.code[f] | set1(static_cast<int32_t>(table << h.bits));
      store(out.index + at, index);
      store(to + at, h.fixed_point ? e.score[f] + state.poison[v] : e.score[f]);
    }
  }
}

// Lookups of the tokens start .. start + tokens - 1, at most NV * kLanes.
template <class S, int NV>
static void tile_hash(const Layer& l, const Tokens& x, int64_t start, int64_t tokens, const HashScratch& s,
                      const Lookups& out) {
  const LookupHeader& h = *l.h;
  constexpr int NT = NV * kLanes;
  TileState<NV> state;
  tile_input<S, NV>(l, x, start, tokens, s, state);
  const int64_t bits = int64_t{h.tables} * h.bits;
  int64_t table = 0, carried = 0;  // columns of an unfinished table, kept in front of the next repeat's
  for (int64_t repeat = 0; repeat < h.repeats; ++repeat) {
    const int64_t left = bits - repeat * h.columns, columns = left < h.columns ? left : h.columns;
    F scale[NV];
    float* z = tile_repeat<S, NV>(l, repeat, s, state, scale);
    tile_finish<NV>(l, repeat, columns, s, state, scale, z);
    int64_t at = -carried;
    if (carried > 0) {
      const float* kept = s.scores + padded_lookups(h) * NT;
      for (int64_t i = 0; i < carried * NT; i += kLanes) store(z - carried * NT + i, load(kept + i));
    }
    for (; at + h.bits <= columns; at += h.bits, ++table) tile_encode<NV>(l, table, z + at * NT, state, s.scores, out);
    carried = columns - at;
    float* keep = s.scores + padded_lookups(h) * NT;
    for (int64_t i = 0; i < carried * NT; i += kLanes) store(keep + i, load(z + at * NT + i));
  }
  float* scores = h.integers() ? s.scores : out.score;
  for (int64_t e = h.lookups(); e < out.count; ++e)
    for (int v = 0; v < NV; ++v) {
      store(out.index + e * NT + v * kLanes, set1(int32_t{0}));
      store(scores + e * NT + v * kLanes, zero());
    }
  if (h.integers())
    for (int v = 0; v < NV; ++v)
      tile_integer_scores(out, h.lookups(), Layer::floats(l, h.row_scale), scores, v * kLanes);
}

}  // namespace nogemm::NOGEMM_NS
