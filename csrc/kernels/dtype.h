// Storage types of the kernels. Plain data, no functions: this header may be included from files built for
// different instruction sets, so an inline function here could be compiled once for AVX-512 and then called
// on a machine without it.
#pragma once
#include <cstdint>

namespace nogemm {

// bfloat16: the upper half of a float32. Converted by vec.h only.
struct bf16 {
  uint16_t bits;
};

// IEEE half precision. Converted by vec.h only.
struct fp16 {
  uint16_t bits;
};

}  // namespace nogemm
