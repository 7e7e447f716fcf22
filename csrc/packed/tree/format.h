// The packed TreeFFN buffer: a header, the output bias, then one record per node. Plain data, the same for
// every instruction set.
//
//   record   head (64 bytes: bias, threshold, scale of the out-row), in-row [d], out-row [d_out], rows
//   64-byte aligned
//
// A node's in-row and out-row lie together, because whoever reads the one needs the other; so do siblings, by
// the heap order. The trees follow one another, the core's neurons (visited by every token, in order) come
// last. In-rows are float32 ("fp32") or bfloat16: a path must not depend on the steps of an int8 row.
// Out-rows are float32, bfloat16, or int8 with one scale per row.
#pragma once
#include <cstdint>

namespace nogemm {

inline constexpr char kTreeMagic[8] = {'n', 'g', 'm', 't', 'r', 'e', 'e', '2'};

struct TreeHeader {
  char magic[8];
  int64_t bytes;       // of the whole buffer
  int64_t mode;        // NOGEMM_TREE_FP32 | BF16 | INT8
  int64_t activation;  // see packed/host/activations.h
  int64_t d, d_out;
  int64_t trees, levels, core;
  int64_t record;  // bytes from one record to the next
  int64_t out_at;  // of the out-row in its record
  int64_t bias_at, nodes_at, core_at;
};

struct NodeHead {
  float bias;
  float threshold;
  float scale;
};

inline constexpr int64_t kNodeHeadBytes = 64;

}  // namespace nogemm
