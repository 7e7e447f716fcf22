#include "dev/naive_lookup.h"

#include <math.h>

namespace naive {
namespace {

void normalise(const Layer& l, const float* x, float* out) {
  float mean = 0, variance = 0;
  for (int64_t i = 0; i < l.d; ++i) mean += x[i];
  mean /= static_cast<float>(l.d);
  for (int64_t i = 0; i < l.d; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / sqrtf(variance / static_cast<float>(l.d) + 1e-5f);
  for (int64_t i = 0; i < l.d; ++i) out[i] = (x[i] - mean) * scale * l.gamma[i] + l.beta[i];
  for (int64_t i = l.d; i < l.width; ++i) out[i] = 0;
}

void product(const Layer& l, const float* weight, const float* in, float* out) {
  for (int64_t o = 0; o < l.width; ++o) {
    const float* from = in + o / l.block * l.block;
    const float* row = weight + o * l.block;
    float sum = 0;
    for (int64_t i = 0; i < l.block; ++i) sum += row[i] * from[i];
    out[o] = sum;
  }
}

void hadamard(float* x, int64_t width) {
  for (int64_t half = 1; half < width; half *= 2)
    for (int64_t i = 0; i < width; i += 2 * half)
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
  const float scale = 1.0f / sqrtf(static_cast<float>(width));
  for (int64_t i = 0; i < width; ++i) x[i] *= scale;
}

}  // namespace

void hash_token(const Layer& l, const float* x, float* scratch, float* z, int32_t* codes, float* scores) {
  float *start = scratch, *in = scratch + l.width, *out = scratch + 2 * l.width;
  normalise(l, x, start);
  for (int64_t r = 0; r < l.repeats; ++r) {
    const float* from = start;
    for (int64_t m = 0; m < l.rounds; ++m) {
      product(l, l.weight + (r * l.rounds + m) * l.width * l.block, from, out);
      hadamard(out, l.width);
      float* const used = in;
      in = out;
      out = used;
      from = in;
    }
    for (int64_t i = 0; i < l.width; ++i) z[r * l.width + i] = in[i];
  }
  for (int64_t t = 0; t < l.tables; ++t) {
    int32_t code = 0;
    float sum = 0, weight = 1;
    for (int64_t j = t * l.bits; j < (t + 1) * l.bits; ++j) {
      const float v = z[j] + l.proj_bias[j], u = fabsf(v);
      code = 2 * code + (v > 0 ? 1 : 0);
      sum += u;
      weight /= 1.0f + expf(-2.0f * u);
    }
    codes[t] = code;
    scores[t] = sum * weight;
  }
}

void gather_token(const Layer& l, const int32_t* codes, const float* scores, float* y) {
  for (int64_t c = 0; c < l.d_out; ++c) y[c] = l.out_bias[c];
  for (int64_t t = 0; t < l.tables; ++t) {
    const float* row = l.rows + ((t << l.bits) + codes[t]) * l.d_out;
    for (int64_t c = 0; c < l.d_out; ++c) y[c] += scores[t] * row[c];
  }
}

}  // namespace naive
