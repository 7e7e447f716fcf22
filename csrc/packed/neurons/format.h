// The packed HireFFN buffer: a header of 64-bit numbers, then 64-byte aligned sections. Plain data, the same
// for every instruction set; src/nogemm/ops/packed_hire.py writes it, csrc/bindings/hire.cpp checks it.
//
// Sketch. Rows in groups of 64, columns in steps: [group][step][64 rows][4 bytes]. A step is 4 columns of
// int8 codes plus 128, or 8 columns of int4 codes plus 8: the low nibbles hold the first four columns, the
// high ones the others. So one group is one sequential stream, and sums of different rows lie in different
// lanes. Bundles. One per neuron: [gate row] [up row] [down row], each padded to 64 bytes, so a neuron is one
// stretch of memory.
#pragma once
#include <cstdint>

namespace nogemm {

inline constexpr int64_t kHireMagic = 0x4552494847474e01ll;
inline constexpr int64_t kHireVersion = 2;
inline constexpr int64_t kSketchRows = 64;  // rows of a sketch group

enum HireMode : int64_t { kHireF32 = 0, kHireBF16 = 1, kHireI8 = 2 };
enum HireSelect : int64_t { kTopK = 0, kStatistical = 1, kActive = 2 };
inline constexpr int64_t kKeySigned = -1;  // a key that is the score itself; any other is an activation

struct HireHeader {
  int64_t magic, version, bytes;
  int64_t mode, d, d_out, hidden;
  int64_t gated;    // 0: up and down; 1: gate, up and down
  int64_t act;      // of the gate or of a plain layer's up, see packed/host/activations.h
  int64_t up_relu;  // ReLU on the gated branch, too
  int64_t key;      // kKeySigned, or an activation whose size ranks
  int64_t select;   // HireSelect
  int64_t nibbles;  // int4 codes
  int64_t width;    // columns of the sketch: d, or the rank
  int64_t steps;    // of 4 or 8 columns
  int64_t group, groups, kept, candidates, always_count;  // counted in groups of neurons
  int64_t bundle_bytes, up_at, down_at;                   // of a bundle, and where in it the rows begin; gate at 0
  int64_t sketch, sketch_scale, reduce, always, margin_error, margin_size;  // offsets; 0: absent
  int64_t bundles, scales, gate_bias, up_bias, out_bias;                    // scales [3][hidden], int8 only
  double keep_z, wide_z;  // statistical: standard deviations above the mean; -infinity keeps all
};

// What kernels are given (kernels/sketch.h, kernels/bundles.h).

// A token rounded to int8, and where its scores go, [rows padded to kSketchRows].
struct SketchToken {
  const int8_t* codes;
  int32_t sum;
  float scale;
  float* scores;
};

struct SketchRows {
  const uint8_t* codes;
  const float* scale;  // padded with zeros, like bias
  const float* bias;
  int64_t steps;
  bool nibbles;
};

// A token in fixed point, x ~ scale * (256 high + low): two planes of `padded` bytes, a multiple of 64, and
// their sums.
struct FixedToken {
  const int8_t *high, *low;
  int32_t high_sum, low_sum;
  int64_t padded;
  float scale;
};

// Rows of one kind: row i begins at base + i * stride bytes; scale is null unless the rows are int8.
struct BundleRows {
  const char* base;
  int64_t stride, width;
  const float* scale;
  const float* bias;
};

}  // namespace nogemm
