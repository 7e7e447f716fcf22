#include "packed/head/run.h"

#include <atomic>

#include "packed/head/tokens.h"

namespace nogemm {
namespace {

using namespace head;

constexpr int64_t kFirst = 32;  // rows that are computed before the others are looked at again

// A token's rows that may win.
struct Rows {
  HeadRow* list;
  int64_t count;
};

// Brings the pieces' lists together, without rows that another piece has ruled out.
Rows gather(const Tokens& tokens, int64_t t) {
  const float floor = tokens.floor[t];
  Rows rows{tokens.part(0, t).list, 0};
  for (int64_t p = 0; p < tokens.pieces; ++p) {
    const HeadToken& part = tokens.part(p, t);
    for (int64_t i = 0; i < part.count; ++i)
      if (part.list[i].value >= floor) rows.list[rows.count++] = part.list[i];
  }
  return rows;
}

void compare_rows(const Head& h, const float* x, const float* noise, const HeadRow* list, int64_t count, Best& best) {
  int32_t index[kTogether];
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t own = std::min(kTogether, count - begin);
    for (int64_t i = 0; i < own; ++i) index[i] = list[begin + i].index;
    compare(h, x, noise, index, own, nullptr, best);
  }
}

// The largest exact logit among a token's rows; computed: how many it took.
Best choose(const Head& h, const float* x, const float* noise, Rows rows, int64_t& computed) {
  Best best;
  // The most promising rows first: their logits rule out most of the others.
  const int64_t first = std::min(kFirst, rows.count);
  std::nth_element(rows.list, rows.list + first, rows.list + rows.count,
                   [](const HeadRow& a, const HeadRow& b) { return a.value > b.value; });
  compare_rows(h, x, noise, rows.list, first, best);
  int64_t left = first;
  for (int64_t i = first; i < rows.count; ++i)
    if (rows.list[i].value >= best.value) rows.list[left++] = rows.list[i];
  compare_rows(h, x, noise, rows.list + first, left - first, best);
  computed = left;
  if (best.index == std::numeric_limits<int64_t>::max()) best.index = kHeadOverflown;  // bounds or logits are NaN
  return best;
}

// Most rows of a piece, and some to spare.
int64_t most_rows(const Head& h) { return ((h.groups + kPieces - 1) / kPieces + 1) * kSketchRows; }

}  // namespace

int64_t head_argmax_workspace(const Head& h, int64_t states) {
  Carver carver{nullptr};
  const Tokens tokens(h, {nullptr, nullptr, states}, 0, h.width, carver);
  carver.take<HeadRow>(tokens.count * kPieces * most_rows(h));
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(carver.at));
}

void head_argmax(const Head& h, const HeadStates& states, double share, int64_t* index, float* value, int64_t* rows,
                 void* workspace, const NogemmHost& host) {
  const int64_t most = most_rows(h);
  for (int64_t begin = 0; begin < states.count; begin += kTokens) {
    Carver carver{static_cast<char*>(workspace)};
    Tokens tokens(h, states, begin, h.width, carver);
    auto* const list = carver.take<HeadRow>(tokens.count * kPieces * most);
    Phases phases;
    std::fill_n(rows + begin, tokens.count, 0);
    // Threads share phases: y, each token's numbers, the scan, the rows that are left.
    run_on(host, [&] {
      tokens.project(phases);
      tokens.start(phases, share, index + begin, value + begin,
                   [&](HeadToken& part, int64_t p, int64_t t) { part.list = list + (t * kPieces + p) * most; });
      phases.run(2, tokens.pieces, [&](int64_t p) {
        h.table->head.scan(h.codes, tokens.begin(p), tokens.begin(p + 1), &tokens.part(p, 0), tokens.finite);
      });
      phases.run(3, tokens.finite, [&](int64_t t) {
        const int64_t n = tokens.place[t];
        const Best best = choose(h, tokens.state(n), tokens.noise(n), gather(tokens, t), rows[begin + n]);
        index[begin + n] = best.index, value[begin + n] = best.value;
      });
    });
  }
}

void head_logits(const Head& h, const float* x, int64_t tokens, float* out, const NogemmHost& host) {
  constexpr int64_t kBlock = 32;  // rows for all tokens while they are in the cache
  const int64_t V = h.codes.rows, blocks = (V + kBlock - 1) / kBlock;
  const BundleRows rows = head_rows_of(h.weight, h.bias, h.width, h.dtype);
  std::atomic<int64_t> next{0};
  run_on(host, [&] {
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const int64_t begin = b * kBlock, end = std::min(begin + kBlock, V);
      for (int64_t n = 0; n < tokens; ++n)
        h.table->head.rows[h.dtype](rows, begin, end, x + n * h.width, out + n * V + begin);
    }
  });
}

}  // namespace nogemm
