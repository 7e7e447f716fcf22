// nogemm::packed_tree(Tensor x, Tensor packed, int d_out) -> Tensor
#include "bindings/packed.h"
#include "tree_pack.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "packed_tree";

void packed_tree(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  const auto forward = [stack](const void* packed, const void* x, int64_t x_dtype, int64_t d, void* y,
                               int64_t tokens, void* scratch, const NogemmHost* host) {
    const int64_t d_out = take_int(stack[2]);
    prefer_huge_pages(y, static_cast<size_t>(tokens * d_out) * (x_dtype == NOGEMM_X_FP32 ? 4 : 2));
    nogemm_tree_forward(packed, x, x_dtype, d, y, tokens, scratch, host);
  };
  run_packed(kOp, stack, workspace, nogemm_tree_check, nogemm_tree_workspace, forward);
}

const Register registered(kOp, packed_tree);

}  // namespace
}  // namespace nogemm
