// The kernels of one instruction set, as function pointers: what bindings call and what csrc/isa/*.cpp fill
// in.
//
// Pointers are indexed by Dtype, so bindings contain no `if (dtype == ...)` beyond one check that the entry
// is not null. Kernels take raw pointers, allocate nothing, start no threads and never fail: the binding has
// checked every argument, provides scratch, and cuts the work into pieces. A piece depends on the shape
// alone, so results do not depend on the number of threads.
//
// Shape legend: N tokens, D width, T tables, K bits, R = 2^K rows, B block width, k neighbours. Strides are
// in elements.
#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/gather_shape.h"
#include "kernels/neuron_shape.h"
#include "packed/head/scan.h"
#include "packed/lookup/pack.h"
#include "packed/neurons/format.h"

namespace nogemm {

struct LookupHeader;  // packed/lookup/format.h
struct TreeHeader;    // packed/tree/format.h

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kDtypes = 4 };

struct HadamardKernels {
  // y[r] = x[r] H / sqrt(width) for each row; scratch holds width floats; y may be x.
  // width is m 2^k with m 1, 12 or 20.
  void (*rows[kDtypes])(const void* x, void* y, float* scratch, int64_t rows, int64_t width);
};

struct BlockProductKernels {
  // matrix_IO (float32, inner x outer) = weight_OI transposed, for one block.
  void (*transpose[kDtypes])(const void* weight, float* matrix, int64_t outer, int64_t inner);
  // matrix (float32) = weight, for one block of `count` elements.
  void (*widen[kDtypes])(const void* weight, float* matrix, int64_t count);
  // y[n, :outer] = x[n, :inner] matrix, float32 accumulation in increasing inner index.
  void (*apply[kDtypes])(const void* x, int64_t x_stride, const float* matrix, void* y, int64_t y_stride,
                         int64_t tokens, int64_t inner, int64_t outer);
  // grad_weight[o, i] = sum_n grad[n, o] x[n, i]; scratch holds outer * inner floats (unused for float32).
  void (*weight_grad[kDtypes])(const void* grad, int64_t grad_stride, const void* x, int64_t x_stride,
                               void* grad_weight, float* scratch, int64_t tokens, int64_t outer, int64_t inner);
};

struct HashCodesKernels {
  void (*forward[kDtypes])(const void* z, int32_t* codes, void* scores, int64_t tokens, int64_t tables, int bits,
                           int neighbours, bool gelu);
  void (*backward[kDtypes])(const void* grad, const void* z, const int32_t* codes, void* grad_z, int64_t tokens,
                            int64_t tables, int bits, int neighbours, bool gelu);
};

// gather_accumulate works on column slices; see kernels/gather_accumulate.h for the walk and the scratch
// layouts.
struct GatherKernels {
  int64_t slice;  // columns per slice

  // plan[group][n][slot] for tokens [begin, end); returns the first flat index n*T*k + ... whose code is
  // outside [0, R), or -1. Indexed by the dtype of scores; row_scale is float32 [T, R] or null.
  int64_t (*plan[kDtypes])(const GatherShape& shape, const int32_t* codes, const void* scores, const float* row_scale,
                           GatherEntry* plan, int64_t begin, int64_t end);
  // One slice: sums[n][slice] = sum over the plan of weight * tables[table, row, slice columns], tokens
  // [begin, end).
  void (*forward[kDtypes])(const GatherShape& shape, const GatherEntry* plan, const void* tables, int64_t column,
                           float* sums, int64_t begin, int64_t end);
  // y[n, column...] = sums, for tokens [begin, end); indexed by the dtype of y.
  void (*finish[kDtypes])(const GatherShape& shape, const float* sums, int64_t column, void* y, int64_t begin,
                          int64_t end);

  // Sort the entries of one table by row: starts[R + 1], order[N * k] (token-major inside a row). Returns as
  // `plan` does.
  int64_t (*bucket[kDtypes])(const GatherShape& shape, const int32_t* codes, const void* scores, int64_t table,
                             int32_t* starts, GatherEntry* order);
  // sliced[n][slice] (float32) = grad[n, column...], zero beyond the width.
  void (*slice_grad[kDtypes])(const GatherShape& shape, const void* grad, int64_t column, float* sliced, int64_t begin,
                              int64_t end);
  // One table, one slice: grad_tables[table, :, column...] (every row written once); dots[entry] += <grad,
  // row> over the slice, or = for the first slice. Slices in increasing order.
  void (*backward[kDtypes])(const GatherShape& shape, const int32_t* starts, const GatherEntry* order,
                            const float* sliced, const void* tables, int64_t table, int64_t column, void* grad_tables,
                            float* dots);
  // by_token[n * k + f] = dots[entry], for one table.
  void (*unsort)(const GatherShape& shape, const GatherEntry* order, const float* dots, float* by_token);
  // grad_scores[n][t][f] = by_token[t][n * k + f] for tokens [begin, end).
  void (*score_grad[kDtypes])(const GatherShape& shape, const float* by_token, void* grad_scores, int64_t begin,
                              int64_t end);
};

// Rows that each token names, one slice of columns at a time; see kernels/neuron_rows.h.
struct NeuronKernels {
  int64_t slice;
  // sliced[row][slice] (float32) = columns of a matrix; shape.tokens rows of shape.width.
  void (*copy[kDtypes])(const GatherShape& shape, const void* matrix, int64_t column, float* sliced, int64_t begin,
                        int64_t end);
  // Rows [begin, end): dots += (= for the first slice); grad_rows = weighted tokens.
  void (*dots[kDtypes])(const NeuronPass& pass, int64_t begin, int64_t end);
  void (*outer[kDtypes])(const NeuronPass& pass, int64_t begin, int64_t end);
  // Tokens [begin, end): y = weighted rows.
  void (*sums[kDtypes])(const NeuronSums& sums, int64_t begin, int64_t end);
  // One optimiser step for some rows; see kernels/row_adam.h.
  void (*adam)(const RowAdam& rows, int64_t begin, int64_t end);
};

struct TreeKernels {
  // z and nodes [N, K, L] of tokens [begin, end); bias and threshold [K, M] or null.
  void (*descend[kDtypes])(const TreeShape& shape, const void* x, const void* rows, const void* bias,
                           const void* threshold, void* z, int32_t* nodes, int64_t begin, int64_t end);
  // The packed TreeFFN (packed/tree/pack.h).
  int64_t (*workspace)(const TreeHeader* header, int64_t tokens, int64_t threads);
  void (*forward)(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                  void* workspace, const NogemmHost* host);
  // Paths alone; the nodes that are visited go to `rows`, unless it is null.
  void (*paths)(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows, int64_t tokens,
                void* workspace, const NogemmHost* host);
};

// Measures the machine; see kernels/roofline.h. Each returns the operations done or bytes read.
struct RooflineKernels {
  double (*fma_f32)(int64_t loops);
  double (*dot_bf16)(int64_t loops);
  double (*dot_i8)(int64_t loops);
  double (*load)(const float* data, int64_t count, int64_t repeats);
};

// The packed LookupFFN (packed/lookup/pack.h): a whole layer in one call.
struct LookupKernels {
  int64_t (*workspace)(const LookupHeader* header, int64_t tokens, int64_t threads);
  void (*forward)(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                  void* workspace, const NogemmHost* host);
  // Codes and scores alone; the rows that are read go to `rows`, unless it is null.
  void (*hash)(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows, int64_t tokens,
               void* workspace, const NogemmHost* host);
};

// Sketch, select, and rows named by lists: the packed HireFFN (packed/neurons/run.h) and the ops of its training form.
struct HireKernels {
  // codes (int8, zeros behind width) and scale of a token; sum of the codes. A token that is not finite gives zeros.
  float (*token)(const float* x, int64_t width, int64_t padded, int8_t* codes, int32_t* sum);
  // Scores of the rows of sketch groups [begin, end).
  void (*scores)(const SketchRows& rows, int64_t begin, int64_t end, const SketchToken* tokens, int64_t count);
  // In place: scores to what is ranked (kKeySigned or an activation).
  void (*keys)(int64_t key, float* scores, int64_t count);
  // The `count` largest keys as increasing indices; ties to the lowest, NaN above all. Destroys keys.
  int64_t (*select)(float* keys, int64_t n, int64_t count, int32_t* chosen);
  // The rest is indexed by HireMode, the dtype of the rows. out[j] = <row index[j], x> + bias, j in [begin, end). Of
  // index, `known` places or more hold rows: those behind the ones in use are fetched ahead.
  void (*dots[2])(const BundleRows& rows, const int32_t* index, int64_t begin, int64_t end, int64_t known,
                  const float* x, float* out);
  // The same for int8 rows, on a token in fixed point that `split` has made; planes hold 2 * padded bytes.
  void (*split)(const float* x, int64_t width, int64_t padded, int8_t* planes, FixedToken* out);
  void (*fixed_dots)(const BundleRows& rows, const int32_t* index, int64_t begin, int64_t end, const FixedToken& x,
                     float* out);
  // weights[j] = act(gate[j]) up[j] scale[index[j]]; up and scale may be null.
  void (*weights)(int64_t act, bool up_relu, const float* gate, const float* up, const float* scale,
                  const int32_t* index, int64_t count, float* weights);
  // y[begin, end) = bias + sum_j weights[j] row index[j]; begin a multiple of `columns`.
  void (*sum[3])(const BundleRows& rows, const int32_t* index, const float* weights, int64_t count, int64_t known,
                 int64_t begin, int64_t end, float* y);
  int64_t columns;
  void (*read[kDtypes])(const void* x, float* out, int64_t count);
  void (*write[kDtypes])(const float* in, void* y, int64_t count);
};

// The largest logit of a vocabulary head; see kernels/head_scan.h. dots and rows are indexed by the dtype of the rows.
struct HeadKernels {
  // As HireKernels::split, with planes within +-127; returns the length of what rounding took off.
  float (*split)(const float* x, int64_t width, int64_t padded, int8_t* planes, FixedToken* out);
  // The same with one plane.
  float (*round)(const float* x, int64_t width, int64_t padded, int8_t* planes, FixedToken* out);
  void (*scan)(const HeadCodes& codes, int64_t begin, int64_t end, HeadToken* tokens, int64_t count);
  void (*estimate)(const HeadCodes& codes, int64_t begin, int64_t end, HeadToken* tokens, int64_t count);
  // As HireKernels::dots.
  void (*dots[kDtypes])(const BundleRows& rows, const int32_t* index, int64_t begin, int64_t end, int64_t known,
                        const float* x, float* out);
  // out = the same of every row from begin to end.
  void (*rows[kDtypes])(const BundleRows& rows, int64_t begin, int64_t end, const float* x, float* out);
};

inline constexpr int64_t kTopkStrip = 64;  // buckets of the approximate form come in multiples of it
inline constexpr int64_t kTopkKept = 4;    // most numbers that a bucket keeps

// The k largest numbers of a row; see kernels/topk.h, also for what the lists and scratch must hold. What reads a row is
// indexed by its dtype; `least` is an integer in the order of the numbers.
struct TopkKernels {
  bool (*maxima[kDtypes])(const void* x, int64_t n, int64_t depth, int64_t begin, int64_t end, float* maxima);
  int32_t (*floor)(float* numbers, int64_t count, int64_t k);
  int64_t (*collect[kDtypes])(const void* x, int64_t n, int64_t depth, const float* maxima, int64_t begin, int64_t end,
                              int32_t least, bool dense, int32_t* keys, int32_t* index);
  int64_t (*count[kDtypes])(const void* x, int64_t begin, int64_t end, int32_t least);
  int64_t (*reaching[kDtypes])(const void* x, int64_t begin, int64_t end, int32_t least, bool dense, int32_t* keys,
                               int32_t* index);
  void (*finish)(int32_t* keys, int32_t* index, int64_t count, int64_t k, int32_t least, bool sorted, int32_t* spare);
  // [numbers a bucket keeps - 1]
  bool (*buckets[kTopkKept][kDtypes])(const void* x, int64_t n, int64_t buckets, int64_t begin, int64_t end,
                                      float* values, int32_t* index);
  bool (*candidates)(float* values, const int32_t* places, int64_t count, int64_t k, bool sorted, int32_t* keys,
                     int32_t* index, int32_t* spare);
  void (*groups[kDtypes])(const void* x, int64_t n, int64_t group, bool sum, int64_t begin, int64_t end, float* scores);
};

struct KernelTable {
  const char* name;
  int lanes;
  HadamardKernels hadamard;
  BlockProductKernels block_product;
  HashCodesKernels hash_codes;
  GatherKernels gather;
  RooflineKernels roofline;
  LookupKernels lookup;
  NeuronKernels neuron;
  TreeKernels tree;
  HireKernels hire;
  HeadKernels head;
  TopkKernels topk;
  // mask[n][f] = whether a code of token n is neuron f's in the same table; see kernels/bucket_union.h.
  void (*bucket_union)(const int32_t* codes, const int32_t* neurons, int64_t tables, int64_t width, uint8_t* mask,
                       int64_t begin, int64_t end);
};

namespace scalar {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_vnni {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
namespace neon {
extern const KernelTable kTable;
}

}  // namespace nogemm
