// What the operators share: working memory, OpenVINO's threads, the dtypes of tokens.
//
// Work runs on OpenVINO's own threads: evaluate() is called inside the task arena of the stream, and so is run_on_tbb.
#pragma once
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <openvino/core/except.hpp>
#include <openvino/core/type/element_type.hpp>

#include "packed/host/host.h"

namespace nogemm {

inline constexpr int64_t kKept = int64_t{64} << 20;

// Working memory of a calling thread, kept between calls: fresh pages cost more than the work on them.
class Scratch {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      bytes_ = 0;
      const int64_t whole = (bytes + 63) / 64 * 64;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(whole))));
      OPENVINO_ASSERT(memory_, "nogemm: no memory for ", whole, " bytes of scratch");
      bytes_ = whole;
    }
    return memory_.get();
  }
  void trim() {
    if (bytes_ <= kKept) return;
    memory_.reset();
    bytes_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t bytes_ = 0;
};

inline void run_on_tbb(void*, int64_t workers, void (*body)(int64_t worker, void* arg), void* arg) {
  tbb::parallel_for(int64_t{0}, workers, int64_t{1}, [=](int64_t w) { body(w, arg); }, tbb::static_partitioner{});
}

inline int64_t type_of(const ov::element::Type& type) {
  if (type == ov::element::f32) return NOGEMM_X_FP32;
  if (type == ov::element::bf16) return NOGEMM_X_BF16;
  OPENVINO_ASSERT(type == ov::element::f16, "nogemm: x must be f32, bf16 or f16, got ", type);
  return NOGEMM_X_FP16;
}

inline NogemmHost tbb_host() { return {tbb::this_task_arena::max_concurrency(), run_on_tbb, nullptr}; }

}  // namespace nogemm
