// Packs a TreeFFN layer into one buffer (see packed/tree/format.h for the layout and the reasons).
#include "packed/tree/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "packed/host/huge_pages.h"
#include "packed/host/round_up.h"
#include "packed/tree/format.h"

namespace nogemm {
namespace {

int64_t line_up(int64_t bytes) { return round_up(bytes, 64); }

const char* check_spec(const NogemmTreeSpec& s) {
  if (s.mode < NOGEMM_TREE_FP32 || s.mode > NOGEMM_TREE_INT8) return "unknown mode";
  if (s.activation < 0 || s.activation >= NOGEMM_ACTIVATIONS) return "unknown activation";
  if (s.d < 1 || s.d_out < 1 || s.trees < 1 || s.core < 0) return "widths and trees must be positive";
  if (s.levels < 1 || s.levels > 21) return "levels must be from 1 to 21";
  // Bytes, in floating point, where too many are not undefined.
  if (s.d > (1 << 20) || s.d_out > (1 << 20)) return "widths must be at most 2^20";
  const double nodes = static_cast<double>(s.trees) * static_cast<double>(int64_t{1} << s.levels);
  const double numbers = static_cast<double>(s.d) + static_cast<double>(s.d_out) + 64;
  if (s.trees >= (int64_t{1} << 31) || (nodes + static_cast<double>(s.core)) * numbers > 1e17)
    return "the nodes would fill more than 2^57 bytes";
  if (s.in_rows == nullptr || s.out_rows == nullptr || (s.core > 0 && (s.core_in == nullptr || s.core_out == nullptr)))
    return "rows are missing";
  return nullptr;
}

TreeHeader layout(const NogemmTreeSpec& s) {
  TreeHeader h{};
  std::memcpy(h.magic, kTreeMagic, sizeof h.magic);
  h.mode = s.mode;
  h.activation = s.activation;
  h.d = s.d;
  h.d_out = s.d_out;
  h.trees = s.trees;
  h.levels = s.levels;
  h.core = s.core;
  const int64_t in = s.mode == NOGEMM_TREE_FP32 ? 4 : 2;
  const int64_t out = s.mode == NOGEMM_TREE_FP32 ? 4 : s.mode == NOGEMM_TREE_BF16 ? 2 : 1;
  h.out_at = kNodeHeadBytes + line_up(s.d * in);
  h.record = h.out_at + line_up(s.d_out * out);
  h.bias_at = line_up(static_cast<int64_t>(sizeof(TreeHeader)));
  h.nodes_at = h.bias_at + line_up(s.d_out * 4);
  h.core_at = h.nodes_at + s.trees * ((int64_t{1} << s.levels) - 1) * h.record;
  h.bytes = h.core_at + s.core * h.record;
  return h;
}

// Whether nogemm_tree_pack would write this header.
bool is_packed(const TreeHeader& h) {
  static const float there = 0;
  NogemmTreeSpec s{};
  s.mode = h.mode, s.activation = h.activation, s.d = h.d, s.d_out = h.d_out;
  s.trees = h.trees, s.levels = h.levels, s.core = h.core;
  s.in_rows = s.out_rows = s.core_in = s.core_out = &there;  // not to be followed
  if (check_spec(s) != nullptr) return false;
  const TreeHeader own = layout(s);
  return std::memcmp(&own, &h, sizeof h) == 0;
}

uint16_t narrow(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

void store_bf16(const float* row, int64_t width, char* to) {
  for (int64_t c = 0; c < width; ++c) {
    const uint16_t bits = narrow(row[c]);
    std::memcpy(to + 2 * c, &bits, 2);
  }
}

// Steps of the row's largest value / 127; a broken row must show in the output, not vanish in the rounding.
float store_int8(const float* row, int64_t width, char* to) {
  float largest = 0;
  bool finite = true;
  for (int64_t c = 0; c < width; ++c) {
    finite = finite && std::isfinite(row[c]);
    largest = std::max(largest, std::fabs(row[c]));
  }
  if (!finite) {
    std::memset(to, 0, static_cast<size_t>(width));
    return NAN;
  }
  const float inverse = largest > 0x1p-119f ? 127.0f / largest : 0.0f;  // below: steps of no normal number
  auto* out = reinterpret_cast<int8_t*>(to);
  for (int64_t c = 0; c < width; ++c)
    out[c] = static_cast<int8_t>(std::clamp(std::nearbyint(row[c] * inverse), -127.0f, 127.0f));
  return largest / 127.0f;
}

void store_node(const TreeHeader& h, const float* in, float bias, float threshold, const float* out, char* record) {
  NodeHead head{bias, threshold, 1.0f};
  if (h.mode == NOGEMM_TREE_FP32) {
    std::memcpy(record + kNodeHeadBytes, in, static_cast<size_t>(h.d) * 4);
    std::memcpy(record + h.out_at, out, static_cast<size_t>(h.d_out) * 4);
  } else {
    store_bf16(in, h.d, record + kNodeHeadBytes);
    if (h.mode == NOGEMM_TREE_BF16) store_bf16(out, h.d_out, record + h.out_at);
    if (h.mode == NOGEMM_TREE_INT8) head.scale = store_int8(out, h.d_out, record + h.out_at);
  }
  std::memcpy(record, &head, sizeof head);
}

}  // namespace
}  // namespace nogemm

using namespace nogemm;

extern "C" int64_t nogemm_tree_pack_size(const NogemmTreeSpec* spec) {
  return check_spec(*spec) == nullptr ? layout(*spec).bytes : -1;
}

extern "C" const char* nogemm_tree_pack(const NogemmTreeSpec* spec, void* out, int64_t out_bytes) {
  if (const char* error = check_spec(*spec)) return error;
  const TreeHeader h = layout(*spec);
  if (reinterpret_cast<uintptr_t>(out) % 64 != 0) return "the packed buffer must be 64-byte aligned";
  if (out_bytes < h.bytes) return "the packed buffer is too small";
  auto* to = static_cast<char*>(out);
  ask_for_huge_pages(to, h.bytes);
  std::memset(to, 0, static_cast<size_t>(h.bytes));
  if (spec->out_bias != nullptr) std::memcpy(to + h.bias_at, spec->out_bias, static_cast<size_t>(h.d_out) * 4);
  const int64_t nodes = h.trees * ((int64_t{1} << h.levels) - 1);
  for (int64_t i = 0; i < nodes; ++i) {
    store_node(h, spec->in_rows + i * h.d, spec->bias ? spec->bias[i] : 0.0f,
               spec->threshold ? spec->threshold[i] : 0.0f, spec->out_rows + i * h.d_out,
               to + h.nodes_at + i * h.record);
  }
  for (int64_t i = 0; i < h.core; ++i) {
    store_node(h, spec->core_in + i * h.d, spec->core_bias ? spec->core_bias[i] : 0.0f, 0.0f,
               spec->core_out + i * h.d_out, to + h.core_at + i * h.record);
  }
  std::memcpy(to, &h, sizeof h);  // last: a half-filled buffer has no header
  return nullptr;
}

extern "C" const char* nogemm_tree_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out) {
  if (packed_bytes < static_cast<int64_t>(sizeof(TreeHeader)) ||
      std::memcmp(packed, kTreeMagic, sizeof kTreeMagic) != 0 || reinterpret_cast<uintptr_t>(packed) % 64 != 0)
    return "not a packed TreeFFN";
  const auto* h = static_cast<const TreeHeader*>(packed);
  if (h->bytes != packed_bytes) return "not a packed TreeFFN: its size is wrong";
  if (!is_packed(*h)) return "the packed TreeFFN is damaged: pack again";
  *d = h->d;
  *d_out = h->d_out;
  return nullptr;
}

extern "C" int64_t nogemm_tree_workspace(const void* packed, int64_t tokens, int64_t threads) {
  return kernels().tree.workspace(static_cast<const TreeHeader*>(packed), tokens, threads);
}

extern "C" void nogemm_tree_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                                    int64_t tokens, void* workspace, const NogemmHost* host) {
  kernels().tree.forward(packed, x, x_dtype, x_stride, y, tokens, workspace, host);
}

extern "C" void nogemm_tree_route(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows,
                                  int64_t tokens, void* workspace, const NogemmHost* host) {
  nogemm::kernels().tree.paths(packed, x, x_dtype, x_stride, rows, tokens, workspace, host);
}
