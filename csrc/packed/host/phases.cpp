#include "packed/host/phases.h"

#include "dispatch.h"
#include "packed/lookup/format.h"
#include "packed/lookup/pack.h"
#include "packed/neurons/host.h"
#include "packed/tree/format.h"
#include "packed/tree/pack.h"

using namespace nogemm;

extern "C" const char* nogemm_phase_check(int64_t kind, int64_t phase, const void* packed, int64_t packed_bytes,
                                          int64_t* d, int64_t* d_out) {
  if (phase != NOGEMM_PHASE_WHOLE && (phase != NOGEMM_PHASE_FIRST || kind == NOGEMM_KIND_HIRE))
    return "this kind of layer has no such phase";
  if (kind == NOGEMM_KIND_LOOKUP) return nogemm_lookup_check(packed, packed_bytes, d, d_out);
  if (kind == NOGEMM_KIND_TREE) return nogemm_tree_check(packed, packed_bytes, d, d_out);
  if (kind == NOGEMM_KIND_HIRE) return nogemm_hire_check(packed, packed_bytes, d, d_out);
  return "unknown kind of layer";
}

extern "C" int64_t nogemm_phase_workspace(int64_t kind, const void* packed, int64_t tokens, int64_t threads) {
  if (kind == NOGEMM_KIND_LOOKUP) return nogemm_lookup_workspace(packed, tokens, threads);
  if (kind == NOGEMM_KIND_TREE) return nogemm_tree_workspace(packed, tokens, threads);
  return nogemm_hire_workspace(packed, tokens, threads);
}

extern "C" void nogemm_phase_run(int64_t kind, int64_t phase, const void* packed, const float* x, float* y,
                                 int64_t tokens, void* workspace, const NogemmHost* host) {
  const KernelTable& table = kernels();
  if (kind == NOGEMM_KIND_LOOKUP) {
    const int64_t d = static_cast<const LookupHeader*>(packed)->d;
    if (phase == NOGEMM_PHASE_FIRST)
      return table.lookup.hash(packed, x, NOGEMM_X_FP32, d, nullptr, tokens, workspace, host);
    return table.lookup.forward(packed, x, NOGEMM_X_FP32, d, y, tokens, workspace, host);
  }
  if (kind == NOGEMM_KIND_TREE) {
    const int64_t d = static_cast<const TreeHeader*>(packed)->d;
    if (phase == NOGEMM_PHASE_FIRST)
      return table.tree.paths(packed, x, NOGEMM_X_FP32, d, nullptr, tokens, workspace, host);
    return table.tree.forward(packed, x, NOGEMM_X_FP32, d, y, tokens, workspace, host);
  }
  nogemm_hire_forward(packed, x, NOGEMM_X_FP32, 0, y, tokens, workspace, host);
}
