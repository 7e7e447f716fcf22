// The steps of a search for the k largest numbers, put together, against a stable sort.
#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"

using namespace check;

namespace {

const nogemm::TopkKernels& kernel() { return nogemm::kernels().topk; }
size_t at(int64_t i) { return static_cast<size_t>(i); }

// Indices of all numbers, NaN first, then the largest, of equal ones the lowest index.
std::vector<int32_t> ranked(const Buffer& x) {
  std::vector<int32_t> order(at(x.size()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return std::isnan(x[a]) != std::isnan(x[b]) ? std::isnan(x[a]) : x[a] > x[b];
  });
  return order;
}

std::vector<int32_t> exact(Buffer& x, int64_t k, int64_t depth, bool dense, bool sorted) {
  const int64_t n = x.size(), lanes = nogemm::kernels().lanes, chunk = depth * lanes, chunks = (n + chunk - 1) / chunk;
  std::vector<float> maxima(at(chunks * lanes));
  std::vector<int32_t> keys(at(n + lanes), -7), index(at(n + lanes), -7), spare(at(2 * k + lanes));
  const int64_t half = chunks / 2;
  bool nan = kernel().maxima[x.dtype()](x.data(), n, depth, 0, half, maxima.data());
  nan |= kernel().maxima[x.dtype()](x.data(), n, depth, half, chunks, maxima.data());
  const int32_t least = kernel().floor(maxima.data(), chunks * lanes, k);
  const int64_t count = nan ? kernel().reaching[x.dtype()](x.data(), 0, n, least, dense, keys.data(), index.data())
                            : kernel().collect[x.dtype()](x.data(), n, depth, maxima.data(), 0, chunks, least, dense,
                                                          keys.data(), index.data());
  expect(count >= k, text("topk: ", count, " numbers reach the floor of ", k));
  expect(kernel().count[x.dtype()](x.data(), 0, n, least) == count, "topk: as many as are counted");
  kernel().finish(keys.data(), index.data(), count, k, least, sorted, spare.data());
  index.resize(at(k));
  return index;
}

void search(Buffer x, int64_t k, const std::string& name) {
  std::vector<int32_t> want = ranked(x);
  want.resize(at(k));
  for (const int64_t depth : {2, 8}) {
    for (const bool dense : {false, true}) expect(exact(x, k, depth, dense, true) == want, name);
  }
  std::vector<int32_t> wrong = exact(x, k, 2, false, true);
  if (k > 1) {
    std::swap(wrong[0], wrong[1]);
    expect(wrong != want, name + ": control: another order passed");
  }
  std::sort(want.begin(), want.end());
  expect(exact(x, k, 4, false, false) == want, name + " by index");
}

void searches(std::mt19937& rng, Dtype dtype) {
  for (const int64_t n : {1, 17, 200, 3001}) {
    for (const int64_t k : {int64_t{1}, n / 20, n / 4, n - 1, n}) {
      if (k < 1) continue;
      const std::string name = text("topk dtype ", static_cast<int>(dtype), ": ", k, " of ", n);
      Buffer x = normal(rng, dtype, n);
      search(x, k, name);
      for (int64_t i = 0; i < n; ++i) x.set(i, std::round(x[i]));
      search(x, k, name + " with ties");
      for (int64_t i = 0; i < n; i += 9) x.set(i, i % 2 ? NAN : i % 4 ? INFINITY : -INFINITY);
      search(x, k, name + " not finite");
      for (int64_t i = 0; i < n; ++i) x.set(i, static_cast<float>(i / 8));
      search(x, k, name + " ascending");
      for (int64_t i = 0; i < n; ++i) x.set(i, i == n / 2 ? 1.0f : -INFINITY);
      search(x, k, name + " lowest");
    }
  }
}

// kept largest of each bucket, then the k largest of those.
void buckets(std::mt19937& rng, int64_t n, int64_t count, int64_t kept, bool ties) {
  const std::string name = text("topk buckets ", count, " of ", n, " keep ", kept, ties ? " with ties" : "");
  Buffer x = normal(rng, nogemm::kF32, n);
  for (int64_t i = 0; ties && i < n; ++i) x.set(i, std::round(2 * x[i]));
  const int64_t all = count * kept, k = count / 2, lanes = nogemm::kernels().lanes;
  std::vector<float> values(at(all));
  std::vector<int32_t> places(at(all)), keys(at(all + lanes)), index(at(all + lanes)), spare(at(2 * all + lanes));
  const int64_t half = count / nogemm::kTopkStrip / 2 * nogemm::kTopkStrip;
  const auto run = kernel().buckets[kept - 1][nogemm::kF32];
  bool nan = run(x.data(), n, count, 0, half, values.data(), places.data());
  nan |= run(x.data(), n, count, half, count, values.data(), places.data());
  expect(!nan, name + ": there is no NaN");
  std::vector<int64_t> taken(at(count));
  std::vector<int32_t> want;
  for (const int32_t i : ranked(x)) {
    if (static_cast<int64_t>(want.size()) < k && taken[at(i % count)]++ < kept) want.push_back(i);
  }
  std::vector<float> again = values;
  expect(kernel().candidates(values.data(), places.data(), all, k, true, keys.data(), index.data(), spare.data()),
         name);
  expect(std::equal(want.begin(), want.end(), index.begin()), name);
  std::reverse(want.begin(), want.end());
  expect(!std::equal(want.begin(), want.end(), index.begin()), name + ": control: the reverse passed");
  std::sort(want.begin(), want.end());
  kernel().candidates(again.data(), places.data(), all, k, false, keys.data(), index.data(), spare.data());
  expect(std::equal(want.begin(), want.end(), index.begin()), name + " by index");
  x.set(n - 1, NAN);
  expect(run(x.data(), n, count, 0, count, values.data(), places.data()), name + ": the NaN is seen");
}

void bounds() {
  Buffer x(nogemm::kF32, 100);
  for (int64_t i = 0; i < 100; ++i) x.set(i, i == 70 ? 3.0f : -INFINITY);
  std::vector<float> values(64);
  std::vector<int32_t> places(64), keys(80), index(80), spare(160);
  kernel().buckets[0][nogemm::kF32](x.data(), 100, 64, 0, 64, values.data(), places.data());
  expect(!kernel().candidates(values.data(), places.data(), 64, 2, true, keys.data(), index.data(), spare.data()),
         "topk: one number above -infinity is not two");
  constexpr int32_t kNan = 0x7f800001;
  expect(kernel().count[nogemm::kF32](x.data(), 0, 100, kNan) == 0, "topk: no number reaches NaN");
  x.set(99, NAN);
  expect(kernel().count[nogemm::kF32](x.data(), 0, 100, kNan) == 1, "topk: NaN reaches NaN");
}

void groups(std::mt19937& rng) {
  for (const int64_t group : {1, 7, 8, 90}) {
    Buffer x = normal(rng, nogemm::kBF16, 83);
    const int64_t count = (83 + group - 1) / group;
    std::vector<float> sums(at(count)), maxima(at(count));
    kernel().groups[nogemm::kBF16](x.data(), 83, group, true, 0, count, sums.data());
    kernel().groups[nogemm::kBF16](x.data(), 83, group, false, 0, count, maxima.data());
    for (int64_t g = 0; g < count; ++g) {
      float sum = x[g * group], most = x[g * group];
      for (int64_t i = g * group + 1; i < std::min<int64_t>(83, (g + 1) * group); ++i)
        sum += x[i], most = std::max(most, x[i]);
      expect(sums[at(g)] == sum && maxima[at(g)] == most, text("topk groups of ", group));
    }
  }
}

}  // namespace

void topk_tests() {
  std::mt19937 rng(17);
  for (const Dtype dtype : {nogemm::kF32, nogemm::kBF16}) searches(rng, dtype);
  for (int64_t kept = 1; kept <= nogemm::kTopkKept; ++kept) {
    for (const bool ties : {false, true}) {
      buckets(rng, 1000, 128, kept, ties);
      buckets(rng, 3001, 192, kept, ties);
    }
  }
  bounds();
  groups(rng);
}
