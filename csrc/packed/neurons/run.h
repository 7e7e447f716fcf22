// The packed HireFFN: sketch, select, exact, accumulate, in one call. Format: packed/neurons/format.h.
#pragma once
#include "kernel_table.h"

namespace nogemm {

// Null if `packed` begins with the header of a buffer of so many bytes that the kernels may read, else what is wrong.
// Looks at the header alone.
const char* hire_check(const void* packed, int64_t bytes);

// Null if what hire_check does not look at, the numbers of neurons behind the header, may be followed.
const char* hire_check_body(const void* packed);

// Scratch that hire_forward needs for `tokens` tokens on `threads` threads.
int64_t hire_workspace(const HireHeader& header, int64_t tokens, int64_t threads);

// y[n] = HireFFN(x[n]); x and y are contiguous and of x_dtype (an index of KernelTable's). The same bits for
// any number of threads: every piece of work computes its own outputs alone. `workspace` is 64-byte aligned.
// With a `mask` [tokens, hidden], the neurons that answer are those marked, and the layer must have no
// sketch.
void hire_forward(const KernelTable& table, const void* packed, const void* x, Dtype x_dtype, const uint8_t* mask,
                  void* y, int64_t tokens, void* workspace, const NogemmHost& host);

// The first half alone: marks in chosen [tokens, hidden] the neurons that hire_forward would compute exactly, or
// (`kept`) those of them with which it would answer.
void hire_choose(const KernelTable& table, const void* packed, const void* x, Dtype x_dtype, bool kept, uint8_t* chosen,
                 int64_t tokens, void* workspace, const NogemmHost& host);

}  // namespace nogemm
