// C entry points of the exchange between processes of one machine, for ctypes: counters in memory that all of them have
// mapped. Whoever sees a counter's new value sees what its process wrote before. Python calls with its lock released.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#define NOGEMM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Counter = std::atomic<uint64_t>;
static_assert(sizeof(Counter) == sizeof(uint64_t) && Counter::is_always_lock_free, "a counter is its eight bytes");

// Reached counters are passed over once and for all: they only grow.
int64_t first_below(const char* counters, int64_t from, int64_t count, int64_t stride, uint64_t value) {
  while (from < count &&
         reinterpret_cast<const Counter*>(counters + from * stride)->load(std::memory_order_acquire) >= value) {
    ++from;
  }
  return from;
}

}  // namespace

NOGEMM_EXPORT void nogemm_shared_publish(void* counter, uint64_t value) {
  static_cast<Counter*>(counter)->store(value, std::memory_order_release);
}

// Wait until all `count` counters, `stride` bytes apart, have reached `value`: by looking `looks` times, then by giving
// the core away between looks, and after a millisecond by sleeping. Returns `count`, or after `seconds` the first
// counter that is still below.
NOGEMM_EXPORT int64_t nogemm_shared_wait(const void* counters, int64_t count, int64_t stride, uint64_t value,
                                         int64_t looks, double seconds) {
  using Clock = std::chrono::steady_clock;
  const char* first = static_cast<const char*>(counters);
  int64_t at = 0;
  for (int64_t look = 0; look < looks; ++look) {
    at = first_below(first, at, count, stride, value);
    if (at == count) return count;
  }
  const Clock::time_point start = Clock::now();
  for (;;) {
    at = first_below(first, at, count, stride, value);
    if (at == count) return count;
    const double waited = std::chrono::duration<double>(Clock::now() - start).count();
    if (waited >= seconds) return at;
    if (waited < 1e-3) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}
