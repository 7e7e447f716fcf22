// Plain structures shared by the kernels that visit a few rows per token and their bindings.
#pragma once
#include <cstdint>

namespace nogemm {

// One slice of columns, row by row. Row r's uses are [starts[r], starts[r + 1]): the token of each, and its
// weight.
struct NeuronPass {
  const int32_t *starts, *token;
  const float* weights;
  const float* sliced;  // [tokens][slice]
  const void* rows;     // [R, width]
  void* grad_rows;      // likewise, written
  float* dots;          // one per use
  int64_t width, column;
};

// One slice of columns, token by token.
struct NeuronSums {
  const int32_t* index;  // [tokens, visits], negative: none
  const float* weights;
  const float* sliced;  // [R][slice]
  void* y;              // [tokens, width]
  int64_t visits, width, column;
};

struct TreeShape {
  int64_t tokens;  // N
  int64_t trees;   // K
  int64_t levels;  // L; a tree has 2^L - 1 nodes
  int64_t width;   // D
};

// The rows of one optimiser step; see kernels/row_adam.h.
struct RowAdam {
  float *param, *mean, *square;  // [R, D]
  const int32_t* index;          // [V], each row once
  const float *grad, *arrears;   // [V, D], [V, 4]: shrink, drift, fade1, fade2
  int64_t width;
  float beta1, beta2, step, root, eps, keep;
};

}  // namespace nogemm
