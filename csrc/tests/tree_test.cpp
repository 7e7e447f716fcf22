// The packed TreeFFN against loops in double precision.
#include <algorithm>

#include "check.h"
#include "tree_reference.h"

using namespace tree_reference;

namespace {

const Shape kShapes[] = {
    {1, 1, 1, 1, 0, NOGEMM_GELU, false, false},       {64, 64, 1, 7, 0, NOGEMM_GELU, true, false},
    {37, 19, 3, 4, 2, NOGEMM_SILU, true, true},       {130, 33, 2, 3, 5, NOGEMM_RELU, false, true},
    {24, 17, 2, 3, 1, NOGEMM_RELU2, true, true},      {24, 17, 2, 3, 1, NOGEMM_GELU_TANH, true, false},
    {24, 17, 2, 3, 1, NOGEMM_QUICK_GELU, true, true}, {16, 200, 9, 2, 1, NOGEMM_GELU, true, true},
    {768, 768, 40, 4, 0, NOGEMM_GELU, true, false}};

std::string name_of(const Shape& s, int64_t mode) {
  return check::text("tree d ", s.d, " ", s.d_out, " K ", s.trees, " L ", s.levels, " core ", s.core, " mode ", mode);
}

void packed(const Shape& s, int64_t mode) {
  const Model model = make_model(s, 5);
  const char* error = nullptr;
  const Buffer buffer = pack(model.spec(mode), &error);
  check::expect(error == nullptr, name_of(s, mode) + ": refused");
  if (error != nullptr) return;
  for (const int64_t tokens : {0, 1, 2, 9, 40}) {
    const std::vector<float> x = normal(7, static_cast<size_t>(tokens * s.d), 1.0f);
    const std::vector<float> y = run(buffer, x, tokens, s.d_out, 1);
    check::expect(compare(model, mode, x, y, tokens) == 0, name_of(s, mode) + check::text(": N ", tokens));
    check::expect(run(buffer, x, tokens, s.d_out, 3) == y, name_of(s, mode) + ": threads change bits");
    if (tokens == 0) continue;
    std::vector<float> wrong = y;
    wrong[0] += 0.01f * (1.0f + std::fabs(wrong[0]));
    std::vector<float> broken = y;
    broken.back() = NAN;
    const std::vector<float> clear(x.begin(), x.begin() + s.d);
    if (!answer(model, mode, clear.data()).close_call)
      check::expect(compare(model, mode, x, wrong, tokens) == 1, name_of(s, mode) + ": control: a wrong output passed");
    const std::vector<float> last(x.end() - s.d, x.end());
    if (!answer(model, mode, last.data()).close_call)
      check::expect(compare(model, mode, x, broken, tokens) == 1, name_of(s, mode) + ": control: a NaN passed");
  }
}

void refusals() {
  const Model model = make_model(kShapes[2], 5);
  const char* error = nullptr;
  const Buffer buffer = pack(model.spec(0), &error);
  int64_t d = 0, d_out = 0;
  check::expect(nogemm_tree_check(buffer.as<void>(), buffer.bytes(), &d, &d_out) == nullptr && d == 37 && d_out == 19,
                "a packed tree is known again");
  check::expect(nogemm_tree_check(buffer.as<void>(), buffer.bytes() - 1, &d, &d_out) != nullptr,
                "a short buffer is refused");
  *buffer.as<char>() ^= 1;
  check::expect(nogemm_tree_check(buffer.as<void>(), buffer.bytes(), &d, &d_out) != nullptr,
                "a spoilt buffer is refused");
  NogemmTreeSpec bad = model.spec(0);
  bad.levels = 22;
  check::expect(nogemm_tree_pack_size(&bad) == -1, "22 levels are refused");
  bad = model.spec(3);
  check::expect(nogemm_tree_pack_size(&bad) == -1, "an unknown mode is refused");
}

// The training kernel: visited nodes and their z. Beside a sign too close to call both ways are right, so the
// walk follows the kernel's own path and holds each step against what z says.
void descent(nogemm::Dtype dtype, int64_t tokens, int64_t trees, int64_t levels, int64_t width, bool extras,
             std::mt19937& rng) {
  const int64_t per_tree = (int64_t{1} << levels) - 1, visits = tokens * trees * levels;
  check::Buffer x = check::normal(rng, dtype, tokens * width),
                rows = check::normal(rng, dtype, trees * per_tree * width),
                bias = check::normal(rng, dtype, trees * per_tree), bar = check::normal(rng, dtype, trees * per_tree),
                z(dtype, visits);
  std::vector<int32_t> nodes(static_cast<size_t>(visits) + 1, -7);
  const nogemm::TreeShape shape{tokens, trees, levels, width};
  for (const auto& range : {std::pair<int64_t, int64_t>{tokens / 2, tokens}, {0, tokens / 2}})
    nogemm::kernels().tree.descend[dtype](shape, x.data(), rows.data(), extras ? bias.data() : nullptr,
                                          extras ? bar.data() : nullptr, z.data(), nodes.data(), range.first,
                                          range.second);
  std::vector<check::Expected> want(static_cast<size_t>(visits));
  const std::string name =
      check::text("descent N ", tokens, " K ", trees, " L ", levels, " D ", width, " dtype ", int{dtype});
  int64_t lost = 0;
  for (int64_t at = 0; at < visits; ++at) {
    const int64_t n = at / levels / trees, k = at / levels % trees, level = at % levels;
    const int64_t row = nodes[static_cast<size_t>(at)], node = row - k * per_tree;
    const bool inside = node >= (int64_t{1} << level) - 1 && node < (int64_t{2} << level) - 1;
    lost += !inside;
    if (!inside) continue;
    check::Expected& e = want[static_cast<size_t>(at)];
    for (int64_t c = 0; c < width; ++c) e.add(static_cast<double>(rows[row * width + c]) * x[n * width + c]);
    if (extras) e.add(bias[row]);
    if (level + 1 == levels) continue;
    const double margin = e.value - (extras ? bar[row] : 0.0f);
    const int64_t right = nodes[static_cast<size_t>(at) + 1] - k * per_tree - 2 * node - 1;
    const bool close = std::fabs(margin) <= std::ldexp(static_cast<double>(width + 8), -24) * e.magnitude;
    lost += !(right == 0 || right == 1) || (!close && right != (margin > 0 ? 1 : 0));
  }
  check::expect(lost == 0 && nodes.back() == -7, name + ": path");
  check::expect(check::matches(z, want, width + 1), name + ": z");
  check::control(z, want, width + 1, name + ": z");
}

}  // namespace

void tree_tests() {
  std::mt19937 rng(17);
  for (const nogemm::Dtype dtype : {nogemm::kF32, nogemm::kBF16})
    for (const bool extras : {false, true}) {
      descent(dtype, 1, 1, 1, 1, extras, rng);
      descent(dtype, 11, 3, 4, 37, extras, rng);
      descent(dtype, 9, 2, 6, 192, extras, rng);
    }
  refusals();
  for (const Shape& s : kShapes)
    for (const int64_t mode : {NOGEMM_TREE_FP32, NOGEMM_TREE_BF16, NOGEMM_TREE_INT8}) packed(s, mode);
}
