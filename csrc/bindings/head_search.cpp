// nogemm::head_search(Tensor x, Tensor weight, Tensor? bias, Tensor? noise, Tensor project, Tensor mean, Tensor eight,
//     Tensor four, Tensor rest, Tensor numbers, Tensor limits, int rows, bool logits) -> (Tensor, Tensor, Tensor)
#include "bindings/head.h"

namespace nogemm::head {
namespace {

constexpr const char* kSearch = "head_search";

bool before(const HeadRow& a, const HeadRow& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Leaves the `limit` best rows of a list.
void thin(HeadToken& token) {
  if (token.count <= token.limit) return;
  std::nth_element(token.list, token.list + token.limit - 1, token.list + token.count, before);
  token.count = token.limit;
  token.floor = token.list[token.limit - 1].value;
}

// The best rows of a token's pieces, in the first one's list; returns how many.
int64_t gather(const Tokens& tokens, int64_t t, int64_t rows) {
  HeadRow* list = tokens.part(0, t).list;
  int64_t count = 0;
  for (int64_t p = 0; p < tokens.pieces; ++p) {
    HeadToken& part = tokens.part(p, t);
    thin(part);
    for (int64_t i = 0; i < part.count; ++i) list[count++] = part.list[i];
  }
  if (count <= rows) return count;
  std::nth_element(list, list + rows - 1, list + count, before);
  return rows;
}

// At most kTokens tokens. Threads share phases: y, each token's numbers, the search, the best of its pieces, their exact
// logits. Without logits: by the leading parts of the codes alone. With them, estimates go there, and exact ones above.
void search_tokens(const Head& h, const float* x, int64_t begin, int64_t count, int64_t rows, float* logits,
                   Workspace& memory, int64_t* index, float* value) {
  // A vocabulary is often sorted by frequency, so that one piece has most of what is sought.
  const int64_t limit = (rows + 1) / 2, room = 2 * limit + kSketchRows, cuts = (rows + kTogether - 1) / kTogether;
  const int64_t lists = count * kPieces * room * static_cast<int64_t>(sizeof(HeadRow));
  Carver carver{
      memory.at_least(Tokens::bytes(h, count) + lists + count * cuts * static_cast<int64_t>(sizeof(Best)) + 64)};
  Tokens tokens(h, x, begin, count, logits == nullptr ? h.width8 + h.width4 : h.width, carver);
  auto* const list = carver.take<HeadRow>(count * kPieces * room);
  auto* const best = carver.take<Best>(count * cuts);
  int64_t found[kTokens];
  HeadCodes codes = h.codes;
  if (logits == nullptr) codes.steps_rest = 0;
  Phases phases;
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  parallel_for(threads, 1, [&](int64_t from, int64_t to) noexcept {
    for (int64_t worker = from; worker < to; ++worker) {
      tokens.project(phases);
      tokens.start(phases, 1.0, index, value, [&](HeadToken& part, int64_t p, int64_t t) {
        part.list = list + (t * kPieces + p) * room;
        part.limit = limit, part.thin = thin;
        if (logits != nullptr) part.estimates = logits + tokens.place[t] * h.rows;
      });
      phases.run(2, tokens.pieces, [&](int64_t p) {
        kernels().head.search(codes, tokens.begin(p), tokens.begin(p + 1), &tokens.part(p, 0), tokens.finite);
      });
      phases.run(3, tokens.finite, [&](int64_t t) { found[t] = gather(tokens, t, rows); });
      phases.run(4, tokens.finite * cuts, [&](int64_t job) {
        const int64_t t = job / cuts, first = job % cuts * kTogether, own = std::min(kTogether, found[t] - first);
        const HeadToken& part = tokens.part(0, t);
        int32_t names[kTogether];
        float exact[kTogether];
        best[job] = {};
        for (int64_t i = 0; i < own; ++i) names[i] = part.list[first + i].index;
        if (own > 0) exact_logits(h, tokens.state(tokens.place[t]), part.noise, names, own, exact);
        for (int64_t i = 0; i < own; ++i) {
          best[job].take(names[i], exact[i]);
          if (logits != nullptr) part.estimates[names[i]] = exact[i];
        }
      });
    }
  });
  for (int64_t t = 0; t < tokens.finite; ++t) {
    Best winner;
    for (int64_t job = t * cuts; job < (t + 1) * cuts; ++job) winner.take(best[job].index, best[job].value);
    const int64_t n = tokens.place[t];
    index[n] = winner.index == std::numeric_limits<int64_t>::max() ? kOverflown : winner.index;
    value[n] = winner.value;
  }
}

void head_search(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace memory;
  const Tensor x = take_tensor(stack[0]).contiguous();
  const Head h = take_head(stack, x, kSearch);
  const int64_t tokens = x.size(0), rows = std::min(take_int(stack[11]), h.rows);
  const bool all = take_bool(stack[12]);
  check(rows >= 1, kSearch, "rows must be at least 1, got ", rows);
  Tensor index = Tensor::empty({tokens}, aoti_torch_dtype_int64()),
         value = Tensor::empty({tokens}, aoti_torch_dtype_float32()),
         logits = Tensor::empty({tokens, all ? h.rows : 0}, aoti_torch_dtype_float32());
  for (int64_t n = 0; n < tokens; n += kTokens) {
    search_tokens(h, x.data<float>(), n, std::min(kTokens, tokens - n), rows,
                  all ? logits.mutable_data<float>() + n * h.rows : nullptr, memory, index.mutable_data<int64_t>() + n,
                  value.mutable_data<float>() + n);
  }
  memory.trim();
  stack[0] = std::move(index).to_stack();
  stack[1] = std::move(value).to_stack();
  stack[2] = std::move(logits).to_stack();
}

const Register registered(kSearch, head_search);

}  // namespace
}  // namespace nogemm::head
