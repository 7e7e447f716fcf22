// How kernels/topk.h cuts a row of n numbers, of which the k largest are wanted. No torch.
#pragma once
#include <cstdint>

namespace nogemm {

inline constexpr int64_t kTopkMostDepth = 16;        // vectors of a chunk
inline constexpr int32_t kTopkLowest = -0x7f800001;  // a floor that every number reaches (kernels/select.h)

// A chunk is `depth` vectors; with depth 1 there are no maxima, and all numbers are collected.
struct TopkChunks {
  int64_t depth, size, count;

  // Few maxima are cheap to rank, many make a floor that few numbers reach: five for two winners at least.
  TopkChunks(int64_t n, int64_t k, int64_t lanes) {
    for (depth = kTopkMostDepth; depth > 1 && 2 * (n / depth) < 5 * k; depth /= 2) continue;
    size = depth * lanes;
    count = (n + size - 1) / size;
  }
};

// Whether most vectors hold a winner.
inline bool topk_dense(int64_t n, int64_t k) { return k * 32 > n; }

}  // namespace nogemm
