#include "packed/head/tokens.h"

namespace nogemm {
namespace {

using namespace head;

bool before(const HeadRow& a, const HeadRow& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Leaves the `limit` best rows of a list.
void thin(HeadToken& token) {
  if (token.count <= token.limit) return;
  std::nth_element(token.list, token.list + token.limit - 1, token.list + token.count, before);
  token.count = token.limit;
  token.floor = token.list[token.limit - 1].value;
}

// The best rows of a token's pieces, in the first one's list; returns how many.
int64_t gather(const Tokens& tokens, int64_t t, int64_t rows) {
  HeadRow* list = tokens.part(0, t).list;
  int64_t count = 0;
  for (int64_t p = 0; p < tokens.pieces; ++p) {
    const HeadToken& part = tokens.part(p, t);
    for (int64_t i = 0; i < part.count; ++i) list[count++] = part.list[i];
  }
  if (count <= rows) return count;
  std::nth_element(list, list + rows - 1, list + count, before);
  return rows;
}

// Rows that a piece keeps. A vocabulary is often sorted by frequency, so that one of many pieces has most of what is
// sought: half of it at most.
int64_t piece_rows(const Head& h, int64_t rows) { return h.groups < kPieces ? rows : (rows + 1) / 2; }

int64_t cuts_of(int64_t rows) { return (rows + kTogether - 1) / kTogether; }

int64_t room_of(const Head& h, int64_t rows) { return 2 * piece_rows(h, rows) + kSketchRows; }

}  // namespace

int64_t head_search_workspace(const Head& h, int64_t states, int64_t rows) {
  Carver carver{nullptr};
  const Tokens tokens(h, {nullptr, nullptr, states}, 0, h.width, carver);
  carver.take<HeadRow>(tokens.count * kPieces * room_of(h, rows));
  carver.take<Best>(tokens.count * cuts_of(rows));
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(carver.at));
}

void head_search(const Head& h, const HeadStates& states, int64_t rows, float* logits, int64_t* index, float* value,
                 void* workspace, const NogemmHost& host) {
  const int64_t room = room_of(h, rows), cuts = cuts_of(rows), V = h.codes.rows;
  HeadCodes codes = h.codes;
  if (logits == nullptr) codes.steps_rest = 0;
  for (int64_t begin = 0; begin < states.count; begin += kTokens) {
    Carver carver{static_cast<char*>(workspace)};
    Tokens tokens(h, states, begin, logits == nullptr ? h.width8 + h.width4 : h.width, carver);
    auto* const list = carver.take<HeadRow>(tokens.count * kPieces * room);
    auto* const best = carver.take<Best>(tokens.count * cuts);
    int64_t found[kTokens];
    Phases phases;
    // Threads share phases: y, each token's numbers, the search, the best of its pieces, their exact logits.
    run_on(host, [&] {
      tokens.project(phases);
      tokens.start(phases, 1.0, index + begin, value + begin, [&](HeadToken& part, int64_t p, int64_t t) {
        part.list = list + (t * kPieces + p) * room;
        part.limit = piece_rows(h, rows), part.thin = thin;
        if (logits != nullptr) part.estimates = logits + (begin + tokens.place[t]) * V;
      });
      phases.run(2, tokens.pieces, [&](int64_t p) {
        h.table->head.search(codes, tokens.begin(p), tokens.begin(p + 1), &tokens.part(p, 0), tokens.finite);
        for (int64_t t = 0; t < tokens.finite; ++t) thin(tokens.part(p, t));
      });
      phases.run(3, tokens.finite, [&](int64_t t) { found[t] = gather(tokens, t, rows); });
      phases.run(4, tokens.finite * cuts, [&](int64_t job) {
        const int64_t t = job / cuts, first = job % cuts * kTogether;
        const HeadToken& part = tokens.part(0, t);
        best[job] = {};
        compare(h, tokens.state(tokens.place[t]), part.noise, part.list + first, std::min(kTogether, found[t] - first),
                part.estimates, best[job]);
      });
    });
    for (int64_t t = 0; t < tokens.finite; ++t) {
      Best winner;
      for (int64_t job = t * cuts; job < (t + 1) * cuts; ++job) winner.take(best[job].index, best[job].value);
      const int64_t n = begin + tokens.place[t];
      index[n] = winner.index == std::numeric_limits<int64_t>::max() ? kHeadOverflown : winner.index;
      value[n] = winner.value;
    }
  }
}

}  // namespace nogemm
