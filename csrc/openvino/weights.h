// Where the operator reads a packed layer: in memory of its own, on huge pages, once per process.
//
// OpenVINO maps weight files with small pages and packs constants without alignment. Rows are read at random, so small
// pages cost a page walk per row, and the kernels need 64-byte alignment. So the first evaluation copies the layer and
// lets go of the file's pages: one copy stays in memory. Models compiled from the same file share it.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/core/except.hpp>

namespace nogemm {

class Weights {
 public:
  Weights() = default;
  Weights(const Weights&) {}  // a copied node finds its own
  Weights& operator=(const Weights&) = delete;

  // The layer whose bytes lie at `source`; the same address must mean the same bytes for the life of a node.
  const char* at(const void* source, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (source != source_) {
      copy_ = shared(source, bytes);
      source_ = source;
    }
    return copy_.get();
  }

 private:
  using Copy = std::shared_ptr<char>;
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  static Copy shared(const void* source, int64_t bytes) {
    static std::mutex mutex;
    static std::map<const void*, std::weak_ptr<char>> copies;
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto entry = copies.begin(); entry != copies.end();)
      entry = entry->second.expired() ? copies.erase(entry) : std::next(entry);
    const auto known = copies.find(source);
    if (known != copies.end()) {
      // An address may come back with another model's weights while the former node still lives.
      Copy copy = known->second.lock();
      if (copy && stored_bytes(copy) == bytes && std::memcmp(copy.get(), source, static_cast<size_t>(bytes)) == 0)
        return copy;
    }
    Copy copy = make(source, bytes);
    copies[source] = copy;
    release(source, bytes);
    return copy;
  }

  struct Free {
    int64_t bytes;
    void operator()(char* p) const { std::free(p); }
  };
  static int64_t stored_bytes(const Copy& copy) { return std::get_deleter<Free>(copy)->bytes; }

  static Copy make(const void* source, int64_t bytes) {
    const int64_t page = bytes >= kHugePage ? kHugePage : 64, whole = (bytes + page - 1) / page * page;
    auto* memory = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(whole)));
    OPENVINO_ASSERT(memory != nullptr, "nogemm: no memory for a packed layer of ", bytes, " bytes");
    if (page == kHugePage) (void)madvise(memory, static_cast<size_t>(whole), MADV_HUGEPAGE);  // a hint: it may fail
    std::memcpy(memory, source, static_cast<size_t>(bytes));
    return Copy(memory, Free{bytes});
  }

  // Says that whole pages of the source are not needed soon: those of a mapped file are dropped, and read again from the
  // file should anybody look; contents never change.
  static void release(const void* source, int64_t bytes) {
#if defined(MADV_PAGEOUT)
    const auto begin = (reinterpret_cast<uintptr_t>(source) + 4095) / 4096 * 4096;
    const auto end = (reinterpret_cast<uintptr_t>(source) + static_cast<uintptr_t>(bytes)) / 4096 * 4096;
    if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#endif
  }

  std::mutex mutex_;
  const void* source_ = nullptr;
  Copy copy_;
};

}  // namespace nogemm
