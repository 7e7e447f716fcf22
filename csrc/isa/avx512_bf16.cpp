// All kernels for x86-64-v4, int8 and bfloat16 dot products. Flags: CMakeLists.txt.
#define NOGEMM_NS avx512_bf16
#include "table.h"

namespace nogemm::avx512_bf16 {
extern const KernelTable kTable = make_table("avx512_bf16");
}
