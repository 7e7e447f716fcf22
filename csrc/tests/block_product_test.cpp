// One block of the block-diagonal product and of its gradients, against plain loops.
#include "check.h"

using namespace check;

namespace {

struct Case {
  int64_t tokens, outer, inner, extra;  // extra: columns of other blocks between the rows
};

const Case kCases[] = {{1, 1, 1, 0},    {7, 5, 9, 3},     {13, 64, 64, 64}, {6, 16, 130, 1},
                       {65, 33, 17, 0}, {70, 100, 70, 5}, {3, 8, 300, 2}};

void product(const Case& c, Dtype dtype, std::mt19937& rng) {
  const nogemm::BlockProductKernels& kernel = nogemm::kernels().block_product;
  const int64_t x_stride = c.inner + c.extra, y_stride = c.outer + c.extra;
  Buffer x = normal(rng, dtype, (c.tokens - 1) * x_stride + c.inner), w = normal(rng, dtype, c.outer * c.inner);
  std::vector<float> matrix(static_cast<size_t>(c.outer * c.inner));
  kernel.transpose[dtype](w.data(), matrix.data(), c.outer, c.inner);
  Buffer y(dtype, (c.tokens - 1) * y_stride + c.outer);
  kernel.apply[dtype](x.data(), x_stride, matrix.data(), y.data(), y_stride, c.tokens, c.inner, c.outer);
  Buffer tight(dtype, c.tokens * c.outer);
  std::vector<Expected> want(static_cast<size_t>(c.tokens * c.outer), Expected{0, 0});
  bool between = true;
  for (int64_t n = 0; n < c.tokens; ++n) {
    for (int64_t o = 0; o < c.outer; ++o) {
      tight.set(n * c.outer + o, y[n * y_stride + o]);
      for (int64_t i = 0; i < c.inner; ++i)
        want[static_cast<size_t>(n * c.outer + o)].add(static_cast<double>(x[n * x_stride + i]) * w[o * c.inner + i]);
    }
    for (int64_t e = 0; e < c.extra && n + 1 < c.tokens; ++e)
      between = between && std::isnan(y[n * y_stride + c.outer + e]);
  }
  const std::string what = text("block_product ", c.tokens, " x ", c.outer, " x ", c.inner, " dtype ", int{dtype});
  expect(matches(tight, want, c.inner) && y.guard_intact(), what);
  expect(between, what + ": wrote into other blocks");
  control(tight, want, c.inner, what);
  // A token alone gives the same bits as in the batch.
  Buffer alone(dtype, c.outer);
  const int64_t last = c.tokens - 1, item = dtype == nogemm::kF32 ? 4 : 2;
  kernel.apply[dtype](x.as<char>() + last * x_stride * item, x_stride, matrix.data(), alone.data(), y_stride, 1,
                      c.inner, c.outer);
  expect(std::memcmp(alone.data(), y.as<char>() + last * y_stride * item, static_cast<size_t>(c.outer * item)) == 0,
         what + ": depends on the batch");
}

void weight_grad(const Case& c, Dtype dtype, std::mt19937& rng) {
  const int64_t x_stride = c.inner + c.extra, g_stride = c.outer + c.extra;
  Buffer x = normal(rng, dtype, (c.tokens - 1) * x_stride + c.inner),
         g = normal(rng, dtype, (c.tokens - 1) * g_stride + c.outer);
  Buffer got(dtype, c.outer * c.inner);
  std::vector<float> scratch(static_cast<size_t>(c.outer * c.inner));
  nogemm::kernels().block_product.weight_grad[dtype](g.data(), g_stride, x.data(), x_stride, got.data(), scratch.data(),
                                                     c.tokens, c.outer, c.inner);
  std::vector<Expected> want(static_cast<size_t>(c.outer * c.inner), Expected{0, 0});
  for (int64_t n = 0; n < c.tokens; ++n)
    for (int64_t o = 0; o < c.outer; ++o)
      for (int64_t i = 0; i < c.inner; ++i)
        want[static_cast<size_t>(o * c.inner + i)].add(static_cast<double>(g[n * g_stride + o]) * x[n * x_stride + i]);
  const std::string what = text("weight_grad ", c.tokens, " x ", c.outer, " x ", c.inner, " dtype ", int{dtype});
  expect(matches(got, want, c.tokens), what);
  control(got, want, c.tokens, what);
}

}  // namespace

void block_product_tests() {
  std::mt19937 rng(2);
  for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16})
    for (const Case& c : kCases) {
      product(c, dtype, rng);
      weight_grad(c, dtype, rng);
      Buffer w = normal(rng, dtype, c.outer * c.inner);
      std::vector<float> wide(static_cast<size_t>(w.size()));
      nogemm::kernels().block_product.widen[dtype](w.data(), wide.data(), w.size());
      bool same = true;
      for (int64_t i = 0; i < w.size(); ++i) same = same && wide[static_cast<size_t>(i)] == w[i];
      expect(same, "widen");
    }
}
