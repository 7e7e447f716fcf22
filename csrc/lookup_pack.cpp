// Packs a LookupFFN layer into one buffer (see kernels/lookup_format.h for the layout and the reasons).
#include "lookup_pack.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "kernels/dtype.h"
#include "kernels/lookup_format.h"

namespace nogemm {
namespace {

thread_local char message[256];

template <class... A>
const char* say(const char* format, A... args) {
  std::snprintf(message, sizeof message, format, args...);
  return message;
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

int64_t padded_width(int64_t d) {
  int64_t width = 1;
  while (width < d) width *= 2;
  return width;
}

int64_t element_bytes(int64_t mode) { return mode == NOGEMM_LOOKUP_FP32 ? 4 : mode == NOGEMM_LOOKUP_BF16 ? 2 : 1; }

uint64_t header_checksum(const LookupHeader& h) {
  const auto* p = reinterpret_cast<const unsigned char*>(&h) + 16;
  uint64_t sum = 0xcbf29ce484222325ull;
  for (size_t i = 0; i + 8 <= sizeof h - 16; i += 8) {
    uint64_t word;
    std::memcpy(&word, p + i, 8);
    sum = (sum ^ word) * 0x9e3779b97f4a7c15ull;
    sum ^= sum >> 29;
  }
  return sum;
}

const char* check(const NogemmLookupSpec& s) {
  if (s.mode < 0 || s.mode > 2) return say("packed dtype %lld: must be 0 (fp32), 1 (bf16) or 2 (int8)", (long long)s.mode);
  if (s.d < 1 || s.d > (1 << 20)) return say("d = %lld: must be 1 to %d", (long long)s.d, 1 << 20);
  if (s.d_out < 1 || s.d_out > (1 << 20)) return say("d_out = %lld: must be 1 to %d", (long long)s.d_out, 1 << 20);
  if (s.bits < 1 || s.bits > 16) return say("bits = %lld: must be 1 to 16", (long long)s.bits);
  if (s.tables < 1 || (s.tables << s.bits) >= (int64_t{1} << 31))
    return say("tables = %lld: must be at least 1, and tables * 2^bits below 2^31", (long long)s.tables);
  if (s.neighbours != 1 && s.neighbours != 2 && s.neighbours != 4)
    return say("neighbours = %lld: the native kernel knows 1, 2 and 4", (long long)s.neighbours);
  if (s.neighbours > (int64_t{1} << s.bits))
    return say("neighbours = %lld: %lld bits give only %lld rows", (long long)s.neighbours, (long long)s.bits,
               1ll << s.bits);
  if (s.score < 0 || s.score > 1) return say("score %lld: must be 0 (gelu) or 1 (sigmoid)", (long long)s.score);
  if (s.projection < 0 || s.projection > 1)
    return say("projection %lld: must be 0 (dense) or 1 (BH)", (long long)s.projection);
  if (s.projection == NOGEMM_LOOKUP_BH) {
    const int64_t width = padded_width(s.d);
    if (s.rounds < 1 || s.rounds > 1024) return say("rounds = %lld: must be 1 to 1024", (long long)s.rounds);
    if (!power_of_two(s.block) || s.block > width)
      return say("block = %lld: must be a power of two that divides %lld", (long long)s.block, (long long)width);
    if (s.repeats < 1 || s.repeats != (s.tables * s.bits + width - 1) / width)
      return say("repeats = %lld: %lld columns of width %lld need %lld", (long long)s.repeats,
                 (long long)(s.tables * s.bits), (long long)width,
                 (long long)((s.tables * s.bits + width - 1) / width));
  } else if (s.mix != 1.0) {
    return say("mix = %g: a dense projection has no residual", s.mix);
  }
  if (!(s.eps >= 0) || !std::isfinite(s.mix)) return "eps must be >= 0 and mix finite";
  if (s.tables_dtype < 0 || s.tables_dtype > 2) return "tables_dtype must be 0 (fp32), 1 (bf16) or 2 (int8)";
  if (!s.weight || !s.table_rows) return "weight and table_rows must not be null";
  if ((s.tables_dtype == NOGEMM_LOOKUP_INT8) != (s.row_scale != nullptr))
    return "row_scale belongs to int8 tables and to no others";
  if (s.beta && !s.gamma) return "beta without gamma";
  return nullptr;
}

LookupHeader layout(const NogemmLookupSpec& s) {
  LookupHeader h;
  std::memset(&h, 0, sizeof h);
  const int64_t columns = s.tables * s.bits;
  h.magic = kLookupMagic;
  h.version = kLookupVersion;
  h.mode = static_cast<int32_t>(s.mode);
  h.score = static_cast<int32_t>(s.score);
  h.neighbours = static_cast<int32_t>(s.neighbours);
  h.d = static_cast<int32_t>(s.d);
  h.d_out = static_cast<int32_t>(s.d_out);
  h.tables = static_cast<int32_t>(s.tables);
  h.bits = static_cast<int32_t>(s.bits);
  if (s.projection == NOGEMM_LOOKUP_DENSE) {
    h.rounds = h.repeats = h.blocks = h.active_blocks = 1;
    h.block_in = static_cast<int32_t>(round_up(s.d, 16));
    h.block_out = static_cast<int32_t>(round_up(columns, 16));
    h.columns = static_cast<int32_t>(columns);
  } else {
    const int64_t width = padded_width(s.d), block = std::max<int64_t>(s.block, 16);
    h.rounds = static_cast<int32_t>(s.rounds);
    h.repeats = static_cast<int32_t>(s.repeats);
    h.block_in = h.block_out = static_cast<int32_t>(block);
    h.blocks = static_cast<int32_t>(std::max<int64_t>(1, width / block));
    h.active_blocks = static_cast<int32_t>((s.d + block - 1) / block);
    h.columns = static_cast<int32_t>(width);
  }
  h.fixed_point = s.mode != NOGEMM_LOOKUP_FP32;
  h.act_max = h.block_in <= 128 ? 16383.0f : 8191.0f;  // wide sums leave fewer bits: weights need them more
  h.norm = s.gamma != nullptr;
  h.residual = s.projection == NOGEMM_LOOKUP_BH && s.mix != 1.0;
  h.eps = static_cast<float>(s.eps);
  h.keep = static_cast<float>(1.0 - s.mix);
  h.slices = static_cast<int32_t>((s.d_out + kTableSlice - 1) / kTableSlice);
  const int64_t rest = s.d_out - int64_t{h.slices - 1} * kTableSlice;
  h.last_slice = rest <= kChunk ? kChunk : kTableSlice;

  int64_t at = round_up(sizeof h, 64);
  const auto section = [&at](int64_t bytes) {
    const int64_t start = at;
    at = round_up(at + bytes, 64);
    return start;
  };
  const int64_t products = int64_t{h.repeats} * h.rounds * h.blocks;
  h.gamma = section(h.in_width() * 4);
  h.beta = section(h.in_width() * 4);
  h.weights = section(products * h.block_in * h.block_out * (h.fixed_point ? 2 : 4));
  h.weight_scale = section(products * h.block_out * 4);
  h.proj_bias = section((columns + 16 * s.bits) * 4);
  h.row_scale = section(s.mode == NOGEMM_LOOKUP_INT8 ? s.tables * h.rows() * 4 : 0);
  h.out_bias = section(int64_t{h.slices} * kTableSlice * 4);
  const int64_t stored = int64_t{h.slices - 1} * kTableSlice + h.last_slice;
  h.tables_at = section(s.tables * h.rows() * stored * element_bytes(s.mode));
  h.bytes = at;
  h.checksum = header_checksum(h);
  return h;
}

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
  const int64_t width = padded_width(s.d), b = s.block, n = width / b;
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
  const double most = std::floor(2147483647.0 / h.act_max) - static_cast<double>(in);  // rounding may add 1/2 per weight
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

// Quantises a row to steps of its largest value / 127; int8 tables keep their own steps, bit for bit.
float quantise_row(const NogemmLookupSpec& s, int64_t row, const float* values, int8_t* out) {
  if (s.tables_dtype == NOGEMM_LOOKUP_INT8) {
    std::memcpy(out, static_cast<const int8_t*>(s.table_rows) + row * s.d_out, static_cast<size_t>(s.d_out));
    return s.row_scale[row];
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
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t c = 0; c < s.d_out; ++c)
    out[c] = static_cast<int8_t>(std::clamp(std::nearbyint(values[c] * inverse), -127.0f, 127.0f));
  return largest / 127.0f;
}

void store_row(const LookupHeader& h, int64_t row, const float* values, const int8_t* steps, char* out) {
  const int64_t total = h.tables * h.rows(), size = element_bytes(h.mode);
  char* slice = out + h.tables_at;
  for (int64_t s = 0; s < h.slices; ++s) {
    const int64_t width = s + 1 == h.slices ? h.last_slice : kTableSlice;
    char* to = slice + row * width * size;
    const int64_t first = s * kTableSlice, count = std::min<int64_t>(width, h.d_out - first);
    for (int64_t c = 0; c < width; ++c) {
      const bool real = c < count;
      if (h.mode == NOGEMM_LOOKUP_FP32) {
        reinterpret_cast<float*>(to)[c] = real ? values[first + c] : 0.0f;
      } else if (h.mode == NOGEMM_LOOKUP_BF16) {
        const int64_t in32 = c % 32;
        reinterpret_cast<uint16_t*>(to)[c - in32 + 2 * (in32 % 16) + in32 / 16] = real ? narrow(values[first + c]) : 0;
      } else {
        const int64_t in64 = c % 64, q = in64 / 16, lane = in64 % 16 / 4, i = in64 % 4;
        reinterpret_cast<uint8_t*>(to)[c - in64 + 16 * lane + 4 * q + i] =
            static_cast<uint8_t>(128 + (real ? steps[first + c] : 0));
      }
    }
    slice += total * width * size;
  }
}

void pack_tables(const NogemmLookupSpec& s, const LookupHeader& h, char* out) {
  std::vector<float> values(static_cast<size_t>(s.d_out));
  std::vector<int8_t> steps(static_cast<size_t>(s.d_out));
  auto* scales = reinterpret_cast<float*>(out + h.row_scale);
  for (int64_t row = 0; row < s.tables * h.rows(); ++row) {
    read_row(s, row, values.data());
    if (h.mode == NOGEMM_LOOKUP_INT8) scales[row] = quantise_row(s, row, values.data(), steps.data());
    store_row(h, row, values.data(), steps.data(), out);
  }
}

void copy_padded(const float* from, int64_t count, void* to, int64_t padded, float missing) {
  auto* f = static_cast<float*>(to);
  for (int64_t i = 0; i < padded; ++i) f[i] = i < count ? (from ? from[i] : missing) : 0.0f;
}

// Rows are read at random: 2 MiB pages save a page walk per row where the system allows them. A hint, so errors do not matter.
void ask_for_huge_pages(char* out, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, start = (reinterpret_cast<uintptr_t>(out) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > start + (4u << 20)) (void)madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace nogemm

using namespace nogemm;

extern "C" int64_t nogemm_lookup_pack_size(const NogemmLookupSpec* spec) {
  return check(*spec) ? -1 : layout(*spec).bytes;
}

extern "C" const char* nogemm_lookup_pack(const NogemmLookupSpec* spec, void* out, int64_t out_bytes) try {
  if (const char* error = check(*spec)) return error;
  const LookupHeader h = layout(*spec);
  if (reinterpret_cast<uintptr_t>(out) % 64) return "the packed buffer must be 64-byte aligned";
  if (out_bytes < h.bytes)
    return say("the packed buffer has %lld bytes, %lld are needed", (long long)out_bytes, (long long)h.bytes);
  auto* to = static_cast<char*>(out);
  ask_for_huge_pages(to, h.bytes);
  std::memset(to, 0, static_cast<size_t>(h.tables_at));
  copy_padded(spec->gamma, spec->d, to + h.gamma, h.in_width(), 1.0f);
  copy_padded(spec->beta, spec->d, to + h.beta, h.in_width(), 0.0f);
  copy_padded(spec->proj_bias, spec->tables * spec->bits, to + h.proj_bias, (spec->tables + 16) * spec->bits, 0.0f);
  copy_padded(spec->out_bias, spec->d_out, to + h.out_bias, int64_t{h.slices} * kTableSlice, 0.0f);
  pack_projection(*spec, h, to);
  pack_tables(*spec, h, to);
  std::memcpy(to, &h, sizeof h);  // last: a half-filled buffer has no header
  return nullptr;
} catch (const std::bad_alloc&) {
  return "not enough memory to pack the layer";
}

extern "C" const char* nogemm_lookup_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out) {
  if (reinterpret_cast<uintptr_t>(packed) % 64) return "the packed buffer must be 64-byte aligned";
  LookupHeader h;
  if (packed_bytes < static_cast<int64_t>(sizeof h)) return "not a packed LookupFFN: too short";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kLookupMagic) return "not a packed LookupFFN";
  if (h.version != kLookupVersion)
    return say("packed by version %u of the format, this is version %u: pack again", h.version, kLookupVersion);
  if (h.checksum != header_checksum(h) || h.bytes > packed_bytes) return "the packed LookupFFN is damaged: pack again";
  *d = h.d;
  *d_out = h.d_out;
  return nullptr;
}

extern "C" int64_t nogemm_lookup_workspace(const void* packed, int64_t tokens, int64_t threads) {
  return kernels().lookup.workspace(static_cast<const LookupHeader*>(packed), tokens, threads);
}

extern "C" void nogemm_lookup_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                                      int64_t tokens, void* workspace, const NogemmHost* host) {
  kernels().lookup.forward(packed, x, x_dtype, x_stride, y, tokens, workspace, host);
}
