// nogemm::packed_lookup(Tensor x, Tensor packed, int d_out) -> Tensor
// nogemm::packed_lookup_rows(Tensor x, Tensor packed, int count) -> Tensor
#include "bindings/packed.h"
#include "packed/lookup/format.h"

namespace nogemm {
namespace {

constexpr const char* kOp = "packed_lookup";
constexpr const char* kRows = "packed_lookup_rows";

void packed_lookup(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  run_packed(kOp, stack, workspace, nogemm_lookup_check, nogemm_lookup_workspace, nogemm_lookup_forward);
}

int64_t rows_of(const void* packed) { return static_cast<const LookupHeader*>(packed)->lookups(); }

void packed_lookup_rows(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  run_route(kRows, stack, workspace, nogemm_lookup_check, rows_of, nogemm_lookup_workspace, nogemm_lookup_route);
}

const Register registered(kOp, packed_lookup);
const Register registered_rows(kRows, packed_lookup_rows);

}  // namespace
}  // namespace nogemm
