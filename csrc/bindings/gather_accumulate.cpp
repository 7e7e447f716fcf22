// nogemm::gather_accumulate(Tensor codes, Tensor scores, Tensor tables, Tensor? row_scale) -> Tensor
// nogemm::gather_accumulate_backward(Tensor grad, Tensor codes, Tensor scores, Tensor tables) -> (Tensor,
// Tensor)
#include <atomic>
#include <limits>

#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kForward = "gather_accumulate";
constexpr const char* kBackward = "gather_accumulate_backward";
constexpr int64_t kGroupBytes = int64_t{1}
                                << 19;  // of table slices walked together, beside the sums in the second-level cache
constexpr int64_t kMaxGroup = 16;
constexpr int64_t kTokens = 4096;    // tokens planned at a time: their sums of a slice stay in the second-level cache
constexpr int64_t kGrain = 1 << 17;  // elements of rows per thread

// The first bad code seen by any piece; the least index wins, so the message does not depend on the threads.
class FirstWrong {
 public:
  void note(int64_t flat) noexcept {
    if (flat < 0) return;
    int64_t seen = first_.load();
    while (flat < seen && !first_.compare_exchange_weak(seen, flat)) {
    }
  }
  void raise_if_any(const char* op, const int32_t* codes, const GatherShape& s) const {
    const int64_t flat = first_.load();
    if (flat == std::numeric_limits<int64_t>::max()) return;
    const int64_t k = s.neighbours;
    fail<std::out_of_range>(op, "codes[", flat / (s.tables * k), ", ", flat / k % s.tables, ", ", flat % k,
                            "] = ", codes[flat], " is outside [0, ", s.rows, "), the rows of a table");
  }

 private:
  std::atomic<int64_t> first_{std::numeric_limits<int64_t>::max()};
};

GatherShape check_shapes(const Tensor& codes, const Tensor& scores, const Tensor& tables, const char* op) {
  check(codes.dtype() == aoti_torch_dtype_int32(), op, "codes must be int32");
  check(codes.dim() == 3 && tables.dim() == 3 && codes.size(1) == tables.size(0), op,
        "expected codes [N, T, F] and tables [T, R, D], got codes of shape ", codes.shape(), " and tables of shape ",
        tables.shape());
  check(scores.shape() == codes.shape(), op, "scores of shape ", scores.shape(), " must have the shape of codes, ",
        codes.shape());
  const GatherShape s{codes.size(0), tables.size(0), tables.size(1), tables.size(2), codes.size(2), 1};
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  check(s.rows * kMaxGroup <= kLimit && s.tokens * s.neighbours <= kLimit, op,
        "too many rows or tokens for 32-bit indices");
  return s;
}

int64_t group_size(const GatherShape& s, int64_t slice, Dtype rows) {
  const int64_t bytes = s.rows * slice * static_cast<int64_t>(item_size(rows));
  const int64_t group = bytes > 0 ? kGroupBytes / bytes : kMaxGroup;
  return group < 1 ? 1 : group > kMaxGroup ? kMaxGroup : group;
}

struct Forward {
  GatherShape shape;
  Dtype score_dtype, row_dtype;
  const int32_t* codes;
  const char* scores;
  const void* tables;
  const float* row_scale;
  char* y;
};

// The tokens of f.shape, whose scratch the caller provides: plan, then all slices of all tokens. A token's
// sum does not depend on how the (slice, token) pairs are cut, so each thread takes one stretch of them.
void forward_tokens(const Forward& f, GatherEntry* plan, float* sums, FirstWrong& wrong, int64_t first_flat) {
  const GatherKernels& kernel = kernels().gather;
  const GatherShape& s = f.shape;
  const int64_t grain = 1 + kGrain / (s.tables * s.neighbours * kernel.slice + 1);
  parallel_for(s.tokens, 1 + kGrain / (16 * s.tables * s.neighbours + 1), [&](int64_t begin, int64_t end) noexcept {
    const int64_t flat = kernel.plan[f.score_dtype](s, f.codes, f.scores, f.row_scale, plan, begin, end);
    if (flat >= 0) wrong.note(first_flat + flat);
  });
  const int64_t slices = (s.width + kernel.slice - 1) / kernel.slice;
  parallel_for(slices * s.tokens, grain, [&](int64_t begin, int64_t end) noexcept {
    while (begin < end) {
      const int64_t slice = begin / s.tokens, n = begin % s.tokens;
      const int64_t stop = n + end - begin < s.tokens ? n + end - begin : s.tokens;
      float* slice_sums = sums + slice * s.tokens * kernel.slice;
      kernel.forward[f.row_dtype](s, plan, f.tables, slice * kernel.slice, slice_sums, n, stop);
      kernel.finish[f.score_dtype](s, slice_sums, slice * kernel.slice, f.y, n, stop);
      begin += stop - n;
    }
  });
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor codes = take_tensor(stack[0]).contiguous(), scores = take_tensor(stack[1]).contiguous(),
         tables = take_tensor(stack[2]).contiguous(), row_scale = take_optional_tensor(stack[3]);
  Forward f{};
  f.score_dtype = dtype_of(scores, kForward, "scores");
  f.row_dtype = dtype_of(tables, kForward, "tables", true);
  f.shape = check_shapes(codes, scores, tables, kForward);
  const GatherShape whole = f.shape;
  if (row_scale.defined()) {
    row_scale = std::move(row_scale).contiguous();
    check(row_scale.dtype() == aoti_torch_dtype_float32() && row_scale.dim() == 2 &&
              row_scale.size(0) == whole.tables && row_scale.size(1) == whole.rows,
          kForward, "row_scale must be float32 [T, R] = (", whole.tables, ", ", whole.rows, "), got shape ",
          row_scale.shape());
    f.row_scale = row_scale.data<float>();
  }
  check(f.row_dtype != kI8 || f.row_scale != nullptr, kForward, "int8 tables need a row_scale");

  Tensor y = Tensor::empty({whole.tokens, whole.width}, scores.dtype());
  const int64_t slice = kernels().gather.slice, slices = (whole.width + slice - 1) / slice;
  const int64_t most = whole.tokens < kTokens ? whole.tokens : kTokens, entries = whole.tables * whole.neighbours;
  f.shape.group = group_size(whole, slice, f.row_dtype);
  f.tables = tables.data();
  if (entries == 0) {  // a sum over nothing
    std::memset(y.mutable_data(), 0, static_cast<size_t>(y.numel()) * item_size(f.score_dtype));
  } else {
    const Scratch<GatherEntry> plan(most * entries);
    const Scratch<float> sums(slices * most * slice);
    const int64_t item = static_cast<int64_t>(item_size(f.score_dtype));
    FirstWrong wrong;
    for (int64_t n = 0; n < whole.tokens; n += kTokens) {
      f.shape.tokens = whole.tokens - n < kTokens ? whole.tokens - n : kTokens;
      f.codes = codes.data<int32_t>() + n * entries;
      f.scores = scores.data<char>() + n * entries * item;
      f.y = y.mutable_data<char>() + n * whole.width * item;
      forward_tokens(f, plan.get(), sums.get(), wrong, n * entries);
      wrong.raise_if_any(kForward, codes.data<int32_t>(), whole);
    }
  }
  stack[0] = std::move(y).to_stack();
}

// All tables, slice after slice: a table's dot products are summed over the slices in order, whichever thread
// has the table.
void backward_tables(const GatherShape& s, Dtype dtype, Dtype row_dtype, const Tensor& grad, const void* tables,
                     const int32_t* starts, const GatherEntry* order, float* dots, void* grad_tables) {
  const GatherKernels& kernel = kernels().gather;
  const Scratch<float> sliced(s.tokens * kernel.slice);
  const int64_t pairs = s.tokens * s.neighbours;
  const int64_t grain = 1 + kGrain / ((pairs + s.rows) * kernel.slice + 1);
  const void* grad_data = grad.data();
  for (int64_t column = 0; column < s.width; column += kernel.slice) {
    parallel_for(s.tokens, 1 + kGrain / (8 * kernel.slice), [&](int64_t begin, int64_t end) noexcept {
      kernel.slice_grad[dtype](s, grad_data, column, sliced.get(), begin, end);
    });
    parallel_for(s.tables, grain, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t t = begin; t < end; ++t) {
        kernel.backward[row_dtype](s, starts + t * (s.rows + 1), order + t * pairs, sliced.get(), tables, t, column,
                                   grad_tables, dots + t * pairs);
      }
    });
  }
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take_tensor(stack[0]).contiguous(), codes = take_tensor(stack[1]).contiguous(),
         scores = take_tensor(stack[2]).contiguous(), tables = take_tensor(stack[3]).contiguous();
  const Dtype dtype = dtype_of(scores, kBackward, "scores"), row_dtype = dtype_of(tables, kBackward, "tables");
  check_same_dtype(grad, scores, kBackward, "grad", "scores");
  const GatherShape s = check_shapes(codes, scores, tables, kBackward);
  check(grad.dim() == 2 && grad.size(0) == s.tokens && grad.size(1) == s.width, kBackward,
        "grad must have the shape of the output, (", s.tokens, ", ", s.width, "), got ", grad.shape());

  Tensor grad_scores = Tensor::empty({s.tokens, s.tables, s.neighbours}, scores.dtype());
  Tensor grad_tables = Tensor::empty({s.tables, s.rows, s.width}, tables.dtype());
  void* grad_rows = grad_tables.mutable_data();
  prefer_huge_pages(grad_rows, static_cast<size_t>(grad_tables.numel()) * item_size(row_dtype));

  const GatherKernels& kernel = kernels().gather;
  const int64_t pairs = s.tokens * s.neighbours;
  const Scratch<int32_t> starts(s.tables * (s.rows + 1));
  const Scratch<GatherEntry> order(s.tables * pairs);
  const Scratch<float> dots(s.tables * pairs), by_token(s.tables * pairs);
  const int32_t* code_data = codes.data<int32_t>();
  const void* score_data = scores.data();
  void* grad_score_data = grad_scores.mutable_data();
  FirstWrong wrong;
  parallel_for(s.tables, 1 + (1 << 15) / (pairs + s.rows + 1), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t t = begin; t < end; ++t) {
      wrong.note(
          kernel.bucket[dtype](s, code_data, score_data, t, starts.get() + t * (s.rows + 1), order.get() + t * pairs));
    }
  });
  wrong.raise_if_any(kBackward, code_data, s);
  if (s.width == 0) std::memset(dots.get(), 0, static_cast<size_t>(s.tables * pairs) * sizeof(float));
  backward_tables(s, dtype, row_dtype, grad, tables.data(), starts.get(), order.get(), dots.get(), grad_rows);
  parallel_for(s.tables, 1 + (1 << 15) / (pairs + 1), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t t = begin; t < end; ++t) {
      kernel.unsort(s, order.get() + t * pairs, dots.get() + t * pairs, by_token.get() + t * pairs);
    }
  });
  parallel_for(s.tokens, 1 + (1 << 15) / (s.tables * s.neighbours + 1), [&](int64_t begin, int64_t end) noexcept {
    kernel.score_grad[dtype](s, by_token.get(), grad_score_data, begin, end);
  });
  stack[0] = std::move(grad_scores).to_stack();
  stack[1] = std::move(grad_tables).to_stack();
}

const Register registered_forward(kForward, forward);
const Register registered_backward(kBackward, backward);

}  // namespace
}  // namespace nogemm
