// nogemm::packed_tree(Tensor x, Tensor packed, int d_out) -> Tensor
#include "bindings/packed.h"
#include "tree_pack.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "packed_tree";

void packed_tree(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous();
  const Tensor packed = take_tensor(stack[1]);
  const int64_t d_out = take_int(stack[2]);

  const int64_t x_dtype = packed_x_dtype(x, kOp);
  check(packed.dtype() == aoti_torch_dtype_uint8() && packed.dim() == 1 && packed.is_contiguous(), kOp,
        "packed must be a contiguous one-dimensional uint8 tensor");
  int64_t layer_d = 0, layer_d_out = 0;
  const char* error = nogemm_tree_check(packed.data(), packed.numel(), &layer_d, &layer_d_out);
  check(error == nullptr, kOp, error == nullptr ? "" : error);
  check(x.dim() > 0 && x.size(x.dim() - 1) == layer_d, kOp, "the layer takes width ", layer_d,
        ", x has shape ", x.shape());
  check(d_out == layer_d_out, kOp, "the layer gives width ", layer_d_out, ", d_out is ", d_out);

  int64_t sizes[16];
  check(x.dim() <= 16, kOp, "x has more than 16 dimensions");
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = d_out;
  Tensor y = Tensor::empty(sizes, x.dim(), x.dtype());
  const int64_t tokens = x.numel() / layer_d;
  prefer_huge_pages(y.mutable_data(),
                    static_cast<size_t>(tokens * d_out) * (x_dtype == NOGEMM_X_FP32 ? 4 : 2));

  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  const NogemmHost host{threads, run_on_torch, nullptr};
  thread_local Workspace workspace;
  char* scratch = workspace.at_least(nogemm_tree_workspace(packed.data(), tokens, threads));
  nogemm_tree_forward(packed.data(), x.data(), x_dtype, layer_d, y.mutable_data(), tokens, scratch, &host);
  workspace.trim();
  stack[0] = std::move(y).to_stack();
}

const Register registered(kOp, packed_tree);

}  // namespace
}  // namespace nogemm
