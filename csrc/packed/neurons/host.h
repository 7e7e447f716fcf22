// C interface of the packed HireFFN, for hosts without torch; conventions as in packed/lookup/pack.h. The buffer is
// made by src/nogemm/ops/packed_hire.py.
#pragma once
#include "packed/host/host.h"

#ifdef __cplusplus
extern "C" {
#endif

// The fields of the header in their order, each behind "q" (integer) or "d" (double), separated by spaces.
NOGEMM_API const char* nogemm_hire_fields(void);

// For memory that a buffer is about to be written to.
NOGEMM_API void nogemm_hire_prepare(void* memory, int64_t bytes);

// Null if `packed` is a buffer made by pack_hire for this version; gives its widths. Looks at the header
// alone.
NOGEMM_API const char* nogemm_hire_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out);

// Null if the numbers of neurons behind a header that passed nogemm_hire_check may be followed. Looks at the whole buffer.
NOGEMM_API const char* nogemm_hire_check_body(const void* packed);

// Scratch bytes that nogemm_hire_forward needs for `tokens` tokens on `threads` threads.
NOGEMM_API int64_t nogemm_hire_workspace(const void* packed, int64_t tokens, int64_t threads);

// y[n, :] = HireFFN(x[n, :]), as nogemm_lookup_forward; x is contiguous, so x_stride is d.
NOGEMM_API void nogemm_hire_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                                    int64_t tokens, void* workspace, const NogemmHost* host);

#ifdef __cplusplus
}
#endif
