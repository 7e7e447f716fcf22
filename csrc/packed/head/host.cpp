#include "packed/head/host.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "packed/head/format.h"
#include "packed/head/run.h"
#include "packed/host/sections.h"
#include "packed/neurons/state.h"

namespace nogemm {
namespace {

Head head_of(const void* packed, const void* rows) {
  const auto* h = static_cast<const HeadHeader*>(packed);
  const auto* base = static_cast<const char*>(packed);
  const auto floats = [&](int64_t offset) {
    return offset == 0 ? nullptr : reinterpret_cast<const float*>(base + offset);
  };
  Head head{};
  head.table = &kernels();
  head.weight = rows;
  head.dtype = static_cast<Dtype>(h->dtype);
  head.bias = floats(h->bias);
  head.project = floats(h->project), head.mean = floats(h->mean), head.limits = floats(h->limits);
  head.width = h->d, head.width8 = h->width8, head.width4 = h->width4;
  head.width_rest = h->d - h->width8 - h->width4;
  head.groups = (h->rows + kSketchRows - 1) / kSketchRows;
  head.codes = {reinterpret_cast<const uint8_t*>(base + h->eight),
                reinterpret_cast<const uint8_t*>(base + h->four),
                reinterpret_cast<const uint8_t*>(base + h->rest),
                reinterpret_cast<const bf16*>(base + h->numbers),
                head.bias,
                (head.width8 + 3) / 4,
                (head.width4 + 7) / 8,
                (head.width_rest + 7) / 8,
                h->rows};
  return head;
}

// What a call works in, beside the algorithm's own scratch of so many bytes.
struct Call {
  float *x, *value;
  int64_t *index, *exact;
  char* scratch;
};

Call carve(const Head& head, int64_t tokens, int64_t bytes, hire::Carver& carver) {
  Call call{};
  call.x = carver.take<float>(tokens * head.width);
  call.value = carver.take<float>(tokens);
  call.index = carver.take<int64_t>(tokens);
  call.exact = carver.take<int64_t>(tokens);
  call.scratch = carver.take<char>(bytes);
  return call;
}

int64_t bytes_of(const Head& head, int64_t tokens, int64_t bytes) {
  hire::Carver carver{nullptr};
  carve(head, tokens, bytes, carver);
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(carver.at));
}

// The answer of all logits, where bounds overflowed float32; a logit that is NaN leaves none.
void answer_by_all(const Head& head, const float* x, const float* noise, const NogemmHost& host, int64_t* index,
                   float* value, int64_t* exact) {
  std::vector<float> logits(static_cast<size_t>(head.codes.rows));
  head_logits(head, x, 1, logits.data(), host);
  *index = 0;
  bool whole = true;
  for (int64_t v = 0; v < head.codes.rows; ++v) {
    float& own = logits[static_cast<size_t>(v)];
    if (noise != nullptr) own += noise[v];
    whole = whole && !std::isnan(own);
    if (own > logits[static_cast<size_t>(*index)]) *index = v;
  }
  *value = whole ? logits[static_cast<size_t>(*index)] : std::numeric_limits<float>::quiet_NaN();
  *exact = whole ? head.codes.rows : 0;
  if (!whole) *index = NOGEMM_HEAD_NO_TOKEN;
}

const float* noise_of(const Head& head, const float* noise, int64_t n) {
  return noise == nullptr ? nullptr : noise + n * head.codes.rows;
}

}  // namespace
}  // namespace nogemm

using namespace nogemm;

static_assert(static_cast<int64_t>(NOGEMM_HEAD_NO_TOKEN) == kHeadNotFinite);

extern "C" const char* nogemm_head_fields() {
#define NOGEMM_INTEGER(name) "q" #name " "
  return NOGEMM_HEAD_FIELDS(NOGEMM_INTEGER);
#undef NOGEMM_INTEGER
}

extern "C" const char* nogemm_head_check(const void* packed, int64_t packed_bytes, int64_t* d, int64_t* rows,
                                         int64_t* row_bytes) {
  const auto* h = static_cast<const HeadHeader*>(packed);
  if (packed_bytes < static_cast<int64_t>(sizeof(HeadHeader)) || h->magic != kHeadMagic) return "not a packed head";
  if (h->version != kHeadVersion) return "codes of another version; export the model again";
  constexpr const char* kDamaged = "damaged codes; export the model again";
  const auto most = std::numeric_limits<int32_t>::max() - kSketchRows;
  if (h->bytes != packed_bytes || h->d < 1 || h->d > (1 << 20) || h->rows < 1 || h->rows >= most || h->dtype < 0 ||
      h->dtype > NOGEMM_X_FP16)
    return kDamaged;
  const int64_t groups = (h->rows + kSketchRows - 1) / kSketchRows;
  if (h->width8 < 0 || h->width4 < 0 || h->width8 > h->d || h->width4 > h->d - h->width8) return kDamaged;
  const int64_t width_rest = h->d - h->width8 - h->width4, step = groups * 4 * kSketchRows;
  Sections sections{packed_bytes, static_cast<int64_t>(sizeof(HeadHeader))};
  sections.need(h->eight, {(h->width8 + 3) / 4, step});
  sections.need(h->four, {(h->width4 + 7) / 8, step});
  sections.need(h->rest, {(width_rest + 7) / 8, step});
  sections.need(h->numbers, {groups, kHeadNumbers * kSketchRows * 2});
  sections.need(h->project, {h->d, h->d, 4});
  sections.need(h->mean, {h->d, 4});
  sections.need(h->limits, {6, 4});
  sections.may_have(h->bias, {h->rows, 4});
  if (!sections.inside) return kDamaged;
  *d = h->d, *rows = h->rows, *row_bytes = h->d * (h->dtype == NOGEMM_X_FP32 ? 4 : 2);
  return nullptr;
}

extern "C" int64_t nogemm_head_workspace(const void* packed, int64_t tokens) {
  const Head head = head_of(packed, nullptr);
  return bytes_of(head, tokens, head_argmax_workspace(head, tokens));
}

extern "C" int64_t nogemm_head_search_workspace(const void* packed, int64_t tokens, int64_t best) {
  const Head head = head_of(packed, nullptr);
  return bytes_of(head, tokens, head_search_workspace(head, tokens, std::min(best, head.codes.rows)));
}

extern "C" void nogemm_head_argmax(const void* packed, const void* rows, const void* x, int64_t x_dtype, int64_t tokens,
                                   const float* noise, int32_t* index, float* logit, int32_t* exact, void* workspace,
                                   const NogemmHost* host) {
  if (tokens == 0) return;
  const Head head = head_of(packed, rows);
  hire::Carver carver{static_cast<char*>(workspace)};
  const Call call = carve(head, tokens, head_argmax_workspace(head, tokens), carver);
  head.table->hire.read[x_dtype](x, call.x, tokens * head.width);
  head_argmax(head, {call.x, noise, tokens}, 1.0, call.index, logit, call.exact, call.scratch, *host);
  for (int64_t n = 0; n < tokens; ++n) {
    if (call.index[n] == kHeadOverflown)
      answer_by_all(head, call.x + n * head.width, noise_of(head, noise, n), *host, call.index + n, logit + n,
                    call.exact + n);
    index[n] = static_cast<int32_t>(call.index[n]), exact[n] = static_cast<int32_t>(call.exact[n]);
  }
}

extern "C" void nogemm_head_search(const void* packed, const void* rows, const void* x, int64_t x_dtype, int64_t tokens,
                                   const float* noise, int64_t best, int32_t* index, float* states, void* workspace,
                                   const NogemmHost* host) {
  if (tokens == 0) return;
  const Head head = head_of(packed, rows);
  best = std::min(best, head.codes.rows);
  hire::Carver carver{static_cast<char*>(workspace)};
  const Call call = carve(head, tokens, head_search_workspace(head, tokens, best), carver);
  head.table->hire.read[x_dtype](x, states, tokens * head.width);
  head_search(head, {states, noise, tokens}, best, nullptr, call.index, call.value, call.scratch, *host);
  for (int64_t n = 0; n < tokens; ++n) {
    if (call.index[n] == kHeadOverflown)
      answer_by_all(head, states + n * head.width, noise_of(head, noise, n), *host, call.index + n, call.value + n,
                    call.exact + n);
    index[n] = static_cast<int32_t>(call.index[n]);
  }
}

extern "C" void nogemm_head_embed(const void* rows, int64_t dtype, int64_t d, const int64_t* ids, int64_t count,
                                  float* out) {
  const int64_t bytes = d * (dtype == NOGEMM_X_FP32 ? 4 : 2);
  for (int64_t i = 0; i < count; ++i)
    kernels().hire.read[dtype](static_cast<const char*>(rows) + ids[i] * bytes, out + i * d, d);
}
