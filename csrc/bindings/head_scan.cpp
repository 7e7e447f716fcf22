// nogemm::head_argmax(Tensor x, Tensor weight, Tensor? bias, Tensor? noise, Tensor project, Tensor mean, Tensor eight,
//     Tensor four, Tensor rest, Tensor numbers, Tensor limits, float share) -> (Tensor, Tensor, Tensor)
// nogemm::head_search(Tensor x, Tensor weight, Tensor? bias, Tensor? noise, Tensor project, Tensor mean, Tensor eight,
//     Tensor four, Tensor rest, Tensor numbers, Tensor limits, int rows, bool logits) -> (Tensor, Tensor, Tensor)
// nogemm::head_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor
#include <algorithm>
#include <limits>

#include "bindings/packed.h"
#include "packed/head/run.h"

namespace nogemm {
namespace {

constexpr const char* kArgmax = "head_argmax";
constexpr const char* kSearch = "head_search";
constexpr const char* kLogits = "head_logits";

// The operators' arguments, alive, and what they hold.
struct Arguments {
  Tensor x, weight, bias, noise, project, mean, eight, four, rest, numbers, limits;
  Head head;

  HeadStates states() const { return {x.data<float>(), noise.defined() ? noise.data<float>() : nullptr, x.size(0)}; }
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

void check_codes(const Arguments& a, const char* op) {
  const Head& h = a.head;
  const int32_t f32 = aoti_torch_dtype_float32(), u8 = aoti_torch_dtype_uint8();
  const auto codes = [&](const Tensor& t, const char* name) {
    check(t.dtype() == u8 && t.dim() == 4 && t.size(0) == h.groups && t.size(2) == kSketchRows && t.size(3) == 4, op,
          name, " must be uint8 [groups, steps, 64, 4] of ", h.groups, " groups, got ", t.shape());
  };
  codes(a.eight, "eight");
  codes(a.four, "four");
  codes(a.rest, "rest");
  check(
      a.project.dtype() == f32 && a.project.dim() == 2 && a.project.size(0) == h.width && a.project.size(1) == h.width,
      op, "project must be float32 [D, D], got ", a.project.shape());
  check(a.mean.dtype() == f32 && a.mean.numel() == h.width, op, "mean must be float32 [D]");
  check(a.eight.size(1) == (h.width8 + 3) / 4 && a.four.size(1) == (h.width4 + 7) / 8 &&
            a.rest.size(1) == (h.width_rest + 7) / 8,
        op, "eight, four and rest must hold ", h.width, " coordinates, got ", a.eight.shape(), ", ", a.four.shape(),
        " and ", a.rest.shape());
  check(a.numbers.dtype() == torch_dtype(kBF16) && a.numbers.numel() == h.groups * kHeadNumbers * kSketchRows, op,
        "numbers must be bfloat16 [groups, 4, 64], got ", a.numbers.shape());
  check(a.limits.dtype() == f32 && a.limits.numel() == 6, op, "limits must be float32 [6]");
  check(!a.noise.defined() || (a.noise.dtype() == f32 && a.noise.dim() == 2 && a.noise.size(0) == a.x.size(0) &&
                               a.noise.size(1) == h.codes.rows),
        op, "noise must be float32 [N, V]");
}

// What all logits need.
void take_rows(Arguments& a, StableIValue* stack, const char* op) {
  a.x = take_tensor(stack[0]).contiguous();
  a.weight = take_tensor(stack[1]);
  a.bias = take_optional_tensor(stack[2]);
  check_rows(op, a.x, a.weight, a.bias);
  if (a.bias.defined()) a.bias = std::move(a.bias).contiguous();
  Head& h = a.head;
  h.table = &kernels();
  h.dtype = rows_dtype(a.weight, op);
  h.weight = a.weight.data();
  h.bias = a.bias.defined() ? a.bias.data<float>() : nullptr;
  h.codes.rows = a.weight.size(0), h.width = a.weight.size(1);
  h.groups = (h.codes.rows + kSketchRows - 1) / kSketchRows;
}

Arguments take_head(StableIValue* stack, const char* op) {
  Arguments a{};
  take_rows(a, stack, op);
  a.noise = take_optional_tensor(stack[3]);
  if (a.noise.defined()) a.noise = std::move(a.noise).contiguous();
  a.project = take_tensor(stack[4]).contiguous();
  a.mean = take_tensor(stack[5]).contiguous();
  a.eight = take_tensor(stack[6]).contiguous();
  a.four = take_tensor(stack[7]).contiguous();
  a.rest = take_tensor(stack[8]).contiguous();
  a.numbers = take_tensor(stack[9]).contiguous();
  a.limits = take_tensor(stack[10]).contiguous();
  Head& h = a.head;
  const auto columns = [](const Tensor& t, int64_t of_a_step, int64_t most) {
    return t.dim() == 4 ? std::min(most, t.size(1) * of_a_step) : 0;
  };
  h.width8 = columns(a.eight, 4, h.width);
  h.width4 = columns(a.four, 8, h.width - h.width8);
  h.width_rest = h.width - h.width8 - h.width4;
  check_codes(a, op);
  h.project = a.project.data<float>(), h.mean = a.mean.data<float>(), h.limits = a.limits.data<float>();
  h.codes = {a.eight.data<uint8_t>(),
             a.four.data<uint8_t>(),
             a.rest.data<uint8_t>(),
             static_cast<const bf16*>(a.numbers.data()),
             h.bias,
             a.eight.size(1),
             a.four.size(1),
             a.rest.size(1),
             h.codes.rows};
  return a;
}

NogemmHost torch_host() {
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  return {threads, run_on_torch, nullptr};
}

void argmax_op(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace memory;
  const Arguments a = take_head(stack, kArgmax);
  const HeadStates states = a.states();
  Tensor index = Tensor::empty({states.count}, aoti_torch_dtype_int64()),
         value = Tensor::empty({states.count}, aoti_torch_dtype_float32()),
         rows = Tensor::empty({states.count}, aoti_torch_dtype_int64());
  head_argmax(a.head, states, take_double(stack[11]), index.mutable_data<int64_t>(), value.mutable_data<float>(),
              rows.mutable_data<int64_t>(), memory.at_least(head_argmax_workspace(a.head, states.count)), torch_host());
  memory.trim();
  stack[0] = std::move(index).to_stack();
  stack[1] = std::move(value).to_stack();
  stack[2] = std::move(rows).to_stack();
}

void search_op(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace memory;
  const Arguments a = take_head(stack, kSearch);
  const HeadStates states = a.states();
  const int64_t rows = std::min(take_int(stack[11]), a.head.codes.rows);
  const bool all = take_bool(stack[12]);
  check(rows >= 1, kSearch, "rows must be at least 1, got ", rows);
  Tensor index = Tensor::empty({states.count}, aoti_torch_dtype_int64()),
         value = Tensor::empty({states.count}, aoti_torch_dtype_float32()),
         logits = Tensor::empty({states.count, all ? a.head.codes.rows : 0}, aoti_torch_dtype_float32());
  head_search(a.head, states, rows, all ? logits.mutable_data<float>() : nullptr, index.mutable_data<int64_t>(),
              value.mutable_data<float>(), memory.at_least(head_search_workspace(a.head, states.count, rows)),
              torch_host());
  memory.trim();
  stack[0] = std::move(index).to_stack();
  stack[1] = std::move(value).to_stack();
  stack[2] = std::move(logits).to_stack();
}

void logits_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a{};
  take_rows(a, stack, kLogits);
  Tensor logits = Tensor::empty({a.x.size(0), a.head.codes.rows}, aoti_torch_dtype_float32());
  head_logits(a.head, a.x.data<float>(), a.x.size(0), logits.mutable_data<float>(), torch_host());
  stack[0] = std::move(logits).to_stack();
}

const Register registered_argmax(kArgmax, argmax_op);
const Register registered_search(kSearch, search_op);
const Register registered_logits(kLogits, logits_op);

}  // namespace
}  // namespace nogemm
