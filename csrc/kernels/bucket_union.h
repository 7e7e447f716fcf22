// Which neurons share a bucket with a token in at least one hash table.
//
// Every neuron's code is compared: a comparison costs less than following a bucket's list, and the codes of a
// table lie side by side. Plain loops: the compiler makes vectors of them.
#pragma once
#include <cstdint>

#include "vec.h"

namespace nogemm::NOGEMM_NS {

// mask[n][f] = whether neurons[t][f] = codes[n][t] for some t; tokens [begin, end).
static void bucket_union(const int32_t* codes, const int32_t* neurons, int64_t tables, int64_t width, uint8_t* mask,
                         int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 1024;
  int32_t hit[kBlock];
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t count = width - start < kBlock ? width - start : kBlock;
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t f = 0; f < count; ++f) hit[f] = 0;
      for (int64_t t = 0; t < tables; ++t) {
        const int32_t own = codes[n * tables + t];
        const int32_t* theirs = neurons + t * width + start;
        for (int64_t f = 0; f < count; ++f) hit[f] |= theirs[f] == own ? 1 : 0;
      }
      uint8_t* out = mask + n * width + start;
      for (int64_t f = 0; f < count; ++f) out[f] = static_cast<uint8_t>(hit[f]);
    }
  }
}

}  // namespace nogemm::NOGEMM_NS
