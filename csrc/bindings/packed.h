// What the bindings of packed layers share: the dtype of x, working memory, and torch's threads behind the C
// interface.
#pragma once
#include "bindings/tensor.h"
#include "lookup_pack.h"

namespace nogemm {

// Working memory that outlives the call: a large batch would otherwise fault its pages in again every time.
// One buffer per calling thread, given back when the thread ends; what is larger than kKept is given back at
// once.
inline constexpr int64_t kKept = int64_t{64} << 20;

class Workspace {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_ = std::make_unique<Scratch<char>>(bytes);
      bytes_ = bytes;
    }
    return memory_->get();
  }
  void trim() {
    if (bytes_ <= kKept) return;
    memory_.reset();
    bytes_ = 0;
  }

 private:
  std::unique_ptr<Scratch<char>> memory_;
  int64_t bytes_ = 0;
};

inline int64_t packed_x_dtype(const Tensor& x, const char* op) {
  if (x.dtype() == aoti_torch_dtype_float32()) return NOGEMM_X_FP32;
  if (x.dtype() == aoti_torch_dtype_bfloat16()) return NOGEMM_X_BF16;
  if (x.dtype() == aoti_torch_dtype_float16()) return NOGEMM_X_FP16;
  fail(op, "x must be float32, bfloat16 or float16");
}

struct Workers {
  void (*body)(int64_t worker, void* arg);
  void* arg;
};

inline void run_on_torch(void*, int64_t workers, void (*body)(int64_t worker, void* arg), void* arg) {
  const Workers job{body, arg};
  parallel_for(workers, 1, [&job](int64_t begin, int64_t end) noexcept {
    for (int64_t w = begin; w < end; ++w) job.body(w, job.arg);
  });
}

}  // namespace nogemm
