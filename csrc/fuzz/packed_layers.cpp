// One input is one packed layer and one call of it: a layer of any kind, shape and type with ordinary or hostile numbers,
// perhaps a header that was edited (and signed again), tokens of any type, on any instruction set, one thread and three.
//
// What must hold: a header is refused, or every access lies inside the buffers (guarded.h, ASan); every number of the
// answer is written; threads change no bit; and of an ordinary layer the answer is that of csrc/tests' references.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "fuzz/guarded.h"
#include "packed/head/format.h"
#include "packed/head/host.h"
#include "packed/host/round_up.h"
#include "packed/lookup/format.h"
#include "packed/lookup/layout.h"
#include "packed/neurons/format.h"
#include "packed/neurons/host.h"
#include "packed/tree/format.h"
#include "tests/lookup_compare.h"
#include "tests/tree_reference.h"

namespace {

using fuzz::fail;
using fuzz::Guarded;

struct Choices {
  const uint8_t* at;
  const uint8_t* end;

  uint8_t byte() { return at < end ? *at++ : 0; }
  int64_t below(int64_t count) { return (byte() | byte() << 8) % count; }
  bool coin() { return (byte() & 1) != 0; }
};

constexpr int64_t kNumbers[] = {0,   1,    -1,      2,       3,          63,         64,        65,
                                128, 1000, 1 << 16, 1 << 20, 2147483647, 2147483648, INT64_MAX, INT64_MIN};
constexpr float kHostile[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-45f, 0.0f, -0.0f};

void on_threads(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  std::vector<std::thread> threads;
  for (int64_t w = 1; w < workers; ++w) threads.emplace_back(body, w, arg);
  body(0, arg);
  for (std::thread& t : threads) t.join();
}

// Puts some hostile numbers among others.
void spoil(Choices& c, float* values, int64_t count) {
  for (int64_t i = 1 + c.below(3); i > 0 && count > 0; --i) values[c.below(65536) % count] = kHostile[c.below(8)];
}

// Tokens of type x_dtype, [tokens, d].
struct Tokens {
  int64_t count, d, dtype;
  std::vector<float> wide;  // what they were made of
  Guarded memory;

  Tokens(Choices& c, int64_t width)
      : count(c.below(4) != 0 ? c.below(20) : c.below(300)),
        d(width),
        dtype(c.below(3)),
        wide(lookup_reference::uniform(c.byte(), static_cast<size_t>(count * d), 1.5f)),
        memory(count * d * item(), item()) {
    if (c.below(4) == 0) spoil(c, wide.data(), count * d);
    for (int64_t i = 0; i < count * d; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &wide[static_cast<size_t>(i)], 4);
      const auto half = static_cast<uint16_t>(dtype == NOGEMM_X_BF16 ? bits >> 16 : c.byte() | (i & 0x3f) << 8);
      std::memcpy(memory.as<>() + i * item(), dtype == NOGEMM_X_FP32 ? static_cast<const void*>(&bits) : &half,
                  static_cast<size_t>(item()));
    }
  }
  int64_t item() const { return dtype == NOGEMM_X_FP32 ? 4 : 2; }
};

struct Kind {
  const char* (*check)(const void* packed, int64_t bytes, int64_t* d, int64_t* d_out);
  const char* (*check_body)(const void* packed);
  int64_t (*workspace)(const void* packed, int64_t tokens, int64_t threads);
  void (*forward)(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                  void* workspace, const NogemmHost* host);
};

std::vector<char> answer(const Kind& kind, const Guarded& packed, const Tokens& x, int64_t d_out, int64_t threads) {
  const NogemmHost host{threads, on_threads, nullptr};
  const Guarded workspace(kind.workspace(packed.as<>(), x.count, threads), 64);
  const Guarded y(x.count * d_out * x.item(), x.item());
  kind.forward(packed.as<>(), x.memory.as<>(), x.dtype, x.d, y.as<>(), x.count, workspace.as<>(), &host);
  return {y.as<>(), y.as<>() + y.bytes()};
}

// Runs a buffer if its header is accepted; the answer of one thread, where there is one.
std::vector<char> run(const Kind& kind, Choices& c, const Guarded& packed, const Tokens& x, int64_t width_out) {
  int64_t d = 0, d_out = 0;
  if (kind.check(packed.as<>(), packed.bytes(), &d, &d_out) != nullptr) return {};
  if (d != x.d || d_out != width_out) return {};  // a caller compares both
  if (kind.check_body != nullptr && kind.check_body(packed.as<>()) != nullptr) return {};
  const std::vector<char> one = answer(kind, packed, x, d_out, 1);
  if (c.coin() && answer(kind, packed, x, d_out, 3) != one) fail("the number of threads changes the answer");
  return one;
}

// Edits the first bytes of a buffer: words of 8 or 4 bytes, or one bit.
void edit(Choices& c, char* header, int64_t bytes) {
  for (int64_t edits = 1 + c.below(3); edits > 0; --edits) {
    const int64_t width = c.coin() ? 8 : 4, at = c.below(bytes / width) * width, what = c.below(20);
    int64_t value = 0;
    std::memcpy(&value, header + at, static_cast<size_t>(width));
    value = what < 16    ? kNumbers[what]
            : what == 16 ? value + 1
            : what == 17 ? value - 1
                         : value ^ (int64_t{1} << c.below(40));
    std::memcpy(header + at, &value, static_cast<size_t>(width));
  }
}

uint64_t lookup_checksum(const char* header) {
  uint64_t sum = 0xcbf29ce484222325ull;
  for (size_t i = 16; i + 8 <= sizeof(nogemm::LookupHeader); i += 8) {
    uint64_t word;
    std::memcpy(&word, header + i, 8);
    sum = (sum ^ word) * 0x9e3779b97f4a7c15ull;
    sum ^= sum >> 29;
  }
  return sum;
}

void lookup(Choices& c) {
  constexpr Kind kind{nogemm_lookup_check, nullptr, nogemm_lookup_workspace, nogemm_lookup_forward};
  lookup_reference::Shape s{1 + c.below(70), 1 + c.below(140), 1 + c.below(24), 1 + c.below(7), 0};
  if (c.coin()) s.block = int64_t{1} << c.below(4);
  s.neighbours = s.bits > 1 ? int64_t{1} << c.below(3) : 1;
  s.score = c.below(3), s.rounds = s.block > 0 ? 1 + c.below(3) : 1, s.norm = c.coin();
  if (s.score == NOGEMM_LOOKUP_CONSTANT) s.neighbours = 1;
  int64_t width = 1;
  while (width < s.d) width *= 2;
  if (s.block > width) s.block = width;
  if (s.block > 0 && c.coin()) s.mix = 0.7;
  lookup_reference::Model m = lookup_reference::make_model(s, c.byte());
  const bool hostile = c.below(3) == 0;
  if (hostile) {
    spoil(c, m.rows.data(), static_cast<int64_t>(m.rows.size()));
    spoil(c, m.weight.data(), static_cast<int64_t>(m.weight.size()));
  }
  const int64_t mode = c.below(4);
  const NogemmLookupSpec spec = m.spec(mode);
  const int64_t bytes = nogemm_lookup_pack_size(&spec);
  if (bytes < 0) fail("a lookup layer cannot be packed");
  const Guarded packed(bytes, 64);
  if (nogemm_lookup_pack(&spec, packed.as<>(), bytes) != nullptr) fail("a lookup layer was not packed");
  const bool edited = c.coin();
  if (edited) edit(c, packed.as<>(), sizeof(nogemm::LookupHeader));
  if (edited && c.below(4) != 0) packed.as<nogemm::LookupHeader>()->checksum = lookup_checksum(packed.as<>());
  const Tokens x(c, s.d);
  const std::vector<char> y = run(kind, c, packed, x, s.d_out);
  if (!edited && y.empty() && x.count > 0) fail("a lookup layer was refused");
  bool finite = x.dtype == NOGEMM_X_FP32 && !edited && !hostile;
  for (const float v : x.wide) finite = finite && std::fabs(v) < 2;
  if (!finite || x.count > 8) return;
  const auto* answers = reinterpret_cast<const float*>(y.data());
  const lookup_reference::Verdict v = lookup_reference::compare(m, mode, x.wide.data(), answers, x.count);
  if (!(v.error <= lookup_reference::tolerance(mode).relative)) fail("a lookup layer gives another answer");
}

void tree(Choices& c) {
  constexpr Kind kind{nogemm_tree_check, nullptr, nogemm_tree_workspace, nogemm_tree_forward};
  const tree_reference::Shape s{1 + c.below(100), 1 + c.below(140), 1 + c.below(4), 1 + c.below(6),
                                c.below(4),       c.below(6),       c.coin(),       c.coin()};
  tree_reference::Model m = tree_reference::make_model(s, c.byte());
  if (c.below(3) == 0) {
    spoil(c, m.in.data(), static_cast<int64_t>(m.in.size()));
    spoil(c, m.out.data(), static_cast<int64_t>(m.out.size()));
  }
  const NogemmTreeSpec spec = m.spec(c.below(3));
  const Guarded packed(nogemm_tree_pack_size(&spec), 64);
  if (nogemm_tree_pack(&spec, packed.as<>(), packed.bytes()) != nullptr) fail("a tree was not packed");
  const bool edited = c.coin();
  if (edited) edit(c, packed.as<>(), sizeof(nogemm::TreeHeader));
  const Tokens x(c, s.d);
  if (run(kind, c, packed, x, s.d_out).empty() && !edited && x.count > 0) fail("a tree was refused");
}

// Places sections behind a header.
struct Layout {
  int64_t end;
  int64_t add(int64_t bytes) {
    const int64_t at = end;
    end = nogemm::round_up(end + bytes, 64);
    return at;
  }
};

// A HireFFN of random bytes: any numbers, NaN and infinity among them, must stay inside.
void hire(Choices& c) {
  using namespace nogemm;
  constexpr Kind kind{nogemm_hire_check, nogemm_hire_check_body, nogemm_hire_workspace, nogemm_hire_forward};
  HireHeader h{};
  h.magic = kHireMagic, h.version = kHireVersion;
  h.mode = c.below(3), h.d = 1 + c.below(90), h.d_out = 1 + c.below(140), h.hidden = 1 + c.below(200);
  h.gated = c.below(2), h.act = c.below(6), h.up_relu = c.below(2), h.key = c.below(7) - 1, h.select = c.below(5);
  h.nibbles = c.below(2), h.group = h.select == kScores ? h.hidden : 1 + c.below(std::min<int64_t>(h.hidden, 4));
  if (h.select == kScores) h.d_out = h.hidden, h.mode = 0;
  h.groups = (h.hidden + h.group - 1) / h.group;
  const bool sketched = h.select == kScores || c.coin();
  h.candidates = sketched ? c.below(h.groups + 1) : h.groups, h.kept = c.below(h.candidates + 1);
  h.width = h.d;
  h.keep_z = static_cast<double>(c.below(5)) - 2, h.wide_z = h.keep_z - 1;
  Layout layout{round_up(static_cast<int64_t>(sizeof h), 64)};
  const int64_t padded = round_up(h.hidden, kSketchRows), item = h.mode == kHireF32 ? 4 : h.mode == kHireBF16 ? 2 : 1;
  if (sketched) {
    const bool reduced = h.select != kScores && c.coin();
    h.width = reduced ? 1 + c.below(h.d) : h.d;
    h.steps = (h.width + (h.nibbles != 0 ? 7 : 3)) / (h.nibbles != 0 ? 8 : 4);
    h.sketch = layout.add(padded * h.steps * 4), h.sketch_scale = layout.add(padded * 4);
    if (reduced) h.reduce = layout.add(h.width * h.d * 4);
  }
  if (c.coin()) h.always_count = std::min<int64_t>(h.groups, 3), h.always = layout.add(h.always_count * 4);
  if (c.coin()) h.margin_error = layout.add(h.hidden * 4), h.margin_size = layout.add(h.hidden * 4);
  if (h.select == kGaussian) {
    h.moments_stride = round_up(h.d + 1, 16) * 4;
    h.moments = layout.add((h.d + 2) * h.moments_stride);
  }
  h.gate_bias = layout.add(padded * 4), h.up_bias = layout.add(h.hidden * 4), h.out_bias = layout.add(h.d_out * 4);
  if (h.mode == kHireI8) h.scales = layout.add(3 * h.hidden * 4);
  const int64_t in = round_up(h.d * item, 64);
  h.up_at = h.gated != 0 ? in : 0, h.down_at = h.up_at + in;
  h.bundle_bytes = h.select == kScores ? 0 : h.down_at + round_up(h.d_out * item, 64);
  if (h.select == kScores) h.up_at = h.down_at = 0;
  h.bundles = layout.add(h.hidden * h.bundle_bytes);
  h.bytes = layout.end;
  const Guarded packed(h.bytes, 64);
  std::mt19937 rng(c.byte());
  const bool tame = c.coin();
  for (int64_t i = 0; i + 4 <= h.bytes; i += 4) {
    const float value = static_cast<float>(static_cast<int>(rng() % 2001) - 1000) / 1000.0f;
    const auto word = static_cast<uint32_t>(rng());
    std::memcpy(packed.as<>() + i, tame ? static_cast<const void*>(&value) : &word, 4);
  }
  for (int64_t i = 0; i < h.always_count; ++i) {
    const auto group = static_cast<int32_t>(c.below(5) == 0 ? c.below(1000) - 500 : i % h.groups);
    std::memcpy(packed.as<>() + h.always + 4 * i, &group, 4);
  }
  std::memcpy(packed.as<>(), &h, sizeof h);
  int64_t d = 0, d_out = 0;
  if (nogemm_hire_check(packed.as<>(), packed.bytes(), &d, &d_out) != nullptr) fail("a HireFFN was refused");
  if (c.coin()) edit(c, packed.as<>(), sizeof h);
  const Tokens x(c, h.d);
  (void)run(kind, c, packed, x, h.d_out);
}

void head(Choices& c) {
  using namespace nogemm;
  HeadHeader h{};
  h.magic = kHeadMagic, h.version = kHeadVersion;
  h.rows = 1 + c.below(300), h.d = 1 + c.below(70), h.dtype = c.below(3);
  h.width8 = c.below(h.d + 1), h.width4 = c.below(h.d - h.width8 + 1);
  const int64_t groups = (h.rows + kSketchRows - 1) / kSketchRows, step = groups * 4 * kSketchRows;
  Layout layout{round_up(static_cast<int64_t>(sizeof h), 64)};
  h.eight = layout.add((h.width8 + 3) / 4 * step), h.four = layout.add((h.width4 + 7) / 8 * step);
  h.rest = layout.add((h.d - h.width8 - h.width4 + 7) / 8 * step);
  h.numbers = layout.add(groups * 4 * kSketchRows * 2), h.project = layout.add(h.d * h.d * 4);
  h.mean = layout.add(h.d * 4), h.limits = layout.add(6 * 4);
  if (c.coin()) h.bias = layout.add(h.rows * 4);
  h.bytes = layout.end;
  const Guarded packed(h.bytes, 64);
  std::mt19937 rng(c.byte());
  const bool tame = c.coin();
  for (int64_t i = 0; i + 4 <= h.bytes; i += 4) {
    const uint32_t word = tame ? 0x3c003c00u + rng() % 256 : static_cast<uint32_t>(rng());
    std::memcpy(packed.as<>() + i, &word, 4);
  }
  std::memcpy(packed.as<>(), &h, sizeof h);
  if (c.coin()) edit(c, packed.as<>(), sizeof h);
  int64_t d = 0, rows = 0, row_bytes = 0;
  if (nogemm_head_check(packed.as<>(), packed.bytes(), &d, &rows, &row_bytes) != nullptr) return;
  if (d != h.d || rows != h.rows) return;  // a caller compares both
  const Guarded weight(rows * row_bytes, 2);
  for (int64_t i = 0; i + 2 <= weight.bytes(); i += 2) {
    const auto half = static_cast<uint16_t>(tame ? 0x3c00 + rng() % 256 : rng());
    std::memcpy(weight.as<>() + i, &half, 2);
  }
  const Tokens x(c, d);
  const int64_t n = x.count, best = 1 + c.below(rows + 5);
  const NogemmHost host{1 + c.below(3), on_threads, nullptr};
  const Guarded index(n * 4, 4), logit(n * 4, 4), exact(n * 4, 4), states(n * d * 4, 4);
  const Guarded workspace(nogemm_head_workspace(packed.as<>(), n), 64);
  const auto check_index = [&] {
    for (int64_t i = 0; i < n; ++i)
      if (index.as<int32_t>()[i] < -1 || index.as<int32_t>()[i] >= rows) fail("a token that is no row");
  };
  nogemm_head_argmax(packed.as<>(), weight.as<>(), x.memory.as<>(), x.dtype, n, nullptr, index.as<int32_t>(),
                     logit.as<float>(), exact.as<int32_t>(), workspace.as<>(), &host);
  check_index();
  const Guarded other(nogemm_head_search_workspace(packed.as<>(), n, best), 64);
  nogemm_head_search(packed.as<>(), weight.as<>(), x.memory.as<>(), x.dtype, n, nullptr, best, index.as<int32_t>(),
                     states.as<float>(), other.as<>(), &host);
  check_index();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices c{data, data + size};
  std::vector<const char*> levels;
  for (int i = 0; nogemm_isa_supported(i) != nullptr; ++i) levels.push_back(nogemm_isa_supported(i));
  nogemm_set_isa(levels[static_cast<size_t>(c.below(static_cast<int64_t>(levels.size())))]);
  constexpr void (*kinds[])(Choices&) = {lookup, tree, hire, head};
  kinds[c.below(4)](c);
  return 0;
}
