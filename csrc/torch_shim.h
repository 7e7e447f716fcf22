// The part of LibTorch's stable C interface that the bindings use, declared by hand so that building needs no
// torch.
//
// These functions are exported by libtorch_cpu.so since 2.10 and promised to keep their meaning.
// csrc/torch_stub.cpp defines the same names for the linker; a name that is declared here but not defined
// there fails the build (-z defs), and one that torch does not export fails when the library loads (-z now).
// The prototypes are compared with torch's own headers by csrc/tests/shim_matches_torch.cpp.
#pragma once
#include <cstdint>

extern "C" {
using AOTITorchError = int32_t;  // 0 is success
using StableIValue = uint64_t;   // one argument or result: a handle, an int64, a double or a bool, by bit copy

struct TorchLibraryOpaque;
struct AtenTensorOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AtenTensorHandle = AtenTensorOpaque*;
using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);

AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*kernel)(StableIValue* stack, uint64_t inputs, uint64_t outputs),
                                  uint64_t built_for_version);
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack,
                                     uint64_t built_for_version);

AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* copy);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function, void* context);
AOTITorchError torch_get_num_threads(uint32_t* threads);

int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_memory_format_contiguous_format();
}

namespace nogemm {
// The oldest torch whose interface this is: 2.10.
inline constexpr uint64_t kTorchVersion = (2ull << 56) | (10ull << 48);
}  // namespace nogemm
