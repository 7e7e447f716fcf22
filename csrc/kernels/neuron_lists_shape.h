// What the kernels of kernels/neuron_lists.h are given. Plain data, the same for every instruction set.
#pragma once
#include <cstdint>

namespace nogemm {

// One slice of columns, neuron by neuron. Neuron r's uses are [starts[r], starts[r + 1]): the token of each,
// and its weight.
struct ListPass {
  const int32_t *starts, *token;
  const float* weights;
  const float* sliced;  // [tokens][slice]
  const void* rows;     // [neurons, width]
  void* grad_rows;      // likewise, written
  float* dots;          // one per use
  int64_t width, column;
};

// One slice of columns, token by token.
struct ListSums {
  const int32_t* index;  // [tokens, count], negative: none
  const float* weights;
  const float* sliced;  // [neurons][slice]
  void* y;              // [tokens, width]
  int64_t count, width, column;
};

}  // namespace nogemm
