// What the kernel tests share: random data in a kernel's dtype, guarded output buffers, and a comparison
// whose tolerance follows from the arithmetic instead of being guessed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"

namespace check {

using nogemm::Dtype;

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAIL [%s] %s\n", nogemm_isa(), what.c_str());
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string result;
  const auto add = [&result](const auto& part) {
    if constexpr (std::is_convertible_v<decltype(part), std::string>) {
      result += part;
    } else {
      result += std::to_string(part);
    }
  };
  (add(parts), ...);
  return result;
}

// An independent conversion: the nearest bfloat16 is found by trying both neighbours.
inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t wide;
  std::memcpy(&wide, &f, sizeof wide);
  const uint16_t down = static_cast<uint16_t>(wide >> 16);
  if (!std::isfinite(f)) return std::isnan(f) ? static_cast<uint16_t>(down | 0x40) : down;
  const uint16_t up = static_cast<uint16_t>(down + 1);  // away from zero; past the largest value it is infinity
  const double gap = std::fabs(static_cast<double>(f)) - std::fabs(static_cast<double>(bf16_value(down)));
  const double step = std::ldexp(1.0, (down & 0x7f80) == 0 ? -133 : ((down >> 7) & 0xff) - 134);
  if (gap * 2 == step) return down & 1 ? up : down;
  return gap * 2 > step ? up : down;
}

// Values in a kernel's storage type, with a guard behind them that must survive.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count)
      : dtype_(dtype),
        count_(count),
        item_(dtype == nogemm::kF32  ? 4
              : dtype == nogemm::kI8 ? 1
                                     : 2) {
    bytes_.assign(static_cast<size_t>(count * item_ + kGuard),
                  static_cast<unsigned char>(0xff));  // NaN if read as a float
  }
  Buffer(Dtype dtype, const std::vector<float>& values) : Buffer(dtype, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < count_; ++i) set(i, values[static_cast<size_t>(i)]);
  }
  void* data() { return bytes_.data(); }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes_.data());
  }
  float operator[](int64_t i) const {
    const unsigned char* p = bytes_.data() + i * item_;
    if (dtype_ == nogemm::kI8) return static_cast<float>(*reinterpret_cast<const int8_t*>(p));
    if (dtype_ == nogemm::kBF16) {
      uint16_t bits;
      std::memcpy(&bits, p, sizeof bits);
      return bf16_value(bits);
    }
    float f;
    std::memcpy(&f, p, sizeof f);
    return f;
  }
  void set(int64_t i, float f) {
    unsigned char* p = bytes_.data() + i * item_;
    if (dtype_ == nogemm::kI8) {
      *p = static_cast<unsigned char>(static_cast<int8_t>(f));
    } else if (dtype_ == nogemm::kBF16) {
      const uint16_t bits = to_bf16(f);
      std::memcpy(p, &bits, sizeof bits);
    } else {
      std::memcpy(p, &f, sizeof f);
    }
  }
  int64_t size() const { return count_; }
  Dtype dtype() const { return dtype_; }
  bool guard_intact() const {
    for (size_t i = bytes_.size() - kGuard; i < bytes_.size(); ++i)
      if (bytes_[i] != 0xff) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  Dtype dtype_;
  int64_t count_, item_;
  std::vector<unsigned char> bytes_;
};

inline Buffer normal(std::mt19937& rng, Dtype dtype, int64_t count) {
  std::normal_distribution<float> draw;
  Buffer b(dtype, count);
  for (int64_t i = 0; i < count; ++i) b.set(i, dtype == nogemm::kI8 ? std::round(40 * draw(rng)) : draw(rng));
  return b;
}

// The true value of an output, and the sum of the magnitudes of what was added up to get it.
struct Expected {
  double value, magnitude;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

// Error allowed: half a step of the output's type, plus float32's rounding in each of `steps` operations on
// the magnitudes.
inline bool close(float got, const Expected& e, Dtype dtype, int64_t steps) {
  if (std::isnan(e.value)) return std::isnan(got);
  const double step = dtype == nogemm::kBF16 ? std::ldexp(1.0, -7) : std::ldexp(1.0, -23);
  const double allowed =
      0.51 * step * std::fabs(e.value) + std::ldexp(1.0, -24) * static_cast<double>(steps + 4) * e.magnitude;
  return std::fabs(got - e.value) <= allowed + 1e-37;  // NaN fails
}

// Compares all outputs, reports the first that is off, and says whether all were close.
inline bool matches(const Buffer& got, const std::vector<Expected>& want, int64_t steps) {
  for (int64_t i = 0; i < got.size(); ++i)
    if (!close(got[i], want[static_cast<size_t>(i)], got.dtype(), steps)) return false;
  return got.guard_intact();
}

// `matches` must fail when one output is wrong by a little more than the tolerance, or is NaN: call with any
// passing pair.
inline void control(Buffer got, const std::vector<Expected>& want, int64_t steps, const std::string& what) {
  if (got.size() == 0) return;
  const int64_t i = got.size() / 2;
  const Expected& e = want[static_cast<size_t>(i)];
  got.set(i, std::isnan(e.value) ? 1.0f : static_cast<float>(e.value + 0.05 * (e.magnitude + 1)));
  expect(!matches(got, want, steps), what + ": control: a wrong output passed");
  got.set(i, NAN);
  expect(std::isnan(e.value) || !matches(got, want, steps), what + ": control: a NaN passed");
}

}  // namespace check
