// nogemm::hash_codes(Tensor z, int bits, int neighbours, bool gelu) -> (Tensor, Tensor)
// nogemm::hash_codes_backward(Tensor grad, Tensor z, Tensor codes, int bits, bool gelu) -> Tensor
#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kForward = "hash_codes";
constexpr const char* kBackward = "hash_codes_backward";
constexpr int64_t kMaxBits = 30;     // as in kernels/hash_codes.h
constexpr int64_t kGrain = 1 << 13;  // soft codes per thread

int64_t check_soft_codes(const Tensor& z, int64_t bits, const char* op) {
  check(bits >= 1 && bits <= kMaxBits, op, "bits must be in 1..", kMaxBits, ", got ", bits);
  check(z.dim() == 2 && z.size(1) % bits == 0, op, "z must be [N, T K] with K = ", bits, " bits, got ", z.shape());
  return z.size(1) / bits;
}

int64_t tokens_per_thread(int64_t columns) { return 1 + kGrain / (columns + 1); }

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor z = take_tensor(stack[0]).contiguous();
  const int64_t bits = take_int(stack[1]), neighbours = take_int(stack[2]);
  const bool gelu = take_bool(stack[3]);
  const Dtype dtype = dtype_of(z, kForward, "z");
  const int64_t tables = check_soft_codes(z, bits, kForward), tokens = z.size(0);
  check(neighbours == 1 || neighbours == 2 || neighbours == 4, kForward, "neighbours must be 1, 2 or 4, got ",
        neighbours);
  check(neighbours <= int64_t{1} << bits, kForward, neighbours, " neighbours need more than ", bits, " bits");

  Tensor codes = Tensor::empty({tokens, tables, neighbours}, aoti_torch_dtype_int32());
  Tensor scores = Tensor::empty({tokens, tables, neighbours}, z.dtype());
  const auto kernel = kernels().hash_codes.forward[dtype];
  const int64_t item = static_cast<int64_t>(item_size(dtype)), per_token = tables * neighbours;
  const char* in = z.data<char>();
  int32_t* code_out = codes.mutable_data<int32_t>();
  char* score_out = scores.mutable_data<char>();
  parallel_for(tokens, tokens_per_thread(z.size(1)), [&](int64_t begin, int64_t end) noexcept {
    kernel(in + begin * tables * bits * item, code_out + begin * per_token, score_out + begin * per_token * item,
           end - begin, tables, static_cast<int>(bits), static_cast<int>(neighbours), gelu);
  });
  stack[0] = std::move(codes).to_stack();
  stack[1] = std::move(scores).to_stack();
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take_tensor(stack[0]).contiguous(), z = take_tensor(stack[1]).contiguous(),
         codes = take_tensor(stack[2]).contiguous();
  const int64_t bits = take_int(stack[3]);
  const bool gelu = take_bool(stack[4]);
  const Dtype dtype = dtype_of(z, kBackward, "z");
  check_same_dtype(z, grad, kBackward, "z", "grad");
  check(codes.dtype() == aoti_torch_dtype_int32(), kBackward, "codes must be int32");
  const int64_t tables = check_soft_codes(z, bits, kBackward), tokens = z.size(0);
  check(codes.dim() == 3 && codes.size(0) == tokens && codes.size(1) == tables && codes.size(2) >= 1, kBackward,
        "codes must be [N, T, F] = (", tokens, ", ", tables, ", F), got ", codes.shape());
  check(grad.shape() == codes.shape(), kBackward, "grad of shape ", grad.shape(), " must have the shape of codes, ",
        codes.shape());

  Tensor result = Tensor::empty({tokens, tables * bits}, z.dtype());
  const auto kernel = kernels().hash_codes.backward[dtype];
  const int64_t item = static_cast<int64_t>(item_size(dtype)), neighbours = codes.size(2),
                per_token = tables * neighbours;
  const char *g = grad.data<char>(), *in = z.data<char>();
  const int32_t* code = codes.data<int32_t>();
  char* out = result.mutable_data<char>();
  parallel_for(tokens, tokens_per_thread(z.size(1)), [&](int64_t begin, int64_t end) noexcept {
    kernel(g + begin * per_token * item, in + begin * tables * bits * item, code + begin * per_token,
           out + begin * tables * bits * item, end - begin, tables, static_cast<int>(bits),
           static_cast<int>(neighbours), gelu);
  });
  stack[0] = std::move(result).to_stack();
}

const Register registered_forward(kForward, forward);
const Register registered_backward(kBackward, backward);

}  // namespace
}  // namespace nogemm
