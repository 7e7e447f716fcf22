// HiRE's kernels against plain loops: the sketch's integer scores, the largest keys, and bundled rows.
#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"
#include "packed/host/activations.h"

using namespace check;

namespace {

const nogemm::HireKernels& kernel() { return nogemm::kernels().hire; }
size_t at(int64_t i) { return static_cast<size_t>(i); }
nogemm::HireMode mode_of(Dtype dtype) {
  return dtype == nogemm::kF32 ? nogemm::kHireF32 : dtype == nogemm::kBF16 ? nogemm::kHireBF16 : nogemm::kHireI8;
}

// 64-byte aligned bytes, as packed buffers are.
struct alignas(64) Line {
  uint8_t bytes[64];
};

std::vector<float> normals(std::mt19937& rng, int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> values(at(count));
  for (float& v : values) v = draw(rng);
  return values;
}

// The layout of packed/neurons/format.h.
std::vector<Line> lay_out(const std::vector<int>& codes, int64_t rows, int64_t width, int64_t steps, bool nibbles) {
  const int64_t groups = (rows + nogemm::kSketchRows - 1) / nogemm::kSketchRows;
  // The kernel fetches ahead, but never reads, beyond the end.
  std::vector<Line> lines(at(groups * steps * 4));
  uint8_t* out = lines[0].bytes;
  const auto code = [&](int64_t r, int64_t c) { return r < rows && c < width ? codes[at(r * width + c)] : 0; };
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t r = 0; r < nogemm::kSketchRows; ++r)
        for (int64_t j = 0; j < 4; ++j, ++out) {
          const int64_t row = g * nogemm::kSketchRows + r;
          *out = static_cast<uint8_t>(nibbles ? (code(row, 8 * s + j) + 8) | ((code(row, 8 * s + 4 + j) + 8) << 4)
                                              : code(row, 4 * s + j) + 128);
        }
  return lines;
}

// `extreme`: the largest and least numbers alone, so that a sum that were too narrow for its products would
// overflow.
void sketch(int64_t rows, int64_t width, int64_t count, bool nibbles, bool extreme, std::mt19937& rng) {
  const std::string name =
      text("sketch F ", rows, " R ", width, " N ", count, nibbles ? " int4" : " int8", extreme ? " extreme" : "");
  const int64_t columns = nibbles ? 8 : 4, steps = (width + columns - 1) / columns;
  const int64_t groups = (rows + nogemm::kSketchRows - 1) / nogemm::kSketchRows, padded = groups * nogemm::kSketchRows;
  std::vector<int> codes(at(rows * width));
  for (int& c : codes) c = static_cast<int>(rng() % (nibbles ? 16u : 255u)) - (nibbles ? 8 : 127);
  std::vector<float> x = normals(rng, count * width);
  if (extreme) {
    for (int64_t i = 0; i < rows * width; ++i)
      codes[at(i)] = i / width % 2 ? (nibbles ? 7 : 127) : (nibbles ? -8 : -128);
    for (int64_t i = 0; i < count * width; ++i) x[at(i)] = i / width % 2 ? -2.0f : 2.0f;
  }
  const std::vector<Line> lines = lay_out(codes, rows, width, steps, nibbles);
  std::vector<float> scale(at(padded), 0.0f), bias(at(padded), 0.0f);
  for (int64_t r = 0; r < rows; ++r)
    scale[at(r)] = 0.01f + static_cast<float>(r % 7), bias[at(r)] = static_cast<float>(r % 5);
  std::vector<int8_t> q(at(count * steps * columns), 99);
  std::vector<Buffer> scores;
  std::vector<nogemm::SketchToken> tokens;
  for (int64_t n = 0; n < count; ++n) scores.emplace_back(nogemm::kF32, padded);
  for (int64_t n = 0; n < count; ++n) {
    nogemm::SketchToken t{};
    int8_t* own = q.data() + n * steps * columns;
    t.scale = kernel().token(x.data() + n * width, width, steps * columns, own, &t.sum);
    t.codes = own;
    t.scores = scores[at(n)].as<float>();
    tokens.push_back(t);
    float most = 0;
    for (int64_t i = 0; i < width; ++i) most = std::max(most, std::fabs(x[at(n * width + i)]));
    bool rounded = std::fabs(t.scale - most / 127.0f) <= 1e-6f * most;
    for (int64_t i = 0; i < steps * columns; ++i)
      rounded =
          rounded && (i < width ? std::fabs(own[i] * t.scale - x[at(n * width + i)]) <= 0.501f * t.scale : own[i] == 0);
    expect(rounded && t.sum == std::accumulate(own, own + width, 0), name + ": token");
  }
  const nogemm::SketchRows w{lines[0].bytes, scale.data(), bias.data(), steps, nibbles};
  kernel().scores(w, groups / 2, groups, tokens.data(), count);
  kernel().scores(w, 0, groups / 2, tokens.data(), count);
  for (int64_t n = 0; n < count; ++n) {
    std::vector<Expected> want(at(padded));
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      for (int64_t c = 0; c < width; ++c) sum += codes[at(r * width + c)] * tokens[at(n)].codes[c];
      want[at(r)].add(static_cast<double>(sum) * (tokens[at(n)].scale * scale[at(r)]));
      want[at(r)].add(bias[at(r)]);
    }
    expect(matches(scores[at(n)], want, 3), name);
    control(scores[at(n)], want, 3, name);
  }
}

void broken_token() {
  std::vector<float> x(37, 1.0f);
  x[36] = INFINITY;
  std::vector<int8_t> codes(40, 99);
  int32_t sum = 5;
  const float scale = kernel().token(x.data(), 37, 40, codes.data(), &sum);
  expect(scale == 0.0f && sum == 0 && std::count(codes.begin(), codes.end(), 0) == 40, "a broken token gives zeros");
}

void select(std::vector<float> keys, int64_t count, const std::string& name) {
  const int64_t n = static_cast<int64_t>(keys.size());
  std::vector<int32_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {  // NaN above all numbers
    const float first = keys[at(a)], second = keys[at(b)];
    return std::isnan(first) != std::isnan(second) ? std::isnan(first) : first > second;
  });
  order.resize(at(std::min(count, n)));
  std::sort(order.begin(), order.end());
  std::vector<int32_t> chosen(keys.size() + 1, -7);
  const int64_t found = kernel().select(keys.data(), n, count, chosen.data());
  expect(chosen[at(found)] == -7 && found == static_cast<int64_t>(order.size()), name + ": count");
  chosen.resize(at(found));
  expect(chosen == order, name);
  if (found > 0 && found < n) {
    for (int32_t i = 0; i < n; ++i)
      if (!std::binary_search(order.begin(), order.end(), i)) {
        chosen[0] = i;
        break;
      }
    expect(chosen != order, name + ": control: another choice passed");
  }
}

void selections(std::mt19937& rng) {
  for (const int64_t n : {1, 5, 16, 63, 200, 8193})
    for (const int64_t count : {int64_t{0}, int64_t{1}, n / 20, n / 3, n - 1, n, n + 3}) {
      const std::string name = text("select ", count, " of ", n);
      std::vector<float> keys = normals(rng, n);
      select(keys, count, name);
      for (float& k : keys) k = std::round(2 * k);  // ties
      select(keys, count, name + " with ties");
      for (float& k : keys) k = 3.0f;
      select(keys, count, name + " all equal");
      keys = normals(rng, n);
      for (int64_t i = 0; i < n; i += 9) keys[at(i)] = i % 2 ? NAN : i % 4 ? INFINITY : -INFINITY;
      select(keys, count, name + " not finite");
    }
}

void keys() {
  std::vector<float> s = {-3.0f, -0.5f, 0.0f, 0.25f, 4.0f};
  for (int64_t key = nogemm::kKeySigned; key < NOGEMM_ACTIVATIONS; ++key) {
    std::vector<float> got = s;
    kernel().keys(key, got.data(), 5);
    for (size_t i = 0; i < s.size(); ++i) {
      const double v = s[i], gate = key == NOGEMM_QUICK_GELU ? 1.702 : 1.0;
      const double tanh = v * 0.5 * (1 + std::tanh(0.7978845608 * (v + 0.044715 * v * v * v)));
      const double want = key == nogemm::kKeySigned ? v
                          : key == NOGEMM_RELU      ? std::max(v, 0.0)
                          : key == NOGEMM_RELU2     ? std::max(v, 0.0) * std::max(v, 0.0)
                          : key == NOGEMM_GELU      ? std::fabs(v * 0.5 * std::erfc(-v / std::sqrt(2.0)))
                          : key == NOGEMM_GELU_TANH ? std::fabs(tanh)
                                                    : std::fabs(v / (1 + std::exp(-gate * v)));
      expect(std::fabs(got[i] - want) < 2e-6, text("key ", int(key), " of value ", int(i)));
    }
  }
}

struct Bundle {
  Dtype dtype;
  int64_t count, width, stride;
  std::vector<Line> memory;
  std::vector<float> values, scale, bias;

  Bundle(Dtype d, int64_t n, int64_t w, std::mt19937& rng) : dtype(d), count(n), width(w) {
    const int64_t item = d == nogemm::kF32 ? 4 : d == nogemm::kBF16 ? 2 : 1;
    stride = (w * item + 63) / 64 * 64 + 64;  // another row lies between
    memory.assign(at(n * stride / 64 + 1), Line{});
    bias = normals(rng, std::max(n, w));
    for (int64_t i = 0; i < n; ++i) {
      Buffer row = normal(rng, d, w);
      std::memcpy(memory[0].bytes + i * stride, row.data(), at(w * item));
      scale.push_back(d == nogemm::kI8 ? 0.01f * static_cast<float>(1 + i % 9) : 1.0f);
      for (int64_t c = 0; c < w; ++c) values.push_back(row[c]);
    }
  }
  nogemm::BundleRows rows() const {
    return {reinterpret_cast<const char*>(memory[0].bytes), stride, width,
            dtype == nogemm::kI8 ? scale.data() : nullptr, bias.data()};
  }
};

std::vector<int32_t> draw_list(std::mt19937& rng, int64_t count, int64_t rows) {
  std::vector<int32_t> index(at(count));
  for (int32_t& i : index) i = static_cast<int32_t>(rng() % static_cast<uint32_t>(rows));
  return index;
}

void bundle_dots(Dtype dtype, int64_t list, int64_t width, std::mt19937& rng) {
  const std::string name = text("bundle dots ", int{dtype}, " list ", list, " D ", width);
  const Bundle b(dtype, 23, width, rng);
  std::vector<int32_t> index = draw_list(rng, list, b.count);
  const std::vector<float> x = normals(rng, width);
  Buffer out(nogemm::kF32, list);
  std::vector<double> token(x.begin(), x.end());
  if (dtype == nogemm::kI8) {
    const int64_t padded = (width + 63) / 64 * 64;
    std::vector<int8_t> planes(at(2 * padded), 99);
    nogemm::FixedToken fixed{};
    kernel().split(x.data(), width, padded, planes.data(), &fixed);
    bool near = true;
    for (int64_t i = 0; i < width; ++i) {
      token[at(i)] = static_cast<double>(fixed.scale) * (256 * fixed.high[i] + fixed.low[i]);
      near = near && std::fabs(token[at(i)] - x[at(i)]) <= 0.501 * fixed.scale;
    }
    expect(near, name + ": a token in fixed point");
    kernel().fixed_dots(b.rows(), index.data(), list / 3, list, fixed, out.as<float>());
    kernel().fixed_dots(b.rows(), index.data(), 0, list / 3, fixed, out.as<float>());
  } else {
    if (list > 2) index[2] = -1;
    kernel().dots[mode_of(dtype)](b.rows(), index.data(), list / 3, list, list, x.data(), out.as<float>());
    kernel().dots[mode_of(dtype)](b.rows(), index.data(), 0, list / 3, list, x.data(), out.as<float>());
  }
  std::vector<Expected> want(at(list));
  for (int64_t j = 0; j < list; ++j) {
    const int32_t i = index[at(j)];
    if (i < 0) continue;
    for (int64_t c = 0; c < width; ++c) want[at(j)].add(token[at(c)] * b.values[at(i * width + c)] * b.scale[at(i)]);
    want[at(j)].add(b.bias[at(i)]);
  }
  expect(matches(out, want, width + 2), name);
  control(out, want, width + 2, name);
}

void bundle_sum(Dtype dtype, int64_t list, int64_t width, std::mt19937& rng) {
  const std::string name = text("bundle sum ", int{dtype}, " list ", list, " E ", width);
  const Bundle b(dtype, 23, width, rng);
  const std::vector<int32_t> index = draw_list(rng, list, b.count);
  const std::vector<float> weights = normals(rng, list);
  Buffer y(nogemm::kF32, width);
  const int64_t cut = std::min(width, kernel().columns);
  kernel().sum[mode_of(dtype)](b.rows(), index.data(), weights.data(), list, list, cut, width, y.as<float>());
  kernel().sum[mode_of(dtype)](b.rows(), index.data(), weights.data(), list, list, 0, cut, y.as<float>());
  std::vector<Expected> want(at(width));
  for (int64_t c = 0; c < width; ++c) {
    want[at(c)].add(b.bias[at(c)]);
    for (int64_t j = 0; j < list; ++j)
      want[at(c)].add(static_cast<double>(weights[at(j)]) * b.values[at(index[at(j)] * width + c)]);
  }
  expect(matches(y, want, list + 1), name);
  control(y, want, list + 1, name);
}

void hidden_weights(std::mt19937& rng) {
  const int64_t count = 21;
  const std::vector<float> gate = normals(rng, count), up = normals(rng, count), scale = normals(rng, 30);
  const std::vector<int32_t> index = draw_list(rng, count, 30);
  for (const bool up_relu : {false, true}) {
    Buffer got(nogemm::kF32, count);
    kernel().weights(NOGEMM_SILU, up_relu, gate.data(), up.data(), scale.data(), index.data(), count, got.as<float>());
    std::vector<Expected> want(at(count));
    for (size_t j = 0; j < want.size(); ++j) {
      const double g = gate[j], u = up_relu ? std::max(up[j], 0.0f) : up[j];
      want[j].add(g / (1 + std::exp(-g)) * u * scale[at(index[j])]);
    }
    expect(matches(got, want, 20), "hidden weights");
    control(got, want, 20, "hidden weights");
  }
}

}  // namespace

void hire_tests() {
  std::mt19937 rng(13);
  for (const bool nibbles : {false, true}) {
    for (const bool extreme : {false, true}) {
      sketch(1, 1, 1, nibbles, extreme, rng);
      sketch(70, 37, 5, nibbles, extreme, rng);
      sketch(200, 64, 9, nibbles, extreme, rng);
      sketch(65, 333, 6, nibbles, extreme, rng);
    }
  }
  broken_token();
  selections(rng);
  keys();
  for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16, nogemm::kI8})
    for (const int64_t width : {1, 63, 64, 130, 777})
      for (const int64_t list : {0, 1, 5, 19}) {
        bundle_dots(dtype, list, width, rng);
        bundle_sum(dtype, list, width, rng);
      }
  hidden_weights(rng);
}
