// All kernels for any CPU, one lane. Flags: CMakeLists.txt.
#define NOGEMM_NS scalar
#include "table.h"

namespace nogemm::scalar {
extern const KernelTable kTable = make_table("scalar");
}
