// gather_accumulate and its gradients against plain loops, and the range check of codes.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

struct Case {
  int64_t tokens, tables, rows, width, k, group;
};

const Case kCases[] = {{1, 1, 2, 1, 1, 1},     {5, 3, 16, 33, 2, 2}, {40, 7, 8, 130, 1, 3},  {9, 5, 4, 64, 4, 16},
                       {70, 2, 16, 200, 1, 1}, {3, 21, 5, 95, 2, 8}, {25, 4, 32, 128, 1, 4}, {100, 3, 2, 17, 1, 2}};

struct Data {
  nogemm::GatherShape shape;
  std::vector<int32_t> codes;
  Buffer scores, tables;
  std::vector<float> row_scale;

  Data(const Case& c, Dtype dtype, Dtype rows, std::mt19937& rng)
      : shape{c.tokens, c.tables, c.rows, c.width, c.k, c.group},
        scores(normal(rng, dtype, c.tokens * c.tables * c.k)),
        tables(normal(rng, rows, c.tables * c.rows * c.width)) {
    for (int64_t i = 0; i < scores.size(); ++i)
      codes.push_back(static_cast<int32_t>(rng() % static_cast<uint32_t>(c.rows)));
    for (int64_t i = 0; i < c.tables * c.rows; ++i) row_scale.push_back(0.5f + static_cast<float>(i % 5));
  }
  // The table row of flat index i, as an offset in tables.
  int64_t row(int64_t i) const {
    return (i / shape.neighbours % shape.tables * shape.rows + codes[static_cast<size_t>(i)]);
  }
};

std::string name_of(const Case& c, Dtype dtype, Dtype rows) {
  return text("gather N ", c.tokens, " T ", c.tables, " R ", c.rows, " D ", c.width, " k ", c.k, " dtypes ", int{dtype},
              " ", int{rows});
}

void forward(const Case& c, Dtype dtype, Dtype rows, std::mt19937& rng) {
  Data d(c, dtype, rows, rng);
  const nogemm::GatherKernels& kernel = nogemm::kernels().gather;
  const bool scaled = rows == nogemm::kI8;
  std::vector<nogemm::GatherEntry> plan(d.codes.size());
  std::vector<float> sums(static_cast<size_t>(c.tokens * kernel.slice));
  Buffer y(dtype, c.tokens * c.width);
  const int64_t half = c.tokens / 2;
  const float* scale = scaled ? d.row_scale.data() : nullptr;
  int64_t wrong = kernel.plan[dtype](d.shape, d.codes.data(), d.scores.data(), scale, plan.data(), half, c.tokens);
  wrong = wrong < 0 ? kernel.plan[dtype](d.shape, d.codes.data(), d.scores.data(), scale, plan.data(), 0, half) : wrong;
  for (int64_t column = 0; column < c.width; column += kernel.slice) {
    kernel.forward[rows](d.shape, plan.data(), d.tables.data(), column, sums.data(), half, c.tokens);
    kernel.forward[rows](d.shape, plan.data(), d.tables.data(), column, sums.data(), 0, half);
    kernel.finish[dtype](d.shape, sums.data(), column, y.data(), 0, c.tokens);
  }
  std::vector<Expected> want(static_cast<size_t>(y.size()), Expected{0, 0});
  const int64_t per_token = c.tables * c.k;
  for (int64_t i = 0; i < c.tokens * per_token; ++i)
    for (int64_t e = 0; e < c.width; ++e)
      want[static_cast<size_t>(i / per_token * c.width + e)].add(
          static_cast<double>(d.scores[i]) * (scaled ? d.row_scale[static_cast<size_t>(d.row(i))] : 1.0f) *
          d.tables[d.row(i) * c.width + e]);
  const std::string what = name_of(c, dtype, rows);
  expect(wrong == -1, what + ": good codes were refused");
  expect(matches(y, want, per_token + 1), what);
  control(y, want, per_token + 1, what);
}

void backward(const Case& c, Dtype dtype, Dtype rows, std::mt19937& rng) {
  Data d(c, dtype, rows, rng);
  Buffer grad = normal(rng, dtype, c.tokens * c.width), grad_tables(rows, d.tables.size()),
         grad_scores(dtype, d.scores.size());
  const nogemm::GatherKernels& kernel = nogemm::kernels().gather;
  const size_t pairs = static_cast<size_t>(c.tokens * c.k);
  std::vector<int32_t> starts(static_cast<size_t>(c.rows + 1));
  std::vector<nogemm::GatherEntry> order(pairs);
  std::vector<float> sliced(static_cast<size_t>(c.tokens * kernel.slice)), dots(pairs),
      by_token(pairs * static_cast<size_t>(c.tables));
  int64_t wrong = -1;
  for (int64_t t = 0; t < c.tables; ++t) {
    wrong =
        std::max(wrong, kernel.bucket[dtype](d.shape, d.codes.data(), d.scores.data(), t, starts.data(), order.data()));
    for (int64_t column = 0; column < c.width; column += kernel.slice) {
      kernel.slice_grad[dtype](d.shape, grad.data(), column, sliced.data(), 0, c.tokens);
      kernel.backward[rows](d.shape, starts.data(), order.data(), sliced.data(), d.tables.data(), t, column,
                            grad_tables.data(), dots.data());
    }
    kernel.unsort(d.shape, order.data(), dots.data(), by_token.data() + static_cast<size_t>(t) * pairs);
  }
  kernel.score_grad[dtype](d.shape, by_token.data(), grad_scores.data(), 0, c.tokens);

  std::vector<Expected> want_tables(static_cast<size_t>(grad_tables.size()), Expected{0, 0}),
      want_scores(d.codes.size(), Expected{0, 0});
  const int64_t per_token = c.tables * c.k;
  for (int64_t i = 0; i < c.tokens * per_token; ++i)
    for (int64_t e = 0; e < c.width; ++e) {
      const double g = grad[i / per_token * c.width + e];
      want_tables[static_cast<size_t>(d.row(i) * c.width + e)].add(g * d.scores[i]);
      want_scores[static_cast<size_t>(i)].add(g * d.tables[d.row(i) * c.width + e]);
    }
  const std::string what = name_of(c, dtype, rows) + " backward";
  expect(wrong == -1, what + ": good codes were refused");
  expect(matches(grad_tables, want_tables, c.tokens * c.k), what + ": tables");
  expect(matches(grad_scores, want_scores, c.width), what + ": scores");
  control(grad_tables, want_tables, c.tokens * c.k, what + ": tables");
  control(grad_scores, want_scores, c.width, what + ": scores");
}

void range_check(std::mt19937& rng) {
  const Case c{6, 4, 8, 16, 2, 3};
  const nogemm::GatherKernels& kernel = nogemm::kernels().gather;
  for (int32_t bad : {-1, 8, 1 << 30, INT32_MIN}) {
    Data d(c, nogemm::kF32, nogemm::kF32, rng);
    const int64_t at = 3 * c.tables * c.k + 2 * c.k + 1;  // token 3, table 2, neighbour 1
    d.codes[static_cast<size_t>(at)] = bad;
    std::vector<nogemm::GatherEntry> plan(d.codes.size()), order(static_cast<size_t>(c.tokens * c.k));
    std::vector<int32_t> starts(static_cast<size_t>(c.rows + 1));
    expect(kernel.plan[nogemm::kF32](d.shape, d.codes.data(), d.scores.data(), nullptr, plan.data(), 0, c.tokens) == at,
           "plan names the bad code");
    for (int64_t t = 0; t < c.tables; ++t)
      expect(kernel.bucket[nogemm::kF32](d.shape, d.codes.data(), d.scores.data(), t, starts.data(), order.data()) ==
                 (t == 2 ? at : -1),
             "bucket names the bad code");
  }
}

}  // namespace

void gather_tests() {
  std::mt19937 rng(4);
  range_check(rng);
  for (const Case& c : kCases)
    for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16})
      for (const Dtype rows : {nogemm::kF32, nogemm::kBF16, nogemm::kI8}) {
        forward(c, dtype, rows, rng);
        if (rows != nogemm::kI8) backward(c, dtype, rows, rng);
      }
}
