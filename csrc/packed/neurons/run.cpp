#include "packed/neurons/run.h"

#include <cstring>
#include <limits>

#include "packed/host/activations.h"
#include "packed/host/sections.h"
#include "packed/neurons/pick.h"

namespace nogemm {
namespace {

using namespace hire;

constexpr int64_t kTogether = 16;    // tokens that share a pass over the sketch
constexpr int64_t kSketchPiece = 4;  // sketch groups per piece
constexpr int64_t kDotPiece = 48;    // rows per piece

void prepare(const Layer& l, const void* x, Dtype dtype, TokenState& t) {
  const HireHeader& h = *l.h;
  l.k->read[dtype](x, t.x, h.d);
  uint32_t broken = 0;  // by bits: a loop over integers is vectorised as it stands
  for (int64_t i = 0; i < h.d; ++i) {
    uint32_t bits;
    std::memcpy(&bits, t.x + i, sizeof bits);
    broken |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  t.finite = broken == 0;
  if (!t.finite) std::memset(t.x, 0, static_cast<size_t>(h.d) * sizeof(float));
  t.x[h.d] = 1.0f;
  if (h.mode == kHireI8) l.k->split(t.x, h.d, round_up(h.d, 64), t.planes, &t.fixed);
}

void quantise(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  const float* source = h.reduce == 0 ? t.x : t.reduced;
  t.sketch.scale = l.k->token(source, h.width, h.steps * (h.nibbles ? 8 : 4), t.codes, &t.sketch.sum);
  t.sketch.codes = t.codes;
  t.sketch.scores = t.scores;
}

void weigh(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  l.k->weights(h.act, h.up_relu != 0, t.exact, h.gated ? t.up : nullptr, l.scale(2), t.kept, t.kept_count, t.weights);
}

struct Chunk {
  Layer layer;
  TokenState* tokens;
  int64_t count;
  const char* x;
  char* y;
  Dtype dtype;
  int64_t item;
  const uint8_t* mask;  // [count, hidden]: the neurons that answer; null: the layer chooses
  uint8_t* chosen;      // [count, hidden]: not null: mark neurons instead of answering
  bool kept;            // mark those that would answer, else all candidates
};

void answer(const Chunk& c, int64_t n, int64_t slice) {
  const HireHeader& h = *c.layer.h;
  TokenState& t = c.tokens[n];
  const int64_t wide = 2 * c.layer.k->columns, begin = slice * wide,
                end = begin + wide < h.d_out ? begin + wide : h.d_out;
  if (t.finite) {
    c.layer.k->sum[h.mode](c.layer.rows(2), t.kept, t.weights, t.kept_count, t.kept_count, begin, end, t.y);
  } else {
    for (int64_t i = begin; i < end; ++i) t.y[i] = std::numeric_limits<float>::quiet_NaN();
  }
  c.layer.k->write[c.dtype](t.y + begin, c.y + (n * h.d_out + begin) * c.item, end - begin);
}

// Rows [begin, end) of the low-rank matrix times the token.
void reduce_rows(const Layer& l, TokenState& t, int64_t begin, int64_t end) {
  static const float zeros[kDotPiece] = {};
  const HireHeader& h = *l.h;
  int32_t index[kDotPiece];
  for (int64_t i = begin; i < end; ++i) index[i - begin] = static_cast<int32_t>(i - begin);
  const BundleRows rows{l.base + h.reduce + begin * h.d * 4, h.d * 4, h.d, nullptr, zeros};
  l.k->dots[kHireF32](rows, index, 0, end - begin, end - begin, t.x, t.reduced + begin);
}

// Rows [begin, end) of the moments times (x, 1). Rows behind the first are a triangle: what lies left of it is not read.
void moment_rows(const Layer& l, TokenState& t, int64_t begin, int64_t end) {
  static const float zeros[kDotPiece] = {};
  const HireHeader& h = *l.h;
  const int64_t first = begin == 0 ? 0 : (begin - 1) / 16 * 16;  // of a row's columns, at a cache line
  int32_t index[kDotPiece];
  for (int64_t i = begin; i < end; ++i) index[i - begin] = static_cast<int32_t>(i - begin);
  const char* base = l.base + h.moments + begin * h.moments_stride + first * 4;
  const BundleRows rows{base, h.moments_stride, h.d + 1 - first, nullptr, zeros};
  l.k->dots[kHireF32](rows, index, 0, end - begin, end - begin, t.x + first, t.moments + begin);
}

void run_chunk(const Chunk& c, Phases& phases) {
  const Layer& l = c.layer;
  const HireHeader& h = *l.h;
  const int64_t n = c.count;
  phases.run(0, n, [&](int64_t i) {
    prepare(l, c.x + i * h.d * c.item, c.dtype, c.tokens[i]);
    if (!l.all() && h.reduce == 0) quantise(l, c.tokens[i]);
  });
  if (h.moments != 0) {
    const int64_t per = (h.d + 2 + kDotPiece - 1) / kDotPiece;
    phases.run(10, n * per, [&](int64_t i) {
      const int64_t begin = i % per * kDotPiece, end = begin + kDotPiece < h.d + 2 ? begin + kDotPiece : h.d + 2;
      moment_rows(l, c.tokens[i / per], begin, end);
    });
  }
  if (!l.all()) {
    if (h.reduce != 0) {
      const int64_t per = (h.width + kDotPiece - 1) / kDotPiece;
      phases.run(1, n * per, [&](int64_t i) {
        const int64_t begin = i % per * kDotPiece, end = begin + kDotPiece < h.width ? begin + kDotPiece : h.width;
        reduce_rows(l, c.tokens[i / per], begin, end);
      });
      phases.run(2, n, [&](int64_t i) { quantise(l, c.tokens[i]); });
    }
    const SketchRows rows{l.at<uint8_t>(h.sketch), l.at(h.sketch_scale), l.at(h.gate_bias), h.steps, h.nibbles != 0};
    const int64_t groups = (h.hidden + kSketchRows - 1) / kSketchRows;
    SketchToken tokens[kTogether];
    for (int64_t i = 0; i < n; ++i) tokens[i] = c.tokens[i].sketch;
    phases.run(3, (groups + kSketchPiece - 1) / kSketchPiece, [&](int64_t i) {
      const int64_t end = (i + 1) * kSketchPiece < groups ? (i + 1) * kSketchPiece : groups;
      l.k->scores(rows, i * kSketchPiece, end, tokens, n);
    });
  }
  if (h.select == kScores) {
    phases.run(9, n, [&](int64_t i) {
      TokenState& t = c.tokens[i];
      for (int64_t r = 0; r < h.hidden && !t.finite; ++r) t.scores[r] = std::numeric_limits<float>::quiet_NaN();
      l.k->write[c.dtype](t.scores, c.y + i * h.hidden * c.item, h.hidden);
    });
    return;
  }
  phases.run(4, n, [&](int64_t i) {
    if (h.moments != 0) c.tokens[i].cutoff = cutoff_from_moments(h, c.tokens[i].moments);
    if (c.mask != nullptr) {
      pick_masked(l, c.mask + i * h.hidden, c.tokens[i]);
    } else {
      pick_candidates(l, c.tokens[i]);
    }
    if (c.chosen != nullptr && !c.kept)
      mark(h, c.tokens[i].candidates, c.tokens[i].candidate_count, c.chosen + i * h.hidden);
  });
  if (c.chosen != nullptr && !c.kept) return;
  const int64_t dots = (most_candidates(h) + kDotPiece - 1) / kDotPiece;
  const auto run_dots = [&](int64_t kind, int64_t i) {
    TokenState& t = c.tokens[i / dots];
    const int64_t count = kind == 0 ? t.candidate_count : t.kept_count, begin = i % dots * kDotPiece;
    const int64_t end = begin + kDotPiece < count ? begin + kDotPiece : count;
    const int32_t* index = kind == 0 ? t.candidates : t.kept;
    float* out = kind == 0 ? t.exact : t.up;
    if (begin >= end) return;
    if (h.mode == kHireI8) {
      l.k->fixed_dots(l.rows(kind), index, begin, end, t.fixed, out);
    } else {
      l.k->dots[h.mode](l.rows(kind), index, begin, end, end, t.x, out);
    }
  };
  phases.run(5, n * dots, [&](int64_t i) { run_dots(0, i); });
  phases.run(6, n, [&](int64_t i) {
    if (c.mask == nullptr) pick_kept(l, c.tokens[i]);
    if (c.chosen != nullptr) {
      mark(h, c.tokens[i].kept, c.tokens[i].kept_count, c.chosen + i * h.hidden);
    } else if (!h.gated) {
      weigh(l, c.tokens[i]);
    }
  });
  if (c.chosen != nullptr) return;
  if (h.gated) {
    phases.run(7, n * dots, [&](int64_t i) { run_dots(1, i); });
    phases.run(8, n, [&](int64_t i) { weigh(l, c.tokens[i]); });
  }
  const int64_t slices = (h.d_out + 2 * l.k->columns - 1) / (2 * l.k->columns);
  phases.run(9, n * slices, [&](int64_t i) { answer(c, i / slices, i % slices); });
}

struct Call {
  Chunk first;  // of the whole call; `count` is not used
  int64_t tokens, chunks;
  char* workspace;
  int64_t token_bytes;
  std::atomic<int64_t> next{0};
};

Chunk chunk_of(const Call& call, int64_t chunk, TokenState* states, int64_t slot) {
  Chunk c = call.first;
  const HireHeader& h = *c.layer.h;
  const int64_t start = chunk * kTogether;
  c.count = call.tokens - start < kTogether ? call.tokens - start : kTogether;
  c.x += start * h.d * c.item;
  if (c.y != nullptr) c.y += start * h.d_out * c.item;
  if (c.mask != nullptr) c.mask += start * h.hidden;
  if (c.chosen != nullptr) c.chosen += start * h.hidden;
  Carver carver{call.workspace + slot * kTogether * call.token_bytes};
  for (int64_t i = 0; i < c.count; ++i) states[i] = carve(h, carver);
  c.tokens = states;
  return c;
}

struct SharedChunk {
  Chunk chunk;
  Phases phases;
};

void run_shared(int64_t, void* arg) {
  auto* shared = static_cast<SharedChunk*>(arg);
  run_chunk(shared->chunk, shared->phases);
}

void run_own(int64_t worker, void* arg) {
  auto* call = static_cast<Call*>(arg);
  for (int64_t chunk; (chunk = call->next.fetch_add(1, std::memory_order_relaxed)) < call->chunks;) {
    TokenState states[kTogether];
    Phases phases;
    run_chunk(chunk_of(*call, chunk, states, worker), phases);
  }
}

bool within(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

// What a header says of the layer, whatever lies where.
bool is_layer(const HireHeader& h) {
  constexpr int64_t most = (int64_t{1} << 31) - 2 * kSketchRows;
  if (!within(h.d, 1, most) || !within(h.d_out, 1, most) || !within(h.hidden, 1, most)) return false;
  if (!within(h.mode, kHireF32, kHireI8) || !within(h.gated, 0, 1) || !within(h.act, 0, NOGEMM_ACTIVATIONS - 1) ||
      !within(h.key, kKeySigned, NOGEMM_ACTIVATIONS - 1) || !within(h.select, kTopK, kScores) ||
      !within(h.nibbles, 0, 1))
    return false;
  if (!within(h.group, 1, h.hidden) || h.groups != (h.hidden + h.group - 1) / h.group) return false;
  if (!within(h.kept, 0, h.groups) || !within(h.candidates, h.kept, h.groups) ||
      !within(h.always_count, 0, h.always == 0 ? 0 : h.groups))
    return false;
  if ((h.moments != 0) != (h.select == kGaussian) || (h.margin_error != 0) != (h.margin_size != 0)) return false;
  if (h.select == kScores) return h.sketch != 0 && h.reduce == 0 && h.d_out == h.hidden;
  // All neurons are candidates of a layer without a sketch.
  return h.sketch != 0 || h.select != kTopK || h.candidates == h.groups;
}

void need_choice(const HireHeader& h, Sections& sections) {
  const int64_t padded = round_up(h.hidden, kSketchRows);
  sections.need(h.gate_bias, {padded, 4});
  sections.may_have(h.always, {h.always_count, 4});
  const bool whole = h.reduce == 0;
  sections.inside = sections.inside && (whole ? h.width == h.d : h.sketch != 0);  // scratch is made of it, too
  if (h.sketch == 0) return;
  const int64_t columns = h.nibbles != 0 ? 8 : 4;
  sections.inside = sections.inside && within(h.width, 1, (int64_t{1} << 31) - columns) &&
                    h.steps == (h.width + columns - 1) / columns;
  sections.need(h.sketch, {padded, h.steps, 4});
  sections.need(h.sketch_scale, {padded, 4});
  sections.may_have(h.reduce, {h.width, h.d, 4});
}

void need_rows(const HireHeader& h, Sections& sections) {
  const int64_t item = h.mode == kHireF32 ? 4 : h.mode == kHireBF16 ? 2 : 1;
  const int64_t in = round_up(h.d * item, 64), out = round_up(h.d_out * item, 64);
  sections.inside = sections.inside && h.up_at == (h.gated != 0 ? in : 0) && h.down_at == h.up_at + in &&
                    h.bundle_bytes == h.down_at + out;
  sections.need(h.bundles, {h.hidden, h.bundle_bytes});
  sections.need(h.up_bias, {h.hidden, 4});
  sections.need(h.out_bias, {h.d_out, 4});
  if (h.mode == kHireI8) sections.need(h.scales, {3, h.hidden, 4});
  sections.inside = sections.inside && (h.mode == kHireI8 || h.scales == 0);
  sections.may_have(h.margin_error, {h.hidden, 4});
  sections.may_have(h.margin_size, {h.hidden, 4});
  if (h.moments == 0) return;
  sections.inside = sections.inside && h.moments_stride == round_up(h.d + 1, 16) * 4;
  sections.need(h.moments, {h.d + 2, h.moments_stride});
}

Chunk whole_call(const KernelTable& table, const void* packed, const void* x, Dtype x_dtype) {
  Chunk whole{};
  whole.layer = {static_cast<const HireHeader*>(packed), static_cast<const char*>(packed), &table.hire};
  whole.x = static_cast<const char*>(x);
  whole.dtype = x_dtype;
  whole.item = x_dtype == kF32 ? 4 : 2;
  return whole;
}

void run_call(const Chunk& whole, int64_t tokens, void* workspace, const NogemmHost& host) {
  Call call{};
  call.first = whole;
  call.tokens = tokens;
  call.chunks = (tokens + kTogether - 1) / kTogether;
  call.workspace = static_cast<char*>(workspace);
  call.token_bytes = token_bytes(*whole.layer.h);
  if (call.chunks >= 2 * host.threads) {
    if (host.threads == 1) return run_own(0, &call);
    return host.run(host.self, host.threads, run_own, &call);
  }
  for (int64_t i = 0; i < call.chunks; ++i) {
    TokenState states[kTogether];
    SharedChunk shared;
    shared.chunk = chunk_of(call, i, states, 0);
    if (host.threads == 1) {
      run_shared(0, &shared);
    } else {
      host.run(host.self, host.threads, run_shared, &shared);
    }
  }
}

}  // namespace

int64_t hire_workspace(const HireHeader& header, int64_t tokens, int64_t threads) {
  const int64_t slots = tokens > kTogether ? threads : 1;
  return slots * kTogether * token_bytes(header);
}

void hire_forward(const KernelTable& table, const void* packed, const void* x, Dtype x_dtype, const uint8_t* mask,
                  void* y, int64_t tokens, void* workspace, const NogemmHost& host) {
  Chunk whole = whole_call(table, packed, x, x_dtype);
  whole.y = static_cast<char*>(y);
  whole.mask = mask;
  run_call(whole, tokens, workspace, host);
}

void hire_choose(const KernelTable& table, const void* packed, const void* x, Dtype x_dtype, bool kept, uint8_t* chosen,
                 int64_t tokens, void* workspace, const NogemmHost& host) {
  Chunk whole = whole_call(table, packed, x, x_dtype);
  whole.chosen = chosen;
  whole.kept = kept;
  run_call(whole, tokens, workspace, host);
}

const char* hire_check(const void* packed, int64_t bytes) {
  constexpr const char* kDamaged = "a damaged buffer; pack the layer again";
  const auto* h = static_cast<const HireHeader*>(packed);
  if (bytes < static_cast<int64_t>(sizeof(HireHeader)) || h->magic != kHireMagic) return "not a packed HireFFN";
  if (h->version != kHireVersion) return "a buffer of another version; pack the layer again";
  if (h->bytes != bytes || !is_layer(*h)) return kDamaged;
  Sections sections{bytes, static_cast<int64_t>(sizeof(HireHeader))};
  need_choice(*h, sections);
  if (h->select != kScores) need_rows(*h, sections);
  return sections.inside ? nullptr : kDamaged;
}

const char* hire_check_body(const void* packed) {
  const auto* h = static_cast<const HireHeader*>(packed);
  const Layer layer{h, static_cast<const char*>(packed), nullptr};
  const int32_t* always = layer.at<int32_t>(h->always);
  for (int64_t i = 0; i < h->always_count; ++i)
    if (always[i] < 0 || always[i] >= h->groups) return "a damaged buffer: it names neurons that are not there";
  return nullptr;
}

}  // namespace nogemm
