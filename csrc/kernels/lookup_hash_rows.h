// The hash of 1 to kRowTokens tokens with features in lanes (see lookup_hash.h).
#pragma once
#include "lookup_hash.h"

namespace nogemm::NOGEMM_NS {

struct RowState {
  float scale[kRowTokens], poison[kRowTokens];
};

template <class S, int NTOK>
NOGEMM_INLINE void rows_input(const Layer& l, const Tokens& x, int64_t start, const HashScratch& s, RowState& state) {
  const LookupHeader& h = *l.h;
  const int64_t row_floats = round_up(h.in_width(), 16);
  for (int n = 0; n < NTOK; ++n) {
    float* row = s.rows + n * row_floats;
    prepare_row(l, x, start + n, row);
    state.scale[n] = 1.0f;
    state.poison[n] = 0.0f;
    if constexpr (S::kInputs == 2) {
      const Step step = fix_row(h, row, reinterpret_cast<int16_t*>(s.row_words + n * input_words(h)));
      state.scale[n] = step.scale;
      state.poison[n] = step.poison;
    }
  }
}

// All rounds of one repeat; z[n] ends in wide, before scale, residual and bias.
template <class S, int NTOK>
NOGEMM_INLINE const float* rows_repeat(const Layer& l, int64_t repeat, const HashScratch& s, RowState& state,
                                       float* buffer, float* scale) {
  const LookupHeader& h = *l.h;
  constexpr bool kFixed = S::kInputs == 2;
  using Word = typename S::Word;
  const Word* in = kFixed ? reinterpret_cast<const Word*>(s.row_words) : reinterpret_cast<const Word*>(s.rows);
  int64_t in_stride = kFixed ? input_words(h) : round_up(h.in_width(), 16);
  const int64_t out_stride = h.out_width();
  float *wide = buffer, *other = reinterpret_cast<float*>(s.input);
  for (int n = 0; n < NTOK; ++n) scale[n] = state.scale[n];
  for (int64_t round = 0; round < h.rounds; ++round) {
    const Round<S> r = round_of<S>(l, repeat, round);
    const int64_t used = round == 0 ? h.active_blocks : h.blocks;
    for (int64_t b = 0; b < used; ++b)
      rows_product<S, NTOK>(r.weights + b * r.block_words, r.scale + b * h.block_out, r.steps, h.block_out,
                            in + b * r.steps, in_stride, wide + b * h.block_out, out_stride);
    const bool last = round + 1 == h.rounds;
    for (int n = 0; n < NTOK; ++n) {
      float* row = wide + n * out_stride;
      for (int64_t i = used * h.block_out; i < out_stride; i += kLanes) store(row + i, zero());
      if (!kFixed || last) {
        butterflies<1, false>(row, h.blocks, h.order, h.block_out, nullptr);
        continue;
      }
      I largest = set1(int32_t{0});
      butterflies<1, true>(row, h.blocks, h.order, h.block_out, &largest);
      const float most = bits_to_float(static_cast<uint32_t>(hmax(largest))), bounded = most > 1e-30f ? most : 1e-30f;
      scale[n] *= bounded * (1.0f / h.act_max);
      state.poison[n] += most * 0.0f;
      auto* words = reinterpret_cast<int32_t*>(s.current) + n * input_words(h);
      row_quantise(row, out_stride, h.act_max / bounded, reinterpret_cast<int16_t*>(words));
    }
    if (last) break;
    in_stride = kFixed ? input_words(h) : out_stride;
    in = reinterpret_cast<const Word*>(kFixed ? reinterpret_cast<float*>(s.current) : wide);
    if (!kFixed) {
      float* swap = wide;
      wide = other;
      other = swap;
    }
  }
  return wide;
}

// z = scale * raw + bias + keep * x. May write up to kLanes - 1 floats behind `columns`; the next repeat overwrites them.
NOGEMM_INLINE void row_finish(const Layer& l, int64_t repeat, int64_t columns, const float* raw, float scale,
                              const float* x, const int16_t* fixed_x, float x_scale, float* z) {
  const LookupHeader& h = *l.h;
  const float* bias = Layer::floats(l, h.proj_bias) + repeat * h.columns;
  for (int64_t c = 0; c < columns; c += kLanes) {
    F value = h.fixed_point ? fma(load(raw + c), set1(scale), load_part(bias + c, static_cast<int>(columns - c)))
                            : load(raw + c) + load_part(bias + c, static_cast<int>(columns - c));
    if (h.residual) {
      alignas(64) float kept[kLanes];  // the same rounded x as in the tile, so that codes do not depend on the batch
      for (int i = 0; i < kLanes; ++i) kept[i] = fixed_x ? static_cast<float>(fixed_x[c + i]) * x_scale : x[c + i];
      value = fma(load(kept), set1(h.keep), value);
    }
    store(z + c, value);
  }
}

NOGEMM_INLINE void row_encode(const Layer& l, const float* z, float poison, float* scores, const Lookups& out) {
  const LookupHeader& h = *l.h;
  const I lane = lane_index(), step = times(lane, h.bits);
  float* to = h.integers() ? scores : out.score;
  const int64_t k = h.neighbours;
  for (int64_t table = 0; table < h.tables; table += kLanes) {
    const int64_t left = h.tables - table;
    const M real = lt(lane, set1(static_cast<int32_t>(left < kLanes ? left : kLanes)));
    Encoded e;
    const auto bit = [z, step, table, &h](int j) { return gather(z + table * h.bits + j, step); };
    encode_lookups(h, bit, e);
    const I first = times(lane + set1(static_cast<int32_t>(table)), int32_t{1} << h.bits);
    for (int f = 0; f < h.neighbours; ++f) {
      const I index = blend(real, e.code[f] | first, set1(int32_t{0}));
      F score = blend(real, e.score[f] + set1(poison), zero());
      if (h.integers()) score = score * gather(Layer::floats(l, h.row_scale), index);
      if (k == 1) {
        store(out.index + table, index);
        store(to + table, score);
        continue;
      }
      alignas(64) int32_t each_index[kLanes];
      alignas(64) float each_score[kLanes];
      store(each_index, index);
      store(each_score, score);
      for (int64_t i = 0; i < kLanes && i < left; ++i) {
        out.index[(table + i) * k + f] = each_index[i];
        to[(table + i) * k + f] = each_score[i];
      }
    }
  }
  for (int64_t i = h.lookups(); i < out.count + kLanes; ++i) {
    out.index[i] = 0;
    to[i] = 0.0f;
  }
  if (h.integers()) row_integer_scores(out, scores);
}

// out[n]: the lookups of token start + n (width 1).
template <class S, int NTOK>
static void rows_hash(const Layer& l, const Tokens& x, int64_t start, const HashScratch& s, const Lookups* out) {
  const LookupHeader& h = *l.h;
  RowState state;
  rows_input<S, NTOK>(l, x, start, s, state);
  const int64_t bits = int64_t{h.tables} * h.bits, room = z_room(h), row_floats = round_up(h.in_width(), 16);
  float* buffer = reinterpret_cast<float*>(S::kInputs == 2 ? s.input : s.current);
  for (int64_t repeat = 0; repeat < h.repeats; ++repeat) {
    const int64_t left = bits - repeat * h.columns, columns = left < h.columns ? left : h.columns;
    float scale[kRowTokens];
    const float* raw = rows_repeat<S, NTOK>(l, repeat, s, state, buffer, scale);
    for (int n = 0; n < NTOK; ++n) {
      const auto* fixed_x = reinterpret_cast<const int16_t*>(s.row_words + n * input_words(h));
      row_finish(l, repeat, columns, raw + n * h.out_width(), scale[n], s.rows + n * row_floats,
                 S::kInputs == 2 ? fixed_x : nullptr, state.scale[n], s.wide + n * room + repeat * h.columns);
    }
  }
  for (int n = 0; n < NTOK; ++n) {
    float* z = s.wide + n * room;
    for (int64_t i = bits; i < bits + 16 * h.bits; ++i) z[i] = 0.0f;
    row_encode(l, z, state.poison[n], s.scores, out[n]);
  }
}

}  // namespace nogemm::NOGEMM_NS
