// A TreeFFN written to be obviously right: double precision, one token and one tree at a time. Shares no code
// with the kernels. Used by the tests and by the timing program.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "packed/tree/pack.h"

namespace tree_reference {

struct Shape {
  int64_t d, d_out, trees, levels, core;
  int64_t activation;
  bool bias, threshold;

  int64_t nodes() const { return trees * ((int64_t{1} << levels) - 1); }
};

struct Model {
  Shape shape;
  std::vector<float> in, bias, threshold, out, core_in, core_bias, core_out, out_bias;

  NogemmTreeSpec spec(int64_t mode) const {
    NogemmTreeSpec s{};
    s.mode = mode;
    s.activation = shape.activation;
    s.d = shape.d;
    s.d_out = shape.d_out;
    s.trees = shape.trees;
    s.levels = shape.levels;
    s.core = shape.core;
    s.in_rows = in.data();
    s.bias = shape.bias ? bias.data() : nullptr;
    s.threshold = shape.threshold ? threshold.data() : nullptr;
    s.out_rows = out.data();
    s.core_in = core_in.data();
    s.core_bias = shape.bias ? core_bias.data() : nullptr;
    s.core_out = core_out.data();
    s.out_bias = out_bias.data();
    return s;
  }
};

// The sum of four uniform numbers is near enough to normal, and cheap for millions of them.
inline std::vector<float> normal(uint64_t seed, size_t count, float scale) {
  std::mt19937_64 rng(seed);
  std::vector<float> v(count);
  for (float& f : v) {
    const uint64_t bits = rng();
    float sum = 0;
    for (int part = 0; part < 4; ++part) sum += static_cast<float>((bits >> (16 * part)) & 0xffff) / 65536.0f - 0.5f;
    f = scale * 1.7320508f * sum;
  }
  return v;
}

inline Model make_model(const Shape& s, uint64_t seed) {
  const auto draw = [&](int64_t count, double scale) {
    return normal(seed++, static_cast<size_t>(count), static_cast<float>(scale));
  };
  Model m;
  m.shape = s;
  const double in = 1 / std::sqrt(static_cast<double>(s.d));
  m.in = draw(s.nodes() * s.d, in);
  m.bias = draw(s.nodes(), 0.1);
  m.threshold = draw(s.nodes(), 0.3);
  m.out = draw(s.nodes() * s.d_out, 0.1);
  m.core_in = draw(s.core * s.d + 1, in);
  m.core_bias = draw(s.core + 1, 0.1);
  m.core_out = draw(s.core * s.d_out + 1, 0.1);
  m.out_bias = draw(s.d_out, 0.2);
  return m;
}

// 64-byte aligned memory.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64)), std::free), bytes_(bytes) {}
  template <class T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<void, void (*)(void*)> data_;
  int64_t bytes_;
};

inline Buffer pack(const NogemmTreeSpec& spec, const char** error) {
  Buffer out(nogemm_tree_pack_size(&spec));
  *error = nogemm_tree_pack(&spec, out.as<void>(), out.bytes());
  return out;
}

inline void run_in_turn(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  for (int64_t w = workers; w-- > 0;) body(w, arg);
}

inline std::vector<float> run(const Buffer& packed, const std::vector<float>& x, int64_t tokens, int64_t d_out,
                              int64_t threads) {
  const auto width = static_cast<int64_t>(x.size()) / (tokens > 0 ? tokens : 1);
  const NogemmHost host{threads, run_in_turn, nullptr};
  const Buffer workspace(nogemm_tree_workspace(packed.as<void>(), tokens, threads));
  std::vector<float> y(static_cast<size_t>(tokens * d_out), NAN);
  nogemm_tree_forward(packed.as<void>(), x.data(), NOGEMM_X_FP32, width, y.data(), tokens, workspace.as<void>(), &host);
  return y;
}

inline double round_bf16(double v) {
  const float f = static_cast<float>(v);
  uint32_t u;
  std::memcpy(&u, &f, 4);
  u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  float back;
  std::memcpy(&back, &u, 4);
  return back;
}

inline double activate(double z, int64_t kind) {
  if (kind == NOGEMM_RELU) return z > 0 ? z : 0;
  if (kind == NOGEMM_RELU2) return z > 0 ? z * z : 0;
  if (kind == NOGEMM_SILU) return z / (1 + std::exp(-z));
  if (kind == NOGEMM_QUICK_GELU) return z / (1 + std::exp(-1.702 * z));
  if (kind == NOGEMM_GELU_TANH) return 0.5 * z * (1 + std::tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)));
  return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
}

// One token: y, the sum of the magnitudes behind each column, and whether some sign was too close to call.
struct Answer {
  std::vector<double> y, size;
  bool close_call = false;
};

inline void add_neuron(const Model& m, int64_t mode, const float* x, const float* in, double bias, double bar,
                       const float* out, bool routes, Answer& a, bool* right) {
  double z = bias, size = std::fabs(bias) + std::fabs(bar);
  float largest = 0;
  for (int64_t c = 0; c < m.shape.d; ++c) {
    const double w = mode == NOGEMM_TREE_FP32 ? in[c] : round_bf16(in[c]);
    z += w * x[c];
    size += std::fabs(w * x[c]);
  }
  if (routes) {
    a.close_call = a.close_call || std::fabs(z - bar) <= 8 * std::ldexp(1.0, -23) * size;
    *right = z > bar;
  }
  for (int64_t c = 0; c < m.shape.d_out; ++c) largest = std::fmax(largest, std::fabs(out[c]));
  const double fire = activate(z, m.shape.activation);
  const float step = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t c = 0; c < m.shape.d_out; ++c) {
    double w = out[c];
    if (mode == NOGEMM_TREE_BF16) w = round_bf16(w);
    if (mode == NOGEMM_TREE_INT8) w = static_cast<double>(std::nearbyint(out[c] * inverse)) * step;
    a.y[static_cast<size_t>(c)] += fire * w;
    a.size[static_cast<size_t>(c)] += (std::fabs(fire) + 1e-1 * size) * std::fabs(w);
  }
}

inline Answer answer(const Model& m, int64_t mode, const float* x) {
  const Shape& s = m.shape;
  Answer a;
  for (int64_t c = 0; c < s.d_out; ++c) {
    a.y.push_back(m.out_bias[static_cast<size_t>(c)]);
    a.size.push_back(std::fabs(a.y.back()));
  }
  const int64_t per_tree = s.nodes() / s.trees;
  for (int64_t k = 0; k < s.trees; ++k) {
    int64_t node = 0;
    for (int64_t level = 0; level < s.levels; ++level) {
      const auto i = static_cast<size_t>(k * per_tree + node);
      bool right = false;
      add_neuron(m, mode, x, m.in.data() + i * static_cast<size_t>(s.d), s.bias ? m.bias[i] : 0,
                 s.threshold ? m.threshold[i] : 0, m.out.data() + i * static_cast<size_t>(s.d_out),
                 level + 1 < s.levels, a, &right);
      node = 2 * node + 1 + (right ? 1 : 0);
    }
  }
  for (int64_t j = 0; j < s.core; ++j) {
    const auto i = static_cast<size_t>(j);
    bool unused = false;
    add_neuron(m, mode, x, m.core_in.data() + i * static_cast<size_t>(s.d), s.bias ? m.core_bias[i] : 0, 0,
               m.core_out.data() + i * static_cast<size_t>(s.d_out), false, a, &unused);
  }
  return a;
}

// How many tokens are wrong: outside float32's rounding of their own magnitudes, though no sign was a close
// call.
inline int64_t compare(const Model& m, int64_t mode, const std::vector<float>& x, const std::vector<float>& y,
                       int64_t tokens) {
  int64_t wrong = 0;
  const Shape& s = m.shape;
  for (int64_t n = 0; n < tokens; ++n) {
    const Answer a = answer(m, mode, x.data() + n * s.d);
    const double steps = static_cast<double>(s.trees * s.levels + s.core + 16) * std::ldexp(1.0, -23);
    bool ok = true;
    for (int64_t c = 0; c < s.d_out; ++c) {
      const auto i = static_cast<size_t>(c);
      ok = ok && std::fabs(y[static_cast<size_t>(n * s.d_out) + i] - a.y[i]) <= steps * a.size[i] + 1e-30;
    }
    wrong += !ok && !a.close_call;
  }
  return wrong;
}

}  // namespace tree_reference
