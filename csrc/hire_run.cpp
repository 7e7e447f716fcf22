#include "hire_run.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "hire_state.h"

namespace nogemm {
namespace {

using namespace hire;

constexpr int64_t kTogether = 16;    // tokens that share a pass over the sketch
constexpr int64_t kSketchPiece = 4;  // sketch groups per piece
constexpr int64_t kDotPiece = 48;    // rows per piece
// Members of the given groups; the last group may be short. Returns how many.
int64_t spell_out(const HireHeader& h, const int32_t* groups, int64_t count, int32_t* members) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t m = groups[i] * h.group; m < (groups[i] + 1) * h.group && m < h.hidden; ++m)
      members[found++] = static_cast<int32_t>(m);
  return found;
}

// keys[i] = the sum of group i's members; values are those of the listed groups, one after the other.
void sum_groups(const HireHeader& h, const float* values, const int32_t* groups, int64_t count, float* keys) {
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = (groups == nullptr ? i : groups[i]) * h.group;
    const int64_t members = first + h.group < h.hidden ? h.group : h.hidden - first;
    float sum = 0;
    for (int64_t m = 0; m < members; ++m) sum += values[at++];
    keys[i] = sum;
  }
}

struct Cutoffs {
  double wide, keep;
};
Cutoffs cutoffs_of(const HireHeader& h, const float* scores) {
  if (h.select == kActive) return {0.0, 0.0};
  double sum = 0, square = 0;
  for (int64_t i = 0; i < h.hidden; ++i) sum += scores[i];
  const double mean = sum / static_cast<double>(h.hidden);
  for (int64_t i = 0; i < h.hidden; ++i) square += (scores[i] - mean) * (scores[i] - mean);
  const double spread = std::sqrt(square / static_cast<double>(h.hidden)),
               none = -std::numeric_limits<double>::infinity();
  return {std::isinf(h.wide_z) ? none : mean + h.wide_z * spread,
          std::isinf(h.keep_z) ? none : mean + h.keep_z * spread};
}

void prepare(const Layer& l, const void* x, Dtype dtype, TokenState& t) {
  const HireHeader& h = *l.h;
  l.k->read[dtype](x, t.x, h.d);
  float poison = 0;
  for (int64_t i = 0; i < h.d; ++i) poison += t.x[i] * 0.0f;
  t.finite = poison == 0.0f;
  if (!t.finite) std::memset(t.x, 0, static_cast<size_t>(h.d) * sizeof(float));
  if (h.mode == kHireI8) l.k->split(t.x, h.d, round_up(h.d, 64), t.planes, &t.fixed);
}

void quantise(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  const float* source = h.reduce == 0 ? t.x : t.reduced;
  t.sketch.scale = l.k->token(source, h.width, h.steps * (h.nibbles ? 8 : 4), t.codes, &t.sketch.sum);
  t.sketch.codes = t.codes;
  t.sketch.scores = t.scores;
}

// A token's neurons as somebody else has chosen them.
void pick_masked(const Layer& l, const uint8_t* mask, TokenState& t) {
  t.kept_count = 0;
  for (int64_t i = 0; i < l.h->hidden; ++i) {
    t.kept[t.kept_count] = static_cast<int32_t>(i);
    t.kept_count += mask[i] != 0;
  }
  std::memcpy(t.candidates, t.kept, static_cast<size_t>(t.kept_count) * sizeof(int32_t));
  t.candidate_count = t.kept_count;
}

void pick_candidates(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  if (l.all()) {
    for (int64_t i = 0; i < h.groups; ++i) t.groups[i] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < h.hidden; ++i) t.candidates[i] = static_cast<int32_t>(i);
    t.candidate_count = h.hidden;
    return;
  }
  if (h.select == kTopK) {
    l.k->keys(h.key, t.scores, h.hidden);
    if (h.group > 1) sum_groups(h, t.scores, nullptr, h.groups, t.scores);
    const int32_t* always = l.at<int32_t>(h.always);
    for (int64_t i = 0; i < h.always_count; ++i) t.scores[always[i]] = std::numeric_limits<float>::infinity();
    const int64_t found = l.k->select(t.scores, h.groups, h.candidates, t.groups);
    t.candidate_count = spell_out(h, t.groups, found, t.candidates);
    return;
  }
  const float *error = l.at(h.margin_error), *size = l.at(h.margin_size);
  const double limit = cutoffs_of(h, t.scores).wide;
  float square = 0;
  for (int64_t i = 0; i < h.d; ++i) square += t.x[i] * t.x[i];
  const float norm = std::sqrt(square);
  t.candidate_count = 0;
  for (int64_t i = 0; i < h.hidden; ++i) {
    const float margin = h.select == kActive ? norm * error[i] + t.sketch.scale * size[i] : 0.0f;
    if (t.scores[i] + margin > limit) t.candidates[t.candidate_count++] = static_cast<int32_t>(i);
  }
}

// The neurons that answer; t.exact is moved along, so that it belongs to t.kept afterwards.
void pick_kept(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  t.kept_count = 0;
  if (h.select != kTopK) {
    const double limit = cutoffs_of(h, l.all() ? t.exact : t.scores).keep;
    for (int64_t j = 0; j < t.candidate_count; ++j) {
      if (!(t.exact[j] > limit)) continue;
      t.exact[t.kept_count] = t.exact[j];
      t.kept[t.kept_count++] = t.candidates[j];
    }
    return;
  }
  const int64_t groups = l.all() ? h.groups : h.candidates;
  float* keys = t.scores;
  std::memcpy(keys, t.exact, static_cast<size_t>(t.candidate_count) * sizeof(float));
  l.k->keys(h.key, keys, t.candidate_count);
  if (h.group > 1) sum_groups(h, keys, t.groups, groups, keys);
  const int32_t* always = l.at<int32_t>(h.always);
  for (int64_t i = 0, a = 0; i < groups && a < h.always_count; ++i) {
    while (a < h.always_count && always[a] < t.groups[i]) ++a;
    if (a < h.always_count && always[a] == t.groups[i]) keys[i] = std::numeric_limits<float>::infinity();
  }
  const int64_t found = l.k->select(keys, groups, h.kept, t.chosen);
  for (int64_t i = 0; i < found; ++i) {
    const int64_t group = t.groups[t.chosen[i]];
    for (int64_t m = 0; m < h.group && group * h.group + m < h.hidden; ++m) {
      t.exact[t.kept_count] = t.exact[t.chosen[i] * h.group + m];
      t.kept[t.kept_count++] = static_cast<int32_t>(group * h.group + m);
    }
  }
}

void weigh(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  l.k->weights(h.act, h.up_relu != 0, t.exact, h.gated ? t.up : nullptr, l.scale(2), t.kept, t.kept_count,
               t.weights);
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

void run_chunk(const Chunk& c, Phases& phases) {
  const Layer& l = c.layer;
  const HireHeader& h = *l.h;
  const int64_t n = c.count;
  phases.run(0, n, [&](int64_t i) {
    prepare(l, c.x + i * h.d * c.item, c.dtype, c.tokens[i]);
    if (!l.all() && h.reduce == 0) quantise(l, c.tokens[i]);
  });
  if (!l.all()) {
    if (h.reduce != 0) {
      const int64_t per = (h.width + kDotPiece - 1) / kDotPiece;
      phases.run(1, n * per, [&](int64_t i) {
        const int64_t begin = i % per * kDotPiece,
                      end = begin + kDotPiece < h.width ? begin + kDotPiece : h.width;
        reduce_rows(l, c.tokens[i / per], begin, end);
      });
      phases.run(2, n, [&](int64_t i) { quantise(l, c.tokens[i]); });
    }
    const SketchRows rows{l.at<uint8_t>(h.sketch), l.at(h.sketch_scale), l.at(h.gate_bias), h.steps,
                          h.nibbles != 0};
    const int64_t groups = (h.hidden + kSketchRows - 1) / kSketchRows;
    SketchToken tokens[kTogether];
    for (int64_t i = 0; i < n; ++i) tokens[i] = c.tokens[i].sketch;
    phases.run(3, (groups + kSketchPiece - 1) / kSketchPiece, [&](int64_t i) {
      const int64_t end = (i + 1) * kSketchPiece < groups ? (i + 1) * kSketchPiece : groups;
      l.k->scores(rows, i * kSketchPiece, end, tokens, n);
    });
  }
  phases.run(4, n, [&](int64_t i) {
    if (c.mask != nullptr) {
      pick_masked(l, c.mask + i * h.hidden, c.tokens[i]);
    } else {
      pick_candidates(l, c.tokens[i]);
    }
  });
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
    if (!h.gated) weigh(l, c.tokens[i]);
  });
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
  c.y += start * h.d_out * c.item;
  if (c.mask != nullptr) c.mask += start * h.hidden;
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

}  // namespace

int64_t hire_workspace(const HireHeader& header, int64_t tokens, int64_t threads) {
  const int64_t slots = tokens > kTogether ? threads : 1;
  return slots * kTogether * token_bytes(header);
}

void hire_forward(const KernelTable& table, const void* packed, const void* x, Dtype x_dtype,
                  const uint8_t* mask, void* y, int64_t tokens, void* workspace, const NogemmHost& host) {
  const auto* header = static_cast<const HireHeader*>(packed);
  Call call{};
  call.first = {{header, static_cast<const char*>(packed), &table.hire},
                nullptr,
                0,
                static_cast<const char*>(x),
                static_cast<char*>(y),
                x_dtype,
                x_dtype == kF32 ? 4 : 2,
                mask};
  call.tokens = tokens;
  call.chunks = (tokens + kTogether - 1) / kTogether;
  call.workspace = static_cast<char*>(workspace);
  call.token_bytes = token_bytes(*header);
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

const char* hire_check(const void* packed, int64_t bytes) {
  const auto* h = static_cast<const HireHeader*>(packed);
  if (bytes < static_cast<int64_t>(sizeof(HireHeader)) || h->magic != kHireMagic)
    return "not a buffer made by pack_hire";
  if (h->version != kHireVersion) return "a buffer of another version; pack the layer again";
  if (h->bytes != bytes || h->d < 1 || h->d_out < 1 || h->hidden < 1 || h->mode < 0 || h->mode > 2)
    return "a damaged buffer; pack the layer again";
  const int64_t bundles = h->bundles + h->hidden * h->bundle_bytes;
  const int64_t sketch = h->sketch + round_up(h->hidden, kSketchRows) * h->steps * 4;
  if (bundles > bytes || sketch > bytes || h->group < 1 || h->kept > h->groups || h->candidates > h->groups)
    return "a damaged buffer; pack the layer again";
  return nullptr;
}

}  // namespace nogemm
