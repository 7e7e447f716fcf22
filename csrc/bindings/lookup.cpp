// nogemm::packed_lookup(Tensor x, Tensor packed, int d_out) -> Tensor
#include "bindings/packed.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "packed_lookup";

void packed_lookup(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  run_packed(kOp, stack, workspace, nogemm_lookup_check, nogemm_lookup_workspace, nogemm_lookup_forward);
}

const Register registered(kOp, packed_lookup);

}  // namespace
}  // namespace nogemm
