// The kernels of the packed HireFFN and of the ops that it is made of, gathered.
#pragma once
#include "bundles.h"
#include "select.h"
#include "sketch.h"

namespace nogemm::NOGEMM_NS {

static constexpr nogemm::HireKernels hire_kernels() {
  nogemm::HireKernels h{};
  h.token = sketch_token;
  h.scores = sketch_rows;
  h.keys = sketch_keys;
  h.select = select_top;
  h.dots[kHireF32] = bundle_dots<float>;
  h.dots[kHireBF16] = bundle_dots<bf16>;
  h.split = split_token;
  h.fixed_dots = bundle_dots_fixed;
  h.weights = hidden_weights;
  h.sum[kHireF32] = bundle_sum<float>;
  h.sum[kHireBF16] = bundle_sum<bf16>;
  h.sum[kHireI8] = bundle_sum<int8_t>;
  h.columns = kColumns;
  h.read[kF32] = to_floats<float>;
  h.read[kBF16] = to_floats<bf16>;
  h.read[kF16] = to_floats<fp16>;
  h.write[kF32] = from_floats<float>;
  h.write[kBF16] = from_floats<bf16>;
  h.write[kF16] = from_floats<fp16>;
  return h;
}

}  // namespace nogemm::NOGEMM_NS
