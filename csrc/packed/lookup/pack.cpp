// Packs a LookupFFN layer into one buffer (see packed/lookup/format.h for the layout and the reasons).
#include "packed/lookup/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/dtype.h"
#include "packed/host/huge_pages.h"
#include "packed/lookup/layout.h"

namespace nogemm {
namespace {

// One block as [in][out] doubles: merged, folded with its part of the Hadamard matrix and with every scale.
void folded_block(const NogemmLookupSpec& s, const LookupHeader& h, int64_t repeat, int64_t round, int64_t block,
                  std::vector<double>& out) {
  std::fill(out.begin(), out.end(), 0.0);
  const int64_t wide = h.block_out;
  if (s.projection == NOGEMM_LOOKUP_DENSE) {
    for (int64_t o = 0; o < s.tables * s.bits; ++o)
      for (int64_t i = 0; i < s.d; ++i) out[i * wide + o] = s.weight[o * s.d + i];
    return;
  }
  const int64_t width = s.width, b = s.block, n = width / b;
  const int64_t used = std::min<int64_t>(h.block_in, width);  // below 16 the rest is padding
  const bool last = round + 1 == s.rounds;
  const double scale = (last ? s.mix : 1.0) / std::sqrt(static_cast<double>(width));
  const float* blocks = s.weight + (repeat * s.rounds + round) * n * b * b;
  for (int64_t part = 0; part < used / b; ++part) {
    const float* w = blocks + (block * (used / b) + part) * b * b;
    for (int64_t o = 0; o < b; ++o)
      for (int64_t i = 0; i < b; ++i) out[(part * b + i) * wide + part * b + o] = scale * w[o * b + i];
  }
  for (int64_t i = 0; i < used; ++i) {
    double* row = out.data() + i * wide;
    for (int64_t half = 1; half < used; half *= 2)
      for (int64_t o = 0; o < used; ++o)
        if (!(o & half)) {
          const double a = row[o], c = row[o + half];
          row[o] = a + c;
          row[o + half] = a - c;
        }
  }
}

void store_fixed(const LookupHeader& h, const std::vector<double>& block, int16_t* weights, float* scales) {
  const int64_t in = h.block_in, out = h.block_out;
  const double most =
      std::floor(2147483647.0 / h.act_max) - static_cast<double>(in);  // rounding may add 1/2 per weight
  for (int64_t o = 0; o < out; ++o) {
    double sum = 0, largest = 0;
    for (int64_t i = 0; i < in; ++i) {
      sum += std::fabs(block[i * out + o]);
      largest = std::max(largest, std::fabs(block[i * out + o]));
    }
    double step = std::max(sum / most, largest / 32767.0);
    if (!(step > 1e-30)) step = std::isnan(step) ? NAN : 1e-30;
    if (!std::isfinite(step)) step = NAN;  // a broken weight must show in the output, not vanish in the rounding
    scales[o] = static_cast<float>(step);
    for (int64_t i = 0; i < in; ++i) {
      const double q = std::isnan(step) ? 0.0 : std::nearbyint(block[i * out + o] / step);
      weights[((i / 2) * out + o) * 2 + i % 2] = static_cast<int16_t>(std::clamp(q, -32767.0, 32767.0));
    }
  }
}

void pack_projection(const NogemmLookupSpec& s, const LookupHeader& h, char* out) {
  std::vector<double> block(static_cast<size_t>(h.block_in) * h.block_out);
  auto* scales = reinterpret_cast<float*>(out + h.weight_scale);
  int64_t index = 0;
  for (int64_t repeat = 0; repeat < h.repeats; ++repeat)
    for (int64_t round = 0; round < h.rounds; ++round)
      for (int64_t b = 0; b < h.blocks; ++b, ++index) {
        folded_block(s, h, repeat, round, b, block);
        if (h.fixed_point) {
          store_fixed(h, block, reinterpret_cast<int16_t*>(out + h.weights) + index * h.block_in * h.block_out,
                      scales + index * h.block_out);
        } else {
          float* w = reinterpret_cast<float*>(out + h.weights) + index * h.block_in * h.block_out;
          for (size_t i = 0; i < block.size(); ++i) w[i] = static_cast<float>(block[i]);
        }
      }
}

float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t narrow(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

void read_row(const NogemmLookupSpec& s, int64_t row, float* out) {
  const int64_t at = row * s.d_out;
  if (s.tables_dtype == NOGEMM_LOOKUP_FP32) {
    std::memcpy(out, static_cast<const float*>(s.table_rows) + at, static_cast<size_t>(s.d_out) * 4);
  } else if (s.tables_dtype == NOGEMM_LOOKUP_BF16) {
    for (int64_t c = 0; c < s.d_out; ++c) out[c] = widen(static_cast<const bf16*>(s.table_rows)[at + c]);
  } else {
    for (int64_t c = 0; c < s.d_out; ++c) out[c] = s.row_scale[row] * static_cast<const int8_t*>(s.table_rows)[at + c];
  }
}

// Whether int8 rows hold nothing beyond -most .. most.
bool fits(const int8_t* steps, int64_t count, float most) {
  return std::all_of(steps, steps + count, [most](int8_t step) { return std::abs(static_cast<int>(step)) <= most; });
}

// Quantises a row to steps of its largest value / most; steps of int8 tables that fit stay as they are, bit for bit.
float quantise_row(const NogemmLookupSpec& s, int64_t row, const float* values, int8_t* out) {
  const float most = s.mode == NOGEMM_LOOKUP_INT4 ? 7.0f : 127.0f;
  if (s.tables_dtype == NOGEMM_LOOKUP_INT8) {
    const int8_t* steps = static_cast<const int8_t*>(s.table_rows) + row * s.d_out;
    if (s.mode == NOGEMM_LOOKUP_INT8 || fits(steps, s.d_out, most)) {
      std::memcpy(out, steps, static_cast<size_t>(s.d_out));
      return s.row_scale[row];
    }
  }
  float largest = 0;
  bool finite = true;
  for (int64_t c = 0; c < s.d_out; ++c) {
    finite = finite && std::isfinite(values[c]);
    largest = std::max(largest, std::fabs(values[c]));
  }
  if (!finite) {
    std::memset(out, 0, static_cast<size_t>(s.d_out));
    return NAN;
  }
  const float inverse = largest > 0x1p-119f ? most / largest : 0.0f;  // below: steps of no normal number
  for (int64_t c = 0; c < s.d_out; ++c)
    out[c] = static_cast<int8_t>(std::clamp(std::nearbyint(values[c] * inverse), -most, most));
  return largest / most;
}

void store_row(const LookupHeader& h, int64_t row, const float* values, const int8_t* steps, char* out) {
  const int64_t total = h.tables * h.rows();
  char* slice = out + h.tables_at;
  for (int64_t s = 0; s < h.slices; ++s) {
    const int64_t width = h.slice_width(s);
    char* to = slice + row * h.row_bytes(width);
    if (h.mode == NOGEMM_LOOKUP_INT4) std::memset(to, 0, static_cast<size_t>(h.row_bytes(width)));
    const int64_t first = s * h.slice(), count = std::min<int64_t>(width, h.d_out - first);
    for (int64_t c = 0; c < width; ++c) {
      const bool real = c < count;
      if (h.mode == NOGEMM_LOOKUP_FP32) {
        reinterpret_cast<float*>(to)[c] = real ? values[first + c] : 0.0f;
      } else if (h.mode == NOGEMM_LOOKUP_BF16) {
        const int64_t in32 = c % 32;
        reinterpret_cast<uint16_t*>(to)[c - in32 + 2 * (in32 % 16) + in32 / 16] = real ? narrow(values[first + c]) : 0;
      } else {
        const int64_t in64 = c % 64, q = in64 / 16, lane = in64 % 16 / 4, i = in64 % 4;
        const int64_t byte = 16 * lane + 4 * q + i;  // of the chunk, in int8
        auto* bytes = reinterpret_cast<uint8_t*>(to + h.row_bytes(c - in64));
        const int step = real ? steps[first + c] : 0;
        if (h.mode == NOGEMM_LOOKUP_INT8) bytes[byte] = static_cast<uint8_t>(128 + step);
        if (h.mode == NOGEMM_LOOKUP_INT4) bytes[byte % 32] |= static_cast<uint8_t>((8 + step) << (byte < 32 ? 0 : 4));
      }
    }
    slice += total * h.row_bytes(width);
  }
}

void pack_tables(const NogemmLookupSpec& s, const LookupHeader& h, char* out) {
  std::vector<float> values(static_cast<size_t>(s.d_out));
  std::vector<int8_t> steps(static_cast<size_t>(s.d_out));
  auto* scales = reinterpret_cast<float*>(out + h.row_scale);
  for (int64_t row = 0; row < s.tables * h.rows(); ++row) {
    read_row(s, row, values.data());
    if (h.integers()) scales[row] = quantise_row(s, row, values.data(), steps.data());
    store_row(h, row, values.data(), steps.data(), out);
  }
}

void copy_padded(const float* from, int64_t count, void* to, int64_t padded, float missing) {
  auto* f = static_cast<float*>(to);
  for (int64_t i = 0; i < padded; ++i) f[i] = i < count ? (from ? from[i] : missing) : 0.0f;
}

}  // namespace
}  // namespace nogemm

using namespace nogemm;

extern "C" const char* nogemm_lookup_pack(const NogemmLookupSpec* spec, void* out, int64_t out_bytes) try {
  if (const char* error = lookup_check_spec(*spec)) return error;
  const LookupHeader h = lookup_layout(*spec);
  if (reinterpret_cast<uintptr_t>(out) % 64) return "the packed buffer must be 64-byte aligned";
  if (out_bytes < h.bytes)
    return lookup_say("the packed buffer has %lld bytes, %lld are needed", (long long)out_bytes, (long long)h.bytes);
  auto* to = static_cast<char*>(out);
  ask_for_huge_pages(to, h.bytes);
  std::memset(to, 0, static_cast<size_t>(h.tables_at));
  copy_padded(spec->gamma, spec->d, to + h.gamma, h.in_width(), 1.0f);
  copy_padded(spec->beta, spec->d, to + h.beta, h.in_width(), 0.0f);
  copy_padded(spec->proj_bias, spec->tables * spec->bits, to + h.proj_bias, (spec->tables + 16) * spec->bits, 0.0f);
  copy_padded(spec->out_bias, spec->d_out, to + h.out_bias, h.slices * h.slice(), 0.0f);
  pack_projection(*spec, h, to);
  pack_tables(*spec, h, to);
  std::memcpy(to, &h, sizeof h);  // last: a half-filled buffer has no header
  return nullptr;
} catch (const std::bad_alloc&) {
  return "not enough memory to pack the layer";
}
