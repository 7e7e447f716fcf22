// Whether what a header says lies inside its buffer. A header may come from a file, and so be anything at all.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace nogemm {

struct Sections {
  int64_t bytes;  // of the buffer
  int64_t start;  // of what may lie behind the header
  bool inside = true;

  // A section of so many bytes, a product of counts, begins at a multiple of 64 behind the header.
  void need(int64_t offset, std::initializer_list<int64_t> counts) {
    int64_t size = 1;
    for (const int64_t count : counts) inside = inside && count >= 0 && !__builtin_mul_overflow(size, count, &size);
    inside = inside && offset >= start && offset % 64 == 0 && offset <= bytes && size <= bytes - offset;
  }
  // The same, if it is there.
  void may_have(int64_t offset, std::initializer_list<int64_t> counts) {
    if (offset != 0) need(offset, counts);
  }
};

}  // namespace nogemm
