// What the scan and the search of a vocabulary head share: the numbers of a token, and pieces of rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "packed/head/run.h"
#include "packed/neurons/state.h"

namespace nogemm::head {

using hire::Carver;
using hire::Phases;

inline constexpr int64_t kTokens = 16;    // that share a pass over the codes
inline constexpr int64_t kPieces = 16;    // of the codes; each keeps a list of its own
inline constexpr int64_t kTogether = 64;  // rows of a small job that one thread takes at once
inline constexpr double kUnit = 0x1p-24;  // rounding of float32

// The body of all of a host's threads.
template <class Body>
void run_on(const NogemmHost& host, Body body) {
  if (host.threads == 1) return body();
  host.run(host.self, host.threads, [](int64_t, void* own) { (*static_cast<Body*>(own))(); }, &body);
}

inline double length(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum);
}

inline float up(double value) { return static_cast<float>(value * (1 + 0x1p-20)); }

// The largest size among numbers; infinity if one of them is not finite.
inline float largest(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float value;
  most = std::min(most, int32_t{0x7f800000});  // NaN's are above infinity's
  std::memcpy(&value, &most, sizeof value);
  return value;
}

// Bytes of a token in fixed point.
inline int64_t plane_bytes(const Head& h) {
  return round_up(2 * round_up(h.width8, 64) + round_up(h.width4, 64) + round_up(h.width_rest, 64), 64);
}

// The coordinates y of a token, in fixed point, with what every estimate of this token may be off by; share: of the
// bound that counts; noise: the largest. Returns 0, or why there is no answer.
inline int64_t prepare(const Head& h, const float* x, const float* y, float noise, double share, int8_t* planes,
                       HeadToken& t) {
  const double x_length = length(x, h.width);
  if (!std::isfinite(x_length)) return kHeadNotFinite;
  const HeadKernels& k = h.table->head;
  const float* limits = h.limits;
  const double row8 = limits[0], row4 = limits[1], row = limits[2], project = limits[3], mean = limits[5];
  const double added = static_cast<double>(limits[4]) + noise;
  const float *y4 = y + h.width8, *y_rest = y4 + h.width4;
  const double length8 = length(y, h.width8), length4 = length(y4, h.width4 + h.width_rest);
  double shift = 0;
  const float* own = h.mean;
  for (int64_t i = 0; i < h.width; ++i) shift += static_cast<double>(own[i]) * x[i];
  // Sums of codes times planes, before the rows' scales, are the largest numbers on the way.
  constexpr double kCodes = 1e5, kMost = 1e37;
  if (!((row8 + kCodes) * length8 + (row4 + kCodes) * length4 + std::fabs(shift) + added < kMost))
    return kHeadOverflown;
  const int64_t padded8 = round_up(h.width8, 64), padded4 = round_up(h.width4, 64);
  const double lost8 = k.split(y, h.width8, padded8, planes, &t.eight);
  planes += 2 * padded8;
  const double lost4 = k.round(y4, h.width4, padded4, planes, &t.four),
               lost_rest = k.round(y_rest, h.width_rest, round_up(h.width_rest, 64), planes + padded4, &t.rest);
  // Additions on the way to a dot product (dot_rows in kernels/bundles.h): two accumulators of a vector each, then lanes.
  const double sums = static_cast<double>(h.width / (2 * h.table->lanes) + h.table->lanes + 4);
  const double slack = row8 * lost8 + row4 * std::hypot(lost4, lost_rest)     // the token's own rounding
                       + (row8 + row4) * (sums * kUnit * project * x_length)  // of y
                       + 16 * kUnit * (row8 * length8 + row4 * length4 + std::fabs(shift) + added)  // of the estimate
                       + sums * kUnit * x_length * (row + mean) + 4 * kUnit * added;                // of the exact dot
  t.norm8 = up(share * length8), t.norm4 = up(share * length4), t.slack = up(slack);
  t.shift = static_cast<float>(shift);
  t.count = 0;
  return t.slack < kMost ? 0 : kHeadOverflown;
}

struct Best {
  int64_t index = std::numeric_limits<int64_t>::max();
  float value = -std::numeric_limits<float>::infinity();

  // Ties go to the lowest index.
  void take(int64_t other, float logit) {
    if (logit > value || (logit == value && other < index)) index = other, value = logit;
  }
};

// Takes the exact logits of listed rows, noise included, which also go to `logits` unless it is null.
inline void compare(const Head& h, const float* x, const float* noise, const int32_t* list, int64_t count,
                    float* logits, Best& best) {
  const BundleRows rows = head_rows_of(h.weight, h.bias, h.width, h.dtype);
  float value[kTogether];
  for (int64_t begin = 0; begin < count; begin += kTogether) {
    const int64_t own = std::min(kTogether, count - begin);
    const int32_t* const index = list + begin;
    h.table->head.dots[h.dtype](rows, index, 0, own, own, x, value);
    for (int64_t i = 0; i < own; ++i) {
      const float logit = noise == nullptr ? value[i] : value[i] + noise[index[i]];
      best.take(index[i], logit);
      if (logits != nullptr) logits[index[i]] = logit;
    }
  }
}

// Up to kTokens tokens of a call: coordinates and planes, filled by the phases 0 and 1 of a pass.
struct Tokens {
  const Head& h;
  HeadStates states;
  int64_t count;
  int64_t used;            // coordinates that are read
  int64_t pieces, finite;  // finite: tokens that have an answer
  float* y;
  int8_t* planes;
  float* largest_noise;    // [kTokens][kPieces]
  HeadToken* parts;        // [piece][token], tokens with an answer in front
  int64_t place[kTokens];  // of those, among the tokens
  float floor[kTokens];    // the best lower bound of each of those

  const float* state(int64_t n) const { return states.x + n * h.width; }
  const float* noise(int64_t n) const { return states.noise == nullptr ? nullptr : states.noise + n * h.codes.rows; }
  HeadToken& part(int64_t p, int64_t t) const { return parts[p * finite + t]; }
  int64_t begin(int64_t p) const { return h.groups * p / pieces; }

  // Up to kTokens of the states, from `begin` on; `read` coordinates of each.
  Tokens(const Head& head, const HeadStates& all, int64_t begin, int64_t read, Carver& carver)
      : h(head),
        states{all.x + begin * head.width, all.noise == nullptr ? nullptr : all.noise + begin * head.codes.rows,
               all.count - begin},
        count(std::min(kTokens, states.count)),
        used(read),
        pieces(std::min(kPieces, head.groups)),
        finite(0) {
    y = carver.take<float>(count * h.width);
    planes = carver.take<int8_t>(count * plane_bytes(h));
    largest_noise = carver.take<float>(kTokens * kPieces);
    parts = carver.take<HeadToken>(kPieces * count);
  }

  // Coordinates, a cut at a time, and the largest noise of each piece.
  void project(Phases& phases) {
    const BundleRows rows = head_rows_of(h.project, nullptr, h.width, kF32);
    const int64_t cuts = (used + kTogether - 1) / kTogether, noisy = states.noise == nullptr ? 0 : pieces;
    phases.run(0, cuts + noisy, [&](int64_t cut) {
      if (cut >= cuts) {
        const int64_t p = cut - cuts, from = h.codes.rows * p / pieces, to = h.codes.rows * (p + 1) / pieces;
        for (int64_t n = 0; n < count; ++n) largest_noise[n * kPieces + p] = largest(noise(n) + from, to - from);
        return;
      }
      const int64_t from = cut * kTogether, to = std::min(from + kTogether, used);
      for (int64_t n = 0; n < count; ++n) h.table->head.rows[kF32](rows, from, to, state(n), y + n * h.width + from);
    });
  }

  // Each token's numbers; index says what has none. give(part, piece, token) sets the list up.
  template <class Give>
  void start(Phases& phases, double share, int64_t* index, float* value, const Give& give) {
    phases.run(1, 1, [&](int64_t) {
      HeadToken tokens[kTokens];
      for (int64_t n = 0; n < count; ++n) {
        float most = 0;
        for (int64_t p = 0; p < (states.noise == nullptr ? 0 : pieces); ++p)
          most = std::max(most, largest_noise[n * kPieces + p]);
        std::fill(y + n * h.width + used, y + (n + 1) * h.width, 0.0f);
        HeadToken& t = tokens[finite] = {};
        index[n] = prepare(h, state(n), y + n * h.width, most, share, planes + n * plane_bytes(h), t);
        value[n] = std::numeric_limits<float>::quiet_NaN();
        t.noise = noise(n);
        if (index[n] == 0) place[finite++] = n;
      }
      for (int64_t t = 0; t < finite; ++t) {
        floor[t] = -std::numeric_limits<float>::infinity();
        tokens[t].floor = floor + t;
      }
      for (int64_t p = 0; p < pieces; ++p) {
        for (int64_t t = 0; t < finite; ++t) {
          part(p, t) = tokens[t];
          give(part(p, t), p, t);
        }
      }
    });
  }
};

}  // namespace nogemm::head
