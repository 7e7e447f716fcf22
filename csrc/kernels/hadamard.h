// Orthonormal fast Hadamard transform of rows, Sylvester order.
//
//     y = x H_D / sqrt(D),   H_2P = [[H_P, H_P], [H_P, -H_P]],   H_mP = H_m x H_P (Kronecker),   D = m P
//
// P is a power of two, m is 1, 12 or 20 (hadamard_steps.h). P log2(P) additions per P numbers. The levels are done
// in groups of three (radix 8, in registers), the innermost log2(kLanes) inside a vector, so a row of 1024 floats is
// read and written four times, in the first-level cache; m is one more pass.
#pragma once
#include "hadamard_order.h"
#include "hadamard_steps.h"

namespace nogemm::NOGEMM_NS {

// Row i: +1 where bit i of the lane number is 0, else -1.
alignas(64) static const float kLaneSigns[4][16] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

// One butterfly level inside a vector: lane i becomes a_i + a_{i + STEP} or a_{i - STEP} - a_i. The product
// by +-1 is exact.
template <int STEP>
NOGEMM_INLINE F lane_level(F a) {
  if constexpr (STEP < kLanes) {
    constexpr int kBit = STEP == 1 ? 0 : STEP == 2 ? 1 : STEP == 4 ? 2 : 3;
    return fma(a, load(kLaneSigns[kBit]), swap_lanes<STEP>(a));
  }
  return a;
}

NOGEMM_INLINE F lane_levels(F a) { return lane_level<8>(lane_level<4>(lane_level<2>(lane_level<1>(a)))); }

// LEVELS butterfly levels over vectors `stride` vectors apart; FIRST adds the levels inside the vectors.
// LEVELS = 0 only with FIRST, for a row of one vector.
template <int LEVELS, bool FIRST, class In, class Out>
static void hadamard_pass(const In* in, Out* out, int64_t vectors, int64_t stride, float scale) {
  constexpr int kRadix = 1 << LEVELS;
  for (int64_t base = 0; base < vectors; base += stride * kRadix) {
    for (int64_t j = base; j < base + stride; ++j) {
      F v[kRadix];
      for (int k = 0; k < kRadix; ++k) {
        v[k] = load(in + (j + k * stride) * kLanes);
        if constexpr (FIRST) v[k] = lane_levels(v[k]);
      }
      for (int h = 1; h < kRadix; h *= 2) {
        for (int k = 0; k < kRadix; ++k) {
          if ((k & h) == 0) {
            const F a = v[k], b = v[k + h];
            v[k] = a + b;
            v[k + h] = a - b;
          }
        }
      }
      for (int k = 0; k < kRadix; ++k) store(out + (j + k * stride) * kLanes, v[k] * set1(scale));
    }
  }
}

template <bool FIRST, class In, class Out>
static void hadamard_levels(int levels, const In* in, Out* out, int64_t vectors, int64_t stride, float scale) {
  switch (levels) {
    case 0:
      return hadamard_pass<0, FIRST>(in, out, vectors, stride, scale);
    case 1:
      return hadamard_pass<1, FIRST>(in, out, vectors, stride, scale);
    case 2:
      return hadamard_pass<2, FIRST>(in, out, vectors, stride, scale);
    default:
      return hadamard_pass<3, FIRST>(in, out, vectors, stride, scale);
  }
}

// Rows shorter than a vector.
template <class In, class Out>
static void hadamard_short(const In* x, Out* y, int64_t width, float scale) {
  float row[kLanes];
  for (int64_t i = 0; i < width; ++i) row[i] = to_float(x[i]);
  for (int64_t h = 1; h < width; h *= 2) {
    for (int64_t i = 0; i < width; ++i) {
      if ((i & h) == 0) {
        const float a = row[i], b = row[i + h];
        row[i] = a + b;
        row[i + h] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < width; ++i) from_float(row[i] * scale, y[i]);
}

// One row of a power of two: y = scale x H. Scratch holds a row and may be y.
template <class In, class Out>
static void hadamard_power(const In* x, Out* y, float* scratch, int64_t width, float scale) {
  const int64_t vectors = width / kLanes;
  int levels = 0;
  while ((int64_t{1} << levels) < vectors) ++levels;
  const int first = levels < 3 ? levels : 3;
  if (vectors == 0) return hadamard_short(x, y, width, scale);
  if (levels == first) return hadamard_levels<true>(first, x, y, vectors, 1, scale);
  hadamard_levels<true>(first, x, scratch, vectors, 1, 1.0f);
  int done = first;
  for (; levels - done > 3; done += 3) {
    hadamard_levels<false>(3, scratch, scratch, vectors, int64_t{1} << done, 1.0f);
  }
  hadamard_levels<false>(levels - done, scratch, y, vectors, int64_t{1} << done, scale);
}

// y = scale H_m x for m runs of `power` numbers, lane by lane.
template <int ORDER, class T>
static void hadamard_order_pass(const float* x, T* y, int64_t power, float scale) {
  for (int64_t i = 0; i < power; i += kLanes) {
    const int lanes = static_cast<int>(power - i < kLanes ? power - i : kLanes);
    F a[ORDER];
    for (int k = 0; k < ORDER; ++k) {
      a[k] = lanes < kLanes ? load_part(x + k * power + i, lanes) : load(x + k * power + i);
    }
    order_step<ORDER>(a);
    for (int k = 0; k < ORDER; ++k) {
      if (lanes < kLanes) {
        store_part(y + k * power + i, a[k] * set1(scale), lanes);
      } else {
        store(y + k * power + i, a[k] * set1(scale));
      }
    }
  }
}

template <class T>
static void hadamard_rows(const void* x_void, void* y_void, float* scratch, int64_t rows, int64_t width) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  const int64_t order = hadamard_order(width), power = width / order;
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = static_cast<const T*>(x_void) + r * width;
    T* y = static_cast<T*>(y_void) + r * width;
    if (order == 1) {
      hadamard_power(x, y, scratch, width, scale);
      continue;
    }
    for (int64_t i = 0; i < width; i += power) hadamard_power(x + i, scratch + i, scratch + i, power, 1.0f);
    if (order == 12) hadamard_order_pass<12>(scratch, y, power, scale);
    if (order == 20) hadamard_order_pass<20>(scratch, y, power, scale);
  }
}

static constexpr HadamardKernels hadamard_kernels() {
  HadamardKernels k{};
  k.rows[kF32] = hadamard_rows<float>;
  k.rows[kBF16] = hadamard_rows<bf16>;
  return k;
}

}  // namespace nogemm::NOGEMM_NS
