// Runs every kernel test on every supported instruction set; exit status 1 if anything failed. With
// `best`: on the best one alone. With `threads`: only those of packed layers on several threads. With `race`:
// a program with a data race, which ThreadSanitizer must end.
#include "check.h"

void hadamard_tests();
void block_product_tests();
void hash_codes_tests();
void gather_tests();
void hire_tests();
void neuron_rows_tests();
void tree_tests();
void head_scan_tests();
void topk_tests();
void phases_tests();
void threads_tests();
void conversion_tests();
void dispatch_tests();
int lookup_tests(int first);  // walks the instruction sets itself
int race();

namespace {

void (*const kAll[])() = {conversion_tests, hadamard_tests,    block_product_tests, hash_codes_tests,
                          gather_tests,     neuron_rows_tests, hire_tests,          head_scan_tests,
                          tree_tests,       topk_tests,        phases_tests,        threads_tests};
void (*const kThreads[])() = {threads_tests};

template <size_t N>
void on_every_level(const char* name, void (*const (&tests)[N])(), int first = 0) {
  for (int i = first; nogemm_isa_supported(i) != nullptr; ++i) {
    nogemm_set_isa(nogemm_isa_supported(i));
    for (void (*test)() : tests) test();
    std::printf("%s [%s]: %d failures so far\n", name, nogemm_isa(), check::failures);
  }
  nogemm_set_isa(nullptr);
}

}  // namespace

int main(int count, char** words) {
  const std::string word = count > 1 ? words[1] : "";
  if (word == "race") return race();
  if (word == "threads") {
    on_every_level("threads", kThreads);
    return check::failures == 0 ? 0 : 1;
  }
  int first = 0;
  while (word == "best" && nogemm_isa_supported(first + 1) != nullptr) ++first;
  dispatch_tests();
  on_every_level("training kernels", kAll, first);
  const int failures = check::failures + lookup_tests(first);
  std::printf(failures == 0 ? "all kernel tests passed\n" : "%d FAILURES\n", failures);
  return failures == 0 ? 0 : 1;
}
