// A stand-in for libtorch_cpu.so at link time only: the same SONAME, exactly the functions of torch_shim.h,
// no bodies worth running. It is never installed. At run time the dynamic linker finds the libtorch_cpu.so
// that `import torch` has loaded.
#define STUB(name) \
  extern "C" __attribute__((visibility("default"))) void name() {}

STUB(aoti_torch_library_init_impl)
STUB(torch_library_impl)
STUB(torch_call_dispatcher)
STUB(aoti_torch_get_dim)
STUB(aoti_torch_get_sizes)
STUB(aoti_torch_get_strides)
STUB(aoti_torch_get_dtype)
STUB(torch_get_const_data_ptr)
STUB(torch_get_mutable_data_ptr)
STUB(aoti_torch_empty_strided)
STUB(aoti_torch_new_tensor_handle)
STUB(aoti_torch_delete_tensor_object)
STUB(torch_parallel_for)
STUB(torch_get_num_threads)
STUB(aoti_torch_dtype_float32)
STUB(aoti_torch_dtype_bfloat16)
STUB(aoti_torch_dtype_float16)
STUB(aoti_torch_dtype_int8)
STUB(aoti_torch_dtype_uint8)
STUB(aoti_torch_dtype_int32)
STUB(aoti_torch_dtype_int64)
STUB(aoti_torch_dtype_bool)
STUB(aoti_torch_device_type_cpu)
STUB(aoti_torch_memory_format_contiguous_format)
