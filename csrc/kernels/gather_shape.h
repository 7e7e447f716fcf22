// Plain structures shared by the gather kernels and their binding.
#pragma once
#include <cstdint>

namespace nogemm {

struct GatherShape {
  int64_t tokens;      // N
  int64_t tables;      // T
  int64_t rows;        // R, a power of two or not
  int64_t width;       // D
  int64_t neighbours;  // k rows per table and token
  int64_t group;       // tables walked together by the forward pass
};

// One (token, table, neighbour): which row, and with which weight. In the forward plan `index` is the row
// within the table; in the backward order it is n * k + f, the row being implied by the bucket.
struct GatherEntry {
  int32_t index;
  float weight;
};

}  // namespace nogemm
