// The packed TreeFFN: a whole layer in one call.
//
//     y = bias + sum over visited nodes of act(z) out_row,   z = <in_row, x> + bias,   i <- 2 i + 1 + [z >
//     threshold]
//
// A step waits for memory twice: for the row, and for the sum that says which row comes next. So a worker
// walks several lanes, a lane being one token in one tree, in step: while one lane computes, the others' rows
// are on their way. A visited node's out-row is fetched along with the descent and added at the end, all of a
// token's at once, so that the sums stay in registers.
//
// Few tokens and much work per token (many trees): the lanes are shared among the threads, then the columns
// of the sums. A token's arithmetic is the same whatever the cut and the group, so its result depends neither
// on the threads nor on the batch.
// Lockstep alone cannot help when every token reads rows that no cache near the core holds: with many tokens
// in one deep tree, the upper levels, whose rows stay in the second-level cache, are walked first; then
// tokens are sorted by the subtree they reached, so that a subtree's rows are fetched once for all tokens
// that need them.
#pragma once
#include "tree_token.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int64_t kNearBytes = 1 << 20;  // of the upper levels' records: half a second-level cache
inline constexpr int64_t kPerSubtree = 8;  // tokens that make fetching a subtree once worth reading x twice
inline constexpr int64_t kSortedTokens = 16384;  // of a worker at a time

// How many upper levels are walked before the tokens are sorted; 0: not at all.
NOGEMM_INLINE int64_t near_levels(const TreeHeader& h, int64_t tokens) {
  int64_t near = 0;
  while (((int64_t{2} << near) - 1) * h.record <= kNearBytes) ++near;
  return h.trees == 1 && near > 0 && near < h.levels && tokens >= kPerSubtree << near ? near : 0;
}

// What the first pass leaves of each token, and the order of the second.
struct Sorted {
  float* z;          // [tokens][near]
  int32_t* subtree;  // [tokens]
  int32_t* order;    // [tokens]
  int32_t* starts;   // [2^near + 1]
};

NOGEMM_INLINE int64_t sorted_bytes(int64_t near, int64_t tokens) {
  const int64_t most = tokens < kSortedTokens ? tokens : kSortedTokens;
  return near == 0 ? 0 : (most * (near + 2) * 4 + ((int64_t{1} << near) + 1) * 4 + 127) / 64 * 64;
}

NOGEMM_INLINE Sorted place_sorted(char* at, int64_t near, int64_t tokens) {
  Sorted s;
  s.z = reinterpret_cast<float*>(at);
  s.subtree = reinterpret_cast<int32_t*>(s.z + tokens * near);
  s.order = s.subtree + tokens;
  s.starts = s.order + tokens;
  return s;
}

NOGEMM_INLINE void fetch_token(const TreeCall& c, int64_t n) {
  const int64_t item = c.x_dtype == NOGEMM_X_FP32 ? 4 : 2;
  prefetch_row(c.x + n * c.x_stride * item, c.h->d * item);
}

// First pass over tokens [first, first + count): upper levels, then the order by subtree.
template <class In>
static void upper_levels(const TreeCall& c, char* scratch, const Sorted& s, int64_t near, int64_t first,
                         int64_t count) {
  const TreeHeader& h = *c.h;
  const int64_t subtrees = int64_t{1} << near;
  for (int64_t j = 0; j <= subtrees; ++j) s.starts[j] = 0;
  for (int64_t i = 0; i < count; i += kTreeGroup) {
    const int64_t group = count - i < kTreeGroup ? count - i : kTreeGroup;
    Lane lane[kTreeGroup];
    for (int64_t g = 0; g < group; ++g) {
      const TokenPlan plan = plan_at(h, scratch, g);
      const float* x = token_floats(c, first + i + g, reinterpret_cast<float*>(scratch) + g * pad_lanes(h.d));
      lane[g] = {x, c.base + h.nodes_at, plan.record, plan.z, 0};
      if (i + g + kTreeGroup < count) fetch_token(c, first + i + g + kTreeGroup);
    }
    walk<In>(h, lane, group, 0, near);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t level = 0; level < near; ++level) s.z[(i + g) * near + level] = lane[g].z[level];
      s.subtree[i + g] = static_cast<int32_t>(lane[g].node - (subtrees - 1));
      ++s.starts[s.subtree[i + g] + 1];
    }
  }
  for (int64_t j = 0; j < subtrees; ++j) s.starts[j + 1] += s.starts[j];
  for (int64_t i = 0; i < count; ++i) s.order[s.starts[s.subtree[i]]++] = static_cast<int32_t>(i);
}

template <class In, class Out>
static void sorted_tokens(const TreeCall& c, char* scratch, int64_t near, int64_t first, int64_t count) {
  const TreeHeader& h = *c.h;
  const Sorted s = place_sorted(scratch + group_bytes(h), near, count);
  upper_levels<In>(c, scratch, s, near, first, count);
  for (int64_t i = 0; i < count; i += kTreeGroup) {
    const int64_t group = count - i < kTreeGroup ? count - i : kTreeGroup;
    Lane lane[kTreeGroup];
    for (int64_t g = 0; g < group; ++g) {
      const int64_t token = s.order[i + g];
      const TokenPlan plan = plan_at(h, scratch, g);
      const float* x = token_floats(c, first + token, reinterpret_cast<float*>(scratch) + g * pad_lanes(h.d));
      lane[g] = {x, c.base + h.nodes_at, plan.record, plan.z, (int64_t{1} << near) - 1 + s.subtree[token]};
      int64_t node = lane[g].node;
      for (int64_t level = near; level-- > 0;) {
        node = (node - 1) / 2;
        plan.record[level] = lane[g].root + node * h.record;
        plan.z[level] = s.z[token * near + level];
      }
      if (i + g + kTreeGroup < count) fetch_token(c, first + s.order[i + g + kTreeGroup]);
    }
    walk<In>(h, lane, group, near, h.levels);
    for (int64_t g = 0; g < group; ++g) {
      const TokenPlan plan = plan_at(h, scratch, g);
      visit_core<In>(c, lane[g].x, plan, 0, h.core);
      fire(c, plan);
      add_token<Out>(c, plan, first + s.order[i + g], 0, h.d_out);
    }
  }
}

// Many tokens: each worker takes a stretch of them.
template <class In, class Out>
static void tree_tokens(int64_t worker, void* arg) {
  const TreeCall& c = *static_cast<const TreeCall*>(arg);
  const TreeHeader& h = *c.h;
  char* scratch = c.scratch + worker * c.worker_bytes;
  int64_t begin = c.tokens * worker / c.parts;
  const int64_t end = c.tokens * (worker + 1) / c.parts;
  while (c.near > 0 && begin < end) {
    const int64_t count = end - begin < kSortedTokens ? end - begin : kSortedTokens;
    sorted_tokens<In, Out>(c, scratch, c.near, begin, count);
    begin += count;
  }
  for (int64_t first = begin; first < end; first += kTreeGroup) {
    const int64_t count = end - first < kTreeGroup ? end - first : kTreeGroup;
    const float* x[kTreeGroup];
    for (int64_t g = 0; g < count; ++g) {
      x[g] = token_floats(c, first + g, reinterpret_cast<float*>(scratch) + g * pad_lanes(h.d));
      if (first + g + kTreeGroup < end) fetch_token(c, first + g + kTreeGroup);
    }
    descend_lanes<In>(c, x, scratch, 0, count * h.trees);
    for (int64_t g = 0; g < count; ++g) {
      const TokenPlan plan = plan_at(h, scratch, g);
      visit_core<In>(c, x[g], plan, 0, h.core);
      fire(c, plan);
      add_token<Out>(c, plan, first + g, 0, h.d_out);
    }
  }
}

// One token shared by all workers: first its lanes, then the columns of its sum. c.tokens is the token's
// number.
template <class In>
static void shared_descent(int64_t worker, void* arg) {
  const TreeCall& c = *static_cast<const TreeCall*>(arg);
  const TreeHeader& h = *c.h;
  const float* x =
      token_floats(c, c.tokens, reinterpret_cast<float*>(c.scratch + (1 + worker) * c.worker_bytes));
  descend_lanes<In>(c, &x, c.scratch, h.trees * worker / c.parts, h.trees * (worker + 1) / c.parts);
  visit_core<In>(c, x, plan_at(h, c.scratch, 0), h.core * worker / c.parts, h.core * (worker + 1) / c.parts);
}

template <class Out>
static void shared_sum(int64_t worker, void* arg) {
  const TreeCall& c = *static_cast<const TreeCall*>(arg);
  const int64_t vectors = pad_lanes(c.h->d_out) / kLanes;
  const int64_t begin = vectors * worker / c.parts * kLanes, end = vectors * (worker + 1) / c.parts * kLanes;
  add_token<Out>(c, plan_at(*c.h, c.scratch, 0), c.tokens, begin, end < c.h->d_out ? end : c.h->d_out);
}

template <class In, class Out>
static void tree_run(TreeCall& c, const NogemmHost* host) {
  const TreeHeader& h = *c.h;
  const int64_t work = tree_visits(h) * (h.d + h.d_out), tokens = c.tokens;
  if (tokens < host->threads && work >= 2 * kShareWork) {
    c.parts = work / kShareWork < host->threads ? work / kShareWork : host->threads;
    for (c.tokens = 0; c.tokens < tokens; ++c.tokens) {
      host->run(host->self, c.parts, shared_descent<In>, &c);
      fire(c, plan_at(h, c.scratch, 0));
      host->run(host->self, c.parts, shared_sum<Out>, &c);
    }
    return;
  }
  c.parts = tokens < host->threads ? tokens : host->threads;
  if (c.parts > 1 && tokens * work / c.parts < kShareWork) c.parts = 1;
  if (c.parts < host->threads) c.near = 0;  // scratch was measured for an equal share of every thread
  if (c.parts <= 1) {
    c.parts = 1;
    return tree_tokens<In, Out>(0, &c);
  }
  host->run(host->self, c.parts, tree_tokens<In, Out>, &c);
}

// Upper levels and scratch bytes of a worker, if the tokens are shared equally.
NOGEMM_INLINE int64_t worker_scratch(const TreeHeader& h, int64_t tokens, int64_t threads, int64_t* near) {
  const int64_t share = (tokens + threads - 1) / threads;
  *near = near_levels(h, share);
  return group_bytes(h) + sorted_bytes(*near, share);
}

static int64_t tree_workspace(const TreeHeader* h, int64_t tokens, int64_t threads) {
  int64_t near = 0;
  return (1 + threads) * worker_scratch(*h, tokens, threads, &near) + 64;
}

static void tree_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                         int64_t tokens, void* workspace, const NogemmHost* host) {
  if (tokens == 0) return;
  TreeCall c{static_cast<const TreeHeader*>(packed),
             static_cast<const char*>(packed),
             static_cast<const char*>(x),
             x_dtype,
             x_stride,
             static_cast<char*>(y),
             tokens,
             static_cast<char*>(workspace),
             1,
             0,
             0};
  c.worker_bytes = worker_scratch(*c.h, tokens, host->threads, &c.near);
  switch (c.h->mode) {
    case NOGEMM_TREE_FP32:
      return tree_run<float, float>(c, host);
    case NOGEMM_TREE_BF16:
      return tree_run<bf16, bf16>(c, host);
    default:
      return tree_run<bf16, int8_t>(c, host);
  }
}

static constexpr TreeKernels tree_kernels() {
  TreeKernels k{};
  k.descend[kF32] = tree_descend<float>;
  k.descend[kBF16] = tree_descend<bf16>;
  k.workspace = tree_workspace;
  k.forward = tree_forward;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
