// The descent of tokens through binary trees of neurons, for training: plain rows, any width.
//
//     i = 0;   z = <rows[k, i], x> + bias[k, i];   i <- 2 i + 1 + [z > threshold[k, i]]
//
// Each row's address depends on the last one's sign. A group of tokens goes down in step, so that one token's
// row is on its way while the others compute. A token's values do not depend on its group.
#pragma once
#include "neuron_shape.h"
#include "vec.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int64_t kTreeGroup = 8;

// <row, x> in float32: four running sums, so that the additions do not wait for each other.
template <class T, class X>
NOGEMM_INLINE float row_dot(const T* row, const X* x, int64_t width) {
  F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
    s0 = fma(load(row + d), load(x + d), s0);
    s1 = fma(load(row + d + kLanes), load(x + d + kLanes), s1);
    s2 = fma(load(row + d + 2 * kLanes), load(x + d + 2 * kLanes), s2);
    s3 = fma(load(row + d + 3 * kLanes), load(x + d + 3 * kLanes), s3);
  }
  for (; d + kLanes <= width; d += kLanes) s0 = fma(load(row + d), load(x + d), s0);
  if (d < width) {
    const int last = static_cast<int>(width - d);
    s1 = fma(load_part(row + d, last), load_part(x + d, last), s1);
  }
  return hsum((s0 + s1) + (s2 + s3));
}

template <class T>
static void tree_descend(const TreeShape& s, const void* x_void, const void* rows_void, const void* bias_void,
                         const void* threshold_void, void* z_void, int32_t* nodes, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(x_void), *rows = static_cast<const T*>(rows_void);
  const T *bias = static_cast<const T*>(bias_void), *threshold = static_cast<const T*>(threshold_void);
  T* z_out = static_cast<T*>(z_void);
  const int64_t per_tree = (int64_t{1} << s.levels) - 1, bytes = s.width * static_cast<int64_t>(sizeof(T));
  for (int64_t first = begin; first < end; first += kTreeGroup) {
    const int64_t count = end - first < kTreeGroup ? end - first : kTreeGroup;
    for (int64_t k = 0; k < s.trees; ++k) {
      int64_t node[kTreeGroup] = {};
      for (int64_t level = 0; level < s.levels; ++level) {
        for (int64_t g = 0; g < count; ++g) {
          const int64_t n = first + g, row = k * per_tree + node[g], at = (n * s.trees + k) * s.levels + level;
          float z = row_dot(rows + row * s.width, x + n * s.width, s.width);
          if (bias != nullptr) z += to_float(bias[row]);
          const bool right = z > (threshold == nullptr ? 0.0f : to_float(threshold[row]));
          from_float(z, z_out[at]);
          nodes[at] = static_cast<int32_t>(row);
          node[g] = 2 * node[g] + 1 + (right ? 1 : 0);
          if (level + 1 < s.levels) prefetch_row(rows + (k * per_tree + node[g]) * s.width, bytes);
        }
      }
    }
  }
}

}  // namespace nogemm::NOGEMM_NS
