// Rows named by lists (dots, sums, outer products, one slice of columns at a time) and bucket unions against
// plain loops.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

struct Case {
  int64_t tokens, visits, rows, width;
};

const Case kCases[] = {{1, 1, 1, 1}, {3, 2, 4, 5}, {17, 9, 6, 65}, {40, 7, 31, 200}, {5, 0, 3, 64}};

struct Data {
  std::vector<int32_t> index, starts, token, place;
  std::vector<float> weights, sorted;
  Buffer x, rows;

  Data(const Case& c, Dtype dtype, std::mt19937& rng)
      : x(normal(rng, dtype, c.tokens * c.width)), rows(normal(rng, dtype, c.rows * c.width)) {
    std::normal_distribution<float> draw;
    for (int64_t i = 0; i < c.tokens * c.visits; ++i) {
      index.push_back(static_cast<int32_t>(rng() % static_cast<uint32_t>(c.rows + 1)) - 1);
      weights.push_back(draw(rng));
    }
    starts.push_back(0);
    for (int32_t r = 0; r < c.rows; ++r) {
      for (size_t i = 0; i < index.size(); ++i) {
        if (index[i] != r) continue;
        token.push_back(static_cast<int32_t>(static_cast<int64_t>(i) / c.visits));
        place.push_back(static_cast<int32_t>(i));
        sorted.push_back(weights[i]);
      }
      starts.push_back(static_cast<int32_t>(token.size()));
    }
  }
};

// Columns of a matrix side by side, as the kernels want them.
std::vector<float> cut(Buffer& matrix, int64_t rows, int64_t width, int64_t column) {
  const nogemm::NeuronKernels& k = nogemm::kernels().neuron;
  std::vector<float> sliced(static_cast<size_t>(rows * k.slice), NAN);
  nogemm::GatherShape shape{};
  shape.tokens = rows;
  shape.width = width;
  k.copy[matrix.dtype()](shape, matrix.data(), column, sliced.data(), 0, rows);
  return sliced;
}

void dots_and_outer(const Case& c, Dtype dtype, std::mt19937& rng) {
  const nogemm::NeuronKernels& k = nogemm::kernels().neuron;
  Data d(c, dtype, rng);
  Buffer grad(dtype, c.rows * c.width), dots(nogemm::kF32, static_cast<int64_t>(d.token.size()));
  for (int64_t column = 0; column < c.width; column += k.slice) {
    const std::vector<float> sliced = cut(d.x, c.tokens, c.width, column);
    const nogemm::NeuronPass pass{d.starts.data(), d.token.data(),   d.sorted.data(), sliced.data(), d.rows.data(),
                                  grad.data(),     dots.as<float>(), c.width,         column};
    const int64_t half = c.rows / 2;
    for (const auto& range : {std::pair<int64_t, int64_t>{half, c.rows}, {0, half}}) {
      k.dots[dtype](pass, range.first, range.second);
      k.outer[dtype](pass, range.first, range.second);
    }
  }
  std::vector<Expected> dot(d.token.size()), outer(static_cast<size_t>(c.rows * c.width));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int32_t e = d.starts[static_cast<size_t>(r)]; e < d.starts[static_cast<size_t>(r) + 1]; ++e)
      for (int64_t i = 0; i < c.width; ++i) {
        const size_t use = static_cast<size_t>(e);
        const double x = d.x[d.token[use] * c.width + i];
        dot[use].add(x * d.rows[r * c.width + i]);
        outer[static_cast<size_t>(r * c.width + i)].add(x * d.sorted[use]);
      }
  const std::string name = text("neuron rows N ", c.tokens, " P ", c.visits, " R ", c.rows, " D ", c.width);
  expect(matches(dots, dot, c.width), name + ": dots");
  control(dots, dot, c.width, name + ": dots");
  expect(matches(grad, outer, c.tokens), name + ": outer");
  control(grad, outer, c.tokens, name + ": outer");
}

void sums(const Case& c, Dtype dtype, std::mt19937& rng) {
  const nogemm::NeuronKernels& k = nogemm::kernels().neuron;
  Data d(c, dtype, rng);
  Buffer y(dtype, c.tokens * c.width);
  for (int64_t column = 0; column < c.width; column += k.slice) {
    const std::vector<float> sliced = cut(d.rows, c.rows, c.width, column);
    const nogemm::NeuronSums pass{d.index.data(), d.weights.data(), sliced.data(), y.data(), c.visits, c.width, column};
    k.sums[dtype](pass, c.tokens / 2, c.tokens);
    k.sums[dtype](pass, 0, c.tokens / 2);
  }
  std::vector<Expected> want(static_cast<size_t>(c.tokens * c.width));
  for (size_t i = 0; i < d.index.size(); ++i)
    for (int64_t column = 0; d.index[i] >= 0 && column < c.width; ++column)
      want[i / static_cast<size_t>(c.visits) * static_cast<size_t>(c.width) + static_cast<size_t>(column)].add(
          static_cast<double>(d.weights[i]) * d.rows[d.index[i] * c.width + column]);
  const std::string name = text("neuron sums N ", c.tokens, " P ", c.visits, " D ", c.width);
  expect(matches(y, want, c.visits), name);
  control(y, want, c.visits, name);
}

void unions(int64_t tokens, int64_t tables, int64_t width, std::mt19937& rng) {
  std::vector<int32_t> codes, neurons;
  for (int64_t i = 0; i < tokens * tables; ++i) codes.push_back(static_cast<int32_t>(rng() % 9));
  for (int64_t i = 0; i < tables * width; ++i) neurons.push_back(static_cast<int32_t>(rng() % 9));
  const auto wanted = [&] {
    std::vector<uint8_t> mask;
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t f = 0; f < width; ++f) {
        bool hit = false;
        for (int64_t t = 0; t < tables; ++t)
          hit = hit || codes[static_cast<size_t>(n * tables + t)] == neurons[static_cast<size_t>(t * width + f)];
        mask.push_back(hit ? 1 : 0);
      }
    return mask;
  };
  std::vector<uint8_t> mask(static_cast<size_t>(tokens * width + 1), 7);
  nogemm::kernels().bucket_union(codes.data(), neurons.data(), tables, width, mask.data(), tokens / 2, tokens);
  nogemm::kernels().bucket_union(codes.data(), neurons.data(), tables, width, mask.data(), 0, tokens / 2);
  expect(mask.back() == 7, "bucket union wrote beyond its end");
  mask.pop_back();
  expect(mask == wanted(), text("bucket union N ", tokens, " T ", tables, " F ", width));
  codes[0] = neurons[0] = 11;
  std::vector<uint8_t> other = wanted();
  other[0] ^= 1;
  expect(mask != other, "bucket union: control: another mask passed");
}

// One optimiser step against double precision; the rows that are not named stay.
void adam(int64_t width, std::mt19937& rng) {
  const int64_t rows = 6;
  const int32_t index[] = {4, 1, 3};
  Buffer p = normal(rng, nogemm::kF32, rows * width), m = normal(rng, nogemm::kF32, rows * width),
         v = normal(rng, nogemm::kF32, rows * width), g = normal(rng, nogemm::kF32, 3 * width);
  for (int64_t i = 0; i < rows * width; ++i) v.set(i, std::fabs(v[i]));
  const float arrears[] = {1.0f, 0.0f, 0.9f, 0.99f, 0.98f, 0.003f, 0.7f, 0.9f, 0.9f, 0.01f, 0.5f, 0.8f};
  const nogemm::RowAdam a{p.as<float>(), m.as<float>(), v.as<float>(), index, g.as<float>(), arrears, width,
                          0.9f,          0.99f,         0.002f,        1.1f,  1e-6f,         0.97f};
  std::vector<Expected> mean, square, param;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) {
      const int64_t named = std::find(index, index + 3, r) - index, at = r * width + c;
      Expected em{m[at], 0}, ev{v[at], 0}, ep{p[at], 0};
      if (named < 3) {
        const float* due = arrears + 4 * named;
        const double gi = g[named * width + c];
        em = ev = ep = Expected{0, 0};
        em.add(static_cast<double>(due[2]) * m[at]), em.add((1.0f - a.beta1) * gi);
        ev.add(static_cast<double>(due[3]) * v[at]), ev.add((1.0f - a.beta2) * gi * gi);
        const double keep = a.keep, late = due[1] * (m[at] / (std::sqrt(static_cast<double>(v[at])) + a.eps));
        ep.add(keep * due[0] * p[at]), ep.add(-keep * late);
        ep.add(-a.step * em.value / (a.root * std::sqrt(ev.value) + a.eps));
        ep.magnitude += a.step * em.magnitude / (a.root * std::sqrt(ev.value) + a.eps);
      }
      mean.push_back(em), square.push_back(ev), param.push_back(ep);
    }
  nogemm::kernels().neuron.adam(a, 1, 3);
  nogemm::kernels().neuron.adam(a, 0, 1);
  const std::string name = text("row adam D ", width);
  expect(matches(m, mean, 4) && matches(v, square, 4) && matches(p, param, 16), name);
  control(m, mean, 4, name), control(v, square, 4, name), control(p, param, 16, name);
}

}  // namespace

void neuron_rows_tests() {
  std::mt19937 rng(11);
  for (const Case& c : kCases)
    for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16}) {
      dots_and_outer(c, dtype, rng);
      sums(c, dtype, rng);
    }
  unions(1, 1, 1, rng);
  unions(5, 3, 37, rng);
  unions(3, 16, 1025, rng);
  for (const int64_t width : {1, 7, 64, 131}) adam(width, rng);
}
