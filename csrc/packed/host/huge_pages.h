// 2 MiB pages for buffers whose rows are read at random: a page walk per row is saved where the system allows
// them.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nogemm {

// A hint, to be given before the memory is first touched; errors do not matter.
inline void ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, start = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > start + (4u << 20)) (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace nogemm
