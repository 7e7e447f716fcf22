// All kernels for x86-64-v4 and int8 dot products. Flags: CMakeLists.txt.
#define NOGEMM_NS avx512_vnni
#include "table.h"

namespace nogemm::avx512_vnni {
extern const KernelTable kTable = make_table("avx512_vnni");
}
