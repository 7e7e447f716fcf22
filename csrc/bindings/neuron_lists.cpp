// nogemm::list_dots(Tensor x, Tensor index, Tensor rows, Tensor? bias) -> Tensor
// nogemm::list_dots_backward(Tensor grad, Tensor x, Tensor index, Tensor rows) -> (Tensor, Tensor, Tensor)
// nogemm::list_sum(Tensor weights, Tensor index, Tensor rows) -> Tensor
// nogemm::list_sum_backward(Tensor grad, Tensor weights, Tensor index, Tensor rows) -> (Tensor, Tensor)
#include <atomic>
#include <limits>

#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kDots = "list_dots";
constexpr const char* kDotsBackward = "list_dots_backward";
constexpr const char* kSum = "list_sum";
constexpr const char* kSumBackward = "list_sum_backward";
constexpr int64_t kPieces = 8;  // of the tokens, when uses are sorted by neuron

struct Lists {
  const int32_t* index;
  int64_t tokens, count, neurons;
  int64_t uses() const { return tokens * count; }
  // Few uses: most rows are not touched, so neither sorting nor copying them pays.
  bool few() const { return uses() < neurons; }
};

Lists check_lists(const Tensor& first, const Tensor& index, const Tensor& rows, const char* op) {
  check(index.dtype() == aoti_torch_dtype_int32() && index.dim() == 2 && first.dim() == 2 && rows.dim() == 2,
        op, "expected an int32 index [N, K] and matrices, got index ", index.shape(), ", ", first.shape(),
        " and rows ", rows.shape());
  check(first.size(0) == index.size(0), op, "index ", index.shape(), " is for another number of tokens than ",
        first.shape());
  check_same_dtype(first, rows, op, "tokens", "rows");
  const Lists l{index.data<int32_t>(), index.size(0), index.size(1), rows.size(0)};
  check(l.uses() < std::numeric_limits<int32_t>::max(), op, "too many tokens for 32-bit indices");
  std::atomic<int64_t> wrong{std::numeric_limits<int64_t>::max()};
  parallel_for(l.uses(), 1 << 15, [&](int64_t begin, int64_t end) noexcept {
    int32_t largest = -1;
    for (int64_t i = begin; i < end; ++i) largest = l.index[i] > largest ? l.index[i] : largest;
    if (largest < l.neurons) return;
    for (int64_t i = begin; i < end; ++i) {
      if (l.index[i] < l.neurons) continue;
      int64_t seen = wrong.load();
      while (i < seen && !wrong.compare_exchange_weak(seen, i)) {
      }
      return;
    }
  });
  const int64_t at = wrong.load();
  if (at != std::numeric_limits<int64_t>::max())
    fail<std::out_of_range>(op, "index[", at / l.count, ", ", at % l.count, "] = ", l.index[at],
                            " is outside [0, ", l.neurons, "), the neurons");
  return l;
}

// Every use of a neuron, sorted by neuron, tokens in order: starts [F + 1], and of each use its token and its
// place in the lists. Pieces of tokens are counted and placed side by side; the result does not depend on who
// does it.
struct Uses {
  Scratch<int32_t> starts, token, place;
  explicit Uses(const Lists& l) : starts(l.neurons + 1), token(l.uses()), place(l.uses()) {
    const int64_t stride = l.neurons;
    const Scratch<int32_t> counts(kPieces * stride);
    const auto piece_start = [&](int64_t p) { return l.tokens * p / kPieces * l.count; };
    parallel_for(kPieces, 1, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t p = begin; p < end; ++p) {
        int32_t* own = counts.get() + p * stride;
        std::memset(own, 0, static_cast<size_t>(stride) * sizeof(int32_t));
        for (int64_t i = piece_start(p); i < piece_start(p + 1); ++i)
          if (l.index[i] >= 0) ++own[l.index[i]];
      }
    });
    int32_t total = 0;
    for (int64_t r = 0; r < l.neurons; ++r) {
      starts.get()[r] = total;
      for (int64_t p = 0; p < kPieces; ++p) {
        int32_t& slot = counts.get()[p * stride + r];
        const int32_t here = slot;
        slot = total;
        total += here;
      }
    }
    starts.get()[l.neurons] = total;
    parallel_for(kPieces, 1, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t p = begin; p < end; ++p) {
        int32_t* own = counts.get() + p * stride;
        for (int64_t i = piece_start(p); i < piece_start(p + 1); ++i) {
          if (l.index[i] < 0) continue;
          const int32_t at = own[l.index[i]]++;
          token.get()[at] = static_cast<int32_t>(i / l.count);
          place.get()[at] = static_cast<int32_t>(i);
        }
      }
    });
  }
};

// Copies columns of a matrix side by side, [rows][slice].
void copy_slice(const void* matrix, Dtype dtype, int64_t rows, int64_t width, int64_t column, float* sliced) {
  const ListKernels& k = kernels().lists;
  GatherShape shape{};
  shape.tokens = rows;
  shape.width = width;
  parallel_for(rows, 256, [&](int64_t begin, int64_t end) noexcept {
    k.copy[dtype](shape, matrix, column, sliced, begin, end);
  });
}

using RowsKernel = void (*)(const ListPass&, int64_t, int64_t);

// All slices of a pass over the neurons: `first`, then `second` unless it is null, while a slice is in the
// cache. Which neurons a thread takes makes no difference to any result.
void over_neurons(const Lists& l, ListPass pass, RowsKernel first, RowsKernel second, const void* tokens,
                  Dtype dtype) {
  const int64_t slice = kernels().lists.slice;
  const Scratch<float> sliced(l.tokens * slice);
  pass.sliced = sliced.get();
  const int64_t per_neuron = 1 + l.uses() / (l.neurons > 0 ? l.neurons : 1);
  for (pass.column = 0; pass.column < pass.width; pass.column += slice) {
    copy_slice(tokens, dtype, l.tokens, pass.width, pass.column, sliced.get());
    const ListPass& now = pass;
    parallel_for(l.neurons, 1 + 4096 / per_neuron, [&](int64_t begin, int64_t end) noexcept {
      first(now, begin, end);
      if (second != nullptr) second(now, begin, end);
    });
  }
}

// y[n] = sum of weighted rows; weights are float32.
void over_tokens(const Lists& l, const float* weights, const void* rows, int64_t width, void* y,
                 Dtype dtype) {
  const ListKernels& k = kernels().lists;
  if (l.few()) {
    const HireKernels& h = kernels().hire;
    const int64_t item = static_cast<int64_t>(item_size(dtype));
    const Scratch<float> zeros(width);
    std::memset(zeros.get(), 0, static_cast<size_t>(width) * sizeof(float));
    const BundleRows bundle{static_cast<const char*>(rows), width * item, width, nullptr, zeros.get()};
    const Scratch<float> sums(l.tokens * width), masked(l.uses());
    const Scratch<int32_t> named(l.uses());
    parallel_for(l.tokens, 1 + 4096 / (l.count + 1), [&](int64_t begin, int64_t end) noexcept {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t i = n * l.count; i < (n + 1) * l.count; ++i) {
          named.get()[i] = l.index[i] < 0 ? 0 : l.index[i];
          masked.get()[i] = l.index[i] < 0 ? 0.0f : weights[i];
        }
        h.sum[dtype](bundle, named.get() + n * l.count, masked.get() + n * l.count, l.count, 0, width,
                     sums.get() + n * width);
        h.write[dtype](sums.get() + n * width, static_cast<char*>(y) + n * width * item, width);
      }
    });
    return;
  }
  const Scratch<float> sliced(l.neurons * k.slice);
  ListSums sums{l.index, weights, sliced.get(), y, l.count, width, 0};
  for (sums.column = 0; sums.column < width; sums.column += k.slice) {
    copy_slice(rows, dtype, l.neurons, width, sums.column, sliced.get());
    parallel_for(l.tokens, 1 + 4096 / (l.count + 1),
                 [&](int64_t begin, int64_t end) noexcept { k.sums[dtype](sums, begin, end); });
  }
}

Scratch<float> floats_of(const Tensor& t, Dtype dtype) {
  Scratch<float> out(t.numel());
  const char* from = t.data<char>();
  const int64_t item = static_cast<int64_t>(item_size(dtype));
  parallel_for(t.numel(), 1 << 15, [&](int64_t begin, int64_t end) noexcept {
    kernels().hire.read[dtype](from + begin * item, out.get() + begin, end - begin);
  });
  return out;
}

Tensor tensor_of(const float* values, const int64_t* sizes, int64_t dim, const Tensor& like, Dtype dtype) {
  Tensor out = Tensor::empty(sizes, dim, like.dtype());
  char* to = out.mutable_data<char>();
  const int64_t item = static_cast<int64_t>(item_size(dtype));
  parallel_for(out.numel(), 1 << 15, [&](int64_t begin, int64_t end) noexcept {
    kernels().hire.write[dtype](values + begin, to + begin * item, end - begin);
  });
  return out;
}

void zero(Tensor& t, Dtype dtype) {
  std::memset(t.mutable_data(), 0, static_cast<size_t>(t.numel()) * item_size(dtype));
}

// Dots of uses back to their places in the lists, with the bias; padding becomes 0.
void place_dots(const Lists& l, const Uses& uses, const float* dots, const float* bias, float* out) {
  std::memset(out, 0, static_cast<size_t>(l.uses()) * sizeof(float));
  const int32_t* starts = uses.starts.get();
  parallel_for(l.neurons, 64, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t r = begin; r < end; ++r)
      for (int32_t e = starts[r]; e < starts[r + 1]; ++e)
        out[uses.place.get()[e]] = dots[e] + (bias == nullptr ? 0.0f : bias[r]);
  });
}

// The weights of uses, sorted as they are.
Scratch<float> sort_weights(const Lists& l, const Uses& uses, const float* weights) {
  Scratch<float> sorted(l.uses());
  parallel_for(uses.starts.get()[l.neurons], 1 << 14, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t e = begin; e < end; ++e) sorted.get()[e] = weights[uses.place.get()[e]];
  });
  return sorted;
}

void list_dots(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
         rows = take_tensor(stack[2]).contiguous(), bias = take_optional_tensor(stack[3]);
  const Dtype dtype = dtype_of(x, kDots, "x");
  const Lists l = check_lists(x, index, rows, kDots);
  const int64_t width = x.size(1);
  check(rows.size(1) == width, kDots, "rows ", rows.shape(), " and x ", x.shape(), " differ in width");
  Scratch<float> bias_values(l.neurons);
  if (bias.defined()) {
    bias = std::move(bias).contiguous();
    check(bias.numel() == l.neurons && bias.dtype() == x.dtype(), kDots,
          "bias must have x's dtype and shape [F]");
    kernels().hire.read[dtype](bias.data(), bias_values.get(), l.neurons);
  } else {
    std::memset(bias_values.get(), 0, static_cast<size_t>(l.neurons) * sizeof(float));
  }
  const Scratch<float> out(l.uses());
  const void* row_data = rows.data();
  if (l.few()) {
    const HireKernels& h = kernels().hire;
    const BundleRows bundle{static_cast<const char*>(row_data),
                            width * static_cast<int64_t>(item_size(dtype)), width, nullptr,
                            bias_values.get()};
    const Scratch<float> wide = floats_of(x, dtype);
    const int64_t block = 32, per = (l.count + block - 1) / block;
    parallel_for(l.tokens * per, 1 + 4096 / (width + 1), [&](int64_t begin, int64_t end) noexcept {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / per, from = i % per * block,
                      to = from + block < l.count ? from + block : l.count;
        h.dots[dtype](bundle, l.index + n * l.count, from, to, wide.get() + n * width,
                      out.get() + n * l.count);
      }
    });
  } else {
    const Uses uses(l);
    const Scratch<float> dots(l.uses() + 64);
    std::memset(dots.get(), 0, static_cast<size_t>(l.uses()) * sizeof(float));
    ListPass pass{uses.starts.get(), uses.token.get(), nullptr, nullptr, row_data,
                  nullptr,           dots.get(),       width,   0};
    over_neurons(l, pass, kernels().lists.dots[dtype], nullptr, x.data(), dtype);
    place_dots(l, uses, dots.get(), bias_values.get(), out.get());
  }
  stack[0] = tensor_of(out.get(), index.sizes(), 2, x, dtype).to_stack();
}

void list_sum(StableIValue* stack, uint64_t, uint64_t) {
  Tensor weights = take_tensor(stack[0]).contiguous(), index = take_tensor(stack[1]).contiguous(),
         rows = take_tensor(stack[2]).contiguous();
  const Dtype dtype = dtype_of(weights, kSum, "weights");
  const Lists l = check_lists(weights, index, rows, kSum);
  check(weights.shape() == index.shape(), kSum, "weights ", weights.shape(), " and index ", index.shape(),
        " differ");
  Tensor y = Tensor::empty({l.tokens, rows.size(1)}, weights.dtype());
  if (l.uses() == 0) {
    zero(y, dtype);
  } else {
    const Scratch<float> wide = floats_of(weights, dtype);
    over_tokens(l, wide.get(), rows.data(), rows.size(1), y.mutable_data(), dtype);
  }
  stack[0] = std::move(y).to_stack();
}

void list_dots_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take_tensor(stack[0]).contiguous(), x = take_tensor(stack[1]).contiguous(),
         index = take_tensor(stack[2]).contiguous(), rows = take_tensor(stack[3]).contiguous();
  const Dtype dtype = dtype_of(x, kDotsBackward, "x");
  const Lists l = check_lists(x, index, rows, kDotsBackward);
  check(grad.shape() == index.shape() && grad.dtype() == x.dtype(), kDotsBackward,
        "grad must have the index's shape");
  const int64_t width = x.size(1);
  Tensor grad_x = Tensor::empty({l.tokens, width}, x.dtype()),
         grad_rows = Tensor::empty({l.neurons, width}, x.dtype());
  const Scratch<float> grad_bias(l.neurons);
  const Scratch<float> weights = floats_of(grad, dtype);
  const Uses uses(l);
  const Scratch<float> sorted = sort_weights(l, uses, weights.get());
  void* grad_row_data = grad_rows.mutable_data();
  if (l.uses() == 0) {
    zero(grad_x, dtype);
  } else {
    over_tokens(l, weights.get(), rows.data(), width, grad_x.mutable_data(), dtype);
  }
  ListPass pass{uses.starts.get(), uses.token.get(), sorted.get(), nullptr, rows.data(),
                grad_row_data,     nullptr,          width,        0};
  over_neurons(l, pass, kernels().lists.scatter[dtype], nullptr, x.data(), dtype);
  for (int64_t r = 0; r < l.neurons; ++r) {
    float sum = 0;
    for (int32_t e = uses.starts.get()[r]; e < uses.starts.get()[r + 1]; ++e) sum += sorted.get()[e];
    grad_bias.get()[r] = sum;
  }
  stack[0] = std::move(grad_x).to_stack();
  stack[1] = std::move(grad_rows).to_stack();
  const int64_t size[1] = {l.neurons};
  stack[2] = tensor_of(grad_bias.get(), size, 1, x, dtype).to_stack();
}

void list_sum_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take_tensor(stack[0]).contiguous(), weights = take_tensor(stack[1]).contiguous(),
         index = take_tensor(stack[2]).contiguous(), rows = take_tensor(stack[3]).contiguous();
  const Dtype dtype = dtype_of(weights, kSumBackward, "weights");
  const Lists l = check_lists(weights, index, rows, kSumBackward);
  const int64_t width = rows.size(1);
  check(grad.dim() == 2 && grad.size(0) == l.tokens && grad.size(1) == width && grad.dtype() == rows.dtype(),
        kSumBackward, "grad must have the output's shape and dtype, got ", grad.shape());
  Tensor grad_rows = Tensor::empty({l.neurons, width}, rows.dtype());
  void* grad_row_data = grad_rows.mutable_data();
  const Scratch<float> wide = floats_of(weights, dtype);
  const Uses uses(l);
  const Scratch<float> sorted = sort_weights(l, uses, wide.get()), dots(l.uses() + 64), out(l.uses());
  std::memset(dots.get(), 0, static_cast<size_t>(l.uses()) * sizeof(float));
  ListPass pass{uses.starts.get(), uses.token.get(), sorted.get(), nullptr, rows.data(),
                grad_row_data,     dots.get(),       width,        0};
  over_neurons(l, pass, kernels().lists.dots[dtype], kernels().lists.scatter[dtype], grad.data(), dtype);
  place_dots(l, uses, dots.get(), nullptr, out.get());
  stack[0] = tensor_of(out.get(), index.sizes(), 2, weights, dtype).to_stack();
  stack[1] = std::move(grad_rows).to_stack();
}

const Register registered_dots(kDots, list_dots);
const Register registered_sum(kSum, list_sum);
const Register registered_dots_backward(kDotsBackward, list_dots_backward);
const Register registered_sum_backward(kSumBackward, list_sum_backward);

}  // namespace
}  // namespace nogemm
