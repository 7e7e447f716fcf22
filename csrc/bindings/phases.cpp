// C entry point of `nogemm profile`, for ctypes: one phase of a packed layer on torch's threads, timed here,
// so that neither Python nor the dispatcher is in the figure.
#include "packed/host/phases.h"

#include <chrono>

#include "bindings/packed.h"

namespace nogemm {
namespace {

double timed_phase(int64_t kind, int64_t phase, const void* packed, const float* x, float* y, int64_t tokens) {
  thread_local Workspace workspace;
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  const NogemmHost host{threads, run_on_torch, nullptr};
  char* scratch = workspace.at_least(nogemm_phase_workspace(kind, packed, tokens, threads));
  const auto start = std::chrono::steady_clock::now();
  nogemm_phase_run(kind, phase, packed, x, y, tokens, scratch, &host);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count();
}

}  // namespace
}  // namespace nogemm

// Seconds that the phase took; negative: no memory for its scratch. The buffer must have passed
// nogemm_phase_check.
extern "C" __attribute__((visibility("default"))) double nogemm_phase_seconds(int64_t kind, int64_t phase,
                                                                              const void* packed, const float* x,
                                                                              float* y, int64_t tokens) try {
  return nogemm::timed_phase(kind, phase, packed, x, y, tokens);
} catch (...) {
  return -1.0;
}
