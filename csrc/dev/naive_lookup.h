// A LookupFFN without any of our optimisations: what one writes first. A contender for the timing program,
// never shipped.
//
// One token after another, weights as they are trained ([out][in] blocks, tables [table][row][column]), a
// radix-2 Hadamard transform per round, expf per bit, one whole table row after another. Loops that a
// compiler may vectorise, float32.
#pragma once
#include <cstdint>

namespace naive {

struct Layer {
  int64_t d, d_out, width, tables, bits, block, rounds, repeats;
  const float *gamma, *beta, *weight, *proj_bias, *rows, *out_bias;
};

// codes and scores [tables] of one token; scratch holds 3 * width floats, z [repeats * width].
void hash_token(const Layer& layer, const float* x, float* scratch, float* z, int32_t* codes, float* scores);

// y [d_out] = bias + sum of scored rows.
void gather_token(const Layer& layer, const int32_t* codes, const float* scores, float* y);

}  // namespace naive
