// The packed TreeFFN: a whole layer in one call.
//
//     y = bias + sum over visited nodes of act(z) out_row
//     z = <in_row, x> + bias,   i <- 2 i + 1 + [z > threshold]
//
// A step waits for memory twice: for the row, and for the sum that says which row comes next. So a worker
// walks several lanes, a lane being one token in one tree, in step: while one lane computes, the others' rows
// are on their way. A visited node's out-row is fetched along with the descent and added at the end, all of a
// token's at once, so that the sums stay in registers.
//
// Few tokens and much work per token (many trees): the lanes are shared among the threads, then the columns
// of the sums. A token's arithmetic is the same whatever the cut and the group, so its result depends neither
// on the threads nor on the batch.
#pragma once
#include "activation.h"
#include "packed/tree/format.h"
#include "packed/tree/pack.h"
#include "tree_descend.h"

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
  int64_t parts;
  bool sum;       // false: stop after the paths, for profiles
  int32_t* rows;  // where the visited nodes' numbers go, [tokens][trees levels], or null
};

template <class T>
NOGEMM_INLINE void widen_row(const char* x, int64_t width, float* out) {
  const T* from = reinterpret_cast<const T*>(x);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(from + d));
  if (d < width) store_part(out + d, load_part(from + d, static_cast<int>(width - d)), static_cast<int>(width - d));
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

NOGEMM_INLINE const NodeHead& head_of(const char* record) { return *reinterpret_cast<const NodeHead*>(record); }

// Lanes [begin, end) of a list of tokens: lane l is tree l % K of token l / K.
template <class In>
static void descend_lanes(const TreeCall& c, const float* const* x, char* scratch, int64_t begin, int64_t end) {
  const TreeHeader& h = *c.h;
  const int64_t per_tree = (int64_t{1} << h.levels) - 1;
  const int64_t in_bytes = kNodeHeadBytes + h.d * static_cast<int64_t>(sizeof(In)), out_bytes = h.record - h.out_at;
  for (int64_t first = begin; first < end; first += kTreeGroup) {
    const int64_t count = end - first < kTreeGroup ? end - first : kTreeGroup;
    struct {
      const float* x;
      const char* root;
      const char** record;
      float* z;
      int64_t node;
    } lane[kTreeGroup];
    for (int64_t g = 0; g < count; ++g) {
      const int64_t token = (first + g) / h.trees, k = (first + g) % h.trees;
      const TokenPlan plan = plan_at(h, scratch, token);
      lane[g] = {x[token], c.base + h.nodes_at + k * per_tree * h.record, plan.record + k * h.levels,
                 plan.z + k * h.levels, 0};
    }
    for (int64_t level = 0; level < h.levels; ++level) {
      for (int64_t g = 0; g < count; ++g) {
        const char* record = lane[g].root + lane[g].node * h.record;
        prefetch_row(record + h.out_at, out_bytes);
        const NodeHead& head = head_of(record);
        const float z = row_dot(reinterpret_cast<const In*>(record + kNodeHeadBytes), lane[g].x, h.d) + head.bias;
        lane[g].record[level] = record;
        lane[g].z[level] = z;
        lane[g].node = 2 * lane[g].node + 1 + (z > head.threshold ? 1 : 0);
        if (level + 1 < h.levels) prefetch_row(lane[g].root + lane[g].node * h.record, in_bytes);
      }
    }
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
  for (int64_t p = 0; p < visits; p += kLanes) store(plan.z + p, activate(h.activation, load(plan.z + p)) + poison);
  if (h.mode == NOGEMM_TREE_INT8) {
    for (int64_t p = 0; p < visits; ++p) plan.z[p] *= head_of(plan.record[p]).scale;
  }
}

template <int VECTORS, class Out, class Y>
NOGEMM_INLINE void add_columns(const TreeHeader& h, const TokenPlan& plan, const float* bias, int64_t column, Y* y) {
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
NOGEMM_INLINE void add_token(const TreeCall& c, const TokenPlan& plan, int64_t n, int64_t begin, int64_t end) {
  const int64_t at = n * c.h->d_out;
  if (c.x_dtype == NOGEMM_X_FP32) return add_rows<Out>(c, plan, reinterpret_cast<float*>(c.y) + at, begin, end);
  if (c.x_dtype == NOGEMM_X_BF16) return add_rows<Out>(c, plan, reinterpret_cast<bf16*>(c.y) + at, begin, end);
  return add_rows<Out>(c, plan, reinterpret_cast<fp16*>(c.y) + at, begin, end);
}

// Which nodes token n has visited; tree k's are numbered from k M on.
NOGEMM_INLINE void tell_nodes(const TreeCall& c, const TokenPlan& plan, int64_t n) {
  const TreeHeader& h = *c.h;
  const int64_t count = h.trees * h.levels;
  for (int64_t p = 0; p < count && c.rows != nullptr; ++p)
    c.rows[n * count + p] = static_cast<int32_t>((plan.record[p] - c.base - h.nodes_at) / h.record);
}

// Many tokens: each worker takes a stretch of them.
template <class In, class Out>
static void tree_tokens(int64_t worker, void* arg) {
  const TreeCall& c = *static_cast<const TreeCall*>(arg);
  const TreeHeader& h = *c.h;
  char* scratch = c.scratch + worker * group_bytes(h);
  const int64_t begin = c.tokens * worker / c.parts, end = c.tokens * (worker + 1) / c.parts;
  for (int64_t first = begin; first < end; first += kTreeGroup) {
    const int64_t count = end - first < kTreeGroup ? end - first : kTreeGroup;
    const float* x[kTreeGroup];
    for (int64_t g = 0; g < count; ++g) {
      x[g] = token_floats(c, first + g, reinterpret_cast<float*>(scratch) + g * pad_lanes(h.d));
      if (first + g + kTreeGroup < end) {
        const int64_t item = c.x_dtype == NOGEMM_X_FP32 ? 4 : 2;
        prefetch_row(c.x + (first + g + kTreeGroup) * c.x_stride * item, h.d * item);
      }
    }
    descend_lanes<In>(c, x, scratch, 0, count * h.trees);
    for (int64_t g = 0; g < count; ++g) tell_nodes(c, plan_at(h, scratch, g), first + g);
    for (int64_t g = 0; g < count && c.sum; ++g) {
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
  const float* x = token_floats(c, c.tokens, reinterpret_cast<float*>(c.scratch + (1 + worker) * group_bytes(h)));
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
      tell_nodes(c, plan_at(h, c.scratch, 0), c.tokens);
      if (!c.sum) continue;
      fire(c, plan_at(h, c.scratch, 0));
      host->run(host->self, c.parts, shared_sum<Out>, &c);
    }
    return;
  }
  c.parts = tokens < host->threads ? tokens : host->threads;
  if (c.parts > 1 && tokens * work / c.parts < kShareWork) c.parts = 1;
  if (c.parts <= 1) {
    c.parts = 1;
    return tree_tokens<In, Out>(0, &c);
  }
  host->run(host->self, c.parts, tree_tokens<In, Out>, &c);
}

static int64_t tree_workspace(const TreeHeader* h, int64_t, int64_t threads) {
  return (1 + threads) * group_bytes(*h) + 64;
}

static void tree_call(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                      void* workspace, const NogemmHost* host, bool sum, int32_t* rows) {
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
             sum,
             rows};
  switch (c.h->mode) {
    case NOGEMM_TREE_FP32:
      return tree_run<float, float>(c, host);
    case NOGEMM_TREE_BF16:
      return tree_run<bf16, bf16>(c, host);
    default:
      return tree_run<bf16, int8_t>(c, host);
  }
}

static void tree_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                         void* workspace, const NogemmHost* host) {
  tree_call(packed, x, x_dtype, x_stride, y, tokens, workspace, host, true, nullptr);
}

// Paths alone, told in `rows` unless it is null (a core, which every token visits, belongs to the sum unless workers
// share one token).
static void tree_paths(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows,
                       int64_t tokens, void* workspace, const NogemmHost* host) {
  tree_call(packed, x, x_dtype, x_stride, nullptr, tokens, workspace, host, false, rows);
}

static constexpr TreeKernels tree_kernels() {
  TreeKernels k{};
  k.descend[kF32] = tree_descend<float>;
  k.descend[kBF16] = tree_descend<bf16>;
  k.workspace = tree_workspace;
  k.forward = tree_forward;
  k.paths = tree_paths;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
