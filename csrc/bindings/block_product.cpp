// nogemm::block_product(Tensor x, Tensor weight) -> Tensor
// nogemm::block_product_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)
#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kForward = "block_product";
constexpr const char* kBackward = "block_product_backward";
constexpr int64_t kTokens =
    96;  // tokens per piece: a multiple of every tile height, and one block's x and y stay in L2
constexpr int64_t kGrainFlop = 1 << 19;

struct Shape {
  int64_t tokens, blocks, outer, inner;
  int64_t grain(int64_t pieces) const {
    const int64_t flop = 2 * tokens * blocks * outer * inner;
    return flop > 0 ? 1 + pieces * kGrainFlop / flop : 1;
  }
};

Shape check_shapes(const Tensor& x, const Tensor& weight, const char* op) {
  check(x.dim() == 2 && weight.dim() == 3, op, "expected x [N, n i] and weight [n, o, i], got x of shape ", x.shape(),
        " and weight of shape ", weight.shape());
  const Shape s{x.size(0), weight.size(0), weight.size(1), weight.size(2)};
  check(x.size(1) == s.blocks * s.inner, op, "x has ", x.size(1), " columns but weight of shape ", weight.shape(),
        " takes ", s.blocks * s.inner);
  return s;
}

// y[:, block] = x[:, block] matrices[block], matrices float32 [blocks][in][out] and in, out the widths of a
// block.
void apply(Dtype dtype, const char* x, const float* matrices, char* y, int64_t tokens, int64_t blocks, int64_t in,
           int64_t out, int64_t grain) {
  const auto kernel = kernels().block_product.apply[dtype];
  const int64_t item = static_cast<int64_t>(item_size(dtype)), x_stride = blocks * in, y_stride = blocks * out;
  const int64_t chunks = (tokens + kTokens - 1) / kTokens;
  // Blocks vary fastest, so a thread finishes the rows of a chunk while they are in its cache.
  parallel_for(chunks * blocks, grain, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p / blocks * kTokens, b = p % blocks;
      const int64_t count = tokens - first < kTokens ? tokens - first : kTokens;
      kernel(x + (first * x_stride + b * in) * item, x_stride, matrices + b * in * out,
             y + (first * y_stride + b * out) * item, y_stride, count, in, out);
    }
  });
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]).contiguous(), weight = take_tensor(stack[1]).contiguous();
  const Dtype dtype = dtype_of(x, kForward, "x");
  check_same_dtype(x, weight, kForward, "x", "weight");
  const Shape s = check_shapes(x, weight, kForward);
  Tensor y = Tensor::empty({s.tokens, s.blocks * s.outer}, x.dtype());
  if (y.numel() > 0) {
    const int64_t block = s.outer * s.inner, item = static_cast<int64_t>(item_size(dtype));
    const Scratch<float> matrices(s.blocks * block);
    const char* w = weight.data<char>();
    const auto transpose = kernels().block_product.transpose[dtype];
    parallel_for(s.blocks, 1 + (1 << 16) / (block + 1), [&](int64_t begin, int64_t end) noexcept {
      for (int64_t b = begin; b < end; ++b) {
        transpose(w + b * block * item, matrices.get() + b * block, s.outer, s.inner);
      }
    });
    const int64_t pieces = (s.tokens + kTokens - 1) / kTokens * s.blocks;
    apply(dtype, x.data<char>(), matrices.get(), y.mutable_data<char>(), s.tokens, s.blocks, s.inner, s.outer,
          s.grain(pieces));
  }
  stack[0] = std::move(y).to_stack();
}

void grad_x(Dtype dtype, const Shape& s, const Tensor& grad, const Tensor& weight, Tensor& result) {
  const int64_t count = s.blocks * s.outer * s.inner;
  const Scratch<float> copy(dtype == kF32 ? 0 : count);
  const float* matrices = copy.get();
  if (dtype == kF32) {
    matrices = weight.data<float>();
  } else {
    kernels().block_product.widen[dtype](weight.data(), copy.get(), count);
  }
  const int64_t pieces = (s.tokens + kTokens - 1) / kTokens * s.blocks;
  apply(dtype, grad.data<char>(), matrices, result.mutable_data<char>(), s.tokens, s.blocks, s.outer, s.inner,
        s.grain(pieces));
}

void grad_weight(Dtype dtype, const Shape& s, const Tensor& grad, const Tensor& x, Tensor& result) {
  const auto kernel = kernels().block_product.weight_grad[dtype];
  const int64_t item = static_cast<int64_t>(item_size(dtype)), block = s.outer * s.inner;
  const Scratch<float> scratch(dtype == kF32 ? 0 : s.blocks * block);
  const char *g = grad.data<char>(), *in = x.data<char>();
  char* out = result.mutable_data<char>();
  parallel_for(s.blocks, s.grain(s.blocks), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t b = begin; b < end; ++b) {
      kernel(g + b * s.outer * item, s.blocks * s.outer, in + b * s.inner * item, s.blocks * s.inner,
             out + b * block * item, dtype == kF32 ? nullptr : scratch.get() + b * block, s.tokens, s.outer, s.inner);
    }
  });
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take_tensor(stack[0]).contiguous(), x = take_tensor(stack[1]).contiguous(),
         weight = take_tensor(stack[2]).contiguous();
  const Dtype dtype = dtype_of(x, kBackward, "x");
  check_same_dtype(x, weight, kBackward, "x", "weight");
  check_same_dtype(x, grad, kBackward, "x", "grad");
  const Shape s = check_shapes(x, weight, kBackward);
  check(grad.dim() == 2 && grad.size(0) == s.tokens && grad.size(1) == s.blocks * s.outer, kBackward,
        "grad must have the shape of the output, (", s.tokens, ", ", s.blocks * s.outer, "), got ", grad.shape());
  Tensor gx = Tensor::empty({s.tokens, s.blocks * s.inner}, x.dtype());
  Tensor gw = Tensor::empty({s.blocks, s.outer, s.inner}, x.dtype());
  if (gx.numel() > 0) grad_x(dtype, s, grad, weight, gx);
  if (gw.numel() > 0) grad_weight(dtype, s, grad, x, gw);
  stack[0] = std::move(gx).to_stack();
  stack[1] = std::move(gw).to_stack();
}

const Register registered_forward(kForward, forward);
const Register registered_backward(kBackward, backward);

}  // namespace
}  // namespace nogemm
