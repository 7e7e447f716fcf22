// nogemm::tree_descend(Tensor x, Tensor rows, Tensor? bias, Tensor? threshold, bool sparse) -> (Tensor,
// Tensor)
#include "bindings/tensor.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "tree_descend";
constexpr int64_t kGrain = 1 << 15;  // multiply-adds worth a thread

const void* per_node(const Tensor& values, const Tensor& rows, const char* name) {
  if (!values.defined()) return nullptr;
  check_same_dtype(values, rows, kOp, name, "rows");
  check(values.dim() == 2 && values.size(0) == rows.size(0) && values.size(1) == rows.size(1), kOp, name, " of shape ",
        values.shape(), " must be [K, M] of rows ", rows.shape());
  return values.data();
}

Tensor optional_contiguous(StableIValue value) {
  Tensor tensor = take_optional_tensor(value);
  return tensor.defined() ? std::move(tensor).contiguous() : std::move(tensor);
}

void descend(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous(), rows = take_tensor(stack[1]).contiguous(),
               bias = optional_contiguous(stack[2]), threshold = optional_contiguous(stack[3]);
  const Dtype dtype = dtype_of(x, kOp, "x");
  check_same_dtype(x, rows, kOp, "x", "rows");
  check(x.dim() == 2 && rows.dim() == 3 && x.size(1) == rows.size(2), kOp, "expected x [N, D] and rows [K, M, D], got ",
        x.shape(), " and ", rows.shape());
  TreeShape s{x.size(0), rows.size(0), 0, x.size(1)};
  while ((int64_t{2} << s.levels) - 1 <= rows.size(1)) ++s.levels;
  check((int64_t{1} << s.levels) - 1 == rows.size(1) && s.levels > 0, kOp, "a tree has 2^levels - 1 nodes, got ",
        rows.size(1));
  check(rows.size(0) * rows.size(1) < (int64_t{1} << 31), kOp, "too many nodes for 32-bit numbers");
  const void *bias_data = per_node(bias, rows, "bias"), *threshold_data = per_node(threshold, rows, "threshold");
  Tensor z = Tensor::empty({s.tokens, s.trees, s.levels}, x.dtype());
  Tensor nodes = Tensor::empty({s.tokens, s.trees, s.levels}, aoti_torch_dtype_int32());
  auto* const kernel = kernels().tree.descend[dtype];
  const void *from = x.data(), *table = rows.data();
  void* z_data = z.mutable_data();
  int32_t* node_data = nodes.mutable_data<int32_t>();
  parallel_for(s.tokens, 1 + kGrain / (s.trees * s.levels * s.width + 1), [&](int64_t begin, int64_t end) noexcept {
    kernel(s, from, table, bias_data, threshold_data, z_data, node_data, begin, end);
  });
  stack[0] = std::move(z).to_stack();
  stack[1] = std::move(nodes).to_stack();
}

const Register registered(kOp, descend);

}  // namespace
}  // namespace nogemm
