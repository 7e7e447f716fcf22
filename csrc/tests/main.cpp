// Runs every kernel test on every supported instruction set; exit status 1 if anything failed.
#include "check.h"

void hadamard_tests();
void block_product_tests();
void hash_codes_tests();
void gather_tests();
void hire_tests();
void neuron_rows_tests();
void tree_tests();
void phases_tests();
void conversion_tests();
void dispatch_tests();
int lookup_tests();  // walks the instruction sets itself

int main() {
  dispatch_tests();
  for (int i = 0; nogemm_isa_supported(i) != nullptr; ++i) {
    nogemm_set_isa(nogemm_isa_supported(i));
    conversion_tests();
    hadamard_tests();
    block_product_tests();
    hash_codes_tests();
    gather_tests();
    neuron_rows_tests();
    hire_tests();
    tree_tests();
    phases_tests();
    std::printf("training kernels [%s]: %d failures so far\n", nogemm_isa(), check::failures);
  }
  nogemm_set_isa(nullptr);
  const int failures = check::failures + lookup_tests();
  std::printf(failures == 0 ? "all kernel tests passed\n" : "%d FAILURES\n", failures);
  return failures == 0 ? 0 : 1;
}
