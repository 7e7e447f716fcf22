// nogemm::head_argmax(Tensor x, Tensor weight, Tensor? bias, Tensor project, Tensor mean, Tensor eight, Tensor four,
//     Tensor numbers, Tensor limits, float share) -> (Tensor, Tensor, Tensor)
// nogemm::head_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bindings/packed.h"
#include "packed/neurons/state.h"

namespace nogemm {
namespace {

using hire::Carver;
using hire::Phases;

constexpr const char* kArgmax = "head_argmax";
constexpr const char* kLogits = "head_logits";
constexpr int64_t kTokens = 16;    // that share a pass over the codes
constexpr int64_t kPieces = 16;    // of the codes; each keeps a list and a floor of its own
constexpr int64_t kTogether = 64;  // rows of a small job that one thread takes at once
constexpr double kUnit = 0x1p-24;  // rounding of float32

BundleRows rows_of(const Tensor& weight, const Tensor& bias, Dtype dtype) {
  return {weight.data<char>(), weight.size(1) * static_cast<int64_t>(item_size(dtype)), weight.size(1), nullptr,
          bias.defined() ? bias.data<float>() : nullptr};
}

// The rows of the head, and what tells how far an estimate may be off.
struct Head {
  Tensor weight, bias, project, mean, eight, four, numbers, limits;
  int64_t width, rows, groups, width8, width4;
  Dtype dtype;
  std::vector<float> padded_bias;
  HeadCodes codes;
  double share;
};

Dtype rows_dtype(const Tensor& weight, const char* op) {
  for (const Dtype d : {kF32, kBF16, kF16})
    if (weight.dtype() == torch_dtype(d)) return d;
  fail(op, "weight must be float32, bfloat16 or float16");
}

void check_rows(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x.dtype() == aoti_torch_dtype_float32() && x.dim() == 2, op, "x must be float32 [N, D], got shape ", x.shape());
  check(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.is_contiguous(), op,
        "weight must be contiguous [V, D], got ", weight.shape(), " for x ", x.shape());
  check(weight.size(0) >= 1 && weight.size(0) < std::numeric_limits<int32_t>::max() - kSketchRows, op,
        "weight must have from 1 to 2^31 rows, got ", weight.size(0));
  check(!bias.defined() || (bias.dtype() == aoti_torch_dtype_float32() && bias.numel() == weight.size(0)), op,
        "bias must be float32 [V]");
}

void check_codes(const Head& h) {
  const int32_t f32 = aoti_torch_dtype_float32(), u8 = aoti_torch_dtype_uint8();
  const auto codes = [&](const Tensor& t, const char* name) {
    check(t.dtype() == u8 && t.dim() == 4 && t.size(0) == h.groups && t.size(2) == kSketchRows && t.size(3) == 4,
          kArgmax, name, " must be uint8 [groups, steps, 64, 4] of ", h.groups, " groups, got ", t.shape());
  };
  codes(h.eight, "eight");
  codes(h.four, "four");
  check(
      h.project.dtype() == f32 && h.project.dim() == 2 && h.project.size(0) == h.width && h.project.size(1) == h.width,
      kArgmax, "project must be float32 [D, D], got ", h.project.shape());
  check(h.mean.dtype() == f32 && h.mean.numel() == h.width, kArgmax, "mean must be float32 [D]");
  check(h.width8 >= 0 && h.width4 >= 0 && h.eight.size(1) == (h.width8 + 3) / 4 && h.four.size(1) == (h.width4 + 7) / 8,
        kArgmax, "eight and four must hold ", h.width, " coordinates, got ", h.eight.shape(), " and ", h.four.shape());
  check(h.numbers.dtype() == torch_dtype(kBF16) && h.numbers.numel() == h.groups * kHeadNumbers * kSketchRows, kArgmax,
        "numbers must be bfloat16 [groups, 4, 64], got ", h.numbers.shape());
  check(h.limits.dtype() == f32 && h.limits.numel() == 6, kArgmax, "limits must be float32 [6]");
}

Head take_head(StableIValue* stack, const Tensor& x) {
  Head h{};
  h.weight = take_tensor(stack[1]);
  h.bias = take_optional_tensor(stack[2]);
  h.project = take_tensor(stack[3]).contiguous();
  h.mean = take_tensor(stack[4]).contiguous();
  h.eight = take_tensor(stack[5]).contiguous();
  h.four = take_tensor(stack[6]).contiguous();
  h.numbers = take_tensor(stack[7]).contiguous();
  h.limits = take_tensor(stack[8]).contiguous();
  h.share = take_double(stack[9]);
  check_rows(kArgmax, x, h.weight, h.bias);
  if (h.bias.defined()) h.bias = std::move(h.bias).contiguous();
  h.dtype = rows_dtype(h.weight, kArgmax);
  h.rows = h.weight.size(0), h.width = h.weight.size(1);
  h.groups = (h.rows + kSketchRows - 1) / kSketchRows;
  h.width8 = h.eight.dim() == 4 ? std::min(h.width, h.eight.size(1) * 4) : -1;
  h.width4 = h.width - h.width8;
  check_codes(h);
  const float* bias = nullptr;
  if (h.bias.defined()) {
    const float* own = h.bias.data<float>();
    h.padded_bias.assign(static_cast<size_t>(h.groups * kSketchRows), own[h.rows - 1]);
    std::copy(own, own + h.rows, h.padded_bias.begin());
    bias = h.padded_bias.data();
  }
  h.codes = {h.eight.data<uint8_t>(),
             h.four.data<uint8_t>(),
             static_cast<const bf16*>(h.numbers.data()),
             bias,
             h.eight.size(1),
             h.four.size(1),
             h.rows};
  return h;
}

double length(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum);
}

// In place of an index.
constexpr int64_t kNotFinite = -1;
constexpr int64_t kOverflown = -2;  // src/nogemm/ops/head_scan.py answers then

float up(double value) { return static_cast<float>(value * (1 + 0x1p-20)); }

// The coordinates y of a token, in fixed point, with what every estimate of this token may be off by. Returns 0, or why
// there is no answer.
int64_t prepare(const Head& h, const float* x, const float* y, int8_t* planes, HeadToken& t) {
  const double x_length = length(x, h.width);
  if (!std::isfinite(x_length)) return kNotFinite;
  const HeadKernels& k = kernels().head;
  const float* limits = h.limits.data<float>();
  const double row8 = limits[0], row4 = limits[1], row = limits[2], project = limits[3], bias = limits[4],
               mean = limits[5];
  const double length8 = length(y, h.width8), length4 = length(y + h.width8, h.width4);
  double shift = 0;
  const float* own = h.mean.data<float>();
  for (int64_t i = 0; i < h.width; ++i) shift += static_cast<double>(own[i]) * x[i];
  // Sums of codes times planes, before the rows' scales, are the largest numbers on the way.
  constexpr double kCodes = 1e5, kMost = 1e37;
  if (!((row8 + kCodes) * length8 + (row4 + kCodes) * length4 + std::fabs(shift) + bias < kMost)) return kOverflown;
  const int64_t padded8 = (h.width8 + 63) / 64 * 64, padded4 = (h.width4 + 63) / 64 * 64;
  const double lost8 = k.split(y, h.width8, padded8, planes, &t.eight),
               lost4 = k.split(y + h.width8, h.width4, padded4, planes + 2 * padded8, &t.four);
  // Additions on the way to a dot product (dot_rows in kernels/bundles.h): two accumulators of a vector each, then lanes.
  const double sums = static_cast<double>(h.width / (2 * kernels().lanes) + kernels().lanes + 4);
  const double slack = row8 * lost8 + row4 * lost4                            // the token's own rounding
                       + (row8 + row4) * (sums * kUnit * project * x_length)  // of y
                       + 16 * kUnit * (row8 * length8 + row4 * length4 + std::fabs(shift) + bias)  // of the estimate
                       + sums * kUnit * x_length * (row + mean) + 2 * kUnit * bias;                // of the exact dot
  t.norm8 = up(h.share * length8), t.norm4 = up(h.share * length4), t.slack = up(slack);
  t.shift = static_cast<float>(shift);
  t.floor = -std::numeric_limits<float>::infinity();
  t.count = 0;
  return t.slack < kMost ? 0 : kOverflown;
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
  auto* const dots = kernels().head.dots[h.dtype];
  const BundleRows exact = rows_of(h.weight, h.bias, h.dtype);
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
  if (best.index == std::numeric_limits<int64_t>::max()) best.index = kOverflown;  // bounds or logits are NaN
  return best;
}

// At most kTokens tokens. Threads share phases: y, each token's numbers, the scan, the rows that are left.
void argmax_tokens(const Head& h, const float* x, int64_t count, Workspace& memory, int64_t* index, float* value,
                   int64_t* rows) {
  const HeadKernels& k = kernels().head;
  const int64_t pieces = std::min(kPieces, h.groups), most = (h.groups + pieces - 1) / pieces * kSketchRows;
  const int64_t planes = 2 * ((h.width8 + 63) / 64 + (h.width4 + 63) / 64) * 64;
  Carver carver{memory.at_least(count * (h.width * 4 + planes + pieces * (most * 8 + 2 * sizeof(HeadToken))) + 4096)};
  auto* const y = carver.take<float>(count * h.width);
  auto* const bytes = carver.take<int8_t>(count * planes);
  auto* const names = carver.take<int32_t>(count * pieces * most);
  auto* const uppers = carver.take<float>(count * pieces * most);
  auto* const tokens = carver.take<HeadToken>(count);
  auto* const parts = carver.take<HeadToken>(pieces * count);  // [piece][token], tokens that are finite in front
  int64_t place[kTokens], finite = 0;
  const BundleRows project = rows_of(h.project, Tensor(), kF32);
  const int64_t cuts = (h.width + kTogether - 1) / kTogether;
  Phases phases;
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  parallel_for(threads, 1, [&](int64_t from, int64_t to) noexcept {
    for (int64_t worker = from; worker < to; ++worker) {
      phases.run(0, cuts, [&](int64_t cut) {
        const int64_t begin = cut * kTogether, end = std::min(begin + kTogether, h.width);
        for (int64_t n = 0; n < count; ++n) k.rows[kF32](project, begin, end, x + n * h.width, y + n * h.width + begin);
      });
      phases.run(1, 1, [&](int64_t) {
        for (int64_t n = 0; n < count; ++n) {
          HeadToken& t = tokens[finite];
          index[n] = prepare(h, x + n * h.width, y + n * h.width, bytes + n * planes, t);
          value[n] = std::numeric_limits<float>::quiet_NaN(), rows[n] = 0;
          if (index[n] == 0) place[finite++] = n;
        }
        for (int64_t p = 0; p < pieces; ++p) {
          for (int64_t t = 0; t < finite; ++t) {
            HeadToken& part = parts[p * finite + t];
            part = tokens[t];
            part.index = names + (t * pieces + p) * most;
            part.upper = uppers + (t * pieces + p) * most;
          }
        }
      });
      phases.run(2, pieces, [&](int64_t p) {
        k.scan(h.codes, h.groups * p / pieces, h.groups * (p + 1) / pieces, parts + p * finite, finite);
      });
      phases.run(3, finite, [&](int64_t t) {
        HeadToken* own[kPieces];
        for (int64_t p = 0; p < pieces; ++p) own[p] = parts + p * finite + t;
        const int64_t n = place[t];
        const Best best = choose(h, x + n * h.width, gather(own, pieces));
        index[n] = best.index, value[n] = best.value, rows[n] = best.rows;
      });
    }
  });
}

void head_argmax(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace memory;
  const Tensor x = take_tensor(stack[0]).contiguous();
  const Head h = take_head(stack, x);
  const int64_t tokens = x.size(0);
  Tensor index = Tensor::empty({tokens}, aoti_torch_dtype_int64()),
         value = Tensor::empty({tokens}, aoti_torch_dtype_float32()),
         rows = Tensor::empty({tokens}, aoti_torch_dtype_int64());
  for (int64_t n = 0; n < tokens; n += kTokens) {
    argmax_tokens(h, x.data<float>() + n * h.width, std::min(kTokens, tokens - n), memory,
                  index.mutable_data<int64_t>() + n, value.mutable_data<float>() + n, rows.mutable_data<int64_t>() + n);
  }
  memory.trim();
  stack[0] = std::move(index).to_stack();
  stack[1] = std::move(value).to_stack();
  stack[2] = std::move(rows).to_stack();
}

void head_logits(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous(), weight = take_tensor(stack[1]);
  Tensor bias = take_optional_tensor(stack[2]);
  check_rows(kLogits, x, weight, bias);
  if (bias.defined()) bias = std::move(bias).contiguous();
  const Dtype dtype = rows_dtype(weight, kLogits);
  const int64_t tokens = x.size(0), rows = weight.size(0), width = weight.size(1);
  Tensor logits = Tensor::empty({tokens, rows}, aoti_torch_dtype_float32());
  const BundleRows all = rows_of(weight, bias, dtype);
  const float* from = x.data<float>();
  float* out = logits.mutable_data<float>();
  // Few rows at a time, for all tokens while they are in the cache.
  constexpr int64_t kBlock = 32;
  parallel_for((rows + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t stop = std::min((b + 1) * kBlock, rows);
      for (int64_t n = 0; n < tokens; ++n)
        kernels().head.rows[dtype](all, b * kBlock, stop, from + n * width, out + n * rows + b * kBlock);
    }
  });
  stack[0] = std::move(logits).to_stack();
}

const Register registered_argmax(kArgmax, head_argmax);
const Register registered_logits(kLogits, head_logits);

}  // namespace
}  // namespace nogemm
