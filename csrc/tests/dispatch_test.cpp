// Choosing an instruction set: names, order, errors; and the conversions every kernel relies on.
#include <algorithm>

#include "check.h"

using namespace check;

void dispatch_tests() {
  expect(std::string(nogemm_isa_supported(0)) == "scalar", "scalar is always supported, and first");
  std::string best;
  for (int i = 0; nogemm_isa_supported(i) != nullptr; ++i) {
    best = nogemm_isa_supported(i);
    expect(nogemm_set_isa(best.c_str()) == nullptr && best == nogemm_isa(), "a supported level can be forced: " + best);
    expect(best == nogemm::kernels().name, "the table in force is the one named");
  }
#if defined(__aarch64__)
  expect(best == "neon", "every AArch64 processor has the vector level");
#endif
  const char* error = nogemm_set_isa("sse9");
  expect(error != nullptr && std::string(error).find("unknown instruction set 'sse9'") == 0,
         "an unknown level is refused");
  expect(best == nogemm_isa(), "a refused level changes nothing");
  nogemm_set_isa("scalar");
  expect(nogemm_set_isa(nullptr) == nullptr && best == nogemm_isa(), "null chooses the best level");
  expect(std::string(nogemm_version()).find('.') != std::string::npos, "the version is known");
}

namespace {

// The value of half-precision bits, and the nearest half of a number, both by exact arithmetic in double
// precision.
double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double v = std::ldexp(exponent == 0 ? fraction : fraction + 1024, (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) v = fraction != 0 ? NAN : INFINITY;
  return bits & 0x8000 ? -v : v;
}
double nearest_half(double v) {
  if (!std::isfinite(v)) return v;
  const int exponent = v == 0 ? 0 : std::ilogb(v);
  const double step = std::ldexp(1.0, std::max(exponent, -14) - 10), rounded = std::nearbyint(v / step) * step;
  return std::fabs(rounded) > 65504 ? std::copysign(INFINITY, v) : rounded;
}
bool same_number(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Every half is read exactly; floats of every kind are written as the nearest half.
void half_tests() {
  const nogemm::HireKernels& k = nogemm::kernels().hire;
  std::vector<uint16_t> halves(1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(halves.size());
  k.read[nogemm::kF16](halves.data(), wide.data(), 1 << 16);
  int wrong = 0;
  for (size_t i = 0; i < halves.size(); ++i) wrong += !same_number(wide[i], half_value(halves[i]));
  expect(wrong == 0, text(wrong, " halves are read wrongly"));
  expect(!same_number(wide[1], half_value(2)) && !same_number(0.0, -0.0), "control: another number passed");

  std::mt19937 rng(3);
  for (size_t i = 0; i < wide.size(); ++i) {
    uint32_t bits = rng();
    std::memcpy(&wide[i], &bits, sizeof bits);
    if (i % 4 == 0) continue;  // any float; else one between, at or near two neighbouring halves
    const auto low = static_cast<uint16_t>(bits & 0x7bff);
    const double a = half_value(low), b = a + (half_value(static_cast<uint16_t>((low & 0x7c00) + 1)) -
                                               half_value(static_cast<uint16_t>(low & 0x7c00)));
    const double v = i % 4 == 1 ? (a + b) / 2 : a + (b - a) * static_cast<double>(bits >> 16) / 65536;
    wide[i] = static_cast<float>(bits & 0x8000 ? -v : v);
  }
  k.write[nogemm::kF16](wide.data(), halves.data(), 1 << 16);
  wrong = 0;
  for (size_t i = 0; i < halves.size(); ++i) wrong += !same_number(half_value(halves[i]), nearest_half(wide[i]));
  expect(wrong == 0, text(wrong, " floats are written as wrong halves"));
}

// Any length, and nothing behind it; float32 and bfloat16 come back as they were.
void row_tests() {
  const nogemm::HireKernels& k = nogemm::kernels().hire;
  std::mt19937 rng(4);
  for (const int64_t count : {0, 1, 3, 16, 37})
    for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16, nogemm::kF16}) {
      Buffer row = normal(rng, dtype == nogemm::kF32 ? nogemm::kF32 : nogemm::kBF16, count), back(row.dtype(), count);
      if (dtype == nogemm::kF16)  // few bits, exact in any format
        for (int64_t i = 0; i < count; ++i) row.as<uint16_t>()[i] = static_cast<uint16_t>(0x3c00 + 64 * (i % 9));
      Buffer wide(nogemm::kF32, count);
      k.read[dtype](row.data(), wide.as<float>(), count);
      k.write[dtype](wide.as<float>(), back.data(), count);
      const auto bytes = static_cast<size_t>(count * (dtype == nogemm::kF32 ? 4 : 2));
      expect(std::memcmp(row.data(), back.data(), bytes) == 0 && wide.guard_intact() && back.guard_intact(),
             text("a row of ", count, " values, dtype ", int{dtype}, ", does not come back"));
    }
}

// What the machine did cannot be checked, but what a measuring loop says that it did can.
void roofline_tests() {
  const nogemm::RooflineKernels& r = nogemm::kernels().roofline;
  const double fma = r.fma_f32(50);
  const int lanes = nogemm::kernels().lanes;
  expect(fma > 0 && std::fmod(fma, 100.0 * lanes) == 0 && r.fma_f32(100) == 2 * fma, "roofline: fma");
  expect(r.dot_bf16(100) == 2 * r.dot_bf16(50) && r.dot_i8(100) == 2 * r.dot_i8(50), "roofline: dot products");
  const std::vector<float> data(1000, 1.0f);
  expect(r.load(data.data(), 1000, 3) == 3 * r.load(data.data(), 1000, 1) && r.load(data.data(), 1000, 1) <= 4000 &&
             r.load(data.data(), 1000, 1) >= 4000 - 4 * 8 * lanes,
         "roofline: loads");
}

}  // namespace

// float32 -> bfloat16 through the kernel that only stores, over every exponent, ties, subnormals, infinities
// and NaN.
void conversion_tests() {
  half_tests();
  row_tests();
  roofline_tests();
  const nogemm::GatherKernels& gather = nogemm::kernels().gather;
  const int64_t width = gather.slice;
  const nogemm::GatherShape shape{1, 1, 1, width, 1, 1};
  std::mt19937 rng(7);
  for (int round = 0; round < 2000; ++round) {
    std::vector<float> values(static_cast<size_t>(width));
    for (float& f : values) {
      uint32_t bits = rng();
      if (round % 4 == 0) bits = (bits & 0xffff0000u) | 0x8000u;       // exactly between two values
      if (round % 4 == 1) bits &= 0x807fffffu;                         // subnormal
      if (round % 16 == 2) bits |= 0x7f800000u;                        // NaN, now and then an infinity
      if (round % 16 == 6) bits = (bits & 0x80000000u) | 0x7f7f8000u;  // rounds to infinity
      std::memcpy(&f, &bits, sizeof f);
    }
    Buffer out(nogemm::kBF16, width);
    gather.finish[nogemm::kBF16](shape, values.data(), 0, out.data(), 0, 1);
    for (int64_t i = 0; i < width; ++i) {
      const uint16_t want = to_bf16(values[static_cast<size_t>(i)]), got = out.as<uint16_t>()[i];
      if (want == got) continue;
      expect(false, text("bfloat16 of ", static_cast<double>(values[static_cast<size_t>(i)]), " is ", int{got},
                         ", should be ", int{want}));
      return;
    }
  }
}
