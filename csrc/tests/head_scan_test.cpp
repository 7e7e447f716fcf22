// The scan of a vocabulary head against plain loops: fixed point, estimates and bounds, the rows that are kept.
#include <algorithm>

#include "check.h"
#include "packed/host/round_up.h"

using namespace check;

namespace {

using nogemm::kHeadNumbers;
using nogemm::kSketchRows;

size_t at(int64_t i) { return static_cast<size_t>(i); }

struct alignas(64) Line {
  uint8_t bytes[64];
};

// Random codes of `rows` rows in the kernel's layout, and the same numbers row by row.
struct Codes {
  std::vector<Line> memory;
  std::vector<int> values;
  int64_t steps, width;

  Codes(std::mt19937& rng, int64_t groups, int64_t columns, bool nibbles)
      : steps((columns + (nibbles ? 7 : 3)) / (nibbles ? 8 : 4)), width(columns) {
    const int64_t rows = groups * kSketchRows, offset = nibbles ? 8 : 128;
    memory.resize(at(groups * steps * 4) + 1);
    values.assign(at(rows * width), 0);
    uint8_t* bytes = memory[0].bytes;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < steps * (nibbles ? 8 : 4); ++c) {
        const int value = c < width ? static_cast<int>(rng() % (nibbles ? 16 : 255)) - (nibbles ? 8 : 127) : 0;
        if (c < width) values[at(r * width + c)] = value;
        const int64_t step = nibbles ? c / 8 : c / 4, inside = nibbles ? c % 8 : c;
        uint8_t& byte = bytes[((r / kSketchRows * steps + step) * kSketchRows + r % kSketchRows) * 4 + inside % 4];
        const auto own = static_cast<uint8_t>(value + offset);
        byte = nibbles && inside >= 4 ? static_cast<uint8_t>((byte & 15) | (own << 4)) : own;
      }
    }
  }
};

struct Token {
  std::vector<float> y;
  std::vector<Line> planes;
  std::vector<nogemm::HeadRow> list;
  std::vector<float> estimates, noise;
  nogemm::HeadToken token{};
  float floor = -INFINITY;

  Token(std::mt19937& rng, int64_t width8, int64_t width4, int64_t width_rest, int64_t rows) {
    std::normal_distribution<float> draw;
    for (int64_t i = 0; i < width8 + width4 + width_rest; ++i) y.push_back(draw(rng));
    for (int64_t i = 0; i < rows; ++i) noise.push_back(draw(rng));
    y[0] = -40;  // the largest number is negative, and far from the others
    const int64_t padded8 = nogemm::round_up(width8, 64), padded4 = nogemm::round_up(width4, 64),
                  padded_rest = nogemm::round_up(width_rest, 64);
    planes.resize(at((2 * padded8 + padded4 + padded_rest) / 64) + 1);
    list.assign(at(rows + kSketchRows), {NAN, -1});
    estimates.assign(at(rows), NAN);
    auto* bytes = reinterpret_cast<int8_t*>(planes[0].bytes);
    const nogemm::HeadKernels& k = nogemm::kernels().head;
    const float lost8 = k.split(y.data(), width8, padded8, bytes, &token.eight);
    const float lost4 = k.round(y.data() + width8, width4, padded4, bytes + 2 * padded8, &token.four);
    const float lost =
        k.round(y.data() + width8 + width4, width_rest, padded_rest, bytes + 2 * padded8 + padded4, &token.rest);
    expect(lost8 <= 40.0f / 32384 * std::sqrt(static_cast<float>(width8)) && lost4 >= 0 && lost >= 0,
           "head split: what was lost");
    for (int64_t i = 0; i < width4; ++i)
      expect(std::fabs(coordinate(token.four, i) - static_cast<double>(y[at(width8 + i)])) <=
                 static_cast<double>(token.four.scale) * 0.5001,
             "head round: a coordinate");
    token.norm8 = 3, token.norm4 = 2, token.shift = 0.5f, token.slack = 0.01f;
    token.list = list.data(), token.noise = noise.data();
  }

  // The coordinate that the planes hold.
  double coordinate(const nogemm::FixedToken& t, int64_t i) const {
    return static_cast<double>(t.scale) * (t.low == nullptr ? t.high[i] : 254 * t.high[i] + t.low[i]);
  }
};

struct Case {
  int64_t rows, width8, width4, width_rest, count;
};

void scan(std::mt19937& rng, const Case& c) {
  const int64_t groups = nogemm::round_up(c.rows, kSketchRows) / kSketchRows, padded = groups * kSketchRows;
  const Codes eight(rng, groups, c.width8, false), four(rng, groups, c.width4, true),
      rest(rng, groups, c.width_rest, true);
  Buffer numbers(nogemm::kBF16, padded * kHeadNumbers);
  std::vector<float> bias(at(c.rows));
  for (float& b : bias) b = 0.001f * static_cast<float>(rng() % 100);
  for (int64_t i = 0; i < padded * kHeadNumbers; ++i) numbers.set(i, 0.001f * static_cast<float>(1 + rng() % 7));
  std::vector<Token> tokens;
  std::vector<nogemm::HeadToken> given, estimated;
  for (int64_t t = 0; t < c.count; ++t) tokens.emplace_back(rng, c.width8, c.width4, c.width_rest, c.rows);
  const nogemm::HeadCodes codes{eight.memory[0].bytes,
                                four.memory[0].bytes,
                                rest.memory[0].bytes,
                                numbers.as<nogemm::bf16>(),
                                bias.data(),
                                eight.steps,
                                four.steps,
                                rest.steps,
                                c.rows};
  for (Token& t : tokens) {
    given.push_back(t.token);
    given.back().floor = &t.floor;
  }
  nogemm::kernels().head.scan(codes, 0, groups, given.data(), c.count);
  const auto number = [&](int64_t row, int64_t which) {
    return static_cast<double>(numbers[(row / kSketchRows * kHeadNumbers + which) * kSketchRows + row % kSketchRows]);
  };
  const auto estimate = [&](const Token& t, int64_t row) {
    double sum8 = 0, sum4 = 0;
    for (int64_t i = 0; i < c.width8; ++i)
      sum8 += eight.values[at(row * c.width8 + i)] * t.coordinate(t.token.eight, i);
    for (int64_t i = 0; i < c.width4; ++i) sum4 += four.values[at(row * c.width4 + i)] * t.coordinate(t.token.four, i);
    for (int64_t i = 0; i < c.width_rest; ++i)
      sum4 += rest.values[at(row * c.width_rest + i)] * t.coordinate(t.token.rest, i);
    return 0.5 + static_cast<double>(bias[at(row)]) + static_cast<double>(t.noise[at(row)]) + sum8 * number(row, 0) +
           sum4 * number(row, 1);
  };
  const auto bound = [&](int64_t row) { return 3 * number(row, 2) + 2 * number(row, 3) + 0.01; };
  for (int64_t t = 0; t < c.count; ++t) {
    const nogemm::HeadToken& got = given[at(t)];
    const Token& own = tokens[at(t)];
    double floor = -INFINITY;
    for (int64_t row = 0; row < c.rows; ++row) floor = std::max(floor, estimate(own, row) - bound(row));
    const std::string what = text("head scan ", c.rows, "x", c.width8, "+", c.width4, "+", c.width_rest, " token ", t);
    expect(std::fabs(*got.floor - floor) < 1e-4 * (1 + std::fabs(floor)), what + ": floor");
    std::vector<bool> kept(at(c.rows), false);
    for (int64_t i = 0; i < got.count; ++i) {
      const int64_t row = got.list[i].index;
      expect(row >= 0 && row < c.rows && (i == 0 || row > got.list[i - 1].index), what + ": order");
      if (row < 0 || row >= c.rows) return;
      kept[at(row)] = true;
      const double upper = estimate(own, row) + bound(row);
      expect(std::fabs(got.list[i].value - upper) < 1e-4 * (1 + std::fabs(upper)), what + ": upper bound");
    }
    for (int64_t row = 0; row < c.rows; ++row)
      expect(kept[at(row)] || estimate(own, row) + bound(row) < floor + 1e-3, what + ": a row that may win is missing");
    expect(got.count < padded || c.rows <= 2 * kSketchRows, what + ": no row was ruled out");
  }
  for (Token& t : tokens) {
    estimated.push_back(t.token);
    estimated.back().estimates = t.estimates.data();
  }
  nogemm::kernels().head.estimate(codes, 0, groups, estimated.data(), c.count);
  for (int64_t t = 0; t < c.count; ++t) {
    const std::string what = text("head estimate ", c.rows, "x", c.width8, "+", c.width4, " token ", t);
    const Token& own = tokens[at(t)];
    for (int64_t row = 0; row < c.rows; ++row) {
      const double right = estimate(own, row);
      expect(std::fabs(own.estimates[at(row)] - right) < 1e-4 * (1 + std::fabs(right)), what);
    }
  }
}

}  // namespace

void head_scan_tests() {
  std::mt19937 rng(11);
  for (const int64_t rows : {1, 63, 65, 500})
    for (const int64_t count : {1, 2, 5}) scan(rng, {rows, 16, 24, 19, count});
  scan(rng, {300, 64, 96, 416, 4});
  scan(rng, {300, 7, 1, 0, 1});
  scan(rng, {300, 0, 0, 40, 3});
}
