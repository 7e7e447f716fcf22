// Drives csrc/fuzz/packed_layers.cpp where libFuzzer is not linked: random inputs, and mutations of inputs that were
// accepted, until the time is over. A sanitizer that finds something ends the process; the input that did it then stays
// in PREFIXcurrent.
//
//   nogemm_fuzz --seconds N [--seed N] [--findings PREFIX] [FILE ...]     files are run once, each
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kLongest = 96;

// The input that runs, where it outlives the process.
class Current {
 public:
  explicit Current(const std::string& prefix) : path_(prefix + "current") {
    const int file = open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (file < 0 || ftruncate(file, kLongest) != 0) std::exit((std::perror(path_.c_str()), 2));
    memory_ = static_cast<uint8_t*>(mmap(nullptr, kLongest, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    close(file);
    if (memory_ == MAP_FAILED) std::exit((std::perror("mmap"), 2));
  }
  void run(const std::vector<uint8_t>& input) {
    std::memset(memory_, 0, kLongest);
    std::memcpy(memory_, input.data(), input.size());
    LLVMFuzzerTestOneInput(memory_, kLongest);
  }
  void remove() { (void)unlink(path_.c_str()); }

 private:
  std::string path_;
  uint8_t* memory_;
};

}  // namespace

int main(int count, char** words) {
  double seconds = 0;
  uint64_t seed = 1;
  std::string prefix = "nogemm_fuzz-";
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--seconds" && i + 1 < count) {
      seconds = std::atof(words[++i]);
    } else if (word == "--seed" && i + 1 < count) {
      seed = std::strtoull(words[++i], nullptr, 10);
    } else if (word == "--findings" && i + 1 < count) {
      prefix = words[++i];
    } else {
      std::ifstream file(word, std::ios::binary);
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      if (bytes.empty()) return std::printf("%s: no such input\n", words[i]), 2;
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
      std::printf("%s: nothing wrong\n", words[i]);
    }
  }
  if (seconds <= 0) return 0;
  std::mt19937_64 rng(seed);
  Current current(prefix);
  int64_t inputs = 0;
  const auto start = std::chrono::steady_clock::now();
  std::vector<uint8_t> input;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    if (inputs % 4 == 0 || input.empty()) {
      input.resize(kLongest);
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(rng());
    } else {  // a neighbour of the last one: the same layer, mostly
      for (uint64_t edits = 1 + rng() % 3; edits > 0; --edits)
        input[rng() % input.size()] = static_cast<uint8_t>(rng());
    }
    current.run(input);
    ++inputs;
  }
  current.remove();
  std::printf("%lld inputs in %.0f s\n", static_cast<long long>(inputs), seconds);
  return 0;
}
