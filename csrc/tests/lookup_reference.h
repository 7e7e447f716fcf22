// A LookupFFN written to be obviously right: double precision, one token at a time, the Hadamard matrix entry by entry.
// Shares no code with the kernels. Used by the tests and by the timing harness.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "packed/lookup/pack.h"
#include "tests/hadamard_reference.h"

namespace lookup_reference {

struct Shape {
  int64_t d, d_out, tables, bits;
  int64_t block;  // 0: dense projection
  int64_t rounds = 4;
  int64_t neighbours = 1;
  int64_t score = NOGEMM_LOOKUP_GELU;
  double mix = 1.0;
  bool norm = true;
  int64_t columns = 0;  // of each repeat; 0: all
  int64_t width = 0;    // padded; 0: the next power of two
};

struct Model {
  Shape shape;
  int64_t width = 1, repeats = 1, taken = 0;  // taken: columns of each repeat
  std::vector<float> gamma, beta, weight, proj_bias, rows, out_bias;
  std::vector<int8_t> signs;  // the Hadamard matrix [width, width]

  NogemmLookupSpec spec(int64_t mode) const {
    NogemmLookupSpec s{};
    s.mode = mode;
    s.d = shape.d;
    s.d_out = shape.d_out;
    s.tables = shape.tables;
    s.bits = shape.bits;
    s.neighbours = shape.neighbours;
    s.score = shape.score;
    s.projection = shape.block > 0 ? NOGEMM_LOOKUP_BH : NOGEMM_LOOKUP_DENSE;
    s.rounds = shape.rounds;
    s.block = shape.block;
    s.repeats = repeats;
    s.columns = shape.columns;
    s.width = shape.block > 0 ? width : 0;
    s.tables_dtype = NOGEMM_LOOKUP_FP32;
    s.eps = 1e-5;
    s.mix = shape.mix;
    s.gamma = shape.norm ? gamma.data() : nullptr;
    s.beta = shape.norm ? beta.data() : nullptr;
    s.weight = weight.data();
    s.proj_bias = proj_bias.data();
    s.table_rows = rows.data();
    s.out_bias = out_bias.data();
    return s;
  }
};

inline std::vector<float> normal(std::mt19937_64& rng, size_t count, double scale, double mean = 0) {
  std::normal_distribution<double> dist(mean, scale);
  std::vector<float> v(count);
  for (float& f : v) f = static_cast<float>(dist(rng));
  return v;
}

// Table values from a cheap generator: a large layer has tens of millions.
inline std::vector<float> uniform(uint64_t seed, size_t count, float scale) {
  std::vector<float> v(count);
  for (float& f : v) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    f = scale * (static_cast<float>(seed >> 40) / static_cast<float>(1 << 23) - 1.0f);
  }
  return v;
}

inline Model make_model(const Shape& shape, uint64_t seed) {
  std::mt19937_64 rng(seed);
  Model m;
  m.shape = shape;
  while (m.width < shape.d) m.width *= 2;
  if (shape.width > 0) m.width = shape.width;
  const int64_t columns = shape.tables * shape.bits;
  m.gamma = normal(rng, static_cast<size_t>(shape.d), 0.2, 1.0);
  m.beta = normal(rng, static_cast<size_t>(shape.d), 0.2);
  if (shape.block > 0) {
    m.taken = shape.columns > 0 ? shape.columns : m.width;
    m.repeats = (columns + m.taken - 1) / m.taken;
    m.weight = normal(rng, static_cast<size_t>(m.repeats * shape.rounds * m.width * shape.block),
                      1 / std::sqrt(static_cast<double>(shape.block)));
    const int64_t order = hadamard_reference::order_of(m.width);
    m.signs.reserve(static_cast<size_t>(m.width * m.width));
    for (int64_t o = 0; o < m.width; ++o)
      for (int64_t i = 0; i < m.width; ++i)
        m.signs.push_back(static_cast<int8_t>(hadamard_reference::entry(order, m.width / order, o, i)));
  } else {
    m.weight = normal(rng, static_cast<size_t>(columns * shape.d), 1 / std::sqrt(static_cast<double>(shape.d)));
  }
  m.proj_bias = normal(rng, static_cast<size_t>(columns), 0.1);
  m.rows = uniform(seed + 1, static_cast<size_t>(shape.tables * (int64_t{1} << shape.bits) * shape.d_out), 1.0f);
  m.out_bias = normal(rng, static_cast<size_t>(shape.d_out), 0.5);
  return m;
}

inline std::vector<double> projected(const Model& m, const float* x) {
  const Shape& s = m.shape;
  std::vector<double> v(static_cast<size_t>(m.width), 0.0);
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < s.d; ++i) mean += x[i] / static_cast<double>(s.d);
  for (int64_t i = 0; i < s.d; ++i) variance += (x[i] - mean) * (x[i] - mean) / static_cast<double>(s.d);
  for (int64_t i = 0; i < s.d; ++i)
    v[i] = s.norm ? (x[i] - mean) / std::sqrt(variance + 1e-5) * m.gamma[i] + m.beta[i] : x[i];
  const int64_t columns = s.tables * s.bits;
  std::vector<double> z(static_cast<size_t>(columns));
  if (s.block == 0) {
    for (int64_t c = 0; c < columns; ++c) {
      z[c] = m.proj_bias[c];
      for (int64_t i = 0; i < s.d; ++i) z[c] += static_cast<double>(m.weight[c * s.d + i]) * v[i];
    }
    return z;
  }
  const int64_t b = s.block, n = m.width / b;
  for (int64_t r = 0; r < m.repeats; ++r) {
    std::vector<double> u = v;
    for (int64_t j = 0; j < s.rounds; ++j) {
      std::vector<double> p(u.size(), 0.0), q(u.size(), 0.0);
      const float* w = m.weight.data() + (r * s.rounds + j) * n * b * b;
      for (int64_t o = 0; o < m.width; ++o)
        for (int64_t i = 0; i < b; ++i) p[o] += static_cast<double>(w[o * b + i]) * u[o / b * b + i];
      for (int64_t o = 0; o < m.width; ++o)
        for (int64_t i = 0; i < m.width; ++i) q[o] += m.signs[o * m.width + i] * p[i];
      for (double& f : q) f /= std::sqrt(static_cast<double>(m.width));
      u = q;
    }
    for (int64_t c = 0; c < m.taken && r * m.taken + c < columns; ++c)
      z[r * m.taken + c] = s.mix * u[c] + (1 - s.mix) * v[c] + m.proj_bias[r * m.taken + c];
  }
  return z;
}

// The rows a packed buffer of `mode` holds.
inline std::vector<float> stored_row(const Model& m, int64_t mode, int64_t row) {
  const int64_t n = m.shape.d_out;
  std::vector<float> out(m.rows.begin() + row * n, m.rows.begin() + (row + 1) * n);
  if (mode == NOGEMM_LOOKUP_BF16)
    for (float& f : out) {
      uint32_t u;
      std::memcpy(&u, &f, 4);
      u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
      std::memcpy(&f, &u, 4);
    }
  if (mode == NOGEMM_LOOKUP_INT8 || mode == NOGEMM_LOOKUP_INT4) {
    const float steps = mode == NOGEMM_LOOKUP_INT8 ? 127.0f : 7.0f;
    float most = 0;
    for (float f : out) most = std::max(most, std::fabs(f));
    for (float& f : out) f = most > 0 ? std::nearbyint(f * (steps / most)) * (most / steps) : 0.0f;
  }
  return out;
}

struct Choice {
  int64_t code;
  double score;
};

// The k flips with the smallest sum of |z|, by trying all of them.
inline std::vector<Choice> choices(const Shape& s, const double* z) {
  const int64_t rows = int64_t{1} << s.bits;
  double a = 0, p = 1;
  int64_t code = 0;
  for (int64_t j = 0; j < s.bits; ++j) {
    a += std::fabs(z[j]);
    p /= 1 + std::exp(-2 * std::fabs(z[j]));
    code = 2 * code + (z[j] > 0 ? 1 : 0);
  }
  std::vector<std::pair<double, int64_t>> flips;
  if (s.neighbours == 1) {
    flips.push_back({0.0, 0});
  } else {
    for (int64_t mask = 0; mask < rows; ++mask) {
      double sum = 0;
      for (int64_t j = 0; j < s.bits; ++j)
        if (mask >> (s.bits - 1 - j) & 1) sum += std::fabs(z[j]);
      flips.push_back({sum, mask});
    }
    std::sort(flips.begin(), flips.end());
  }
  std::vector<Choice> out;
  for (int64_t f = 0; f < s.neighbours; ++f) {
    const double sum = flips[f].first, weight = p * std::exp(-2 * sum);
    const double score = s.score == NOGEMM_LOOKUP_CONSTANT ? 1.0 / static_cast<double>(s.tables)
                         : s.score == NOGEMM_LOOKUP_GELU   ? (a - 2 * sum) * weight
                                                           : weight;
    out.push_back({code ^ flips[f].second, score});
  }
  return out;
}

inline void add_table(const Model& m, int64_t mode, int64_t table, const double* z, double sign,
                      std::vector<double>& y) {
  for (const Choice& c : choices(m.shape, z)) {
    const std::vector<float> row = stored_row(m, mode, (table << m.shape.bits) + c.code);
    for (size_t i = 0; i < y.size(); ++i) y[i] += sign * c.score * row[i];
  }
}

// 64-byte aligned bytes.
struct Buffer {
  explicit Buffer(int64_t count)
      : bytes(count), data(std::aligned_alloc(64, static_cast<size_t>((count + 127) / 64 * 64)), std::free) {}
  template <class T>
  T* as() const {
    return static_cast<T*>(data.get());
  }
  int64_t bytes;
  std::unique_ptr<void, void (*)(void*)> data;
};

inline Buffer pack(const NogemmLookupSpec& spec, const char** error) {
  const int64_t bytes = nogemm_lookup_pack_size(&spec);
  Buffer buffer(bytes > 0 ? bytes : 64);
  *error = nogemm_lookup_pack(&spec, buffer.as<void>(), buffer.bytes);
  return buffer;
}

}  // namespace lookup_reference
