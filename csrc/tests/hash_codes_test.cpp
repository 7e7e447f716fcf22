// Codes, scores and their gradient against the formulas, neighbours against an exhaustive search over all bit
// sets.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

struct Case {
  int64_t tokens, tables;
  int bits;
};

const Case kCases[] = {{1, 1, 1}, {3, 5, 2}, {5, 33, 3}, {4, 17, 9}, {1, 19, 10}};

struct Set {
  double sum;
  int mask;
};

// The k bit sets of least sum, ties by mask; sums in float32 as the kernel has them, so that equal means
// equal.
std::vector<Set> nearest(const Buffer& z, int64_t at, int bits, int k) {
  std::vector<Set> sets;
  for (int mask = 0; mask < (1 << bits); ++mask) {
    std::vector<float> members;
    for (int j = 0; j < bits; ++j)
      if (mask >> (bits - 1 - j) & 1) members.push_back(std::fabs(z[at + j]));
    std::sort(members.begin(), members.end());
    float sum = 0;
    for (float m : members) sum += m;
    sets.push_back({static_cast<double>(sum), mask});
  }
  std::sort(sets.begin(), sets.end(),
            [](const Set& a, const Set& b) { return a.sum < b.sum || (a.sum == b.sum && a.mask < b.mask); });
  sets.resize(static_cast<size_t>(k));
  return sets;
}

// Everything the formulas need for one table.
struct Table {
  double total = 0, p = 1;
  int code = 0;
  bool finite = true;
  Table(const Buffer& z, int64_t at, int bits) {
    for (int j = 0; j < bits; ++j) {
      const double u = std::fabs(z[at + j]);
      total += u;
      p /= 1 + std::exp(-2 * u);
      finite = finite && std::isfinite(u);
      code = code * 2 + (z[at + j] > 0 ? 1 : 0);
    }
  }
};

void forward_and_backward(const Case& c, int k, bool gelu, Dtype dtype, bool broken, std::mt19937& rng) {
  const int64_t count = c.tokens * c.tables, soft = count * c.bits;
  Buffer z = normal(rng, dtype, soft), scores(dtype, count * k), grad = normal(rng, dtype, count * k),
         grad_z(dtype, soft);
  for (int64_t i = 0; i < soft; i += 7) z.set(i, z[(i + 3) % soft]);  // ties
  z.set(soft / 3, 0.0f);
  if (broken) z.set(soft / 2, soft % 2 != 0 ? NAN : -INFINITY);
  std::vector<int32_t> codes(static_cast<size_t>(count * k));
  const nogemm::HashCodesKernels& kernel = nogemm::kernels().hash_codes;
  kernel.forward[dtype](z.data(), codes.data(), scores.data(), c.tokens, c.tables, c.bits, k, gelu);
  kernel.backward[dtype](grad.data(), z.data(), codes.data(), grad_z.data(), c.tokens, c.tables, c.bits, k, gelu);

  const std::string what = text("hash_codes T ", c.tables, " K ", c.bits, " k ", k, gelu ? " gelu" : " sigmoid",
                                " dtype ", int{dtype}, broken ? " broken" : "");
  std::vector<Expected> want, want_grad(static_cast<size_t>(soft), Expected{0, 0});
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * c.bits;
    const Table table(z, at, c.bits);
    const std::vector<Set> sets = nearest(z, at, c.bits, k);
    for (int f = 0; f < k; ++f) {
      const int code = codes[static_cast<size_t>(t * k + f)];
      if (!table.finite) {
        expect(code >= 0 && code < (1 << c.bits), what + ": a code out of range");
        want.push_back({NAN, 0});
        for (int j = 0; j < c.bits; ++j) want_grad[static_cast<size_t>(at + j)] = {NAN, 0};
        continue;
      }
      const Set& set = sets[static_cast<size_t>(f)];
      expect(code == (table.code ^ set.mask), text(what, ": code of table ", t, " neighbour ", f, " is ", code));
      const double a = table.total - 2 * set.sum, p = table.p * std::exp(-2 * set.sum), g = grad[t * k + f];
      want.push_back({gelu ? a * p : p, (gelu ? (table.total + set.sum) * p : p) * (1 + table.total)});
      for (int j = 0; j < c.bits; ++j) {
        const double s = code >> (c.bits - 1 - j) & 1 ? 1 : -1, slope = s - std::tanh(static_cast<double>(z[at + j]));
        Expected& e = want_grad[static_cast<size_t>(at + j)];
        e.value += g * p * (gelu ? s + a * slope : slope);
        e.magnitude += std::fabs(g * p) * (2 + 2 * table.total) * (1 + table.total);
      }
    }
  }
  expect(matches(scores, want, c.bits + 8), what + ": scores");
  expect(matches(grad_z, want_grad, c.bits + 8), what + ": gradient");
  control(scores, want, c.bits + 8, what + ": scores");
  control(grad_z, want_grad, c.bits + 8, what + ": gradient");
}

}  // namespace

void hash_codes_tests() {
  std::mt19937 rng(3);
  for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16})
    for (const Case& c : kCases)
      for (int k : {1, 2, 4})
        for (bool gelu : {true, false})
          for (bool broken : {false, true})
            if (k <= 1 << c.bits) forward_and_backward(c, k, gelu, dtype, broken, rng);
}
