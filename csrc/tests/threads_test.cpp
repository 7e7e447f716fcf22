// Every packed layer on threads of its own, a few calls of each: the same bits as on one thread. This is what
// the build for ThreadSanitizer runs (`nogemm_tests threads`); it is short, because that makes everything
// twenty times slower.
//
// The kernels start no threads and know no OpenMP: they hand their work to the host (NogemmHost), and meet
// each other in what they read and write, in hire_state.h's atomics, and when the host's call returns. Here
// the host is std::thread, all of which ThreadSanitizer understands. libgomp, torch's pool, is not built for
// it and would give false reports, but is not part of this program, so there is nothing to suppress.
#include <thread>

#include "check.h"
#include "dispatch.h"
#include "lookup_reference.h"
#include "packed/neurons/run.h"
#include "tree_reference.h"

namespace {

using check::expect;

void on_threads(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  std::vector<std::thread> threads;
  for (int64_t w = 1; w < workers; ++w) threads.emplace_back(body, w, arg);
  body(0, arg);
  for (std::thread& t : threads) t.join();
}

const int64_t kTokens[] = {1, 3, 17, 300, 1100};  // both sides of every regime's border

// call(x, y, tokens, host) is one call of a layer that maps width d to d_out.
template <class Call>
void compare(const std::string& name, int64_t d, int64_t d_out, const Call& call) {
  for (int64_t tokens : kTokens) {
    const std::vector<float> x = lookup_reference::uniform(7, static_cast<size_t>(tokens * d), 1.5f);
    const auto answer = [&](int64_t threads) {
      std::vector<float> y(static_cast<size_t>(tokens * d_out), NAN);
      const NogemmHost host{threads, on_threads, nullptr};
      call(x.data(), y.data(), tokens, host);
      return y;
    };
    const std::vector<float> one = answer(1);
    bool finite = true;
    for (float v : one) finite = finite && std::isfinite(v);
    expect(finite, check::text(name, ", ", tokens, " tokens: not finite"));
    for (int64_t threads : {2, 3})
      expect(answer(threads) == one,
             check::text(name, ", ", tokens, " tokens, ", threads, " threads: other bits than on one"));
  }
}

void lookups() {
  for (int64_t mode = 0; mode < 4; ++mode) {
    const char* error = nullptr;
    const lookup_reference::Model m = lookup_reference::make_model({40, 72, 9, 4, 16}, 3);
    const lookup_reference::Buffer packed = lookup_reference::pack(m.spec(mode), &error);
    compare(check::text("lookup, mode ", mode), 40, 72,
            [&](const float* x, float* y, int64_t tokens, const NogemmHost& host) {
              const lookup_reference::Buffer scratch(nogemm_lookup_workspace(packed.as<void>(), tokens, host.threads));
              nogemm_lookup_forward(packed.as<void>(), x, NOGEMM_X_FP32, 40, y, tokens, scratch.as<void>(), &host);
            });
  }
}

void trees() {
  for (int64_t mode = 0; mode < 3; ++mode) {
    const char* error = nullptr;
    const tree_reference::Model m = tree_reference::make_model({40, 72, 3, 4, 2, NOGEMM_GELU, true, true}, 3);
    const tree_reference::Buffer packed = tree_reference::pack(m.spec(mode), &error);
    compare(check::text("tree, mode ", mode), 40, 72,
            [&](const float* x, float* y, int64_t tokens, const NogemmHost& host) {
              const tree_reference::Buffer scratch(nogemm_tree_workspace(packed.as<void>(), tokens, host.threads));
              nogemm_tree_forward(packed.as<void>(), x, NOGEMM_X_FP32, 40, y, tokens, scratch.as<void>(), &host);
            });
  }
}

// A float32 layer of 200 neurons with an int8 sketch of random codes; the layout is packed/neurons/format.h's. With
// `sketched` false all neurons answer, or those of a mask.
struct Hire {
  static constexpr int64_t kWidth = 64, kHidden = 200, kPadded = 256;
  bool sketched, gated;
  std::vector<float> memory;

  Hire(bool with_sketch, bool with_gate) : sketched(with_sketch), gated(with_gate) {
    nogemm::HireHeader h{};
    const int64_t codes = kPadded * kWidth, kinds = gated ? 3 : 2;
    h.magic = nogemm::kHireMagic, h.version = nogemm::kHireVersion;
    h.mode = nogemm::kHireF32, h.d = h.d_out = h.width = kWidth, h.hidden = kHidden, h.gated = gated;
    h.act = NOGEMM_RELU, h.key = NOGEMM_RELU, h.select = nogemm::kTopK;
    h.steps = kWidth / 4, h.group = 1, h.groups = kHidden;
    h.kept = sketched ? 20 : kHidden, h.candidates = sketched ? 30 : kHidden;
    h.bundle_bytes = kinds * kWidth * 4, h.up_at = gated ? kWidth * 4 : 0, h.down_at = (kinds - 1) * kWidth * 4;
    int64_t end = (static_cast<int64_t>(sizeof h) + 63) / 64 * 64;
    const auto add = [&end](int64_t bytes) {
      end += bytes;
      return end - bytes;
    };
    if (sketched) h.sketch = add(codes), h.sketch_scale = add(kPadded * 4);
    h.gate_bias = add(kPadded * 4), h.up_bias = add(kPadded * 4), h.out_bias = add(kWidth * 4);
    h.bundles = add(kHidden * h.bundle_bytes);
    h.bytes = end;
    memory = lookup_reference::uniform(11, static_cast<size_t>(end / 4), 0.5f);
    std::memcpy(memory.data(), &h, sizeof h);
    if (!sketched) return;
    auto* bytes = reinterpret_cast<uint8_t*>(memory.data()) + h.sketch;
    std::mt19937 rng(5);
    for (int64_t i = 0; i < codes; ++i) bytes[i] = static_cast<uint8_t>(1 + rng() % 255);
  }
};

void hires() {
  for (bool sketched : {true, false})
    for (bool gated : {false, true})
      for (bool masked : {false, true}) {
        if (sketched && masked) continue;
        const Hire layer(sketched, gated);
        const lookup_reference::Buffer packed(static_cast<int64_t>(layer.memory.size() * 4));
        std::memcpy(packed.as<void>(), layer.memory.data(), layer.memory.size() * 4);
        const auto* h = packed.as<const nogemm::HireHeader>();
        expect(nogemm::hire_check(h, h->bytes) == nullptr, "the HiRE layer of this test is not one");
        const std::string name = check::text("hire, sketch ", sketched, ", gated ", gated, ", mask ", masked);
        compare(name, Hire::kWidth, Hire::kWidth,
                [&](const float* x, float* y, int64_t tokens, const NogemmHost& host) {
                  const lookup_reference::Buffer scratch(nogemm::hire_workspace(*h, tokens, host.threads));
                  std::vector<uint8_t> mask(static_cast<size_t>(tokens * Hire::kHidden), 0);
                  for (size_t i = 0; i < mask.size(); i += 3) mask[i] = 1;
                  nogemm::hire_forward(nogemm::kernels(), h, x, nogemm::kF32, masked ? mask.data() : nullptr, y, tokens,
                                       scratch.as<void>(), host);
                });
      }
}

}  // namespace

void threads_tests() {
  lookups();
  trees();
  hires();
}

// Two threads add to one number without a lock: ThreadSanitizer must report it, or it has reported nothing
// above either.
int race() {
  volatile int64_t sum = 0;
  on_threads(
      nullptr, 2,
      [](int64_t, void* arg) {
        auto* number = static_cast<volatile int64_t*>(arg);
        for (int i = 0; i < 10000; ++i) *number = *number + 1;
      },
      const_cast<int64_t*>(&sum));
  return 0;
}
