// What the operators of a vocabulary head share: its codes, the numbers of a token, and pieces of rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bindings/packed.h"
#include "packed/neurons/state.h"

namespace nogemm::head {

using hire::Carver;
using hire::Phases;

inline constexpr int64_t kTokens = 16;    // that share a pass over the codes
inline constexpr int64_t kPieces = 16;    // of the codes; each keeps a list and a floor of its own
inline constexpr int64_t kTogether = 64;  // rows of a small job that one thread takes at once
inline constexpr double kUnit = 0x1p-24;  // rounding of float32

// In place of an index.
inline constexpr int64_t kNotFinite = -1;
inline constexpr int64_t kOverflown = -2;  // src/nogemm/ops/head_scan.py answers then

inline BundleRows rows_of(const Tensor& weight, const Tensor& bias, Dtype dtype) {
  return {weight.data<char>(), weight.size(1) * static_cast<int64_t>(item_size(dtype)), weight.size(1), nullptr,
          bias.defined() ? bias.data<float>() : nullptr};
}

// The rows of the head, what is added to their logits, and what tells how far an estimate may be off.
struct Head {
  const char* op;
  Tensor weight, bias, noise, project, mean, eight, four, rest, numbers, limits;
  int64_t width, rows, groups;
  int64_t width8, width4, width_rest;  // coordinates of each part
  Dtype dtype;
  HeadCodes codes;

  BundleRows exact() const { return rows_of(weight, bias, dtype); }
  const float* noise_of(int64_t token) const { return noise.defined() ? noise.data<float>() + token * rows : nullptr; }
};

inline Dtype rows_dtype(const Tensor& weight, const char* op) {
  for (const Dtype d : {kF32, kBF16, kF16})
    if (weight.dtype() == torch_dtype(d)) return d;
  fail(op, "weight must be float32, bfloat16 or float16");
}

inline void check_rows(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x.dtype() == aoti_torch_dtype_float32() && x.dim() == 2, op, "x must be float32 [N, D], got shape ", x.shape());
  check(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.is_contiguous(), op,
        "weight must be contiguous [V, D], got ", weight.shape(), " for x ", x.shape());
  check(weight.size(0) >= 1 && weight.size(0) < std::numeric_limits<int32_t>::max() - kSketchRows, op,
        "weight must have from 1 to 2^31 rows, got ", weight.size(0));
  check(!bias.defined() || (bias.dtype() == aoti_torch_dtype_float32() && bias.numel() == weight.size(0)), op,
        "bias must be float32 [V]");
}

inline void check_codes(const Head& h, const Tensor& x) {
  const int32_t f32 = aoti_torch_dtype_float32(), u8 = aoti_torch_dtype_uint8();
  const auto codes = [&](const Tensor& t, const char* name) {
    check(t.dtype() == u8 && t.dim() == 4 && t.size(0) == h.groups && t.size(2) == kSketchRows && t.size(3) == 4, h.op,
          name, " must be uint8 [groups, steps, 64, 4] of ", h.groups, " groups, got ", t.shape());
  };
  codes(h.eight, "eight");
  codes(h.four, "four");
  codes(h.rest, "rest");
  check(
      h.project.dtype() == f32 && h.project.dim() == 2 && h.project.size(0) == h.width && h.project.size(1) == h.width,
      h.op, "project must be float32 [D, D], got ", h.project.shape());
  check(h.mean.dtype() == f32 && h.mean.numel() == h.width, h.op, "mean must be float32 [D]");
  check(h.rest.size(1) == (h.width_rest + 7) / 8 && h.eight.size(1) == (h.width8 + 3) / 4 &&
            h.four.size(1) == (h.width4 + 7) / 8,
        h.op, "eight, four and rest must hold ", h.width, " coordinates, got ", h.eight.shape(), ", ", h.four.shape(),
        " and ", h.rest.shape());
  check(h.numbers.dtype() == torch_dtype(kBF16) && h.numbers.numel() == h.groups * kHeadNumbers * kSketchRows, h.op,
        "numbers must be bfloat16 [groups, 4, 64], got ", h.numbers.shape());
  check(h.limits.dtype() == f32 && h.limits.numel() == 6, h.op, "limits must be float32 [6]");
  check(!h.noise.defined() ||
            (h.noise.dtype() == f32 && h.noise.dim() == 2 && h.noise.size(0) == x.size(0) && h.noise.size(1) == h.rows),
        h.op, "noise must be float32 [N, V]");
}

// Takes stack[1..10]: weight, bias, noise, and the codes as src/nogemm/ops/head_scan.py lists them.
inline Head take_head(StableIValue* stack, const Tensor& x, const char* op) {
  Head h{};
  h.op = op;
  h.weight = take_tensor(stack[1]);
  h.bias = take_optional_tensor(stack[2]);
  h.noise = take_optional_tensor(stack[3]);
  h.project = take_tensor(stack[4]).contiguous();
  h.mean = take_tensor(stack[5]).contiguous();
  h.eight = take_tensor(stack[6]).contiguous();
  h.four = take_tensor(stack[7]).contiguous();
  h.rest = take_tensor(stack[8]).contiguous();
  h.numbers = take_tensor(stack[9]).contiguous();
  h.limits = take_tensor(stack[10]).contiguous();
  check_rows(op, x, h.weight, h.bias);
  if (h.bias.defined()) h.bias = std::move(h.bias).contiguous();
  if (h.noise.defined()) h.noise = std::move(h.noise).contiguous();
  h.dtype = rows_dtype(h.weight, op);
  h.rows = h.weight.size(0), h.width = h.weight.size(1);
  h.groups = (h.rows + kSketchRows - 1) / kSketchRows;
  const auto columns = [](const Tensor& t, int64_t of_a_step, int64_t most) {
    return t.dim() == 4 ? std::min(most, t.size(1) * of_a_step) : 0;
  };
  h.width8 = columns(h.eight, 4, h.width);
  h.width4 = columns(h.four, 8, h.width - h.width8);
  h.width_rest = h.width - h.width8 - h.width4;
  check_codes(h, x);
  h.codes = {h.eight.data<uint8_t>(),
             h.four.data<uint8_t>(),
             h.rest.data<uint8_t>(),
             static_cast<const bf16*>(h.numbers.data()),
             h.bias.defined() ? h.bias.data<float>() : nullptr,
             h.eight.size(1),
             h.four.size(1),
             h.rest.size(1),
             h.rows};
  return h;
}

inline double length(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum);
}

inline float up(double value) { return static_cast<float>(value * (1 + 0x1p-20)); }

// The largest size among numbers; what is not finite is larger than all others.
inline float largest(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float value;
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
  if (!std::isfinite(x_length)) return kNotFinite;
  const HeadKernels& k = kernels().head;
  const float* limits = h.limits.data<float>();
  const double row8 = limits[0], row4 = limits[1], row = limits[2], project = limits[3], mean = limits[5];
  const double added = static_cast<double>(limits[4]) + noise;
  const float *y4 = y + h.width8, *y_rest = y4 + h.width4;
  const double length8 = length(y, h.width8), length4 = length(y4, h.width4 + h.width_rest);
  double shift = 0;
  const float* own = h.mean.data<float>();
  for (int64_t i = 0; i < h.width; ++i) shift += static_cast<double>(own[i]) * x[i];
  // Sums of codes times planes, before the rows' scales, are the largest numbers on the way.
  constexpr double kCodes = 1e5, kMost = 1e37;
  if (!((row8 + kCodes) * length8 + (row4 + kCodes) * length4 + std::fabs(shift) + added < kMost)) return kOverflown;
  const int64_t padded8 = round_up(h.width8, 64), padded4 = round_up(h.width4, 64);
  const double lost8 = k.split(y, h.width8, padded8, planes, &t.eight);
  planes += 2 * padded8;
  const double lost4 = k.round(y4, h.width4, padded4, planes, &t.four),
               lost_rest = k.round(y_rest, h.width_rest, round_up(h.width_rest, 64), planes + padded4, &t.rest);
  // Additions on the way to a dot product (dot_rows in kernels/bundles.h): two accumulators of a vector each, then lanes.
  const double sums = static_cast<double>(h.width / (2 * kernels().lanes) + kernels().lanes + 4);
  const double slack = row8 * lost8 + row4 * std::hypot(lost4, lost_rest)     // the token's own rounding
                       + (row8 + row4) * (sums * kUnit * project * x_length)  // of y
                       + 16 * kUnit * (row8 * length8 + row4 * length4 + std::fabs(shift) + added)  // of the estimate
                       + sums * kUnit * x_length * (row + mean) + 4 * kUnit * added;                // of the exact dot
  t.norm8 = up(share * length8), t.norm4 = up(share * length4), t.slack = up(slack);
  t.shift = static_cast<float>(shift);
  t.floor = -std::numeric_limits<float>::infinity();
  t.count = 0;
  return t.slack < kMost ? 0 : kOverflown;
}

struct Best {
  int64_t index = std::numeric_limits<int64_t>::max();
  float value = -std::numeric_limits<float>::infinity();

  // Ties go to the lowest index.
  void take(int64_t other, float logit) {
    if (logit > value || (logit == value && other < index)) index = other, value = logit;
  }
};

// Exact logits of rows, noise included.
inline void exact_logits(const Head& h, const float* x, const float* noise, const int32_t* index, int64_t count,
                         float* out) {
  kernels().head.dots[h.dtype](h.exact(), index, 0, count, count, x, out);
  if (noise == nullptr) return;
  for (int64_t i = 0; i < count; ++i) out[i] += noise[index[i]];
}

// Up to kTokens tokens of a call: coordinates and planes, filled by the phases 0 and 1 of a pass.
struct Tokens {
  const Head& h;
  const float* x;
  int64_t count, first;    // first: among all tokens of the call
  int64_t used;            // coordinates that are read
  int64_t pieces, finite;  // finite: tokens that have an answer
  float* y;
  int8_t* planes;
  float* noise;            // [kTokens][kPieces], the largest
  HeadToken* parts;        // [piece][token], tokens with an answer in front
  int64_t place[kTokens];  // of those, among the tokens

  const float* state(int64_t n) const { return x + n * h.width; }
  HeadToken& part(int64_t p, int64_t t) const { return parts[p * finite + t]; }
  int64_t begin(int64_t p) const { return h.groups * p / pieces; }

  static int64_t bytes(const Head& h, int64_t count) {
    return count * (h.width * 4 + plane_bytes(h) + kPieces * static_cast<int64_t>(sizeof(HeadToken) + 4)) + 4096;
  }

  Tokens(const Head& head, const float* states, int64_t begin, int64_t tokens, int64_t coordinates, Carver& carver)
      : h(head),
        x(states + begin * head.width),
        count(tokens),
        first(begin),
        used(coordinates),
        pieces(std::min(kPieces, head.groups)),
        finite(0) {
    y = carver.take<float>(count * h.width);
    planes = carver.take<int8_t>(count * plane_bytes(h));
    noise = carver.take<float>(kTokens * kPieces);
    parts = carver.take<HeadToken>(kPieces * count);
  }

  // Coordinates, a cut at a time, and the largest noise of each piece.
  void project(Phases& phases) {
    const BundleRows rows = rows_of(h.project, Tensor(), kF32);
    const int64_t cuts = (used + kTogether - 1) / kTogether, noisy = h.noise.defined() ? pieces : 0;
    phases.run(0, cuts + noisy, [&](int64_t cut) {
      if (cut >= cuts) {
        const int64_t p = cut - cuts, from = h.rows * p / pieces, to = h.rows * (p + 1) / pieces;
        for (int64_t n = 0; n < count; ++n) noise[n * kPieces + p] = largest(h.noise_of(first + n) + from, to - from);
        return;
      }
      const int64_t from = cut * kTogether, to = std::min(from + kTogether, used);
      for (int64_t n = 0; n < count; ++n) kernels().head.rows[kF32](rows, from, to, state(n), y + n * h.width + from);
    });
  }

  // Each token's numbers; index says what has none. give(part, piece, token) sets the list up.
  template <class Give>
  void start(Phases& phases, double share, int64_t* index, float* value, const Give& give) {
    phases.run(1, 1, [&](int64_t) {
      HeadToken tokens[kTokens];
      for (int64_t n = 0; n < count; ++n) {
        float most = 0;
        for (int64_t p = 0; p < (h.noise.defined() ? pieces : 0); ++p)
          if (!(noise[n * kPieces + p] <= most)) most = noise[n * kPieces + p];  // NaN, too
        std::fill(y + n * h.width + used, y + (n + 1) * h.width, 0.0f);
        HeadToken& t = tokens[finite] = {};
        index[n] = prepare(h, state(n), y + n * h.width, most, share, planes + n * plane_bytes(h), t);
        value[n] = std::numeric_limits<float>::quiet_NaN();
        t.noise = h.noise_of(first + n);
        if (index[n] == 0) place[finite++] = n;
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
