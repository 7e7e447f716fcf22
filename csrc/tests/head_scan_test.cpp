// The scan of a vocabulary head against plain loops: fixed point, estimates and bounds, the rows that are kept.
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
  std::vector<int32_t> index;
  std::vector<float> upper;
  nogemm::HeadToken token{};

  Token(std::mt19937& rng, int64_t width8, int64_t width4, int64_t rows) {
    std::normal_distribution<float> draw;
    for (int64_t i = 0; i < width8 + width4; ++i) y.push_back(draw(rng));
    y[0] = -40;  // the largest number is negative, and far from the others
    const int64_t padded8 = nogemm::round_up(width8, 64), padded4 = nogemm::round_up(width4, 64);
    planes.resize(at(2 * (padded8 + padded4) / 64) + 1);
    index.assign(at(rows), -1);
    upper.assign(at(rows), NAN);
    auto* bytes = reinterpret_cast<int8_t*>(planes[0].bytes);
    const nogemm::HeadKernels& k = nogemm::kernels().head;
    const float lost8 = k.split(y.data(), width8, padded8, bytes, &token.eight);
    const float lost4 = k.split(y.data() + width8, width4, padded4, bytes + 2 * padded8, &token.four);
    expect(lost8 <= 40.0f / 32384 * std::sqrt(static_cast<float>(width8)) && lost4 >= 0, "head split: what was lost");
    token.norm8 = 3, token.norm4 = 2, token.shift = 0.5f, token.slack = 0.01f, token.floor = -INFINITY;
    token.index = index.data(), token.upper = upper.data();
  }

  // The coordinate that the planes hold.
  double coordinate(const nogemm::FixedToken& t, int64_t i) const {
    return static_cast<double>(t.scale) * (254 * t.high[i] + t.low[i]);
  }
};

void scan(std::mt19937& rng, int64_t rows, int64_t width8, int64_t width4, int64_t count) {
  const int64_t groups = nogemm::round_up(rows, kSketchRows) / kSketchRows, padded = groups * kSketchRows;
  const Codes eight(rng, groups, width8, false), four(rng, groups, width4, true);
  Buffer numbers(nogemm::kBF16, padded * kHeadNumbers);
  std::vector<float> bias(at(padded), 0.25f);
  for (int64_t i = 0; i < padded * kHeadNumbers; ++i) numbers.set(i, 0.001f * static_cast<float>(1 + rng() % 7));
  std::vector<Token> tokens;
  std::vector<nogemm::HeadToken> given;
  for (int64_t t = 0; t < count; ++t) tokens.emplace_back(rng, width8, width4, padded);
  for (Token& t : tokens) given.push_back(t.token);
  const nogemm::HeadCodes codes{eight.memory[0].bytes,
                                four.memory[0].bytes,
                                numbers.as<nogemm::bf16>(),
                                bias.data(),
                                eight.steps,
                                four.steps,
                                rows};
  nogemm::kernels().head.scan(codes, 0, groups, given.data(), count);
  for (int64_t t = 0; t < count; ++t) {
    const nogemm::HeadToken& got = given[at(t)];
    const auto number = [&](int64_t row, int64_t which) {
      return static_cast<double>(numbers[(row / kSketchRows * kHeadNumbers + which) * kSketchRows + row % kSketchRows]);
    };
    const auto bounds = [&](int64_t row, double side) {
      double sum8 = 0, sum4 = 0;
      for (int64_t c = 0; c < width8; ++c)
        sum8 += eight.values[at(row * width8 + c)] * tokens[at(t)].coordinate(got.eight, c);
      for (int64_t c = 0; c < width4; ++c)
        sum4 += four.values[at(row * width4 + c)] * tokens[at(t)].coordinate(got.four, c);
      return 0.5 + 0.25 + sum8 * number(row, 0) + sum4 * number(row, 1) +
             side * (3 * number(row, 2) + 2 * number(row, 3) + 0.01);
    };
    double floor = -INFINITY;
    for (int64_t row = 0; row < padded; ++row) floor = std::max(floor, bounds(row, -1));  // random, where heads repeat
    const std::string what = text("head scan ", rows, "x", width8, "+", width4, " token ", t);
    expect(std::fabs(got.floor - floor) < 1e-4 * (1 + std::fabs(floor)), what + ": floor");
    std::vector<bool> kept(at(rows), false);
    for (int64_t i = 0; i < got.count; ++i) {
      const int64_t row = got.index[i];
      expect(row >= 0 && row < rows && (i == 0 || row > got.index[i - 1]), what + ": order");
      if (row < 0 || row >= rows) return;
      kept[at(row)] = true;
      const double upper = bounds(row, 1);
      expect(std::fabs(got.upper[i] - upper) < 1e-4 * (1 + std::fabs(upper)), what + ": upper bound");
    }
    for (int64_t row = 0; row < rows; ++row)
      expect(kept[at(row)] || bounds(row, 1) < floor + 1e-3, what + ": a row that may win is missing");
    expect(got.count < padded || rows <= 2 * kSketchRows, what + ": no row was ruled out");
  }
}

}  // namespace

void head_scan_tests() {
  std::mt19937 rng(11);
  for (const int64_t rows : {1, 63, 65, 500})
    for (const int64_t count : {1, 2, 5}) scan(rng, rows, 16, 43, count);
  scan(rng, 300, 64, 512, 3);
  scan(rng, 300, 7, 1, 1);
}
