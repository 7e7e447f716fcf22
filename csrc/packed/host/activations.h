// The activations by number; src/nogemm/activations.py has the same ones under the same names.
#pragma once

enum {
  NOGEMM_RELU = 0,
  NOGEMM_RELU2 = 1,
  NOGEMM_GELU = 2,
  NOGEMM_GELU_TANH = 3,
  NOGEMM_SILU = 4,
  NOGEMM_QUICK_GELU = 5,
  NOGEMM_ACTIVATIONS = 6
};
