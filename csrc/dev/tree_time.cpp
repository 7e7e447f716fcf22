// Times the packed TreeFFN without torch: nogemm_tree_time [--threads N] [--mode fp32|bf16|int8] [--batch N]
// [--trees K]
// [--depth D] [--d D] [--copies C] [--repeat] [--json FILE]
//
// Weights and tokens are random, so paths are. Tokens are fresh on every call (a pool larger than the
// caches); up to 8 tokens go round 12 layers, as in a model. --repeat gives one token again and again
// instead. Every row was compared with double precision first. Prints microseconds per call: median and 10 %
// / 90 % quantiles over rounds.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <random>
#include <string>

#include "dev/pool.h"
#include "dispatch.h"
#include "tests/tree_reference.h"

using namespace tree_reference;

namespace {

struct Options {
  int64_t threads = 2, copies = 12, only_batch = 0, only_mode = -1, rounds = 15, pool = 340000;
  bool repeat = false;
  const char* json = nullptr;
  Shape shape{768, 768, 1, 12, 0, NOGEMM_GELU, true, false};
};

constexpr int kSeed = 1;  // of the weights; tokens have the next one

// The processor's name, as Linux gives it.
std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos)
      return line.substr(line.find(": ") + 2);
  return "unknown";
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[16];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool verified(const Model& model, int64_t mode, const Buffer& packed, const std::vector<float>& x) {
  const int64_t tokens = 64;
  const std::vector<float> y = run(packed, x, tokens, model.shape.d_out, 1);
  return compare(model, mode, x, y, tokens) == 0;
}

void time_one(const Options& o, const std::vector<Buffer>& layers, int64_t mode, int64_t batch, FILE* json) {
  const Shape& s = o.shape;
  dev::Pool pool(o.threads);
  const NogemmHost host{o.threads, dev::Pool::run, &pool};
  const int64_t used = batch <= 8 ? static_cast<int64_t>(layers.size()) : 1;
  const Buffer workspace(nogemm_tree_workspace(layers[0].as<void>(), batch, o.threads));
  const int64_t tokens = std::max<int64_t>(2 * batch, o.repeat ? 1 : o.pool);
  static std::vector<float> x;
  if (static_cast<int64_t>(x.size()) < tokens * s.d) x = normal(3, static_cast<size_t>(tokens * s.d), 1.0f);
  std::vector<float> y(static_cast<size_t>(batch * s.d_out));
  const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(2400, 16384 / batch));
  int64_t at = 0, layer = 0;
  std::vector<double> times;
  for (int64_t round = -1; round < o.rounds; ++round) {
    const double start = now_us();
    for (int64_t c = 0; c < calls; ++c) {
      nogemm_tree_forward(layers[static_cast<size_t>(layer)].as<void>(), x.data() + at * s.d, NOGEMM_X_FP32, s.d,
                          y.data(), batch, workspace.as<void>(), &host);
      if (!o.repeat) at = at + 2 * batch <= tokens ? at + batch : 0;
      layer = o.repeat ? 0 : (layer + 1) % used;
    }
    if (round >= 0) times.push_back((now_us() - start) / static_cast<double>(calls));
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2], p10 = times[times.size() / 10], p90 = times[times.size() * 9 / 10];
  const char* names[] = {"fp32", "bf16", "int8"};
  const char* cache = o.repeat ? "one repeated token" : "fresh";
  std::printf("%-12s %dx%d d%d %s N %6d, %s: %10.2f us/call (%.2f .. %.2f)  %8.3f us/token\n", nogemm_isa(),
              int(s.trees), int(s.levels - 1), int(s.d), names[mode], int(batch), cache, median, p10, p90,
              median / static_cast<double>(batch));
  std::fflush(stdout);
  if (json != nullptr)
    std::fprintf(json,
                 "{\"contender\": \"kernel-%s\", \"isa\": \"%s\", \"trees\": %d, \"depth\": %d, \"d\": %d, \"batch\": "
                 "%d, "
                 "\"cache\": \"%s\", \"threads\": %d, \"us_median\": %.3f, \"us_p10\": %.3f, \"us_p90\": %.3f, "
                 "\"cpu\": \"%s\", \"compiler\": \"%s\", \"seed\": %d, \"date\": \"%s\"}\n",
                 names[mode], nogemm_isa(), int(s.trees), int(s.levels - 1), int(s.d), int(batch), cache,
                 int(o.threads), median, p10, p90, cpu_name().c_str(), __VERSION__, kSeed, today().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const auto next = [&] { return i + 1 < argc ? std::string(argv[++i]) : std::string("0"); };
    if (a == "--threads") o.threads = std::stol(next());
    if (a == "--copies") o.copies = std::stol(next());
    if (a == "--batch") o.only_batch = std::stol(next());
    if (a == "--pool") o.pool = std::stol(next());
    if (a == "--rounds") o.rounds = std::stol(next());
    if (a == "--trees") o.shape.trees = std::stol(next());
    if (a == "--depth") o.shape.levels = std::stol(next()) + 1;
    if (a == "--d") o.shape.d = o.shape.d_out = std::stol(next());
    if (a == "--repeat") o.repeat = true;
    if (a == "--json") o.json = argv[++i];
    if (a == "--mode") {
      const std::string m = next();
      o.only_mode = m == "fp32" ? 0 : m == "bf16" ? 1 : 2;
    }
  }
  FILE* json = o.json == nullptr ? nullptr : std::fopen(o.json, "a");
  const Model model = make_model(o.shape, kSeed);
  const std::vector<float> sample = normal(kSeed + 1, static_cast<size_t>(64 * o.shape.d), 1.0f);
  for (int64_t mode = 0; mode < 3; ++mode) {
    if (o.only_mode >= 0 && mode != o.only_mode) continue;
    std::vector<Buffer> layers;
    const char* error = nullptr;
    for (int64_t c = 0; c < (o.only_batch > 8 || o.repeat ? 1 : o.copies); ++c)
      layers.push_back(pack(model.spec(mode), &error));
    if (error != nullptr) return std::printf("%s\n", error), 1;
    if (!verified(model, mode, layers[0], sample)) return std::printf("does not match its reference\n"), 1;
    for (int64_t batch : {1, 4, 8, 64, 512, 4096, 16384})
      if (o.only_batch == 0 || o.only_batch == batch) time_one(o, layers, mode, batch, json);
  }
  if (json != nullptr) std::fclose(json);
  return 0;
}
