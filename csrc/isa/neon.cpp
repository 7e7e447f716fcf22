// All kernels for AArch64 Advanced SIMD (Armv8-A, no extension). Flags: CMakeLists.txt.
#define NOGEMM_NS neon
#include "table.h"

namespace nogemm::neon {
extern const KernelTable kTable = make_table("neon");
}
