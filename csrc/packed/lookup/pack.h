// C interface of the packed LookupFFN: one buffer per layer, made once, and one native call per evaluation.
//
//   int64_t bytes = nogemm_lookup_pack_size(&spec);            // -1: call nogemm_lookup_pack for the reason
//   const char* error = nogemm_lookup_pack(&spec, out, bytes); // null: done
//   const char* error = nogemm_lookup_forward(...);            // null: done
//
// The function computed, row vectors throughout (tables T, bits K, R = 2^K rows per table, k neighbours):
//   x -> [LayerNorm] -> projection -> z [T K] -> codes and scores -> y = out_bias + sum over lookups of score * row.
// Returned texts are static or live in a buffer of the calling thread: valid until its next call here.
#pragma once
#include "packed/host/host.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { NOGEMM_LOOKUP_FP32 = 0, NOGEMM_LOOKUP_BF16 = 1, NOGEMM_LOOKUP_INT8 = 2, NOGEMM_LOOKUP_INT4 = 3 };  // mode
enum { NOGEMM_LOOKUP_GELU = 0, NOGEMM_LOOKUP_SIGMOID = 1, NOGEMM_LOOKUP_CONSTANT = 2 };                   // score
enum { NOGEMM_LOOKUP_DENSE = 0, NOGEMM_LOOKUP_BH = 1 };                                                   // projection

// Every field is 8 bytes, so that ctypes and C agree without thinking about padding. Pointers are to contiguous arrays.
typedef struct NogemmLookupSpec {
  int64_t mode;            // NOGEMM_LOOKUP_FP32 | BF16 | INT8 | INT4: what the buffer stores
  int64_t d;               // width of x, >= 1
  int64_t d_out;           // width of y, >= 1
  int64_t tables;          // T >= 1, with T 2^K < 2^31
  int64_t bits;            // K in 1..16
  int64_t neighbours;      // 1, 2 or 4, at most 2^K
  int64_t score;           // NOGEMM_LOOKUP_GELU (A P) | SIGMOID (P) | CONSTANT (1 / T, with one neighbour)
  int64_t projection;      // NOGEMM_LOOKUP_DENSE | NOGEMM_LOOKUP_BH
  int64_t rounds;          // BH: m >= 1
  int64_t block;           // BH: b, a power of two that divides 2^k (see width)
  int64_t repeats;         // BH: the least r with r columns >= T K
  int64_t tables_dtype;    // dtype of `tables`: NOGEMM_LOOKUP_FP32 | BF16 | INT8
  double eps;              // LayerNorm
  double mix;              // BH: z = mix * BH(x) + (1 - mix) * x; 1 for none
  const float* gamma;      // [d], null: no LayerNorm
  const float* beta;       // [d], null: zero
  const float* weight;     // dense [T K, d]; BH [r, m, D/b, b (out), b (in)], H/sqrt(D) after every round
  const float* proj_bias;  // [T K] or null
  const void* table_rows;  // [T, R, d_out] of tables_dtype
  const float* row_scale;  // [T, R] when tables_dtype is INT8, else null
  const float* out_bias;   // [d_out] or null
  int64_t columns;         // BH: how many columns of each repeat z takes, at most D; 0: all D
  int64_t width;           // BH: D = m 2^k >= d with m 1, 12 or 20, and 2^k >= 16 unless m is 1; dense: 0
} NogemmLookupSpec;

// Bytes of the packed buffer; -1 for a specification that nogemm_lookup_pack would refuse.
NOGEMM_API int64_t nogemm_lookup_pack_size(const NogemmLookupSpec* spec);

// Fills `out` (64-byte aligned, at least nogemm_lookup_pack_size bytes). Null, or what is wrong.
NOGEMM_API const char* nogemm_lookup_pack(const NogemmLookupSpec* spec, void* out, int64_t out_bytes);

// Checks the buffer's header. Null if `packed` is a buffer made by nogemm_lookup_pack for this version; gives its widths.
NOGEMM_API const char* nogemm_lookup_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out);

// Scratch bytes that nogemm_lookup_forward needs for `tokens` tokens on `threads` threads.
NOGEMM_API int64_t nogemm_lookup_workspace(const void* packed, int64_t tokens, int64_t threads);

// y[n, :] = LookupFFN(x[n, :]). x rows start x_stride elements apart; y is contiguous and has x's dtype. The same bits for
// any number of threads. `workspace` is 64-byte aligned. The buffer must have passed nogemm_lookup_check.
NOGEMM_API void nogemm_lookup_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                                      int64_t tokens, void* workspace, const NogemmHost* host);

// Which rows the tokens read: rows[n, t k + f] = t R + the code of neighbour f in table t, [tokens, T k]. Otherwise as
// nogemm_lookup_forward.
NOGEMM_API void nogemm_lookup_route(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows,
                                    int64_t tokens, void* workspace, const NogemmHost* host);

#ifdef __cplusplus
}
#endif
