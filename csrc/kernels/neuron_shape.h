// Plain structures shared by the kernels that visit a few rows per token and their bindings.
#pragma once
#include <cstdint>

namespace nogemm {

struct NeuronShape {
  int64_t tokens;  // N
  int64_t visits;  // P rows per token
  int64_t rows;    // R
  int64_t width;   // D
};

struct TreeShape {
  int64_t tokens;  // N
  int64_t trees;   // K
  int64_t levels;  // L; a tree has 2^L - 1 nodes
  int64_t width;   // D
};

// One (token, weight) of a row, in the order of the tokens.
struct NeuronEntry {
  int32_t token;
  float weight;
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
