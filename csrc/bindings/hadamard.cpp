// nogemm::hadamard(Tensor x) -> Tensor
#include "bindings/tensor.h"
#include "kernels/hadamard_order.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "hadamard";
constexpr int64_t kGrain = 1 << 15;  // elements per thread below which a second thread costs more than it saves

void hadamard(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]).contiguous();
  check(x.dim() > 0, kOp, "x needs at least one dimension");
  const Dtype dtype = dtype_of(x, kOp, "x");
  const int64_t width = x.size(x.dim() - 1);
  check(hadamard_order(width) > 0, kOp, "the last dimension must be m 2^k with m 1, 12 or 20, got x of shape ",
        x.shape());

  Tensor y = Tensor::empty(x.sizes(), x.dim(), x.dtype());
  const int64_t rows = x.numel() / width;
  const auto kernel = kernels().hadamard.rows[dtype];
  const char* in = x.data<char>();
  char* out = y.mutable_data<char>();
  const int64_t row_bytes = width * static_cast<int64_t>(item_size(dtype));
  // One scratch row per piece: pieces are counted by rows, so a piece's number gives its row of scratch.
  const int64_t per_piece = kGrain / width > 0 ? kGrain / width : 1;
  const int64_t pieces = (rows + per_piece - 1) / per_piece;
  const Scratch<float> scratch(pieces * width);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * per_piece;
      const int64_t count = rows - first < per_piece ? rows - first : per_piece;
      // The scratch row of the range's first piece serves the whole range and stays in the cache.
      kernel(in + first * row_bytes, out + first * row_bytes, scratch.get() + begin * width, count, width);
    }
  });
  stack[0] = std::move(y).to_stack();
}

const Register registered(kOp, hadamard);

}  // namespace
}  // namespace nogemm
