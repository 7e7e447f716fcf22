// The Hadamard transform against its definition, entry by entry.
#include "check.h"
#include "hadamard_reference.h"

using namespace check;

void hadamard_tests() {
  std::mt19937 rng(1);
  for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16}) {
    for (const int64_t width :
         {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 12, 24, 192, 768, 1536, 20, 40, 160, 640, 2560}) {
      const int64_t rows = 3;
      Buffer x = normal(rng, dtype, rows * width), y(dtype, rows * width);
      std::vector<float> scratch(static_cast<size_t>(width));
      nogemm::kernels().hadamard.rows[dtype](x.data(), y.data(), scratch.data(), rows, width);
      std::vector<Expected> want(static_cast<size_t>(rows * width), Expected{0, 0});
      const double scale = 1 / std::sqrt(static_cast<double>(width));
      const int64_t order = hadamard_reference::order_of(width);
      int64_t levels = order == 1 ? 0 : order == 12 ? 10 : 30;  // how far rounding grows in hadamard_steps.h
      while ((order << levels) < width) ++levels;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i)
          for (int64_t j = 0; j < width; ++j)
            want[static_cast<size_t>(r * width + i)].add(hadamard_reference::entry(order, width / order, i, j) * scale *
                                                         x[r * width + j]);
      const std::string what = text("hadamard ", width, dtype == nogemm::kF32 ? " float32" : " bfloat16");
      expect(matches(y, want, levels), what);
      control(y, want, levels, what);
      nogemm::kernels().hadamard.rows[dtype](x.data(), x.data(), scratch.data(), rows, width);
      expect(std::memcmp(x.data(), y.data(), static_cast<size_t>(rows * width) * (dtype == nogemm::kF32 ? 4 : 2)) == 0,
             what + " in place");
    }
  }
}
