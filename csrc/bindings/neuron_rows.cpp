// nogemm::neuron_dot(Tensor x, Tensor index, Tensor rows, Tensor? bias, bool sparse) -> Tensor
// nogemm::neuron_dot_backward(Tensor grad, Tensor x, Tensor index, Tensor rows) -> (Tensor, Tensor, Tensor)
// nogemm::neuron_sum(Tensor weight, Tensor index, Tensor rows, bool sparse) -> Tensor
// nogemm::neuron_sum_backward(Tensor grad, Tensor weight, Tensor index, Tensor rows) -> (Tensor, Tensor)
// nogemm::neuron_outer(Tensor weight, Tensor index, Tensor x, int n_rows) -> Tensor
// nogemm::neuron_outer_visited(Tensor weight, Tensor index, Tensor x, int n_rows) -> (Tensor, Tensor)
#include "bindings/neuron_uses.h"

namespace nogemm {
namespace {

constexpr const char* kDot = "neuron_dot";
constexpr const char* kDotBackward = "neuron_dot_backward";
constexpr const char* kSum = "neuron_sum";
constexpr const char* kSumBackward = "neuron_sum_backward";
constexpr int64_t kGrain = 1 << 15;  // multiply-adds worth a thread

BundleRows plain_rows(const NamedRows& n, const void* rows, Dtype dtype, const float* bias) {
  return {static_cast<const char*>(rows), n.width * static_cast<int64_t>(item_size(dtype)), n.width, nullptr, bias};
}

Scratch<float> zeros(int64_t count) {
  Scratch<float> values(count);
  std::memset(values.get(), 0, static_cast<size_t>(count) * sizeof(float));
  return values;
}

// Blocks of uses, token by token; x is float32.
void few_dots(const NamedRows& n, const BundleRows& rows, const float* x, Dtype dtype, float* out) {
  constexpr int64_t kBlock = 32;
  const int64_t per = (n.visits + kBlock - 1) / kBlock;
  auto* const kernel = kernels().hire.dots[dtype];
  parallel_for(n.tokens * per, 1 + kGrain / (kBlock * n.width + 1), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / per, from = i % per * kBlock;
      const int64_t to = from + kBlock < n.visits ? from + kBlock : n.visits;
      kernel(rows, n.index + token * n.visits, from, to, (n.tokens - token) * n.visits, x + token * n.width,
             out + token * n.visits);
    }
  });
}

// Row by row: out as in dots_of, and with `sorted` weights the outer products in the same visit to a token.
void many_dots(const NamedRows& n, const Uses& uses, const Tensor& x, const Tensor& rows, const float* bias,
               Dtype dtype, float* out, const float* sorted, void* grad_rows) {
  const NeuronKernels& k = kernels().neuron;
  const int32_t *starts = uses.starts.get(), *place = uses.place.get();
  const Scratch<float> dots = zeros(n.uses());
  const NeuronPass pass{starts, uses.token.get(), sorted, nullptr, rows.data(), grad_rows, dots.get(), n.width, 0};
  over_rows(pass, n.rows, k.dots[dtype], sorted == nullptr ? nullptr : k.outer[dtype], x.data(), n.tokens, dtype);
  if (n.padded) std::memset(out, 0, static_cast<size_t>(n.uses()) * sizeof(float));
  by_rows(starts, n.rows, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin; r < end; ++r)
      for (int32_t e = starts[r]; e < starts[r + 1]; ++e) out[place[e]] = dots.get()[e] + bias[r];
  });
}

// out[n, p] = <x[n], rows[i]> + bias[i]; 0 where the index is negative.
void dots_of(const NamedRows& n, const Tensor& x, const Tensor& rows, const float* bias, Dtype dtype, float* out) {
  if (!n.few()) return many_dots(n, Uses(n), x, rows, bias, dtype, out, nullptr, nullptr);
  const Floats wide(x, dtype);
  few_dots(n, plain_rows(n, rows.data(), dtype, bias), wide.get(), dtype, out);
}

// y[n] = sum of weighted rows, token by token.
void few_sums(const NamedRows& n, const float* weights, const BundleRows& rows, Dtype dtype, float* y) {
  const int32_t* index = n.index;
  const Scratch<int32_t> named(n.padded ? n.uses() : 0);
  const Scratch<float> masked(n.padded ? n.uses() : 0);
  if (n.padded) {
    for (int64_t i = 0; i < n.uses(); ++i) {
      named.get()[i] = index[i] < 0 ? 0 : index[i];
      masked.get()[i] = index[i] < 0 ? 0.0f : weights[i];
    }
    index = named.get();
    weights = masked.get();
  }
  auto* const kernel = kernels().hire.sum[dtype];
  parallel_for(n.tokens, 1 + kGrain / (n.visits * n.width + 1), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t i = begin; i < end; ++i)
      kernel(rows, index + i * n.visits, weights + i * n.visits, n.visits, (n.tokens - i) * n.visits, 0, n.width,
             y + i * n.width);
  });
}

// y[n] = sum of weighted rows; weights are float32.
void sums_of(const NamedRows& n, const float* weights, const Tensor& rows, Dtype dtype, Tensor& y) {
  if (n.uses() == 0) {
    std::memset(y.mutable_data(), 0, static_cast<size_t>(y.numel()) * item_size(dtype));
    return;
  }
  if (n.few()) {
    const Scratch<float> none = zeros(n.width);
    FloatsOut out(y, dtype);
    few_sums(n, weights, plain_rows(n, rows.data(), dtype, none.get()), dtype, out.get());
    return out.finish();
  }
  const NeuronKernels& k = kernels().neuron;
  const Scratch<float> sliced(n.rows * k.slice);
  NeuronSums sums{n.index, weights, sliced.get(), y.mutable_data(), n.visits, n.width, 0};
  for (sums.column = 0; sums.column < n.width; sums.column += k.slice) {
    copy_slice(rows.data(), dtype, n.rows, n.width, sums.column, sliced.get());
    parallel_for(n.tokens, 1 + kGrain / (n.visits * k.slice + 1),
                 [&](int64_t begin, int64_t end) noexcept { k.sums[dtype](sums, begin, end); });
  }
}

// grad_rows[r] = the weighted tokens of row r's uses, for `count` rows whose uses lie one after the other. A
// thread takes whole slices of columns, so a slice of the tokens stays in its own cache.
void outer_of(const NamedRows& n, const Uses& uses, const int32_t* starts, int64_t count, const float* weights,
              const Tensor& x, Dtype dtype, Tensor& grad_rows) {
  const NeuronKernels& k = kernels().neuron;
  void* to = grad_rows.mutable_data();
  prefer_huge_pages(to, static_cast<size_t>(grad_rows.numel()) * item_size(dtype));
  const Scratch<float> sorted = uses.sort(weights, n.rows);
  const int64_t slices = (n.width + k.slice - 1) / k.slice, per_slice = n.tokens * k.slice;
  const Scratch<float> sliced(slices * per_slice);
  const NeuronPass whole{starts, uses.token.get(), sorted.get(), nullptr, nullptr, to, nullptr, n.width, 0};
  GatherShape tokens{};
  tokens.tokens = n.tokens;
  tokens.width = n.width;
  const void* from = x.data();
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t s = begin; s < end; ++s) {
      NeuronPass pass = whole;
      pass.column = s * k.slice;
      pass.sliced = sliced.get() + s * per_slice;
      k.copy[dtype](tokens, from, pass.column, sliced.get() + s * per_slice, 0, n.tokens);
      k.outer[dtype](pass, 0, count);
    }
  });
}

void dot(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
               rows = take_tensor(stack[2]).contiguous();
  Tensor bias = take_optional_tensor(stack[3]);
  const Dtype dtype = dtype_of(x, kDot, "x");
  check_same_dtype(x, rows, kDot, "x", "rows");
  const NamedRows n = named_rows(index, x, row_count(rows, kDot), x.size(1), kDot);
  check(rows.size(rows.dim() - 1) == n.width, kDot, "rows ", rows.shape(), " and x ", x.shape(), " differ in width");
  const Scratch<float> biases = zeros(n.rows);
  if (bias.defined()) {
    bias = std::move(bias).contiguous();
    check(bias.numel() == n.rows && bias.dtype() == x.dtype(), kDot, "bias must have x's dtype and shape [R]");
    kernels().hire.read[dtype](bias.data(), biases.get(), n.rows);
  }
  Tensor out = Tensor::empty({n.tokens, n.visits}, x.dtype());
  FloatsOut values(out, dtype);
  dots_of(n, x, rows, biases.get(), dtype, values.get());
  values.finish();
  stack[0] = std::move(out).to_stack();
}

void dot_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = take_tensor(stack[0]).contiguous(), x = take_tensor(stack[1]).contiguous(),
               index = take_tensor(stack[2]).contiguous(), rows = take_tensor(stack[3]).contiguous();
  const Dtype dtype = dtype_of(x, kDotBackward, "x");
  const NamedRows n = named_rows(index, x, row_count(rows, kDotBackward), x.size(1), kDotBackward);
  check(grad.shape() == index.shape() && grad.dtype() == x.dtype() && rows.dtype() == x.dtype() &&
            rows.size(rows.dim() - 1) == n.width,
        kDotBackward, "grad ", grad.shape(), " must have the index's shape, rows ", rows.shape(), " x's width");
  Tensor grad_x = Tensor::empty({n.tokens, n.width}, x.dtype()),
         grad_rows = Tensor::empty(rows.sizes(), rows.dim(), x.dtype()), grad_bias = Tensor::empty({n.rows}, x.dtype());
  const Floats weights(grad, dtype);
  sums_of(n, weights.get(), rows, dtype, grad_x);
  const Uses uses(n);
  const int32_t *starts = uses.starts.get(), *place = uses.place.get();
  outer_of(n, uses, starts, n.rows, weights.get(), x, dtype, grad_rows);
  FloatsOut biases(grad_bias, dtype);
  by_rows(starts, n.rows, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin; r < end; ++r) {
      float sum = 0;
      for (int32_t e = starts[r]; e < starts[r + 1]; ++e) sum += weights.get()[place[e]];
      biases.get()[r] = sum;
    }
  });
  biases.finish();
  stack[0] = std::move(grad_x).to_stack();
  stack[1] = std::move(grad_rows).to_stack();
  stack[2] = std::move(grad_bias).to_stack();
}

void sum(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor weights = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
               rows = take_tensor(stack[2]).contiguous();
  const Dtype dtype = dtype_of(weights, kSum, "weight");
  check_same_dtype(weights, rows, kSum, "weight", "rows");
  const int64_t count = row_count(rows, kSum);
  const NamedRows n = named_rows(index, weights, count, rows.size(rows.dim() - 1), kSum);
  check(weights.shape() == index.shape(), kSum, "weight ", weights.shape(), " and index ", index.shape(), " differ");
  Tensor y = Tensor::empty({n.tokens, n.width}, weights.dtype());
  const Floats wide(weights, dtype);
  sums_of(n, wide.get(), rows, dtype, y);
  stack[0] = std::move(y).to_stack();
}

void sum_backward(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor grad = take_tensor(stack[0]).contiguous(), weights = take_tensor(stack[1]).contiguous(),
               index = take_tensor(stack[2]).contiguous(), rows = take_tensor(stack[3]).contiguous();
  const Dtype dtype = dtype_of(weights, kSumBackward, "weight");
  const int64_t count = row_count(rows, kSumBackward);
  const NamedRows n = named_rows(index, weights, count, rows.size(rows.dim() - 1), kSumBackward);
  check(weights.shape() == index.shape() && rows.dtype() == weights.dtype() && grad.dim() == 2 &&
            grad.size(0) == n.tokens && grad.size(1) == n.width && grad.dtype() == rows.dtype(),
        kSumBackward, "grad must have the output's shape and dtype, got ", grad.shape());
  Tensor grad_weights = Tensor::empty({n.tokens, n.visits}, rows.dtype()),
         grad_rows = Tensor::empty(rows.sizes(), rows.dim(), rows.dtype());
  const Floats wide(weights, dtype);
  const Scratch<float> none = zeros(n.rows);
  FloatsOut dots(grad_weights, dtype);
  const Uses uses(n);
  if (n.few()) {
    dots_of(n, grad, rows, none.get(), dtype, dots.get());
    outer_of(n, uses, uses.starts.get(), n.rows, wide.get(), grad, dtype, grad_rows);
  } else {
    const Scratch<float> sorted = uses.sort(wide.get(), n.rows);
    many_dots(n, uses, grad, rows, none.get(), dtype, dots.get(), sorted.get(), grad_rows.mutable_data());
  }
  dots.finish();
  stack[0] = std::move(grad_weights).to_stack();
  stack[1] = std::move(grad_rows).to_stack();
}

// Sums weighted tokens into the rows that are named, all of them or (`visited`) those alone.
void outer_op(StableIValue* stack, const char* op, bool compact) {
  const Tensor weights = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
               x = take_tensor(stack[2]).contiguous();
  const int64_t rows = take_int(stack[3]);
  const Dtype dtype = dtype_of(x, op, "x");
  check(rows >= 0, op, "n_rows must be at least 0, got ", rows);
  const NamedRows n = named_rows(index, x, rows, x.size(1), op);
  check(weights.shape() == index.shape() && weights.dtype() == x.dtype(), op, "weight ", weights.shape(),
        " must have x's dtype and the shape of index, ", index.shape());
  const Floats wide(weights, dtype);
  const Uses uses(n);
  const int32_t* starts = uses.starts.get();
  if (!compact) {
    Tensor out = Tensor::empty({rows, n.width}, x.dtype());
    outer_of(n, uses, starts, rows, wide.get(), x, dtype, out);
    stack[0] = std::move(out).to_stack();
    return;
  }
  const Scratch<int32_t> ends(rows + 1);  // the starts of visited rows: those of the others lie between
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (starts[r + 1] > starts[r]) ends.get()[count++] = starts[r];
  ends.get()[count] = starts[rows];
  Tensor visited = Tensor::empty({count}, aoti_torch_dtype_int32()),
         values = Tensor::empty({count, n.width}, x.dtype());
  int32_t* row = visited.mutable_data<int32_t>();
  for (int64_t r = 0; r < rows; ++r)
    if (starts[r + 1] > starts[r]) *row++ = static_cast<int32_t>(r);
  outer_of(n, uses, ends.get(), count, wide.get(), x, dtype, values);
  stack[0] = std::move(visited).to_stack();
  stack[1] = std::move(values).to_stack();
}

void outer(StableIValue* stack, uint64_t, uint64_t) { outer_op(stack, "neuron_outer", false); }
void outer_visited(StableIValue* stack, uint64_t, uint64_t) { outer_op(stack, "neuron_outer_visited", true); }

const Register registered_dot(kDot, dot);
const Register registered_dot_backward(kDotBackward, dot_backward);
const Register registered_sum(kSum, sum);
const Register registered_sum_backward(kSumBackward, sum_backward);
const Register registered_outer("neuron_outer", outer);
const Register registered_outer_visited("neuron_outer_visited", outer_visited);

}  // namespace
}  // namespace nogemm
