// Times a naive LookupFFN beside the packed one, both float32, without torch:
//   nogemm_naive_time [--threads N] [--batch N] [--json FILE] [d tables bits block]
//
// First both are compared on 512 tokens: a token whose error is above 1e-3 of the outputs' size went to
// another row where a bit's value is nearly zero; one in a thousand may. Tokens are fresh on every call.
// Prints and writes microseconds per call: median over rounds of the whole, of the hash, and their
// difference, the gather.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>

#include "dev/naive_lookup.h"
#include "dev/pool.h"
#include "dispatch.h"
#include "packed/host/phases.h"
#include "tests/lookup_reference.h"

using namespace lookup_reference;

namespace {

constexpr int kRounds = 7;
constexpr int64_t kCheckTokens = 512;

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Job {
  naive::Layer layer;
  const float* x;
  float* y;
  int64_t tokens, threads;
  bool gather;
};

void naive_worker(int64_t worker, void* arg) {
  const Job& job = *static_cast<const Job*>(arg);
  const naive::Layer& l = job.layer;
  std::vector<float> scratch(static_cast<size_t>(3 * l.width)), z(static_cast<size_t>(l.repeats * l.width)),
      scores(static_cast<size_t>(l.tables));
  std::vector<int32_t> codes(static_cast<size_t>(l.tables));
  const int64_t begin = job.tokens * worker / job.threads, end = job.tokens * (worker + 1) / job.threads;
  for (int64_t n = begin; n < end; ++n) {
    naive::hash_token(l, job.x + n * l.d, scratch.data(), z.data(), codes.data(), scores.data());
    if (job.gather) naive::gather_token(l, codes.data(), scores.data(), job.y + n * l.d_out);
  }
}

// Median of rounds over `pool` fresh tokens, in us per call.
template <class Call>
double median_us(const std::vector<float>& x, int64_t d, int64_t batch, Call call) {
  const int64_t pool = static_cast<int64_t>(x.size()) / d;
  const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(200, 2048 / batch));
  std::vector<double> times;
  int64_t at = 0;
  for (int round = -1; round < kRounds; ++round) {
    const double start = now_us();
    for (int64_t c = 0; c < calls; ++c) {
      call(x.data() + at * d);
      at = at + 2 * batch <= pool ? at + batch : 0;
    }
    if (round >= 0) times.push_back((now_us() - start) / static_cast<double>(calls));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Share of tokens that differ; 1 if any value is not finite.
double differing(const std::vector<float>& a, const std::vector<float>& b, int64_t width) {
  double size = 0;
  for (float f : a) size += static_cast<double>(f) * f;
  size = std::sqrt(size / static_cast<double>(a.size()) * static_cast<double>(width));
  int64_t off = 0;
  const int64_t tokens = static_cast<int64_t>(a.size()) / width;
  for (int64_t n = 0; n < tokens; ++n) {
    double error = 0;
    for (int64_t c = n * width; c < (n + 1) * width; ++c) error += std::pow(a[c] - b[c], 2);
    if (!(std::sqrt(error) <= 1e-3 * size)) ++off;
  }
  return static_cast<double>(off) / static_cast<double>(tokens);
}

}  // namespace

int main(int argc, char** argv) {
  int64_t threads = 2, batch = 4096;
  const char* json = nullptr;
  std::vector<int64_t> numbers;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--threads" && i + 1 < argc) {
      threads = std::stol(argv[++i]);
    } else if (a == "--batch" && i + 1 < argc) {
      batch = std::stol(argv[++i]);
    } else if (a == "--json" && i + 1 < argc) {
      json = argv[++i];
    } else {
      numbers.push_back(std::stol(a));
    }
  }
  if (numbers.empty()) numbers = {768, 170, 9, 64};
  if (numbers.size() != 4 || batch < 1 || threads < 1)
    return std::printf("nogemm_naive_time: d tables bits block, positive\n"), 1;
  const Shape s{numbers[0], numbers[0], numbers[1], numbers[2], numbers[3]};
  const Model m = make_model(s, 1);
  const char* error = nullptr;
  const Buffer packed = pack(m.spec(NOGEMM_LOOKUP_FP32), &error);
  if (error != nullptr) return std::printf("%s\n", error), 1;

  const int64_t tokens = std::max<int64_t>(2 * batch, 65536);
  const std::vector<float> x = uniform(3, static_cast<size_t>(tokens * s.d), 1.7f);
  std::vector<float> y(static_cast<size_t>(std::max(batch, kCheckTokens) * s.d_out)), reference = y;
  dev::Pool pool(threads);
  const NogemmHost host{threads, dev::Pool::run, &pool};
  const Buffer workspace(nogemm_lookup_workspace(packed.as<void>(), std::max(batch, kCheckTokens), threads));
  Job job{{s.d, s.d_out, m.width, s.tables, s.bits, s.block, s.rounds, m.repeats, m.gamma.data(), m.beta.data(),
           m.weight.data(), m.proj_bias.data(), m.rows.data(), m.out_bias.data()},
          nullptr,
          y.data(),
          batch,
          threads,
          true};
  const auto naive_call = [&](const float* from, int64_t count, bool gather) {
    job.x = from;
    job.tokens = count;
    job.gather = gather;
    dev::Pool::run(&pool, threads, naive_worker, &job);
  };
  const auto packed_call = [&](const float* from, int64_t count, int64_t phase, float* to) {
    nogemm_phase_run(NOGEMM_KIND_LOOKUP, phase, packed.as<void>(), from, to, count, workspace.as<void>(), &host);
  };

  naive_call(x.data(), kCheckTokens, true);
  packed_call(x.data(), kCheckTokens, NOGEMM_PHASE_WHOLE, reference.data());
  y.resize(static_cast<size_t>(kCheckTokens * s.d_out));
  const std::vector<float> ours(reference.begin(), reference.begin() + kCheckTokens * s.d_out);
  const double off = differing(ours, y, s.d_out);
  std::vector<float> wrong = y;
  for (int64_t n = 0; n < kCheckTokens; n += 50) wrong[static_cast<size_t>(n * s.d_out)] += 10.0f;
  if (!(off <= 1e-3) || differing(ours, wrong, s.d_out) <= 1e-3)
    return std::printf("nogemm_naive_time: outputs do not match (%.4f of the tokens)\n", off), 1;
  y.resize(static_cast<size_t>(batch * s.d_out));
  job.y = y.data();

  FILE* file = json == nullptr ? nullptr : std::fopen(json, "a");
  double whole[2];
  for (int which = 0; which < 2; ++which) {
    const bool naive = which == 0;
    const double all = median_us(x, s.d, batch, [&](const float* from) {
      naive ? naive_call(from, batch, true) : packed_call(from, batch, NOGEMM_PHASE_WHOLE, y.data());
    });
    const double hash = median_us(x, s.d, batch, [&](const float* from) {
      naive ? naive_call(from, batch, false) : packed_call(from, batch, NOGEMM_PHASE_FIRST, y.data());
    });
    whole[which] = all;
    const char* name = naive ? "naive" : "packed-fp32";
    std::printf("%-12s d%d t%d k%d b%d N %d, %d threads: %10.1f us, hash %10.1f, gather %10.1f\n", name, int(s.d),
                int(s.tables), int(s.bits), int(s.block), int(batch), int(threads), all, hash, all - hash);
    if (file != nullptr)
      std::fprintf(file,
                   "{\"contender\": \"%s\", \"isa\": \"%s\", \"d\": %d, \"tables\": %d, \"bits\": %d, \"block\": %d, "
                   "\"batch\": %d, \"threads\": %d, \"us_median\": %.1f, \"hash_us\": %.1f, \"gather_us\": %.1f, "
                   "\"tokens_off\": %g, \"compiler\": \"%s\"}\n",
                   name, naive ? "compiler's" : nogemm_isa(), int(s.d), int(s.tables), int(s.bits), int(s.block),
                   int(batch), int(threads), all, hash, all - hash, off, __VERSION__);
  }
  std::printf("naive / packed: %.2f\n", whole[0] / whole[1]);
  if (file != nullptr) std::fclose(file);
  return 0;
}
