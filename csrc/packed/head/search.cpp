#include "packed/head/tokens.h"
#include "packed/topk_chunks.h"

namespace nogemm {
namespace {

using namespace head;

// How the rows of a head are cut: into pieces of whole groups and whole chunks.
struct Cut {
  TopkChunks chunks;
  int64_t rows, unit, units, pieces, lanes;

  Cut(const Head& h, int64_t best)
      : chunks(h.codes.rows, best, h.table->lanes),
        rows(h.codes.rows),
        unit(std::max(chunks.size, kSketchRows)),
        units((rows + unit - 1) / unit),
        pieces(std::min(kPieces, units)),
        lanes(h.table->lanes) {}

  int64_t row(int64_t p) const { return std::min(units * p / pieces * unit, rows); }
  int64_t group(int64_t p) const { return (row(p) + kSketchRows - 1) / kSketchRows; }
  int64_t chunk(int64_t p) const { return std::min(units * p / pieces * (unit / chunks.size), chunks.count); }
  // Where a piece's list of rows begins, and how long all lists are: a list may be as long as its piece and a vector.
  int64_t list(int64_t p) const { return row(p) + p * lanes; }
  int64_t lists() const { return list(pieces) + lanes; }
};

// What one token's best rows are found in.
struct Ranking {
  float *estimates, *maxima;
  int32_t *keys, *index, *spare;
  int64_t counts[kPieces];
  bool nan[kPieces], broken;  // an estimate of a piece, of any
  int32_t least;
};

void carve(const Cut& cut, int64_t best, bool own_estimates, Carver& carver, Ranking& r) {
  if (own_estimates) r.estimates = carver.take<float>(cut.rows);
  r.maxima = carver.take<float>(cut.chunks.count * cut.lanes);
  r.keys = carver.take<int32_t>(cut.lists()), r.index = carver.take<int32_t>(cut.lists());
  r.spare = carver.take<int32_t>(2 * best + cut.lanes);
}

// Ranks what has been estimated of a piece.
void top(const TopkKernels& k, const Cut& cut, int64_t p, Ranking& r) {
  r.nan[p] = cut.chunks.depth > 1 &&
             k.maxima[kF32](r.estimates, cut.rows, cut.chunks.depth, cut.chunk(p), cut.chunk(p + 1), r.maxima);
}

void find_floor(const TopkKernels& k, const Cut& cut, int64_t best, Ranking& r) {
  r.broken = std::any_of(r.nan, r.nan + cut.pieces, [](bool nan) { return nan; });
  r.least = cut.chunks.depth > 1 ? k.floor(r.maxima, cut.chunks.count * cut.lanes, best) : kTopkLowest;
}

// The rows of a piece whose estimates reach the floor.
void collect(const TopkKernels& k, const Cut& cut, int64_t best, int64_t p, Ranking& r) {
  const bool dense = topk_dense(cut.rows, best);
  int32_t *const keys = r.keys + cut.list(p), *const index = r.index + cut.list(p);
  r.counts[p] = cut.chunks.depth > 1
                    ? k.collect[kF32](r.estimates, cut.rows, cut.chunks.depth, r.maxima, cut.chunk(p), cut.chunk(p + 1),
                                      r.least, dense, keys, index)
                    : k.reaching[kF32](r.estimates, cut.row(p), cut.row(p + 1), kTopkLowest, dense, keys, index);
}

// The best rows of all pieces, in front of the lists.
void finish(const TopkKernels& k, const Cut& cut, int64_t best, Ranking& r) {
  int64_t count = 0;
  for (int64_t p = 0; p < cut.pieces; ++p) {
    const auto bytes = static_cast<size_t>(r.counts[p]) * sizeof(int32_t);
    std::memmove(r.keys + count, r.keys + cut.list(p), bytes);
    std::memmove(r.index + count, r.index + cut.list(p), bytes);
    count += r.counts[p];
  }
  k.finish(r.keys, r.index, count, best, r.least, false, r.spare);
}

int64_t cuts_of(int64_t rows) { return (rows + kTogether - 1) / kTogether; }

}  // namespace

int64_t head_search_workspace(const Head& h, int64_t states, int64_t rows) {
  Carver carver{nullptr};
  const Tokens tokens(h, {nullptr, nullptr, states}, 0, h.width, carver);
  Ranking unused;
  for (int64_t t = 0; t < tokens.count; ++t) carve(Cut(h, rows), rows, true, carver, unused);
  carver.take<Best>(tokens.count * cuts_of(rows));
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(carver.at));
}

void head_search(const Head& h, const HeadStates& states, int64_t rows, float* logits, int64_t* index, float* value,
                 void* workspace, const NogemmHost& host) {
  const Cut cut(h, rows);
  const TopkKernels& k = h.table->topk;
  const int64_t jobs = cuts_of(rows);
  HeadCodes codes = h.codes;
  if (logits == nullptr) codes.steps_rest = 0;
  for (int64_t begin = 0; begin < states.count; begin += kTokens) {
    Carver carver{static_cast<char*>(workspace)};
    Tokens tokens(h, states, begin, logits == nullptr ? h.width8 + h.width4 : h.width, carver);
    Ranking rankings[kTokens];
    for (int64_t t = 0; t < tokens.count; ++t) carve(cut, rows, logits == nullptr, carver, rankings[t]);
    auto* const best = carver.take<Best>(tokens.count * jobs);
    HeadToken* const first = tokens.parts;
    Phases phases;
    // Threads share phases: y, each token's numbers, the estimates, the floor of the best, those that reach it, the
    // best of them, their exact logits.
    run_on(host, [&] {
      tokens.project(phases);
      tokens.start(phases, 1.0, index + begin, value + begin, [&](HeadToken& part, int64_t p, int64_t t) {
        if (logits != nullptr) rankings[t].estimates = logits + (begin + tokens.place[t]) * cut.rows;
        if (p == 0) part.estimates = rankings[t].estimates;
      });
      const int64_t count = tokens.finite;
      phases.run(2, cut.pieces, [&](int64_t p) {
        h.table->head.estimate(codes, cut.group(p), cut.group(p + 1), first, count);
        for (int64_t t = 0; t < count; ++t) top(k, cut, p, rankings[t]);
      });
      phases.run(3, count, [&](int64_t t) { find_floor(k, cut, rows, rankings[t]); });
      phases.run(4, cut.pieces * count, [&](int64_t job) {
        Ranking& r = rankings[job / cut.pieces];
        if (!r.broken) collect(k, cut, rows, job % cut.pieces, r);
      });
      phases.run(5, count, [&](int64_t t) {
        if (!rankings[t].broken) finish(k, cut, rows, rankings[t]);
      });
      phases.run(6, count * jobs, [&](int64_t job) {
        const int64_t t = job / jobs, from = job % jobs * kTogether;
        best[job] = {};
        if (rankings[t].broken) return;
        compare(h, tokens.state(tokens.place[t]), first[t].noise, rankings[t].index + from,
                std::min(kTogether, rows - from), logits == nullptr ? nullptr : rankings[t].estimates, best[job]);
      });
    });
    for (int64_t t = 0; t < tokens.finite; ++t) {
      Best winner;
      for (int64_t job = t * jobs; job < (t + 1) * jobs; ++job) winner.take(best[job].index, best[job].value);
      const int64_t n = begin + tokens.place[t];
      index[n] = winner.index == std::numeric_limits<int64_t>::max() ? kHeadOverflown : winner.index;
      value[n] = winner.value;
    }
  }
}

}  // namespace nogemm
