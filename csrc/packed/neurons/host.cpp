#include "packed/neurons/host.h"

#include "dispatch.h"
#include "packed/host/huge_pages.h"
#include "packed/neurons/run.h"

using namespace nogemm;

static_assert(NOGEMM_X_FP32 == static_cast<int>(kF32) && NOGEMM_X_BF16 == static_cast<int>(kBF16) &&
              NOGEMM_X_FP16 == static_cast<int>(kF16));

extern "C" const char* nogemm_hire_fields() {
#define NOGEMM_INTEGER(name) "q" #name " "
#define NOGEMM_DOUBLE(name) "d" #name " "
  return NOGEMM_HIRE_FIELDS(NOGEMM_INTEGER, NOGEMM_DOUBLE);
#undef NOGEMM_INTEGER
#undef NOGEMM_DOUBLE
}

extern "C" void nogemm_hire_prepare(void* memory, int64_t bytes) { ask_for_huge_pages(memory, bytes); }

extern "C" const char* nogemm_hire_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out) {
  if (const char* error = hire_check(packed, packed_bytes)) return error;
  *d = static_cast<const HireHeader*>(packed)->d;
  *d_out = static_cast<const HireHeader*>(packed)->d_out;
  return nullptr;
}

extern "C" const char* nogemm_hire_check_body(const void* packed) { return hire_check_body(packed); }

extern "C" int64_t nogemm_hire_workspace(const void* packed, int64_t tokens, int64_t threads) {
  return hire_workspace(*static_cast<const HireHeader*>(packed), tokens, threads);
}

extern "C" void nogemm_hire_forward(const void* packed, const void* x, int64_t x_dtype, int64_t, void* y,
                                    int64_t tokens, void* workspace, const NogemmHost* host) {
  if (tokens == 0) return;
  hire_forward(kernels(), packed, x, static_cast<Dtype>(x_dtype), nullptr, y, tokens, workspace, *host);
}
