// C entry points of the roofline measurement, for ctypes: one call per thread, which Python makes with its lock released.
#include "dispatch.h"

// Python asks nogemm_isa_error first; a wrong NOGEMM_ISA must still not throw through C, so it measures nothing.
static const nogemm::RooflineKernels* roofline() {
  try {
    return &nogemm::kernels().roofline;
  } catch (...) {
    return nullptr;
  }
}

#define NOGEMM_EXPORT extern "C" __attribute__((visibility("default")))

// Operations done by `loops` rounds; kind 0 float32 multiply-add, 1 bfloat16 dot, 2 int8 dot. Zero: no such instruction.
NOGEMM_EXPORT double nogemm_roofline_compute(int kind, int64_t loops) {
  const nogemm::RooflineKernels* k = roofline();
  if (k == nullptr) return 0.0;
  switch (kind) {
    case 0:
      return k->fma_f32(loops);
    case 1:
      return k->dot_bf16(loops);
    case 2:
      return k->dot_i8(loops);
    default:
      return 0.0;
  }
}

// Bytes read by `repeats` passes over a buffer of `count` floats.
NOGEMM_EXPORT double nogemm_roofline_load(const float* data, int64_t count, int64_t repeats) {
  const nogemm::RooflineKernels* k = roofline();
  return k == nullptr ? 0.0 : k->load(data, count, repeats);
}
