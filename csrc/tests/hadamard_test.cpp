// The Hadamard transform against the definition, H[i][j] = (-1)^popcount(i & j) / sqrt(D).
#include "check.h"

using namespace check;

void hadamard_tests() {
  std::mt19937 rng(1);
  for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16}) {
    for (int64_t width = 1; width <= 2048; width *= 2) {
      const int64_t rows = 3;
      Buffer x = normal(rng, dtype, rows * width), y(dtype, rows * width);
      std::vector<float> scratch(static_cast<size_t>(width));
      nogemm::kernels().hadamard.rows[dtype](x.data(), y.data(), scratch.data(), rows, width);
      std::vector<Expected> want(static_cast<size_t>(rows * width), Expected{0, 0});
      const double scale = 1 / std::sqrt(static_cast<double>(width));
      int64_t levels = 0;
      while ((int64_t{1} << levels) < width) ++levels;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i)
          for (int64_t j = 0; j < width; ++j)
            want[static_cast<size_t>(r * width + i)].add(
                (__builtin_parityll(static_cast<uint64_t>(i & j)) ? -1 : 1) * scale * x[r * width + j]);
      const std::string what = text("hadamard ", width, dtype == nogemm::kF32 ? " float32" : " bfloat16");
      expect(matches(y, want, levels), what);
      control(y, want, levels, what);
      nogemm::kernels().hadamard.rows[dtype](x.data(), x.data(), scratch.data(), rows, width);
      expect(std::memcmp(x.data(), y.data(),
                         static_cast<size_t>(rows * width) * (dtype == nogemm::kF32 ? 4 : 2)) == 0,
             what + " in place");
    }
  }
}
