// Tensors, arguments, threads and errors on top of torch_shim.h: everything a binding needs, and nothing
// about SIMD.
//
// A boxed kernel gets a stack of StableIValues, owns the tensor handles on it, and puts its results in their
// place. It reports a failure by throwing, as torch's own stable headers do: the dispatcher passes C++
// exceptions on to Python. std::runtime_error becomes RuntimeError, std::out_of_range IndexError,
// std::invalid_argument ValueError.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "torch_shim.h"

namespace nogemm {

template <class Error = std::invalid_argument, class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "nogemm::" << op << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

// Throws ValueError with the op's name unless `ok`.
template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

#define NOGEMM_CALL(call)                                                                 \
  do {                                                                                    \
    if ((call) != 0) throw std::runtime_error("nogemm: a torch function failed: " #call); \
  } while (0)

// Memory this large is worth 2 MiB pages: a first touch then faults once per 512 small pages, and random rows
// miss the TLB less.
inline constexpr size_t kHugeBytes = size_t{8} << 20;

inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes < kHugeBytes) return;
  constexpr uintptr_t kPage = 4096;  // madvise wants whole pages; advice about a part less at either end loses nothing
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure is harmless
#else
  (void)data, (void)bytes;
#endif
}

inline int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case kF32:
      return aoti_torch_dtype_float32();
    case kBF16:
      return aoti_torch_dtype_bfloat16();
    case kF16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_int8();
  }
}

inline size_t item_size(Dtype dtype) { return dtype == kF32 ? 4 : dtype == kI8 ? 1 : 2; }

// An owned tensor handle, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) { read(); }
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  // A new, uninitialised, contiguous CPU tensor.
  template <size_t DIM>
  static Tensor empty(const int64_t (&sizes)[DIM], int32_t dtype) {
    return empty(sizes, static_cast<int64_t>(DIM), dtype);
  }
  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) {
    int64_t strides[kMaxDim];
    if (dim > kMaxDim) throw std::invalid_argument("nogemm: tensors have at most 16 dimensions");
    int64_t step = 1;
    for (int64_t d = dim; d-- > 0; step *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = step;
    AtenTensorHandle handle = nullptr;
    // The sizes are ours and fit: what is left to fail is memory.
    if (aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle) != 0) {
      std::ostringstream text;
      text << "nogemm: out of memory: a result of shape [";
      for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << sizes[d];
      text << "] cannot be allocated";
      throw std::runtime_error(text.str());
    }
    return Tensor(handle);
  }

  bool defined() const { return handle_ != nullptr; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  const int64_t* sizes() const { return sizes_; }
  int32_t dtype() const { return dtype_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim_; ++d) n *= sizes_[d];
    return n;
  }
  std::string shape() const {
    std::string text = "(";
    for (int64_t d = 0; d < dim_; ++d) text += (d > 0 ? ", " : "") + std::to_string(sizes_[d]);
    return text + ")";
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim_; d-- > 0; step *= sizes_[d]) {
      if (sizes_[d] == 0) return true;
      if (sizes_[d] != 1 && strides_[d] != step) return false;
    }
    return true;
  }

  // This tensor if it is contiguous, else a contiguous copy.
  Tensor contiguous() && {
    if (is_contiguous()) return std::move(*this);
    StableIValue stack[2] = {0, 0};
    const AtenTensorHandle handle = release();  // the dispatcher takes the reference over
    const int32_t format = aoti_torch_memory_format_contiguous_format();
    std::memcpy(&stack[0], &handle, sizeof handle);
    std::memcpy(&stack[1], &format, sizeof format);
    NOGEMM_CALL(torch_call_dispatcher("aten::contiguous", "", stack, kTorchVersion));
    AtenTensorHandle result;
    std::memcpy(&result, &stack[0], sizeof result);
    return Tensor(result);
  }

  template <class T = void>
  const T* data() const {
    const void* p = nullptr;
    NOGEMM_CALL(torch_get_const_data_ptr(handle_, &p));
    return static_cast<const T*>(p);
  }
  template <class T = void>
  T* mutable_data() {
    void* p = nullptr;
    NOGEMM_CALL(torch_get_mutable_data_ptr(handle_, &p));
    return static_cast<T*>(p);
  }

  StableIValue to_stack() && {
    const AtenTensorHandle handle = release();
    StableIValue value = 0;
    std::memcpy(&value, &handle, sizeof handle);
    return value;
  }

 private:
  static constexpr int64_t kMaxDim = 16;

  void read() {
    NOGEMM_CALL(aoti_torch_get_dim(handle_, &dim_));
    NOGEMM_CALL(aoti_torch_get_sizes(handle_, &sizes_));
    NOGEMM_CALL(aoti_torch_get_strides(handle_, &strides_));
    NOGEMM_CALL(aoti_torch_get_dtype(handle_, &dtype_));
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  void swap(Tensor& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dtype_, other.dtype_);
  }

  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;  // owned by torch, valid as long as the handle
  int64_t* strides_ = nullptr;
  int32_t dtype_ = 0;
};

// Arguments of a boxed kernel.
inline Tensor take_tensor(StableIValue value) {
  AtenTensorHandle handle;
  std::memcpy(&handle, &value, sizeof handle);
  return Tensor(handle);
}
// Tensor?: null, or a pointer to a heap-allocated StableIValue which the receiver frees.
inline Tensor take_optional_tensor(StableIValue value) {
  StableIValue* boxed;
  std::memcpy(&boxed, &value, sizeof boxed);
  if (boxed == nullptr) return Tensor();
  const std::unique_ptr<StableIValue> owner(boxed);
  return take_tensor(*owner);
}
inline int64_t take_int(StableIValue value) {
  int64_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline double take_double(StableIValue value) {
  double result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline bool take_bool(StableIValue value) { return (value & 0xff) != 0; }

// The kernel index of a tensor's dtype; ValueError naming the argument otherwise.
inline Dtype dtype_of(const Tensor& tensor, const char* op, const char* argument, bool with_int8 = false) {
  const Dtype accepted[] = {kF32, kBF16, kI8};
  for (int i = 0; i < (with_int8 ? 3 : 2); ++i) {
    if (tensor.dtype() == torch_dtype(accepted[i])) return accepted[i];
  }
  fail(op, argument, " must be float32", with_int8 ? ", bfloat16 or int8" : " or bfloat16",
       "; other dtypes are served by the PyTorch reference");
}

inline void check_same_dtype(const Tensor& a, const Tensor& b, const char* op, const char* a_name, const char* b_name) {
  check(a.dtype() == b.dtype(), op, a_name, " and ", b_name, " must have the same dtype");
}

// Working memory, uninitialised, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + kAlign - 1) & ~(kAlign - 1);
    data_.reset(static_cast<T*>(std::aligned_alloc(kAlign, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data_.get(), bytes);
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Calls body(begin, end) on parts of [0, count) from torch's thread pool, parts of `grain` or more. The body
// must not throw: an exception cannot cross the C callback.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  static_assert(noexcept(body(int64_t{}, int64_t{})), "declare the body noexcept");
  if (count <= 0) return;
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  NOGEMM_CALL(torch_parallel_for(0, count, grain > 0 ? grain : 1, call, const_cast<Body*>(&body)));
}

// Registers a boxed kernel for nogemm::name on CPU. Use at namespace scope in a binding.
struct Register {
  Register(const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    // The library handle lives as long as the process: deleting it would take the kernels back.
    static TorchLibraryHandle library = [] {
      TorchLibraryHandle handle = nullptr;
      NOGEMM_CALL(aoti_torch_library_init_impl("nogemm", "CPU", __FILE__, __LINE__, &handle));
      return handle;
    }();
    NOGEMM_CALL(torch_library_impl(library, name, kernel, kTorchVersion));
  }
};

}  // namespace nogemm
