// nogemm::head_argmax(Tensor x, Tensor weight, Tensor? bias, Tensor project, Tensor mean, Tensor eight, Tensor four,
//     Tensor numbers, Tensor limits, float share) -> (Tensor, Tensor, Tensor)
// nogemm::head_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor
#include <algorithm>
#include <limits>
#include <vector>

#include "bindings/packed.h"
#include "packed/head/run.h"

namespace nogemm {
namespace {

constexpr const char* kArgmax = "head_argmax";
constexpr const char* kLogits = "head_logits";

// The operator's arguments, alive, and what they hold.
struct Arguments {
  Tensor weight, bias, project, mean, eight, four, numbers, limits;
  std::vector<float> padded_bias;
  Head head;
};

Dtype rows_dtype(const Tensor& weight, const char* op) {
  for (const Dtype d : {kF32, kBF16, kF16})
    if (weight.dtype() == torch_dtype(d)) return d;
  fail(op, "weight must be float32, bfloat16 or float16");
}

void check_rows(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x.dtype() == aoti_torch_dtype_float32() && x.dim() == 2, op, "x must be float32 [N, D], got shape ", x.shape());
  check(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.is_contiguous(), op,
        "weight must be contiguous [V, D], got ", weight.shape(), " for x ", x.shape());
  check(weight.size(0) >= 1 && weight.size(0) < std::numeric_limits<int32_t>::max() - kSketchRows, op,
        "weight must have from 1 to 2^31 rows, got ", weight.size(0));
  check(!bias.defined() || (bias.dtype() == aoti_torch_dtype_float32() && bias.numel() == weight.size(0)), op,
        "bias must be float32 [V]");
}

void check_codes(const Arguments& a) {
  const Head& h = a.head;
  const int32_t f32 = aoti_torch_dtype_float32(), u8 = aoti_torch_dtype_uint8();
  const auto codes = [&](const Tensor& t, const char* name) {
    check(t.dtype() == u8 && t.dim() == 4 && t.size(0) == h.groups && t.size(2) == kSketchRows && t.size(3) == 4,
          kArgmax, name, " must be uint8 [groups, steps, 64, 4] of ", h.groups, " groups, got ", t.shape());
  };
  codes(a.eight, "eight");
  codes(a.four, "four");
  check(
      a.project.dtype() == f32 && a.project.dim() == 2 && a.project.size(0) == h.width && a.project.size(1) == h.width,
      kArgmax, "project must be float32 [D, D], got ", a.project.shape());
  check(a.mean.dtype() == f32 && a.mean.numel() == h.width, kArgmax, "mean must be float32 [D]");
  check(h.width8 >= 0 && h.width4 >= 0 && a.eight.size(1) == (h.width8 + 3) / 4 && a.four.size(1) == (h.width4 + 7) / 8,
        kArgmax, "eight and four must hold ", h.width, " coordinates, got ", a.eight.shape(), " and ", a.four.shape());
  check(a.numbers.dtype() == torch_dtype(kBF16) && a.numbers.numel() == h.groups * kHeadNumbers * kSketchRows, kArgmax,
        "numbers must be bfloat16 [groups, 4, 64], got ", a.numbers.shape());
  check(a.limits.dtype() == f32 && a.limits.numel() == 6, kArgmax, "limits must be float32 [6]");
}

// What all logits need.
void take_rows(Arguments& a, const char* op, const Tensor& x) {
  check_rows(op, x, a.weight, a.bias);
  if (a.bias.defined()) a.bias = std::move(a.bias).contiguous();
  Head& h = a.head;
  h.table = &kernels();
  h.dtype = rows_dtype(a.weight, op);
  h.weight = a.weight.data();
  h.bias = a.bias.defined() ? a.bias.data<float>() : nullptr;
  h.codes.rows = a.weight.size(0), h.width = a.weight.size(1);
  h.groups = (h.codes.rows + kSketchRows - 1) / kSketchRows;
}

Arguments take_head(StableIValue* stack, const Tensor& x) {
  Arguments a{};
  a.weight = take_tensor(stack[1]);
  a.bias = take_optional_tensor(stack[2]);
  a.project = take_tensor(stack[3]).contiguous();
  a.mean = take_tensor(stack[4]).contiguous();
  a.eight = take_tensor(stack[5]).contiguous();
  a.four = take_tensor(stack[6]).contiguous();
  a.numbers = take_tensor(stack[7]).contiguous();
  a.limits = take_tensor(stack[8]).contiguous();
  take_rows(a, kArgmax, x);
  Head& h = a.head;
  h.share = take_double(stack[9]);
  h.width8 = a.eight.dim() == 4 ? std::min(h.width, a.eight.size(1) * 4) : -1;
  h.width4 = h.width - h.width8;
  check_codes(a);
  if (h.bias != nullptr) {
    a.padded_bias.assign(static_cast<size_t>(h.groups * kSketchRows), h.bias[h.codes.rows - 1]);
    std::copy(h.bias, h.bias + h.codes.rows, a.padded_bias.begin());
    h.codes.bias = a.padded_bias.data();
  }
  h.project = a.project.data<float>(), h.mean = a.mean.data<float>(), h.limits = a.limits.data<float>();
  h.codes.eight = a.eight.data<uint8_t>(), h.codes.four = a.four.data<uint8_t>();
  h.codes.numbers = static_cast<const bf16*>(a.numbers.data());
  h.codes.steps8 = a.eight.size(1), h.codes.steps4 = a.four.size(1);
  return a;
}

NogemmHost torch_host() {
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  return {threads, run_on_torch, nullptr};
}

void argmax_op(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace memory;
  const Tensor x = take_tensor(stack[0]).contiguous();
  const Arguments a = take_head(stack, x);
  const int64_t tokens = x.size(0);
  Tensor index = Tensor::empty({tokens}, aoti_torch_dtype_int64()),
         value = Tensor::empty({tokens}, aoti_torch_dtype_float32()),
         rows = Tensor::empty({tokens}, aoti_torch_dtype_int64());
  const NogemmHost host = torch_host();
  head_argmax(a.head, x.data<float>(), tokens, index.mutable_data<int64_t>(), value.mutable_data<float>(),
              rows.mutable_data<int64_t>(), memory.at_least(head_workspace(a.head, tokens)), host);
  memory.trim();
  stack[0] = std::move(index).to_stack();
  stack[1] = std::move(value).to_stack();
  stack[2] = std::move(rows).to_stack();
}

void logits_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous();
  Arguments a{};
  a.weight = take_tensor(stack[1]);
  a.bias = take_optional_tensor(stack[2]);
  take_rows(a, kLogits, x);
  Tensor logits = Tensor::empty({x.size(0), a.head.codes.rows}, aoti_torch_dtype_float32());
  head_logits(a.head, x.data<float>(), x.size(0), logits.mutable_data<float>(), torch_host());
  stack[0] = std::move(logits).to_stack();
}

const Register registered_argmax(kArgmax, argmax_op);
const Register registered_logits(kLogits, logits_op);

}  // namespace
}  // namespace nogemm
