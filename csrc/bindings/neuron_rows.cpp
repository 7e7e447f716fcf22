// nogemm::neuron_dot(Tensor x, Tensor index, Tensor rows, bool sparse) -> Tensor
// nogemm::neuron_sum(Tensor weight, Tensor index, Tensor rows, bool sparse) -> Tensor
// nogemm::neuron_outer(Tensor weight, Tensor index, Tensor x, int n_rows) -> Tensor
// nogemm::neuron_outer_visited(Tensor weight, Tensor index, Tensor x, int n_rows) -> (Tensor, Tensor)
#include <limits>

#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr int64_t kGrain = 1 << 15;  // multiply-adds worth a thread

int64_t grain_of(const NeuronShape& s) { return 1 + kGrain / (s.visits * s.width + 1); }

// [..., D] as R rows.
int64_t row_count(const Tensor& rows) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < rows.dim(); ++d) count *= rows.size(d);
  return count;
}

void check_index(const Tensor& index, const NeuronShape& s, const char* op) {
  const int32_t* at = index.data<int32_t>();
  for (int64_t i = 0; i < s.tokens * s.visits; ++i) {
    if (at[i] < 0 || at[i] >= s.rows)
      fail<std::out_of_range>(op, "index[", i / s.visits, ", ", i % s.visits, "] = ", at[i],
                              " is outside [0, ", s.rows, "), the rows");
  }
}

NeuronShape check_shapes(const Tensor& index, const Tensor& rows, const char* op) {
  check(index.dtype() == aoti_torch_dtype_int32() && index.dim() == 2, op, "index must be int32 [N, P]");
  check(rows.dim() >= 2, op, "rows must be [..., D], got shape ", rows.shape());
  return {index.size(0), index.size(1), row_count(rows), rows.size(rows.dim() - 1)};
}

void dot(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kOp = "neuron_dot";
  const Tensor x = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
               rows = take_tensor(stack[2]).contiguous();
  const Dtype dtype = dtype_of(x, kOp, "x");
  check_same_dtype(x, rows, kOp, "x", "rows");
  const NeuronShape s = check_shapes(index, rows, kOp);
  check(x.dim() == 2 && x.size(0) == s.tokens && x.size(1) == s.width, kOp, "x of shape ", x.shape(),
        " does not fit index ", index.shape(), " and rows ", rows.shape());
  check_index(index, s, kOp);
  Tensor out = Tensor::empty({s.tokens, s.visits}, x.dtype());
  auto* const kernel = kernels().neuron.dot[dtype];
  const void *from = x.data(), *table = rows.data();
  const int32_t* at = index.data<int32_t>();
  void* to = out.mutable_data();
  parallel_for(s.tokens, grain_of(s),
               [&](int64_t begin, int64_t end) noexcept { kernel(s, from, at, table, to, begin, end); });
  stack[0] = std::move(out).to_stack();
}

void sum(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* kOp = "neuron_sum";
  const Tensor weight = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
               rows = take_tensor(stack[2]).contiguous();
  const Dtype dtype = dtype_of(weight, kOp, "weight");
  check_same_dtype(weight, rows, kOp, "weight", "rows");
  const NeuronShape s = check_shapes(index, rows, kOp);
  check(weight.shape() == index.shape(), kOp, "weight of shape ", weight.shape(),
        " must have the shape of index, ", index.shape());
  check_index(index, s, kOp);
  Tensor y = Tensor::empty({s.tokens, s.width}, weight.dtype());
  auto* const kernel = kernels().neuron.sum[dtype];
  const void *from = weight.data(), *table = rows.data();
  const int32_t* at = index.data<int32_t>();
  void* to = y.mutable_data();
  parallel_for(s.tokens, grain_of(s),
               [&](int64_t begin, int64_t end) noexcept { kernel(s, from, at, table, to, begin, end); });
  stack[0] = std::move(y).to_stack();
}

// The pairs of a batch by row, and the slices of x they multiply.
struct Outer {
  NeuronShape shape;
  Dtype dtype;
  Tensor weight, index, x;
  std::unique_ptr<Scratch<int32_t>> starts;
  std::unique_ptr<Scratch<NeuronEntry>> order;
};

Outer sorted(StableIValue* stack, const char* op) {
  Outer o;
  o.weight = take_tensor(stack[0]).contiguous();
  o.index = take_tensor(stack[1]).contiguous();
  o.x = take_tensor(stack[2]).contiguous();
  const int64_t rows = take_int(stack[3]);
  o.dtype = dtype_of(o.x, op, "x");
  check_same_dtype(o.weight, o.x, op, "weight", "x");
  check(o.index.dtype() == aoti_torch_dtype_int32() && o.index.dim() == 2 &&
            o.weight.shape() == o.index.shape(),
        op, "weight and int32 index must both be [N, P], got ", o.weight.shape(), " and ", o.index.shape());
  check(o.x.dim() == 2 && o.x.size(0) == o.index.size(0) && rows >= 0, op, "x of shape ", o.x.shape(),
        " does not fit index ", o.index.shape());
  o.shape = {o.index.size(0), o.index.size(1), rows, o.x.size(1)};
  check(o.shape.tokens * o.shape.visits <= std::numeric_limits<int32_t>::max(), op,
        "too many pairs for 32-bit numbers");
  o.starts = std::make_unique<Scratch<int32_t>>(rows + 1);
  o.order = std::make_unique<Scratch<NeuronEntry>>(o.shape.tokens * o.shape.visits);
  const int64_t wrong = kernels().neuron.sort[o.dtype](o.shape, o.index.data<int32_t>(), o.weight.data(),
                                                       o.starts->get(), o.order->get());
  if (wrong >= 0) check_index(o.index, o.shape, op);
  return o;
}

// A row's sum runs over its tokens in order, within one thread: the cut is by columns.
void write_slices(const Outer& o, const int32_t* visited, int64_t results, char* out) {
  const int64_t slice = kernels().gather.slice, width = o.shape.width, slices = (width + slice - 1) / slice;
  const int64_t item = static_cast<int64_t>(item_size(o.dtype));
  GatherShape tokens{};
  tokens.tokens = o.shape.tokens;
  tokens.width = width;
  auto* const cut = kernels().gather.slice_grad[o.dtype];
  auto* const outer = kernels().neuron.outer[o.dtype];
  const void* x = o.x.data();
  const Scratch<float> sliced(o.shape.tokens * slices * slice);
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t s = begin; s < end; ++s) {
      float* own = sliced.get() + s * o.shape.tokens * slice;
      const int64_t column = s * slice;
      cut(tokens, x, column, own, 0, o.shape.tokens);
      outer(o.shape, o.starts->get(), o.order->get(), own, slice, visited, results, out + column * item,
            width - column < slice ? width - column : slice);
    }
  });
}

void outer(StableIValue* stack, uint64_t, uint64_t) {
  const Outer o = sorted(stack, "neuron_outer");
  Tensor out = Tensor::empty({o.shape.rows, o.shape.width}, o.x.dtype());
  char* to = out.mutable_data<char>();
  prefer_huge_pages(to, static_cast<size_t>(out.numel()) * item_size(o.dtype));
  write_slices(o, nullptr, o.shape.rows, to);
  stack[0] = std::move(out).to_stack();
}

void outer_visited(StableIValue* stack, uint64_t, uint64_t) {
  const Outer o = sorted(stack, "neuron_outer_visited");
  const int32_t* starts = o.starts->get();
  int64_t count = 0;
  for (int64_t r = 0; r < o.shape.rows; ++r) count += starts[r + 1] > starts[r];
  Tensor visited = Tensor::empty({count}, aoti_torch_dtype_int32());
  Tensor values = Tensor::empty({count, o.shape.width}, o.x.dtype());
  int32_t* row = visited.mutable_data<int32_t>();
  for (int64_t r = 0; r < o.shape.rows; ++r) {
    if (starts[r + 1] > starts[r]) *row++ = static_cast<int32_t>(r);
  }
  write_slices(o, visited.data<int32_t>(), count, values.mutable_data<char>());
  stack[0] = std::move(visited).to_stack();
  stack[1] = std::move(values).to_stack();
}

const Register registered_dot("neuron_dot", dot);
const Register registered_sum("neuron_sum", sum);
const Register registered_outer("neuron_outer", outer);
const Register registered_outer_visited("neuron_outer_visited", outer_visited);

}  // namespace
}  // namespace nogemm
