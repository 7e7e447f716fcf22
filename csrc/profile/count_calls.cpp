// Runs a packed layer a given number of times and does nothing else, so that a simulator (valgrind) can count
// what calls do: the difference of two runs is what their difference in calls did.
//
//   count_calls KIND PHASE BATCH COPIES CALLS TOUCH PACKED TOKENS
//
// Calls take the tokens of the file in order and the copies in turn. Copies are mappings of one file at
// addresses of their own: to a cache they are layers of their own. With TOUCH 1 every line of every copy is
// read once before the first call, so that a simulated last-level cache begins as a running model would leave
// it.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "packed/host/phases.h"

namespace {

struct File {
  void* at = nullptr;
  int64_t bytes = 0;
};

File map_file(const char* path) {
  const int file = open(path, O_RDONLY);
  struct stat facts;
  if (file < 0 || fstat(file, &facts) != 0) return {};
  void* at = mmap(nullptr, static_cast<size_t>(facts.st_size), PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  return at == MAP_FAILED ? File{} : File{at, static_cast<int64_t>(facts.st_size)};
}

int64_t touch(const File& file) {
  int64_t sum = 0;
  for (int64_t at = 0; at < file.bytes; at += 64) sum += static_cast<const char*>(file.at)[at];
  return sum;
}

int fail(const char* why) {
  std::fprintf(stderr, "count_calls: %s\n", why);
  return 1;
}

void run_in_turn(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  for (int64_t w = 0; w < workers; ++w) body(w, arg);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 9) return fail("eight arguments are needed: KIND PHASE BATCH COPIES CALLS TOUCH PACKED TOKENS");
  const int64_t kind = std::atoll(argv[1]), phase = std::atoll(argv[2]), batch = std::atoll(argv[3]);
  const int64_t copies = std::atoll(argv[4]), calls = std::atoll(argv[5]), touched = std::atoll(argv[6]);
  std::vector<File> layers;
  for (int64_t c = 0; c < copies; ++c) layers.push_back(map_file(argv[7]));
  const File tokens = map_file(argv[8]);
  if (layers.empty() || layers[0].at == nullptr || tokens.at == nullptr) return fail("a file cannot be read");
  int64_t d = 0, d_out = 0;
  const char* error = nogemm_phase_check(kind, phase, layers[0].at, layers[0].bytes, &d, &d_out);
  if (error != nullptr) return fail(error);
  if (batch < 1 || tokens.bytes < calls * batch * d * 4) return fail("the file has too few tokens");

  const int64_t scratch = nogemm_phase_workspace(kind, layers[0].at, batch, 1);
  void* workspace = std::aligned_alloc(64, static_cast<size_t>((scratch + 127) / 64 * 64));
  std::vector<float> y(static_cast<size_t>(batch * d_out));
  const NogemmHost host{1, run_in_turn, nullptr};
  volatile int64_t sink = 0;
  for (const File& layer : layers)
    if (touched != 0) sink = sink + touch(layer);
  for (int64_t call = 0; call < calls; ++call)
    nogemm_phase_run(kind, phase, layers[static_cast<size_t>(call % copies)].at,
                     static_cast<const float*>(tokens.at) + call * batch * d, y.data(), batch, workspace, &host);
  return 0;
}
