// All kernels for any CPU, one lane. Flags: CMakeLists.txt.
#define NOGEMM_NS scalar
#define NOGEMM_FORCE_SCALAR  // on AArch64 the baseline has vectors
#include "table.h"

namespace nogemm::scalar {
extern const KernelTable kTable = make_table("scalar");
}
