// Choosing an instruction set: names, order, errors; and the conversions every kernel relies on.
#include "check.h"

using namespace check;

void dispatch_tests() {
  expect(std::string(nogemm_isa_supported(0)) == "scalar", "scalar is always supported, and first");
  std::string best;
  for (int i = 0; nogemm_isa_supported(i) != nullptr; ++i) {
    best = nogemm_isa_supported(i);
    expect(nogemm_set_isa(best.c_str()) == nullptr && best == nogemm_isa(),
           "a supported level can be forced: " + best);
    expect(best == nogemm::kernels().name, "the table in force is the one named");
  }
  const char* error = nogemm_set_isa("sse9");
  expect(error != nullptr && std::string(error).find("unknown instruction set 'sse9'") == 0,
         "an unknown level is refused");
  expect(best == nogemm_isa(), "a refused level changes nothing");
  nogemm_set_isa("scalar");
  expect(nogemm_set_isa(nullptr) == nullptr && best == nogemm_isa(), "null chooses the best level");
  expect(std::string(nogemm_version()).find('.') != std::string::npos, "the version is known");
}

// float32 -> bfloat16 through the kernel that only stores, over every exponent, ties, subnormals, infinities
// and NaN.
void conversion_tests() {
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
      expect(false, text("bfloat16 of ", static_cast<double>(values[static_cast<size_t>(i)]), " is ",
                         int{got}, ", should be ", int{want}));
      return;
    }
  }
}
