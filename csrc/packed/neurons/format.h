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
inline constexpr int64_t kHireVersion = 3;
inline constexpr int64_t kSketchRows = 64;  // rows of a sketch group

enum HireMode : int64_t { kHireF32 = 0, kHireBF16 = 1, kHireI8 = 2 };
enum HireSelect : int64_t { kTopK = 0, kStatistical = 1, kActive = 2, kGaussian = 3, kScores = 4 };
// kScores: a dense linear layer, whose answer are the scores themselves; it has no bundles.
inline constexpr int64_t kKeySigned = -1;  // a key that is the score itself; any other is an activation

// The header's fields in their order, eight bytes each: I(integer), D(double). The only list of them: Python asks for it.
#define NOGEMM_HIRE_FIELDS(I, D)                                                       \
  I(magic)                                                                             \
  I(version)                                                                           \
  I(bytes)                                                                             \
  I(mode)                                                                              \
  I(d)                                                                                 \
  I(d_out)                                                                             \
  I(hidden)                                                                            \
  I(gated)   /* 0: up and down; 1: gate, up and down */                                \
  I(act)     /* of the gate or of a plain layer's up, see packed/host/activations.h */ \
  I(up_relu) /* ReLU on the gated branch, too */                                       \
  I(key)     /* kKeySigned, or an activation whose size ranks */                       \
  I(select)  /* HireSelect */                                                          \
  I(nibbles) /* int4 codes */                                                          \
  I(width)   /* columns of the sketch: d, or the rank */                               \
  I(steps)   /* of 4 or 8 columns */                                                   \
  I(group)                                                                             \
  I(groups) /* this and the next three are counted in groups of neurons */             \
  I(kept)                                                                              \
  I(candidates)                                                                        \
  I(always_count)                                                                      \
  I(bundle_bytes) /* of a bundle, and where in it the rows begin; gate at 0 */         \
  I(up_at)                                                                             \
  I(down_at)                                                                           \
  I(sketch) /* offsets from here on; 0: absent */                                      \
  I(sketch_scale)                                                                      \
  I(reduce)                                                                            \
  I(always)                                                                            \
  I(margin_error)                                                                      \
  I(margin_size)                                                                       \
  I(moments) /* gaussian: what mean and deviation are made of, see state.h */          \
  I(moments_stride)                                                                    \
  I(bundles)                                                                           \
  I(scales) /* [3][hidden], int8 only */                                               \
  I(gate_bias)                                                                         \
  I(up_bias)                                                                           \
  I(out_bias)                                                                          \
  D(keep_z) /* standard deviations above the mean; -infinity keeps all */              \
  D(wide_z)

struct HireHeader {
#define NOGEMM_INTEGER(name) int64_t name;
#define NOGEMM_DOUBLE(name) double name;
  NOGEMM_HIRE_FIELDS(NOGEMM_INTEGER, NOGEMM_DOUBLE)
#undef NOGEMM_INTEGER
#undef NOGEMM_DOUBLE
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

// Rows of one kind: row i begins at base + i * stride bytes; scale is null unless the rows are int8, bias may be.
struct BundleRows {
  const char* base;
  int64_t stride, width;
  const float* scale;
  const float* bias;
};

}  // namespace nogemm
