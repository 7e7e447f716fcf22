// What the machine can reach with this instruction set: multiply-adds from registers, and loads from a buffer.
//
// Each function returns what it did, so that the caller divides by its own clock; zero means "no such instruction here".
#pragma once
#include "vec_peak.h"

namespace nogemm::NOGEMM_NS {

// FLOP of `loops` rounds of float32 multiply-adds.
static double roofline_fma_f32(int64_t loops) {
  F chain[kChains];
  F a = set1(0.999f), b = set1(1e-9f);
  for (F& c : chain) c = zero();
  for (int64_t i = 0; i < loops; ++i) {
    for (F& c : chain) c = fma(a, c, b);
  }
  for (F& c : chain) keep(c.v);
  return 2.0 * kLanes * kChains * static_cast<double>(loops);
}

// Bytes read by `repeats` passes over `count` floats; count a multiple of 8 vectors is used, the rest ignored.
static double roofline_load(const float* data, int64_t count, int64_t repeats) {
  constexpr int kStep = 8;
  F sum[kStep];
  for (F& s : sum) s = zero();
  const int64_t whole = count / (kStep * kLanes) * (kStep * kLanes);
  for (int64_t pass = 0; pass < repeats; ++pass) {
    for (int64_t i = 0; i < whole; i += kStep * kLanes) {
      for (int j = 0; j < kStep; ++j) sum[j] = sum[j] + load(data + i + j * kLanes);
    }
  }
  for (F& s : sum) keep(s.v);
  return 4.0 * static_cast<double>(whole) * static_cast<double>(repeats);
}

static constexpr RooflineKernels roofline_kernels() {
  return {roofline_fma_f32, roofline_dot_bf16, roofline_dot_i8, roofline_load};
}

}  // namespace nogemm::NOGEMM_NS
