// nogemm::bucket_union(Tensor codes, Tensor neurons) -> Tensor
#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "bucket_union";

void bucket_union(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor codes = take_tensor(stack[0]).contiguous(), neurons = take_tensor(stack[1]).contiguous();
  check(codes.dtype() == aoti_torch_dtype_int32() && neurons.dtype() == aoti_torch_dtype_int32() && codes.dim() == 2 &&
            neurons.dim() == 2 && codes.size(1) == neurons.size(0),
        kOp, "expected int32 codes [N, T] and neurons [T, F], got ", codes.shape(), " and ", neurons.shape());
  const int64_t tokens = codes.size(0), tables = codes.size(1), width = neurons.size(1);
  Tensor mask = Tensor::empty({tokens, width}, aoti_torch_dtype_bool());
  const int32_t *own = codes.data<int32_t>(), *theirs = neurons.data<int32_t>();
  auto* out = mask.mutable_data<uint8_t>();
  parallel_for(tokens, 1 + (1 << 17) / (tables * width + 1), [&](int64_t begin, int64_t end) noexcept {
    kernels().bucket_union(own, theirs, tables, width, out, begin, end);
  });
  stack[0] = std::move(mask).to_stack();
}

const Register registered(kOp, bucket_union);

}  // namespace
}  // namespace nogemm
