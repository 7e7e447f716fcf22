// nogemm::packed_tree(Tensor x, Tensor packed, int d_out) -> Tensor
#include "bindings/packed.h"
#include "packed/tree/pack.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "packed_tree";

void packed_tree(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  run_packed(kOp, stack, workspace, nogemm_tree_check, nogemm_tree_workspace, nogemm_tree_forward);
}

const Register registered(kOp, packed_tree);

}  // namespace
}  // namespace nogemm
