// Memory with a page that nobody may touch right behind its end (or as near as its alignment allows), and bytes of all
// ones, which are NaN in every floating type, wherever nothing was written.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fuzz {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "nogemm_fuzz: %s\n", what);
  std::abort();
}

class Guarded {
 public:
  Guarded(int64_t bytes, int64_t alignment) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), usable = (bytes + alignment + page - 1) / page * page;
    whole_ = usable + 2 * page;
    void* memory =
        mmap(nullptr, static_cast<size_t>(whole_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    memory_ = static_cast<char*>(memory);
    std::memset(memory_, 0xff, static_cast<size_t>(whole_));
    char* end = memory_ + page + usable;
    at_ = end - (bytes + alignment - 1) / alignment * alignment;
    rest_ = end - at_ - bytes;
    if (mprotect(memory_, static_cast<size_t>(page), PROT_NONE) != 0 ||
        mprotect(end, static_cast<size_t>(page), PROT_NONE) != 0)
      fail("no guard page");
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    // What lies between the end and the guard, where the alignment leaves something, must be as it was.
    for (int64_t i = 0; i < rest_; ++i)
      if (static_cast<unsigned char>(at_[bytes_ + i]) != 0xff) fail("wrote behind the end of a buffer");
    munmap(memory_, static_cast<size_t>(whole_));
  }

  template <class T = char>
  T* as() const {
    return reinterpret_cast<T*>(at_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char *memory_, *at_;
  int64_t bytes_, whole_, rest_;
};

}  // namespace fuzz
