// What a packed HireFFN's call is made of: phases that threads share, the memory of a token, the layer's
// rows.
#pragma once
#include <atomic>

#include "packed/host/round_up.h"
#include "packed/neurons/run.h"

namespace nogemm::hire {

inline constexpr int64_t kPhases = 11;

// Phases of pieces, run by however many threads come. A thread takes the next piece of the phase, and goes on
// to the next phase when all pieces are done; it waits only for pieces that another running thread has taken.
// So one thread alone gets through as well, and one that starts late finds work to join. Pieces compute
// disjoint outputs.
struct Phases {
  std::atomic<int64_t> next[kPhases] = {}, done[kPhases] = {};

  template <class Body>
  void run(int64_t phase, int64_t pieces, const Body& body) {
    for (;;) {
      const int64_t piece = next[phase].fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces) break;
      body(piece);
      done[phase].fetch_add(1, std::memory_order_release);
    }
    while (done[phase].load(std::memory_order_acquire) < pieces) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }
};

// A token's moments, kGaussian: with x~ = (x, 1), row 0 of the section times x~ is the mean of all selecting values,
// and the other d + 1 rows, an upper triangle, give numbers whose squares add up to their variance.
struct TokenState {
  float *x, *reduced, *scores, *exact, *up, *weights, *y, *moments;
  int8_t *codes, *planes;
  int32_t *groups, *candidates, *chosen, *kept;
  int64_t candidate_count, kept_count;
  float cutoff;  // kGaussian
  bool finite;
  SketchToken sketch;
  FixedToken fixed;
};

struct Layer {
  const HireHeader* h;
  const char* base;
  const HireKernels* k;

  template <class T = float>
  const T* at(int64_t offset) const {
    return offset == 0 ? nullptr : reinterpret_cast<const T*>(base + offset);
  }
  const float* scale(int64_t kind) const { return h->scales == 0 ? nullptr : at(h->scales) + kind * h->hidden; }
  // kind 0: the rows that select (gate, or a plain layer's up); 1: up; 2: down.
  BundleRows rows(int64_t kind) const {
    const int64_t where = kind == 2 ? h->down_at : kind == 1 ? h->up_at : 0;
    const int64_t bias = kind == 2 ? h->out_bias : kind == 1 ? h->up_bias : h->gate_bias;
    return {base + h->bundles + where, h->bundle_bytes, kind == 2 ? h->d_out : h->d, kind == 2 ? nullptr : scale(kind),
            at(bias)};
  }
  bool all() const { return h->sketch == 0; }
};

// Most neurons that may be candidates, and kept.
inline int64_t most_candidates(const HireHeader& h) {
  if (h.select == kScores) return 0;
  const int64_t most = h.select == kTopK ? h.candidates * h.group : h.hidden;
  return most < h.hidden ? most : h.hidden;
}

struct Carver {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

inline TokenState carve(const HireHeader& h, Carver& c) {
  TokenState t{};
  const int64_t most = most_candidates(h), padded = round_up(h.hidden, kSketchRows);
  t.x = c.take<float>(h.d + 1);
  t.reduced = c.take<float>(h.width);
  t.scores = c.take<float>(padded);
  t.exact = c.take<float>(round_up(most, 16) + h.group);
  t.up = c.take<float>(most);
  t.weights = c.take<float>(most);
  t.y = c.take<float>(h.d_out);
  t.moments = c.take<float>(h.moments == 0 ? 0 : h.d + 2);
  t.codes = c.take<int8_t>(round_up(h.width, 8) + 8);
  t.planes = c.take<int8_t>(2 * round_up(h.d, 64));
  t.groups = c.take<int32_t>(h.groups);
  t.candidates = c.take<int32_t>(most + h.group);
  t.chosen = c.take<int32_t>(h.groups);
  t.kept = c.take<int32_t>(most + h.group);
  return t;
}

inline int64_t token_bytes(const HireHeader& h) {
  Carver c{nullptr};
  carve(h, c);
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(c.at));
}

}  // namespace nogemm::hire
