// A vocabulary head's largest logit, by scan and proof, and all of its logits; see src/nogemm/ops/head_scan.py. No torch.
#pragma once
#include <atomic>

#include "kernel_table.h"
#include "packed/head/scan.h"
#include "packed/host/host.h"

namespace nogemm {

// In place of an index.
inline constexpr int64_t kHeadNotFinite = -1;
inline constexpr int64_t kHeadOverflown = -2;  // bounds are beyond float32: only all logits answer then

// The rows of a head, and what tells how far an estimate may be off. codes.rows is V.
struct Head {
  const KernelTable* table;
  const void* weight;  // [V, width] of dtype
  Dtype dtype;
  const float* bias;                     // [V], or null; codes.bias is the same, padded
  const float *project, *mean, *limits;  // see HeadCodes in src/nogemm/ops/head_scan.py
  int64_t width, width8, width4, groups;
  HeadCodes codes;
  double share;
};

inline BundleRows head_rows_of(const void* weight, const float* bias, int64_t width, Dtype dtype) {
  return {static_cast<const char*>(weight), width * (dtype == kF32 ? 4 : 2), width, nullptr, bias};
}

// Scratch bytes of head_argmax.
int64_t head_workspace(const Head& head, int64_t tokens);

// Of each token of x [tokens, width] the row with the largest logit (or why there is none), the logit, and how many rows
// were computed exactly. `workspace` is 64-byte aligned.
void head_argmax(const Head& head, const float* x, int64_t tokens, int64_t* index, float* value, int64_t* rows,
                 void* workspace, const NogemmHost& host);

// out [tokens, V]: all logits. Needs of the head its weight, bias, dtype, width and codes.rows.
void head_logits(const Head& head, const float* x, int64_t tokens, float* out, const NogemmHost& host);

}  // namespace nogemm
