// C interface of the packed TreeFFN: one buffer per layer, made once, and one native call per evaluation.
//
//   y = out_bias + sum over trees and levels of act(z) out_row + sum over the core of act(z) out_row
//
// with z = <in_row, x> + bias and the path i <- 2 i + 1 + [z > threshold], heap order. Conventions as in
// packed/lookup/pack.h.
#pragma once
#include "packed/host/activations.h"
#include "packed/host/host.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { NOGEMM_TREE_FP32 = 0, NOGEMM_TREE_BF16 = 1, NOGEMM_TREE_INT8 = 2 };  // mode

// Every field is 8 bytes, so that ctypes and C agree without thinking about padding. Pointers are to
// contiguous float32 arrays.
typedef struct NogemmTreeSpec {
  int64_t mode;
  int64_t activation;      // see packed/host/activations.h
  int64_t d;               // width of x, >= 1
  int64_t d_out;           // width of y, >= 1
  int64_t trees;           // K >= 1
  int64_t levels;          // L in 1..21; a tree has M = 2^L - 1 nodes
  int64_t core;            // neurons visited by every token, >= 0
  const float* in_rows;    // [K, M, d]
  const float* bias;       // [K, M] or null
  const float* threshold;  // [K, M] or null
  const float* out_rows;   // [K, M, d_out]
  const float* core_in;    // [core, d]
  const float* core_bias;  // [core] or null
  const float* core_out;   // [core, d_out]
  const float* out_bias;   // [d_out] or null
} NogemmTreeSpec;

// Bytes of the packed buffer; -1 for a specification that nogemm_tree_pack would refuse.
NOGEMM_API int64_t nogemm_tree_pack_size(const NogemmTreeSpec* spec);

// Fills `out` (64-byte aligned, at least nogemm_tree_pack_size bytes). Null, or what is wrong.
NOGEMM_API const char* nogemm_tree_pack(const NogemmTreeSpec* spec, void* out, int64_t out_bytes);

// Null if `packed` is a buffer made by nogemm_tree_pack for this version; gives its widths.
NOGEMM_API const char* nogemm_tree_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out);

// Scratch bytes that nogemm_tree_forward needs for `tokens` tokens on `threads` threads.
NOGEMM_API int64_t nogemm_tree_workspace(const void* packed, int64_t tokens, int64_t threads);

// y[n, :] = TreeFFN(x[n, :]), as nogemm_lookup_forward.
NOGEMM_API void nogemm_tree_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                                    int64_t tokens, void* workspace, const NogemmHost* host);

// Which nodes the tokens visit: rows[n, k L + l] = k M + the node of level l of tree k, [tokens, K L].
NOGEMM_API void nogemm_tree_route(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows,
                                  int64_t tokens, void* workspace, const NogemmHost* host);

#ifdef __cplusplus
}
#endif
