// The packed LookupFFN buffer: a header, then 64-byte aligned sections. Plain data, the same for every instruction set.
//
// Projection. Every supported map is "for each repeat, for each round: block product, then butterflies between whole blocks":
//   BH     D = m 2^k, and H = H_m x H_2^k with m = 1, 12 or 20 (hadamard_steps.h); the factor inside a block, 1/sqrt(D) and
//          the residual mix are multiplied into the weights when packing;
//          blocks narrower than 16 are merged into block-diagonal ones of 16, widths below 16 become one zero-padded block.
//   dense  one repeat, one round, one block of [d -> T K], no butterfly.
// Weights [repeat][round][block][in][out] in fp32, or [repeat][round][block][in/2][out][2] in 16-bit fixed point with an
// fp32 scale per output. Fixed point: activations are scaled per token to |v| <= act_max and the weights of one output to
// sum |w| * act_max < 2^31, so a 32-bit sum cannot overflow. That is a finer step than bf16's.
//
// Tables. [slice][table][row][columns of the slice], 64 columns in fp32, else 128, the last slice 64 if that is enough. Inside
// each 64 columns
//   bf16  the 32-bit word i of every 32 columns holds column i (low half) and 16 + i (high half): two shifts widen it;
//   int8  byte 16 L + 4 q + i holds column 16 q + 4 L + i, plus 128: interleaving the bytes of four rows, or the words of
//         two, inside 128-bit lanes (the only cheap interleave) then leaves sums of neighbouring columns in neighbouring lanes;
//   int4  the bytes of int8, but each column plus 8 in half of one: byte j holds those of j (low half) and 32 + j.
#pragma once
#include <cstdint>

#include "packed/lookup/pack.h"

namespace nogemm {

inline constexpr uint64_t kLookupMagic = 0x4b4f4f4c4d474e01ull;
inline constexpr uint32_t kLookupVersion = 3;
inline constexpr int kChunk = 64;  // columns per interleave group of int8 and int4

struct LookupHeader {
  uint64_t magic;
  uint64_t checksum;  // of the rest of the header
  uint32_t version;
  int32_t mode;         // NOGEMM_LOOKUP_*
  int32_t fixed_point;  // projection in 16-bit fixed point
  int32_t score;
  int32_t neighbours;
  int32_t d, d_out;
  int32_t tables, bits;
  int32_t rounds, repeats;
  int32_t blocks;               // n = order 2^j
  int32_t order;                // m
  int32_t active_blocks;        // blocks of the first round that see anything but padding
  int32_t block_in, block_out;  // multiples of 16
  int32_t columns;              // columns of z per repeat
  int32_t slices, last_slice;   // width of the last slice: slice() or 64
  int32_t norm, residual;
  float eps;
  float keep;  // 1 - mix, the share of x in z
  float act_max;
  int64_t gamma, beta;                       // [in_width] fp32, zero behind d
  int64_t weights, weight_scale, proj_bias;  // scale [repeat][round][n out]; bias [T K + 16 K], zero if none
  int64_t tables_at, row_scale;              // scale [T R], int8 and int4 only
  int64_t out_bias;                          // [slices slice()]
  int64_t bytes;

  // Inlined everywhere: this header is compiled for several instruction sets (see dtype.h).
  [[gnu::always_inline]] int64_t in_width() const { return static_cast<int64_t>(blocks) * block_in; }
  [[gnu::always_inline]] int64_t out_width() const { return static_cast<int64_t>(blocks) * block_out; }
  [[gnu::always_inline]] int64_t rows() const { return int64_t{1} << bits; }
  // Table columns per slice, at most 128: their fp32 accumulators fill 8 of 32 AVX-512 registers. fp32 rows are long enough
  // in 64: a group of tables that fits the L2 cache is then twice as many, so sums are kept and fetched half as often.
  [[gnu::always_inline]] int64_t slice() const { return mode == NOGEMM_LOOKUP_FP32 ? kChunk : 2 * kChunk; }
  [[gnu::always_inline]] int64_t slice_width(int64_t s) const { return s + 1 == slices ? last_slice : slice(); }
  [[gnu::always_inline]] bool integers() const { return mode == NOGEMM_LOOKUP_INT8 || mode == NOGEMM_LOOKUP_INT4; }
  // Bytes of so many columns of a row, a multiple of 64 of them.
  [[gnu::always_inline]] int64_t row_bytes(int64_t of_columns) const {
    return mode == NOGEMM_LOOKUP_FP32   ? 4 * of_columns
           : mode == NOGEMM_LOOKUP_BF16 ? 2 * of_columns
           : mode == NOGEMM_LOOKUP_INT8 ? of_columns
                                        : of_columns / 2;
  }
  [[gnu::always_inline]] int64_t lookups() const { return static_cast<int64_t>(tables) * neighbours; }
};

}  // namespace nogemm
