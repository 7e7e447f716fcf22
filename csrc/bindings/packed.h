// What the bindings of packed layers share: the dtype of x, working memory, and torch's threads behind the C
// interface.
#pragma once
#include "bindings/tensor.h"
#include "packed/lookup/pack.h"

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

// A large fresh y is a page fault every 4 KiB, and on a virtual machine a fault costs more than the zeros it brings. All
// threads ask for y's pages beforehand, in a few calls (Linux 5.14; elsewhere the kernel's own writes fault them in).
// Huge pages would be cheaper at their best, but now and then the system stops to make room for them: 100 ms and more.
inline void populate(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers do not name
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kCalls = 64;
  if (bytes < kHugeBytes) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage;
  const int64_t pages = static_cast<int64_t>((reinterpret_cast<uintptr_t>(data) + bytes) / kPage - first);
  parallel_for(kCalls, 1, [first, pages](int64_t begin, int64_t end) noexcept {
    const int64_t from = pages * begin / kCalls, to = pages * end / kCalls;
    (void)madvise(reinterpret_cast<void*>((first + from) * kPage), (to - from) * kPage, kPopulateWrite);
  });
#else
  (void)data, (void)bytes;
#endif
}

// The first two arguments of a packed layer's op, checked: x [..., d] and the buffer.
struct PackedCall {
  Tensor x, packed;
  int64_t x_dtype, d, d_out, tokens;
  NogemmHost host;
};

template <class Check>
PackedCall take_packed(const char* op, StableIValue* stack, Check check_buffer) {
  PackedCall call{take_tensor(stack[0]).contiguous(), take_tensor(stack[1]), 0, 0, 0, 0, {}};
  const Tensor &x = call.x, &packed = call.packed;
  call.x_dtype = packed_x_dtype(x, op);
  check(packed.dtype() == aoti_torch_dtype_uint8() && packed.dim() == 1 && packed.is_contiguous(), op,
        "packed must be a contiguous one-dimensional uint8 tensor");
  const char* error = check_buffer(packed.data(), packed.numel(), &call.d, &call.d_out);
  check(error == nullptr, op, error == nullptr ? "" : error);
  check(x.dim() > 0 && x.size(x.dim() - 1) == call.d, op, "the layer takes width ", call.d, ", x has shape ",
        x.shape());
  call.tokens = x.numel() / call.d;
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  call.host = {threads, run_on_torch, nullptr};
  return call;
}

// The binding of a packed layer: (Tensor x [..., d], Tensor packed, int d_out) -> y [..., d_out] in x's dtype.
//
//   const char* check_buffer(packed, bytes, &d, &d_out)      null, or what is wrong with the buffer
//   int64_t workspace_bytes(packed, tokens, threads)
//   void forward(packed, x, x_dtype, x_stride, y, tokens, workspace, host)
template <class Check, class Bytes, class Forward>
void run_packed(const char* op, StableIValue* stack, Workspace& workspace, Check check_buffer, Bytes workspace_bytes,
                Forward forward) {
  const PackedCall call = take_packed(op, stack, check_buffer);
  const Tensor &x = call.x, &packed = call.packed;
  const int64_t d_out = take_int(stack[2]), tokens = call.tokens;
  check(d_out == call.d_out, op, "the layer gives width ", call.d_out, ", d_out is ", d_out);

  int64_t sizes[16];
  check(x.dim() <= 16, op, "x has more than 16 dimensions");
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = d_out;
  Tensor y = Tensor::empty(sizes, x.dim(), x.dtype());
  populate(y.mutable_data(), static_cast<size_t>(tokens * d_out) * (call.x_dtype == NOGEMM_X_FP32 ? 4 : 2));

  char* scratch = workspace.at_least(workspace_bytes(packed.data(), tokens, call.host.threads));
  forward(packed.data(), x.data(), call.x_dtype, call.d, y.mutable_data(), tokens, scratch, &call.host);
  workspace.trim();
  stack[0] = std::move(y).to_stack();
}

// The binding of what a packed layer reads: (Tensor x [..., d], Tensor packed, int count) -> rows int32 [tokens, count].
//
//   void route(packed, x, x_dtype, x_stride, rows, tokens, workspace, host)
template <class Check, class Count, class Bytes, class Route>
void run_route(const char* op, StableIValue* stack, Workspace& workspace, Check check_buffer, Count count_of,
               Bytes workspace_bytes, Route route) {
  const PackedCall call = take_packed(op, stack, check_buffer);
  const int64_t count = take_int(stack[2]), own = count_of(call.packed.data());
  check(count == own, op, "the layer reads ", own, " rows a token, count is ", count);
  const int64_t sizes[2] = {call.tokens, count};
  Tensor rows = Tensor::empty(sizes, 2, aoti_torch_dtype_int32());
  char* scratch = workspace.at_least(workspace_bytes(call.packed.data(), call.tokens, call.host.threads));
  route(call.packed.data(), call.x.data(), call.x_dtype, call.d, static_cast<int32_t*>(rows.mutable_data()),
        call.tokens, scratch, &call.host);
  workspace.trim();
  stack[0] = std::move(rows).to_stack();
}

}  // namespace nogemm
