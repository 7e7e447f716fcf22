// Which widths have a Hadamard matrix here: m 2^k with m = 1, 12 or 20.
#pragma once
#include <cstdint>

namespace nogemm {

// m of a width m 2^k; 0 for any other width. Inlined everywhere: this header is compiled for several instruction sets.
[[gnu::always_inline]] inline int64_t hadamard_order(int64_t width) {
  if (width < 1) return 0;
  int64_t odd = width;
  while (odd % 2 == 0) odd /= 2;
  if (odd == 1) return 1;
  return (odd == 3 || odd == 5) && width % 4 == 0 ? 4 * odd : 0;
}

}  // namespace nogemm
