// Times the packed LookupFFN without torch: nogemm_lookup_time [--threads N] [--mode fp32|bf16|int8|int4] [--batch N] [d tables bits block ...]
//
// Tokens are fresh on every call (a pool larger than the caches); small batches also go round `--copies` layers, as in a model.
// Prints microseconds per call and per token: median and 10 % / 90 % quantiles over rounds.
#include <chrono>
#include <cstdio>
#include <ctime>
#include <string>

#include "dev/pool.h"
#include "dispatch.h"
#include "tests/lookup_reference.h"

using namespace lookup_reference;

namespace {

struct Options {
  int64_t threads = 2, copies = 12, only_batch = 0, only_mode = -1, rounds = 9;
  std::vector<Shape> shapes;
};

// Processor time of all threads: what a call costs when others use the machine too (spinning counts, so use one thread).
double cpu_us() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) * 1e-3;
}

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void time_one(const Options& o, const std::vector<Buffer>& layers, const Shape& s, int64_t mode, int64_t batch) {
  dev::Pool pool(o.threads);
  const NogemmHost host{o.threads, dev::Pool::run, &pool};
  const int64_t used = batch <= 4 ? static_cast<int64_t>(layers.size()) : 1;
  const Buffer workspace(nogemm_lookup_workspace(layers[0].as<void>(), batch, o.threads));
  const int64_t tokens = std::max<int64_t>(batch, 65536);
  static std::vector<float> pool_x;
  if (static_cast<int64_t>(pool_x.size()) < tokens * s.d) pool_x = uniform(3, static_cast<size_t>(tokens * s.d), 1.7f);
  std::vector<float> y(static_cast<size_t>(batch * s.d_out));
  const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(600, 8192 / batch));
  int64_t at = 0, layer = 0;
  std::vector<double> times;
  double cpu = 1e30;
  for (int64_t round = -1; round < o.rounds; ++round) {
    const double start = now_us(), cpu_start = cpu_us();
    for (int64_t c = 0; c < calls; ++c) {
      nogemm_lookup_forward(layers[static_cast<size_t>(layer)].as<void>(), pool_x.data() + at * s.d, NOGEMM_X_FP32, s.d,
                            y.data(), batch, workspace.as<void>(), &host);
      at = at + 2 * batch <= tokens ? at + batch : 0;
      layer = (layer + 1) % used;
    }
    if (round >= 0) cpu = std::min(cpu, (cpu_us() - cpu_start) / static_cast<double>(calls));
    if (round >= 0) times.push_back((now_us() - start) / static_cast<double>(calls));
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2];
  const char* names[] = {"fp32", "bf16", "int8", "int4"};
  std::printf("%-12s d%-4d t%-3d k%-2d b%-3d %s N %6d: %10.1f us/call (%.1f .. %.1f)  %8.3f us/token  cpu %8.3f\n",
              nogemm_isa(), int(s.d), int(s.tables), int(s.bits), int(s.block), names[mode], int(batch), median,
              times[times.size() / 10], times[times.size() * 9 / 10], median / static_cast<double>(batch),
              cpu / static_cast<double>(batch));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const auto next = [&] { return i + 1 < argc ? std::string(argv[++i]) : std::string("0"); };
    if (a == "--threads") {
      o.threads = std::stol(next());
    } else if (a == "--copies") {
      o.copies = std::stol(next());
    } else if (a == "--batch") {
      o.only_batch = std::stol(next());
    } else if (a == "--rounds") {
      o.rounds = std::stol(next());
    } else if (a == "--mode") {
      const std::string m = next();
      o.only_mode = m == "fp32" ? 0 : m == "bf16" ? 1 : m == "int8" ? 2 : 3;
    } else {
      Shape s{};
      s.d = s.d_out = std::stol(a);
      s.tables = std::stol(next());
      s.bits = std::stol(next());
      s.block = std::stol(next());
      s.rounds = 4;
      s.neighbours = 1;
      s.mix = 1.0;
      s.norm = true;
      o.shapes.push_back(s);
    }
  }
  if (o.shapes.empty()) o.shapes = {{384, 384, 64, 8, 64}, {512, 512, 128, 8, 64}, {768, 768, 170, 9, 64}};
  for (const Shape& s : o.shapes)
    for (int64_t mode = 0; mode < 4; ++mode) {
      if (o.only_mode >= 0 && mode != o.only_mode) continue;
      const Model model = make_model(s, 1);
      std::vector<Buffer> layers;
      const char* error = nullptr;
      for (int64_t c = 0; c < (o.only_batch > 4 ? 1 : o.copies); ++c) layers.push_back(pack(model.spec(mode), &error));
      if (error != nullptr) return std::printf("%s\n", error), 1;
      for (int64_t batch : {1, 2, 4, 8, 16, 32, 64, 128, 512, 4096, 32768})
        if (o.only_batch == 0 || o.only_batch == batch) time_one(o, layers, s, mode, batch);
    }
  return 0;
}
