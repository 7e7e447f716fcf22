// All kernels for AVX-512 F, BW, CD, DQ, VL (x86-64-v4). Flags: CMakeLists.txt.
#define NOGEMM_NS avx512
#include "table.h"

namespace nogemm::avx512 {
extern const KernelTable kTable = make_table("avx512");
}
