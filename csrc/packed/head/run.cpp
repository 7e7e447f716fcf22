#include "packed/head/run.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "packed/neurons/state.h"

namespace nogemm {
namespace {

using hire::Carver;
using hire::Phases;

constexpr int64_t kTokens = 16;    // that share a pass over the codes
constexpr int64_t kPieces = 16;    // of the codes; each keeps a list and a floor of its own
constexpr int64_t kTogether = 64;  // rows of a small job that one thread takes at once
constexpr double kUnit = 0x1p-24;  // rounding of float32

double length(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum);
}

float up(double value) { return static_cast<float>(value * (1 + 0x1p-20)); }

// The coordinates y of a token, in fixed point, with what every estimate of this token may be off by. Returns 0, or why
// there is no answer.
int64_t prepare(const Head& h, const float* x, const float* y, int8_t* planes, HeadToken& t) {
  const double x_length = length(x, h.width);
  if (!std::isfinite(x_length)) return kHeadNotFinite;
  const HeadKernels& k = h.table->head;
  const float* limits = h.limits;
  const double row8 = limits[0], row4 = limits[1], row = limits[2], project = limits[3], bias = limits[4],
               mean = limits[5];
  const double length8 = length(y, h.width8), length4 = length(y + h.width8, h.width4);
  double shift = 0;
  const float* own = h.mean;
  for (int64_t i = 0; i < h.width; ++i) shift += static_cast<double>(own[i]) * x[i];
  // Sums of codes times planes, before the rows' scales, are the largest numbers on the way.
  constexpr double kCodes = 1e5, kMost = 1e37;
  if (!((row8 + kCodes) * length8 + (row4 + kCodes) * length4 + std::fabs(shift) + bias < kMost)) return kHeadOverflown;
  const int64_t padded8 = (h.width8 + 63) / 64 * 64, padded4 = (h.width4 + 63) / 64 * 64;
  const double lost8 = k.split(y, h.width8, padded8, planes, &t.eight),
               lost4 = k.split(y + h.width8, h.width4, padded4, planes + 2 * padded8, &t.four);
  // Additions on the way to a dot product (dot_rows in kernels/bundles.h): two accumulators of a vector each, then lanes.
  const double sums = static_cast<double>(h.width / (2 * h.table->lanes) + h.table->lanes + 4);
  const double slack = row8 * lost8 + row4 * lost4                            // the token's own rounding
                       + (row8 + row4) * (sums * kUnit * project * x_length)  // of y
                       + 16 * kUnit * (row8 * length8 + row4 * length4 + std::fabs(shift) + bias)  // of the estimate
                       + sums * kUnit * x_length * (row + mean) + 2 * kUnit * bias;                // of the exact dot
  t.norm8 = up(h.share * length8), t.norm4 = up(h.share * length4), t.slack = up(slack);
  t.shift = static_cast<float>(shift);
  t.floor = -std::numeric_limits<float>::infinity();
  t.count = 0;
  return t.slack < kMost ? 0 : kHeadOverflown;
}

constexpr int64_t kFirst = 32;  // rows that are computed before the others are looked at again

struct Best {
  int64_t index;
  float value;
  int64_t rows;
};

// A token's rows that may win: lists of the pieces, one behind the other at equal distances.
struct Rows {
  int32_t* index;
  float* upper;
  int64_t count;
};

// Brings the pieces' lists together, without rows that another piece has ruled out.
Rows gather(HeadToken* const* parts, int64_t pieces) {
  float floor = -std::numeric_limits<float>::infinity();
  for (int64_t p = 0; p < pieces; ++p) floor = std::max(floor, parts[p]->floor);
  Rows rows{parts[0]->index, parts[0]->upper, 0};
  for (int64_t p = 0; p < pieces; ++p) {
    for (int64_t i = 0; i < parts[p]->count; ++i) {
      if (parts[p]->upper[i] < floor) continue;
      rows.index[rows.count] = parts[p]->index[i];
      rows.upper[rows.count++] = parts[p]->upper[i];
    }
  }
  return rows;
}

// The largest exact logit among a token's rows.
Best choose(const Head& h, const float* x, Rows rows) {
  auto* const dots = h.table->head.dots[h.dtype];
  const BundleRows exact = head_rows_of(h.weight, h.bias, h.width, h.dtype);
  Best best{std::numeric_limits<int64_t>::max(), -std::numeric_limits<float>::infinity(), 0};
  const auto compare = [&](const int32_t* index, int64_t count) {
    float value[kTogether];
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      const int64_t end = std::min(begin + kTogether, count);
      dots(exact, index + begin, 0, end - begin, count - begin, x, value);
      for (int64_t i = begin; i < end; ++i) {
        const float own = value[i - begin];
        if (own > best.value || (own == best.value && index[i] < best.index)) best.index = index[i], best.value = own;
      }
    }
    best.rows += count;
  };
  // The most promising rows first: their logits rule out most of the others. places[0] is the least of the first ones.
  int64_t places[kFirst], first = 0;
  const auto above = [&](int64_t a, int64_t b) { return rows.upper[a] > rows.upper[b]; };
  for (int64_t i = 0; i < rows.count; ++i) {
    if (first < kFirst) {
      places[first++] = i;
      std::push_heap(places, places + first, above);
    } else if (rows.upper[i] > rows.upper[places[0]]) {
      std::pop_heap(places, places + first, above);
      places[first - 1] = i;
      std::push_heap(places, places + first, above);
    }
  }
  int32_t index[kFirst];
  for (int64_t i = 0; i < first; ++i) {
    index[i] = rows.index[places[i]];
    rows.upper[places[i]] = -std::numeric_limits<float>::infinity();  // done
  }
  compare(index, first);
  int64_t left = 0;
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.upper[i] >= best.value) rows.index[left++] = rows.index[i];
  compare(rows.index, left);
  if (best.index == std::numeric_limits<int64_t>::max()) best.index = kHeadOverflown;  // bounds or logits are NaN
  return best;
}

// At most kTokens tokens, and the memory that they need.
struct Job {
  const Head* head;
  const float* x;
  int64_t count, pieces, most, planes;
  float *y, *uppers;
  int8_t* bytes;
  int32_t* names;
  HeadToken *tokens, *parts;  // parts: [piece][token], tokens that are finite in front
  int64_t* index;
  float* value;
  int64_t* rows;
  int64_t place[kTokens], finite;
  Phases phases;
};

void carve(Job& job, Carver& carver) {
  const int64_t count = job.count;
  job.y = carver.take<float>(count * job.head->width);
  job.bytes = carver.take<int8_t>(count * job.planes);
  job.names = carver.take<int32_t>(count * job.pieces * job.most);
  job.uppers = carver.take<float>(count * job.pieces * job.most);
  job.tokens = carver.take<HeadToken>(count);
  job.parts = carver.take<HeadToken>(job.pieces * count);
}

void measure(Job& job, const Head& h, int64_t count) {
  job.head = &h;
  job.count = count;
  job.pieces = std::min(kPieces, h.groups);
  job.most = (h.groups + job.pieces - 1) / job.pieces * kSketchRows;
  job.planes = 2 * ((h.width8 + 63) / 64 + (h.width4 + 63) / 64) * 64;
}

void prepare_all(Job& job) {
  const Head& h = *job.head;
  job.finite = 0;
  for (int64_t n = 0; n < job.count; ++n) {
    HeadToken& t = job.tokens[job.finite];
    job.index[n] = prepare(h, job.x + n * h.width, job.y + n * h.width, job.bytes + n * job.planes, t);
    job.value[n] = std::numeric_limits<float>::quiet_NaN(), job.rows[n] = 0;
    if (job.index[n] == 0) job.place[job.finite++] = n;
  }
  for (int64_t p = 0; p < job.pieces; ++p) {
    for (int64_t t = 0; t < job.finite; ++t) {
      HeadToken& part = job.parts[p * job.finite + t];
      part = job.tokens[t];
      part.index = job.names + (t * job.pieces + p) * job.most;
      part.upper = job.uppers + (t * job.pieces + p) * job.most;
    }
  }
}

// Threads share phases: y, each token's numbers, the scan, the rows that are left.
void run_job(int64_t, void* arg) {
  Job& job = *static_cast<Job*>(arg);
  const Head& h = *job.head;
  const HeadKernels& k = h.table->head;
  const BundleRows project = head_rows_of(h.project, nullptr, h.width, kF32);
  job.phases.run(0, (h.width + kTogether - 1) / kTogether, [&](int64_t cut) {
    const int64_t begin = cut * kTogether, end = std::min(begin + kTogether, h.width);
    for (int64_t n = 0; n < job.count; ++n)
      k.rows[kF32](project, begin, end, job.x + n * h.width, job.y + n * h.width + begin);
  });
  job.phases.run(1, 1, [&](int64_t) { prepare_all(job); });
  job.phases.run(2, job.pieces, [&](int64_t p) {
    k.scan(h.codes, h.groups * p / job.pieces, h.groups * (p + 1) / job.pieces, job.parts + p * job.finite, job.finite);
  });
  job.phases.run(3, job.finite, [&](int64_t t) {
    HeadToken* own[kPieces];
    for (int64_t p = 0; p < job.pieces; ++p) own[p] = job.parts + p * job.finite + t;
    const int64_t n = job.place[t];
    const Best best = choose(h, job.x + n * h.width, gather(own, job.pieces));
    job.index[n] = best.index, job.value[n] = best.value, job.rows[n] = best.rows;
  });
}

void run_on(const NogemmHost& host, void (*body)(int64_t, void*), void* arg) {
  if (host.threads == 1) return body(0, arg);
  host.run(host.self, host.threads, body, arg);
}

struct All {
  const Head* head;
  const float* x;
  int64_t tokens, blocks;
  float* out;
  std::atomic<int64_t> next{0};
};

constexpr int64_t kBlock = 32;  // rows for all tokens while they are in the cache

void run_all(int64_t, void* arg) {
  All& all = *static_cast<All*>(arg);
  const Head& h = *all.head;
  const BundleRows rows = head_rows_of(h.weight, h.bias, h.width, h.dtype);
  for (int64_t b; (b = all.next.fetch_add(1, std::memory_order_relaxed)) < all.blocks;) {
    const int64_t begin = b * kBlock, end = std::min(begin + kBlock, h.codes.rows);
    for (int64_t n = 0; n < all.tokens; ++n)
      h.table->head.rows[h.dtype](rows, begin, end, all.x + n * h.width, all.out + n * h.codes.rows + begin);
  }
}

}  // namespace

int64_t head_workspace(const Head& h, int64_t tokens) {
  Job job{};
  measure(job, h, std::min(kTokens, tokens));
  Carver carver{nullptr};
  carve(job, carver);
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(carver.at));
}

void head_argmax(const Head& h, const float* x, int64_t tokens, int64_t* index, float* value, int64_t* rows,
                 void* workspace, const NogemmHost& host) {
  for (int64_t n = 0; n < tokens; n += kTokens) {
    Job job{};
    measure(job, h, std::min(kTokens, tokens - n));
    job.x = x + n * h.width, job.index = index + n, job.value = value + n, job.rows = rows + n;
    Carver carver{static_cast<char*>(workspace)};
    carve(job, carver);
    run_on(host, run_job, &job);
  }
}

void head_logits(const Head& h, const float* x, int64_t tokens, float* out, const NogemmHost& host) {
  All all{};
  all.head = &h, all.x = x, all.tokens = tokens, all.out = out;
  all.blocks = (h.codes.rows + kBlock - 1) / kBlock;
  run_on(host, run_all, &all);
}

}  // namespace nogemm
