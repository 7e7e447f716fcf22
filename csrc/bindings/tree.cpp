// nogemm::packed_tree(Tensor x, Tensor packed, int d_out) -> Tensor
// nogemm::packed_tree_rows(Tensor x, Tensor packed, int count) -> Tensor
#include "bindings/packed.h"
#include "packed/tree/format.h"
#include "packed/tree/pack.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "packed_tree";
constexpr const char* kRows = "packed_tree_rows";

void packed_tree(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  run_packed(kOp, stack, workspace, nogemm_tree_check, nogemm_tree_workspace, nogemm_tree_forward);
}

int64_t rows_of(const void* packed) {
  const auto* h = static_cast<const TreeHeader*>(packed);
  return h->trees * h->levels;
}

void packed_tree_rows(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  run_route(kRows, stack, workspace, nogemm_tree_check, rows_of, nogemm_tree_workspace, nogemm_tree_route);
}

const Register registered(kOp, packed_tree);
const Register registered_rows(kRows, packed_tree_rows);

}  // namespace
}  // namespace nogemm
