// Included once per instruction set, after NOGEMM_NS is defined: compiles every kernel and gathers them in
// one table. Nothing with external linkage besides kTable may come out of these files, hence no standard
// library templates here.
#pragma once
#include "kernel_table.h"
#include "kernels/vec.h"
//
#include "kernels/block_product.h"
#include "kernels/bucket_union.h"
#include "kernels/gather_accumulate.h"
#include "kernels/gather_backward.h"
#include "kernels/hadamard.h"
#include "kernels/hash_codes.h"
#include "kernels/head_scan.h"
#include "kernels/hire.h"
#include "kernels/lookup_forward.h"
#include "kernels/neuron_rows.h"
#include "kernels/roofline.h"
#include "kernels/topk.h"
#include "kernels/tree_forward.h"

namespace nogemm::NOGEMM_NS {

static constexpr KernelTable make_table(const char* name) {
  KernelTable t{};
  t.name = name;
  t.lanes = kLanes;
  t.hadamard = hadamard_kernels();
  t.block_product = block_product_kernels();
  t.hash_codes = hash_codes_kernels();
  t.gather = gather_kernels();
  t.roofline = roofline_kernels();
  t.lookup = lookup_kernels();
  t.neuron = neuron_kernels();
  t.tree = tree_kernels();
  t.hire = hire_kernels();
  t.head = head_kernels();
  t.topk = topk_kernels();
  t.bucket_union = bucket_union;
  return t;
}

}  // namespace nogemm::NOGEMM_NS
