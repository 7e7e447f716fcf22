// C interface of a vocabulary head, for hosts without torch; conventions as in packed/lookup/pack.h. The codes are packed
// by src/nogemm/ops/packed_head.py; the rows are the head's own, [V, d] of the dtype that the codes name.
#pragma once
#include "packed/host/host.h"

#ifdef __cplusplus
extern "C" {
#endif

// In place of a token: a state or a logit is not finite.
enum { NOGEMM_HEAD_NO_TOKEN = -1 };

// The header's fields in their order, each behind "q", separated by spaces.
NOGEMM_API const char* nogemm_head_fields(void);

// Null if `packed` holds codes for this version; gives the head's shape, and bytes of one of its rows. Looks at the header
// alone.
NOGEMM_API const char* nogemm_head_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* rows,
                                         int64_t* row_bytes);

// Scratch bytes of nogemm_head_argmax.
NOGEMM_API int64_t nogemm_head_workspace(const void* packed, int64_t tokens);

// Of each token of x [tokens, d], contiguous and of x_dtype: the row with the largest logit, accumulated in float32, or
// NOGEMM_HEAD_NO_TOKEN; that logit, or NaN; and how many rows were computed exactly. noise, where not null: [tokens, V],
// added to the logits. `workspace` is 64-byte aligned.
NOGEMM_API void nogemm_head_argmax(const void* packed, const void* rows, const void* x, int64_t x_dtype, int64_t tokens,
                                   const float* noise, int32_t* index, float* logit, int32_t* exact, void* workspace,
                                   const NogemmHost* host);

// Scratch bytes of nogemm_head_search.
NOGEMM_API int64_t nogemm_head_search_workspace(const void* packed, int64_t tokens, int64_t best);

// As nogemm_head_argmax, but the largest among the `best` rows, at least 1, that the leading parts of the codes rank
// first: nothing is proven. states [tokens, d]: x as float32, for a proof that comes later.
NOGEMM_API void nogemm_head_search(const void* packed, const void* rows, const void* x, int64_t x_dtype, int64_t tokens,
                                   const float* noise, int64_t best, int32_t* index, float* states, void* workspace,
                                   const NogemmHost* host);

// out[i] = row ids[i] of rows [V, d], as float32. The ids must be rows.
NOGEMM_API void nogemm_head_embed(const void* rows, int64_t dtype, int64_t d, const int64_t* ids, int64_t count,
                                  float* out);

#ifdef __cplusplus
}
#endif
