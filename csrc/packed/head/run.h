// A vocabulary head's largest logit, by scan and proof or by search, and all of its logits; see
// src/nogemm/ops/head_scan.py. No torch.
#pragma once
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
  const float* bias;                     // [V], or null; codes.bias is the same
  const float *project, *mean, *limits;  // see HeadCodes in src/nogemm/ops/head_scan.py
  int64_t width, groups;
  int64_t width8, width4, width_rest;  // coordinates of each part of the codes
  HeadCodes codes;
};

struct HeadStates {
  const float* x;      // [count, width]
  const float* noise;  // [count, V], or null
  int64_t count;
};

inline BundleRows head_rows_of(const void* weight, const float* bias, int64_t width, Dtype dtype) {
  return {static_cast<const char*>(weight), width * (dtype == kF32 ? 4 : 2), width, nullptr, bias};
}

// Scratch bytes of head_argmax, for so many states.
int64_t head_argmax_workspace(const Head& head, int64_t states);

// Of each state the row with the largest logit (or why there is none), the logit, and how many rows were computed exactly.
// share: of the bound that counts; below 1 nothing is proven. `workspace` is 64-byte aligned.
void head_argmax(const Head& head, const HeadStates& states, double share, int64_t* index, float* value, int64_t* rows,
                 void* workspace, const NogemmHost& host);

// Scratch bytes of head_search.
int64_t head_search_workspace(const Head& head, int64_t states, int64_t rows);

// Of each state the row with the largest logit (or why there is none) among the `rows` best by the codes' leading parts,
// and the logit. logits, where not null: [count, V], by all parts of the codes, and exact for the best rows.
void head_search(const Head& head, const HeadStates& states, int64_t rows, float* logits, int64_t* index, float* value,
                 void* workspace, const NogemmHost& host);

// out [tokens, V]: all logits. Needs of the head its table, weight, bias, dtype, width and codes.rows.
void head_logits(const Head& head, const float* x, int64_t tokens, float* out, const NogemmHost& host);

}  // namespace nogemm
