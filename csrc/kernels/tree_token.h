// One token in a packed tree: the walk down, the activations, the sum of the out-rows; see tree_forward.h for
// who does what.
#pragma once
#include "../tree_pack.h"
#include "tree_activation.h"
#include "tree_descend.h"
#include "tree_format.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int64_t kShareWork = 1 << 17;  // multiply-adds of one token worth a second thread

NOGEMM_INLINE int64_t tree_visits(const TreeHeader& h) { return h.trees * h.levels + h.core; }
NOGEMM_INLINE int64_t pad_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// What a token leaves behind between descent and sum.
struct TokenPlan {
  float* z;             // [visits], padded to whole vectors; becomes the weights
  const char** record;  // [visits]
};

NOGEMM_INLINE int64_t plan_bytes(const TreeHeader& h) {
  return pad_lanes(tree_visits(h)) * static_cast<int64_t>(sizeof(float) + sizeof(char*)) + 64;
}

// Scratch of one worker: kTreeGroup tokens in float32 (for other dtypes), and their plans.
NOGEMM_INLINE int64_t group_bytes(const TreeHeader& h) {
  return (kTreeGroup * (pad_lanes(h.d) * 4 + plan_bytes(h)) + 127) / 64 * 64;
}

NOGEMM_INLINE TokenPlan plan_at(const TreeHeader& h, char* scratch, int64_t g) {
  char* at = scratch + kTreeGroup * pad_lanes(h.d) * 4 + g * (plan_bytes(h) / 8 * 8);
  return {reinterpret_cast<float*>(at + pad_lanes(tree_visits(h)) * 8), reinterpret_cast<const char**>(at)};
}

struct TreeCall {
  const TreeHeader* h;
  const char* base;
  const char* x;
  int64_t x_dtype, x_stride;
  char* y;
  int64_t tokens;
  char* scratch;
  int64_t parts;         // workers that share the call
  int64_t worker_bytes;  // scratch of each
  int64_t near;          // upper levels walked before the tokens are sorted, or 0
};

template <class T>
NOGEMM_INLINE void widen_row(const char* x, int64_t width, float* out) {
  const T* from = reinterpret_cast<const T*>(x);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(from + d));
  if (d < width)
    store_part(out + d, load_part(from + d, static_cast<int>(width - d)), static_cast<int>(width - d));
}

NOGEMM_INLINE const float* token_floats(const TreeCall& c, int64_t n, float* own) {
  if (c.x_dtype == NOGEMM_X_FP32) return reinterpret_cast<const float*>(c.x) + n * c.x_stride;
  const char* x = c.x + n * c.x_stride * 2;
  if (c.x_dtype == NOGEMM_X_BF16) {
    widen_row<bf16>(x, c.h->d, own);
  } else {
    widen_row<fp16>(x, c.h->d, own);
  }
  return own;
}

NOGEMM_INLINE const NodeHead& head_of(const char* record) {
  return *reinterpret_cast<const NodeHead*>(record);
}

// One token in one tree.
struct Lane {
  const float* x;
  const char* root;
  const char** record;  // where the plan keeps this tree's records,
  float* z;             // and what they gave
  int64_t node;
};

// Takes a group of lanes from level `from` to level `to`, in step; their first records are on their way
// already or near.
template <class In>
static void walk(const TreeHeader& h, Lane* lane, int64_t count, int64_t from, int64_t to) {
  const int64_t in_bytes = kNodeHeadBytes + h.d * static_cast<int64_t>(sizeof(In)),
                out_bytes = h.record - h.out_at;
  for (int64_t level = from; level < to; ++level) {
    for (int64_t g = 0; g < count; ++g) {
      const char* record = lane[g].root + lane[g].node * h.record;
      prefetch_row(record + h.out_at, out_bytes);
      const NodeHead& head = head_of(record);
      const float z =
          row_dot(reinterpret_cast<const In*>(record + kNodeHeadBytes), lane[g].x, h.d) + head.bias;
      lane[g].record[level] = record;
      lane[g].z[level] = z;
      lane[g].node = 2 * lane[g].node + 1 + (z > head.threshold ? 1 : 0);
      if (level + 1 < to) prefetch_row(lane[g].root + lane[g].node * h.record, in_bytes);
    }
  }
}

// Lanes [begin, end) of a list of tokens: lane l is tree l % K of token l / K.
template <class In>
static void descend_lanes(const TreeCall& c, const float* const* x, char* scratch, int64_t begin,
                          int64_t end) {
  const TreeHeader& h = *c.h;
  const int64_t per_tree = (int64_t{1} << h.levels) - 1;
  for (int64_t first = begin; first < end; first += kTreeGroup) {
    const int64_t count = end - first < kTreeGroup ? end - first : kTreeGroup;
    Lane lane[kTreeGroup];
    for (int64_t g = 0; g < count; ++g) {
      const int64_t token = (first + g) / h.trees, k = (first + g) % h.trees;
      const TokenPlan plan = plan_at(h, scratch, token);
      lane[g] = {x[token], c.base + h.nodes_at + k * per_tree * h.record, plan.record + k * h.levels,
                 plan.z + k * h.levels, 0};
    }
    walk<In>(h, lane, count, 0, h.levels);
  }
}

template <class In>
static void visit_core(const TreeCall& c, const float* x, const TokenPlan& plan, int64_t begin, int64_t end) {
  const TreeHeader& h = *c.h;
  for (int64_t j = begin; j < end; ++j) {
    const char* record = c.base + h.core_at + j * h.record;
    plan.record[h.trees * h.levels + j] = record;
    plan.z[h.trees * h.levels + j] =
        row_dot(reinterpret_cast<const In*>(record + kNodeHeadBytes), x, h.d) + head_of(record).bias;
  }
}

// z becomes act(z) scale; NaN everywhere for a token that is not finite, which the first root has seen all
// of.
NOGEMM_INLINE void fire(const TreeCall& c, const TokenPlan& plan) {
  const TreeHeader& h = *c.h;
  const int64_t visits = tree_visits(h);
  for (int64_t p = visits; p < pad_lanes(visits); ++p) plan.z[p] = 0.0f;
  const F poison = set1(plan.z[0] * 0.0f);
  for (int64_t p = 0; p < visits; p += kLanes)
    store(plan.z + p, tree_activation(load(plan.z + p), h.activation) + poison);
  if (h.mode == NOGEMM_TREE_INT8) {
    for (int64_t p = 0; p < visits; ++p) plan.z[p] *= head_of(plan.record[p]).scale;
  }
}

template <int VECTORS, class Out, class Y>
NOGEMM_INLINE void add_columns(const TreeHeader& h, const TokenPlan& plan, const float* bias, int64_t column,
                               Y* y) {
  F sum[VECTORS];
  for (int v = 0; v < VECTORS; ++v) sum[v] = load(bias + column + v * kLanes);
  const int64_t visits = tree_visits(h);
  for (int64_t p = 0; p < visits; ++p) {
    const Out* row = reinterpret_cast<const Out*>(plan.record[p] + h.out_at) + column;
    const F w = set1(plan.z[p]);
    for (int v = 0; v < VECTORS; ++v) sum[v] = fma(load(row + v * kLanes), w, sum[v]);
  }
  for (int v = 0; v < VECTORS; ++v) store(y + column + v * kLanes, sum[v]);
}

// Columns [begin, end) of one token's y.
template <class Out, class Y>
static void add_rows(const TreeCall& c, const TokenPlan& plan, Y* y, int64_t begin, int64_t end) {
  constexpr int kWide = kLanes == 1 ? 4 : 8;
  const TreeHeader& h = *c.h;
  const float* bias = reinterpret_cast<const float*>(c.base + h.bias_at);
  int64_t d = begin;
  for (; d + kWide * kLanes <= end; d += kWide * kLanes) add_columns<kWide, Out>(h, plan, bias, d, y);
  for (; d + kLanes <= end; d += kLanes) add_columns<1, Out>(h, plan, bias, d, y);
  if (d < end) {
    const int last = static_cast<int>(end - d);
    F sum = load_part(bias + d, last);
    for (int64_t p = 0; p < tree_visits(h); ++p) {
      const Out* row = reinterpret_cast<const Out*>(plan.record[p] + h.out_at) + d;
      sum = fma(load_part(row, last), set1(plan.z[p]), sum);
    }
    store_part(y + d, sum, last);
  }
}

template <class Out>
NOGEMM_INLINE void add_token(const TreeCall& c, const TokenPlan& plan, int64_t n, int64_t begin,
                             int64_t end) {
  const int64_t at = n * c.h->d_out;
  if (c.x_dtype == NOGEMM_X_FP32)
    return add_rows<Out>(c, plan, reinterpret_cast<float*>(c.y) + at, begin, end);
  if (c.x_dtype == NOGEMM_X_BF16)
    return add_rows<Out>(c, plan, reinterpret_cast<bf16*>(c.y) + at, begin, end);
  return add_rows<Out>(c, plan, reinterpret_cast<fp16*>(c.y) + at, begin, end);
}

}  // namespace nogemm::NOGEMM_NS
