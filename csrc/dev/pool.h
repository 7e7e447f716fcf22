// Threads for the timing programs, behind the host interface of the packed layers.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "packed/lookup/pack.h"

// A helper thread per worker beyond the first; spins for a while before it sleeps, as OpenMP's do.
namespace dev {

class Pool {
 public:
  explicit Pool(int64_t threads) {
    for (int64_t w = 1; w < threads; ++w) helpers_.emplace_back([this, w] { help(w); });
  }
  ~Pool() {
    job_.store(-1);
    wake();
    for (std::thread& t : helpers_) t.join();
  }
  static void run(void* self, int64_t workers, void (*body)(int64_t, void*), void* arg) {
    static_cast<Pool*>(self)->start(workers, body, arg);
  }

 private:
  void start(int64_t workers, void (*body)(int64_t, void*), void* arg) {
    workers_ = workers;
    body_ = body;
    arg_ = arg;
    left_.store(static_cast<int64_t>(helpers_.size()));
    job_.fetch_add(1);
    wake();
    body(0, arg);
    while (left_.load(std::memory_order_acquire) > 0) __builtin_ia32_pause();
  }
  void wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    sleepers_.notify_all();
  }
  void help(int64_t worker) {
    for (int64_t seen = 0;;) {
      for (int spin = 0; spin < 20000 && job_.load() == seen; ++spin) __builtin_ia32_pause();
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.wait(lock, [&] { return job_.load() != seen; });
      lock.unlock();
      seen = job_.load();
      if (seen < 0) return;
      if (worker < workers_) body_(worker, arg_);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable sleepers_;
  std::atomic<int64_t> job_{0}, left_{0};
  int64_t workers_ = 0;
  void (*body_)(int64_t, void*) = nullptr;
  void* arg_ = nullptr;
};

}  // namespace dev
