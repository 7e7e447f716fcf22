// nogemm::head_argmax(Tensor x, Tensor weight, Tensor? bias, Tensor? noise, Tensor project, Tensor mean, Tensor eight,
//     Tensor four, Tensor rest, Tensor numbers, Tensor limits, float share) -> (Tensor, Tensor, Tensor)
// nogemm::head_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor
#include "bindings/head.h"

namespace nogemm::head {
namespace {

constexpr const char* kArgmax = "head_argmax";
constexpr const char* kLogits = "head_logits";
constexpr int64_t kFirst = 32;  // rows that are computed before the others are looked at again

// A token's rows that may win.
struct Rows {
  HeadRow* list;
  int64_t count;
};

// Brings the pieces' lists together, without rows that another piece has ruled out.
Rows gather(const Tokens& tokens, int64_t t) {
  float floor = -std::numeric_limits<float>::infinity();
  for (int64_t p = 0; p < tokens.pieces; ++p) floor = std::max(floor, tokens.part(p, t).floor);
  Rows rows{tokens.part(0, t).list, 0};
  for (int64_t p = 0; p < tokens.pieces; ++p) {
    const HeadToken& part = tokens.part(p, t);
    for (int64_t i = 0; i < part.count; ++i)
      if (part.list[i].value >= floor) rows.list[rows.count++] = part.list[i];
  }
  return rows;
}

// The largest exact logit among a token's rows; computed counts the rows that it took.
Best choose(const Head& h, const float* x, const float* noise, Rows rows, int64_t& computed) {
  Best best;
  const auto compare = [&](const HeadRow* list, int64_t count) {
    int32_t index[kTogether];
    float value[kTogether];
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      const int64_t own = std::min(kTogether, count - begin);
      for (int64_t i = 0; i < own; ++i) index[i] = list[begin + i].index;
      exact_logits(h, x, noise, index, own, value);
      for (int64_t i = 0; i < own; ++i) best.take(index[i], value[i]);
    }
    computed += count;
  };
  // The most promising rows first: their logits rule out most of the others.
  const int64_t first = std::min(kFirst, rows.count);
  std::nth_element(rows.list, rows.list + first, rows.list + rows.count,
                   [](const HeadRow& a, const HeadRow& b) { return a.value > b.value; });
  compare(rows.list, first);
  int64_t left = first;
  for (int64_t i = first; i < rows.count; ++i)
    if (rows.list[i].value >= best.value) rows.list[left++] = rows.list[i];
  compare(rows.list + first, left - first);
  if (best.index == std::numeric_limits<int64_t>::max()) best.index = kOverflown;  // bounds or logits are NaN
  return best;
}

// At most kTokens tokens. Threads share phases: y, each token's numbers, the scan, the rows that are left.
void argmax_tokens(const Head& h, const float* x, int64_t begin, int64_t count, double share, Workspace& memory,
                   int64_t* index, float* value, int64_t* rows) {
  const int64_t most = (h.groups + kPieces - 1) / kPieces * kSketchRows + kSketchRows;
  const int64_t lists = count * kPieces * most * static_cast<int64_t>(sizeof(HeadRow));
  Carver carver{memory.at_least(Tokens::bytes(h, count) + lists)};
  Tokens tokens(h, x, begin, count, h.width, carver);
  auto* const list = carver.take<HeadRow>(count * kPieces * most);
  Phases phases;
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  parallel_for(threads, 1, [&](int64_t from, int64_t to) noexcept {
    for (int64_t worker = from; worker < to; ++worker) {
      tokens.project(phases);
      tokens.start(phases, share, index, value,
                   [&](HeadToken& part, int64_t p, int64_t t) { part.list = list + (t * kPieces + p) * most; });
      phases.run(2, tokens.pieces, [&](int64_t p) {
        kernels().head.scan(h.codes, tokens.begin(p), tokens.begin(p + 1), &tokens.part(p, 0), tokens.finite);
      });
      phases.run(3, tokens.finite, [&](int64_t t) {
        const int64_t n = tokens.place[t];
        rows[n] = 0;
        const Best best = choose(h, tokens.state(n), h.noise_of(begin + n), gather(tokens, t), rows[n]);
        index[n] = best.index, value[n] = best.value;
      });
    }
  });
}

void head_argmax(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace memory;
  const Tensor x = take_tensor(stack[0]).contiguous();
  const Head h = take_head(stack, x, kArgmax);
  const double share = take_double(stack[11]);
  const int64_t tokens = x.size(0);
  Tensor index = Tensor::empty({tokens}, aoti_torch_dtype_int64()),
         value = Tensor::empty({tokens}, aoti_torch_dtype_float32()),
         rows = Tensor::empty({tokens}, aoti_torch_dtype_int64());
  std::fill_n(rows.mutable_data<int64_t>(), tokens, 0);
  for (int64_t n = 0; n < tokens; n += kTokens) {
    argmax_tokens(h, x.data<float>(), n, std::min(kTokens, tokens - n), share, memory,
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
}  // namespace nogemm::head
