// Compiles only if torch_shim.h declares its functions exactly as torch does: two different declarations of
// one C function in one translation unit are an error. Built when NOGEMM_TORCH_INCLUDE names torch's include
// directory.
#include <torch/csrc/stable/c/shim.h>

#include "torch_shim.h"

static_assert(nogemm::kTorchVersion == TORCH_VERSION_2_10_0, "the version our kernels are registered for");
