// What a packed LookupFFN may be and where its parts lie; the C entry points that only read a buffer.
#include "packed/lookup/layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "kernels/hadamard_order.h"
#include "packed/host/round_up.h"

namespace nogemm {
namespace {

constexpr double kMostBytes = 1152921504606846976.0;  // 2^60

bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// Of each repeat.
int64_t lookup_columns(const NogemmLookupSpec& s) { return s.columns > 0 ? s.columns : s.width; }

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

// Why a BH projection cannot be packed, or null.
const char* check_bh(const NogemmLookupSpec& s) {
  if (s.rounds < 1 || s.rounds > 1024) return lookup_say("rounds = %lld: must be 1 to 1024", (long long)s.rounds);
  const int64_t order = s.width < s.d || s.width > (1 << 20) ? 0 : hadamard_order(s.width);
  if (order == 0)
    return lookup_say("width = %lld: must be m 2^k with m 1, 12 or 20, at least d = %lld and at most %d",
                      (long long)s.width, (long long)s.d, 1 << 20);
  const int64_t power = s.width / order;
  if (order > 1 && power < 16)
    return lookup_say("width = %lld is %lld times %lld: the native kernel knows multiples of 16", (long long)s.width,
                      (long long)order, (long long)power);
  if (!power_of_two(s.block) || s.block > power)
    return lookup_say("block = %lld: must be a power of two that divides %lld", (long long)s.block, (long long)power);
  if (s.columns < 0 || s.columns > s.width)
    return lookup_say("columns = %lld: must be 0 to %lld", (long long)s.columns, (long long)s.width);
  const int64_t taken = lookup_columns(s), needed = (s.tables * s.bits + taken - 1) / taken;
  if (s.repeats < 1 || s.repeats != needed)
    return lookup_say("repeats = %lld: %lld columns, %lld from each, need %lld", (long long)s.repeats,
                      (long long)(s.tables * s.bits), (long long)taken, (long long)needed);
  // Bytes of the weights, in floating point, where too many are not undefined.
  const double products = static_cast<double>(s.repeats) * static_cast<double>(s.rounds) *
                          static_cast<double>(std::max<int64_t>(s.width, 16));
  if (products * static_cast<double>(std::max<int64_t>(s.block, 16)) * 4 > kMostBytes)
    return "the weights of the projection would fill more than 2^60 bytes";
  return nullptr;
}

// The specification that a header describes, if its projection is of this kind; pointers are not to be followed.
NogemmLookupSpec described(const LookupHeader& h, int64_t projection) {
  static const float there = 0;
  NogemmLookupSpec s{};
  s.mode = h.mode, s.d = h.d, s.d_out = h.d_out, s.tables = h.tables, s.bits = h.bits;
  s.neighbours = h.neighbours, s.score = h.score, s.projection = projection;
  s.eps = static_cast<double>(h.eps), s.mix = 1.0;
  s.gamma = h.norm != 0 ? &there : nullptr;
  s.weight = &there, s.table_rows = &there;
  if (projection == NOGEMM_LOOKUP_DENSE) return s;
  s.rounds = h.rounds, s.repeats = h.repeats, s.block = h.block_in, s.columns = h.columns;
  s.width = h.in_width();  // of a narrower map, which fills one block of 16, too: it has fewer columns
  if (h.residual != 0) s.mix = 1.0 - static_cast<double>(h.keep);
  return s;
}

// Whether nogemm_lookup_pack would write this header: a checksum is no proof, since anybody can compute it.
bool is_packed(const LookupHeader& h) {
  for (const int64_t projection : {NOGEMM_LOOKUP_DENSE, NOGEMM_LOOKUP_BH}) {
    const NogemmLookupSpec s = described(h, projection);
    if (lookup_check_spec(s) != nullptr) continue;
    LookupHeader own = lookup_layout(s);
    if (own.residual != 0) own.keep = h.keep;  // the last bit of 1 - (1 - keep)
    own.checksum = h.checksum;
    if (std::memcmp(&own, &h, sizeof h) == 0) return true;
  }
  return false;
}

}  // namespace

const char* lookup_check_spec(const NogemmLookupSpec& s) {
  if (s.mode < 0 || s.mode > 3)
    return lookup_say("packed dtype %lld: must be 0 (fp32), 1 (bf16), 2 (int8) or 3 (int4)", (long long)s.mode);
  if (s.d < 1 || s.d > (1 << 20)) return lookup_say("d = %lld: must be 1 to %d", (long long)s.d, 1 << 20);
  if (s.d_out < 1 || s.d_out > (1 << 20))
    return lookup_say("d_out = %lld: must be 1 to %d", (long long)s.d_out, 1 << 20);
  if (s.bits < 1 || s.bits > 16) return lookup_say("bits = %lld: must be 1 to 16", (long long)s.bits);
  if (s.tables < 1 || (s.tables << s.bits) >= (int64_t{1} << 31))
    return lookup_say("tables = %lld: must be at least 1, and tables * 2^bits below 2^31", (long long)s.tables);
  if (s.neighbours != 1 && s.neighbours != 2 && s.neighbours != 4)
    return lookup_say("neighbours = %lld: the native kernel knows 1, 2 and 4", (long long)s.neighbours);
  if (s.neighbours > (int64_t{1} << s.bits))
    return lookup_say("neighbours = %lld: %lld bits give only %lld rows", (long long)s.neighbours, (long long)s.bits,
                      1ll << s.bits);
  if (s.score < 0 || s.score > 2)
    return lookup_say("score %lld: must be 0 (gelu), 1 (sigmoid) or 2 (constant)", (long long)s.score);
  if (s.score == NOGEMM_LOOKUP_CONSTANT && s.neighbours != 1)
    return lookup_say("neighbours = %lld: a constant score knows one", (long long)s.neighbours);
  if (s.projection < 0 || s.projection > 1)
    return lookup_say("projection %lld: must be 0 (dense) or 1 (BH)", (long long)s.projection);
  if (s.projection == NOGEMM_LOOKUP_BH) {
    if (const char* error = check_bh(s)) return error;
  } else if (s.width != 0) {
    return lookup_say("width = %lld: a dense projection is not padded", (long long)s.width);
  } else if (s.columns != 0) {
    return lookup_say("columns = %lld: a dense projection has no repeats", (long long)s.columns);
  } else if (s.mix != 1.0) {
    return lookup_say("mix = %g: a dense projection has no residual", s.mix);
  }
  if (!(s.eps >= 0) || !std::isfinite(s.mix)) return "eps must be >= 0 and mix finite";
  if (s.tables_dtype < 0 || s.tables_dtype > 2) return "tables_dtype must be 0 (fp32), 1 (bf16) or 2 (int8)";
  if (!s.weight || !s.table_rows) return "weight and table_rows must not be null";
  if ((s.tables_dtype == NOGEMM_LOOKUP_INT8) != (s.row_scale != nullptr))
    return "row_scale belongs to int8 tables and to no others";
  if (s.beta && !s.gamma) return "beta without gamma";
  return nullptr;
}

LookupHeader lookup_layout(const NogemmLookupSpec& s) {
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
    h.rounds = h.repeats = h.blocks = h.order = h.active_blocks = 1;
    h.block_in = static_cast<int32_t>(round_up(s.d, 16));
    h.block_out = static_cast<int32_t>(round_up(columns, 16));
    h.columns = static_cast<int32_t>(columns);
  } else {
    const int64_t block = std::max<int64_t>(s.block, 16);
    h.rounds = static_cast<int32_t>(s.rounds);
    h.repeats = static_cast<int32_t>(s.repeats);
    h.block_in = h.block_out = static_cast<int32_t>(block);
    h.blocks = static_cast<int32_t>(std::max<int64_t>(1, s.width / block));
    h.order = static_cast<int32_t>(hadamard_order(s.width));
    h.active_blocks = static_cast<int32_t>((s.d + block - 1) / block);
    h.columns = static_cast<int32_t>(lookup_columns(s));
  }
  h.fixed_point = s.mode != NOGEMM_LOOKUP_FP32;
  h.act_max = h.block_in <= 128 ? 16383.0f : 8191.0f;  // wide sums leave fewer bits: weights need them more
  h.norm = s.gamma != nullptr;
  h.residual = s.projection == NOGEMM_LOOKUP_BH && s.mix != 1.0;
  h.eps = static_cast<float>(s.eps);
  h.keep = static_cast<float>(1.0 - s.mix);
  h.slices = static_cast<int32_t>((s.d_out + h.slice() - 1) / h.slice());
  const int64_t rest = s.d_out - (h.slices - 1) * h.slice();
  h.last_slice = static_cast<int32_t>(rest <= kChunk ? kChunk : h.slice());

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
  h.row_scale = section(h.integers() ? s.tables * h.rows() * 4 : 0);
  h.out_bias = section(h.slices * h.slice() * 4);
  const int64_t stored = (h.slices - 1) * h.slice() + h.last_slice;
  h.tables_at = section(s.tables * h.rows() * h.row_bytes(stored));
  h.bytes = at;
  h.checksum = header_checksum(h);
  return h;
}

}  // namespace nogemm

using namespace nogemm;

extern "C" int64_t nogemm_lookup_pack_size(const NogemmLookupSpec* spec) {
  return lookup_check_spec(*spec) ? -1 : lookup_layout(*spec).bytes;
}

extern "C" const char* nogemm_lookup_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* d_out) {
  if (reinterpret_cast<uintptr_t>(packed) % 64) return "the packed buffer must be 64-byte aligned";
  LookupHeader h;
  if (packed_bytes < static_cast<int64_t>(sizeof h)) return "not a packed LookupFFN: too short";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kLookupMagic) return "not a packed LookupFFN";
  if (h.version != kLookupVersion)
    return lookup_say("packed by version %u of the format, this is version %u: pack again", h.version, kLookupVersion);
  if (h.checksum != header_checksum(h) || h.bytes > packed_bytes || !is_packed(h))
    return "the packed LookupFFN is damaged: pack again";
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

extern "C" void nogemm_lookup_route(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows,
                                    int64_t tokens, void* workspace, const NogemmHost* host) {
  nogemm::kernels().lookup.hash(packed, x, x_dtype, x_stride, rows, tokens, workspace, host);
}
