// One call of a packed layer of any kind, whole or cut off after its first phase, for profiles: what a call
// takes longer than its first phase is the rest. No torch, so that a simulator can run it.
#pragma once
#include "packed/host/host.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { NOGEMM_KIND_LOOKUP = 0, NOGEMM_KIND_TREE = 1, NOGEMM_KIND_HIRE = 2 };
// First phase: codes and scores of a LookupFFN, paths of a TreeFFN. A HireFFN is one phase.
enum { NOGEMM_PHASE_WHOLE = 0, NOGEMM_PHASE_FIRST = 1 };

// Null if `packed` is a buffer of this kind that has this phase; gives its widths. Else what is wrong.
NOGEMM_API const char* nogemm_phase_check(int64_t kind, int64_t phase, const void* packed, int64_t packed_bytes,
                                          int64_t* d, int64_t* d_out);

// Scratch bytes of nogemm_phase_run.
NOGEMM_API int64_t nogemm_phase_workspace(int64_t kind, const void* packed, int64_t tokens, int64_t threads);

// The phase for contiguous float32 x [tokens, d]; y [tokens, d_out] is written by whole calls alone.
// `workspace` is 64-byte aligned; the buffer must have passed nogemm_phase_check.
NOGEMM_API void nogemm_phase_run(int64_t kind, int64_t phase, const void* packed, const float* x, float* y,
                                 int64_t tokens, void* workspace, const NogemmHost* host);

#ifdef __cplusplus
}
#endif
