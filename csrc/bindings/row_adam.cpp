// nogemm::row_adam_(Tensor(a!) param, Tensor(b!) mean, Tensor(c!) square, Tensor index, Tensor grad, Tensor
// arrears,
//                   float beta1, float beta2, float step, float root, float eps, float keep) -> ()
#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "row_adam_";

void step(StableIValue* stack, uint64_t, uint64_t) {
  Tensor state[3] = {take_tensor(stack[0]), take_tensor(stack[1]), take_tensor(stack[2])};
  const Tensor index = take_tensor(stack[3]).contiguous(), grad = take_tensor(stack[4]).contiguous(),
               arrears = take_tensor(stack[5]).contiguous();
  const int32_t f32 = aoti_torch_dtype_float32();
  for (const Tensor& t : state) {
    check(t.dtype() == f32 && t.is_contiguous() && t.dim() >= 1 && t.shape() == state[0].shape(), kOp,
          "param, mean and square must be contiguous float32 of one shape");
  }
  RowAdam a{};
  a.width = state[0].size(state[0].dim() - 1);
  const int64_t rows = a.width > 0 ? state[0].numel() / a.width : 0;
  check(index.dtype() == aoti_torch_dtype_int32() && index.dim() == 1 && grad.dtype() == f32 && grad.dim() == 2 &&
            grad.size(0) == index.size(0) && grad.size(1) == a.width && arrears.dtype() == f32 && arrears.dim() == 2 &&
            arrears.size(0) == index.size(0) && arrears.size(1) == 4,
        kOp, "index [V], grad [V, D] and arrears [V, 4] must fit param ", state[0].shape(), ", got ", index.shape(),
        ", ", grad.shape(), ", ", arrears.shape());
  a.index = index.data<int32_t>();
  for (int64_t i = 0; i < index.size(0); ++i) {
    if (a.index[i] < 0 || a.index[i] >= rows)
      fail<std::out_of_range>(kOp, "index[", i, "] = ", a.index[i], " is outside [0, ", rows, "), the rows");
  }
  a.param = state[0].mutable_data<float>();
  a.mean = state[1].mutable_data<float>();
  a.square = state[2].mutable_data<float>();
  a.grad = grad.data<float>();
  a.arrears = arrears.data<float>();
  float* constants[] = {&a.beta1, &a.beta2, &a.step, &a.root, &a.eps, &a.keep};
  for (int i = 0; i < 6; ++i) *constants[i] = static_cast<float>(take_double(stack[6 + i]));
  auto* const kernel = kernels().neuron.adam;
  parallel_for(index.size(0), 1 + (1 << 14) / (a.width + 1),
               [&](int64_t begin, int64_t end) noexcept { kernel(a, begin, end); });
}

const Register registered(kOp, step);

}  // namespace
}  // namespace nogemm
