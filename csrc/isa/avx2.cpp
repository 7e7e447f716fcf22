// All kernels for AVX2, FMA, F16C (x86-64-v3). Flags: CMakeLists.txt.
#define NOGEMM_NS avx2
#include "table.h"

namespace nogemm::avx2 {
extern const KernelTable kTable = make_table("avx2");
}
