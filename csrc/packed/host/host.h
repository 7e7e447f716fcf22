// What every packed layer's C interface shares: who runs the work, and the dtypes of tokens.
#pragma once
#include <stdint.h>

#define NOGEMM_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { NOGEMM_X_FP32 = 0, NOGEMM_X_BF16 = 1, NOGEMM_X_FP16 = 2 };  // dtype of x and y

// How the caller runs work: `run` must call body(w, arg) once for every w in 0..workers-1, in any order, at once or not.
typedef struct NogemmHost {
  int64_t threads;
  void (*run)(void* self, int64_t workers, void (*body)(int64_t worker, void* arg), void* arg);
  void* self;
} NogemmHost;

#ifdef __cplusplus
}
#endif
