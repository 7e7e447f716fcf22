// nogemm::topk(Tensor x, int k, bool sorted) -> (Tensor, Tensor)
// nogemm::topk_approximate(Tensor x, int k, int buckets, int kept, bool sorted) -> (Tensor, Tensor)
// nogemm::topk_grouped(Tensor x, int k, int group, bool sum, bool sorted) -> (Tensor, Tensor)
// nogemm::topk_threshold(Tensor x, Tensor threshold) -> (Tensor, Tensor, Tensor)
#include <algorithm>
#include <cmath>
#include <limits>

#include "bindings/packed.h"
#include "packed/neurons/state.h"
#include "packed/topk_chunks.h"

namespace nogemm {
namespace {

using hire::Carver;
using hire::Phases;

constexpr const char* kTopk = "topk";
constexpr const char* kApproximate = "topk_approximate";
constexpr const char* kGrouped = "topk_grouped";
constexpr const char* kThreshold = "topk_threshold";
constexpr int64_t kPiece = 16384;  // numbers of a row that one thread takes at once
constexpr int64_t kShared =
    65536;                       // numbers of the shortest row that threads share: to wake one takes some microseconds
constexpr int64_t kPieces = 16;  // of a row at most
// kernels/select.h, in words that know no instruction set.
constexpr int32_t kNan = 0x7f800001;

int32_t ordered(float number) {
  if (std::isnan(number)) return kNan;
  const float plain = number + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &plain, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// What is asked of every row. kept 0: exact; group 0: single numbers.
struct Question {
  Dtype dtype;
  int64_t n, k, buckets, kept, group;
  bool sum, sorted;

  int64_t places() const { return group == 0 ? n : (n + group - 1) / group; }  // that compete
};

// Runs pieces of a phase one after the other, where a row has one thread.
struct Alone {
  template <class Body>
  void run(int64_t, int64_t pieces, const Body& body) {
    for (int64_t p = 0; p < pieces; ++p) body(p);
  }
};

// One row at a time: memory, and the steps of kernels/topk.h.
class Row {
 public:
  Row(const Question& q, int64_t pieces) : q_(q), k_(kernels().topk), pieces_(pieces), n_(q.places()) {
    const TopkChunks chunks(n_, q.k, kernels().lanes);
    depth_ = chunks.depth, chunk_ = chunks.size, chunks_ = chunks.count;
  }

  int64_t bytes() const {
    const int64_t lanes = kernels().lanes, candidates = q_.buckets * q_.kept;
    const int64_t list = std::max(n_ + (pieces_ + 1) * lanes, candidates + lanes);
    return 4 * (2 * list + chunks_ * lanes + 2 * candidates + 2 * std::max(q_.k, candidates) + lanes +
                (q_.group == 0 ? 0 : n_)) +
           8 * 64;
  }

  void carve(char* memory) {
    const int64_t lanes = kernels().lanes, candidates = q_.buckets * q_.kept;
    const int64_t list = std::max(n_ + (pieces_ + 1) * lanes, candidates + lanes);
    Carver carver{memory};
    keys_ = carver.take<int32_t>(list);
    index_ = carver.take<int32_t>(list);
    maxima_ = carver.take<float>(chunks_ * lanes);
    values_ = carver.take<float>(candidates);
    where_ = carver.take<int32_t>(candidates);
    spare_ = carver.take<int32_t>(2 * std::max(q_.k, candidates) + lanes);
    scores_ = carver.take<float>(q_.group == 0 ? 0 : n_);
  }

  template <class Run>
  void answer(Run& run, const void* x, void* values, int64_t* index) {
    x_ = x, dtype_ = q_.dtype;
    if (q_.group > 0) {
      run.run(0, pieces_, [&](int64_t p) {
        k_.groups[q_.dtype](x, q_.n, q_.group, q_.sum, n_ * p / pieces_, n_ * (p + 1) / pieces_, scores_);
      });
      x_ = scores_, dtype_ = kF32;
    }
    if (q_.kept > 0) {
      bucket(run);
      if (answered_) {
        run.run(3, 1, [&](int64_t) { write(values, index); });
        return;
      }
    }
    collect(run);
    run.run(6, 1, [&](int64_t) {
      count_ = 0;
      for (int64_t p = 0; p < pieces_; ++p) {
        const int64_t from = list(p);
        if (from != count_) {
          std::memmove(keys_ + count_, keys_ + from, static_cast<size_t>(counts_[p]) * sizeof(int32_t));
          std::memmove(index_ + count_, index_ + from, static_cast<size_t>(counts_[p]) * sizeof(int32_t));
        }
        count_ += counts_[p];
      }
      k_.finish(keys_, index_, count_, q_.k, depth_ > 1 ? least_ : kTopkLowest, q_.sorted, spare_);
      write(values, index);
    });
  }

 private:
  // Where piece p's list begins: a list may be as long as its piece and a vector.
  int64_t list(int64_t p) const { return std::min(chunks_ * p / pieces_ * chunk_, n_) + p * kernels().lanes; }

  bool any_nan() const {
    return std::any_of(nan_, nan_ + pieces_, [](bool nan) { return nan; });
  }

  // The approximate form, where it can answer for this row.
  template <class Run>
  void bucket(Run& run) {
    const int64_t strips = q_.buckets / kTopkStrip;
    run.run(1, pieces_, [&](int64_t p) {
      nan_[p] = k_.buckets[q_.kept - 1][dtype_](x_, n_, q_.buckets, strips * p / pieces_ * kTopkStrip,
                                                strips * (p + 1) / pieces_ * kTopkStrip, values_, where_);
    });
    run.run(2, 1, [&](int64_t) {
      answered_ =
          !any_nan() && k_.candidates(values_, where_, q_.buckets * q_.kept, q_.k, q_.sorted, keys_, index_, spare_);
    });
  }

  template <class Run>
  void collect(Run& run) {
    const bool dense = topk_dense(n_, q_.k);
    const auto begin = [&](int64_t p) { return chunks_ * p / pieces_; };
    if (depth_ > 1) {
      run.run(3, pieces_,
              [&](int64_t p) { nan_[p] = k_.maxima[dtype_](x_, n_, depth_, begin(p), begin(p + 1), maxima_); });
      run.run(4, 1, [&](int64_t) { least_ = k_.floor(maxima_, chunks_ * kernels().lanes, q_.k); });
    }
    run.run(5, pieces_, [&](int64_t p) {
      int32_t *const keys = keys_ + list(p), *const index = index_ + list(p);
      if (depth_ > 1 && !any_nan()) {
        counts_[p] = k_.collect[dtype_](x_, n_, depth_, maxima_, begin(p), begin(p + 1), least_, dense, keys, index);
      } else {  // a NaN is in no maximum; without chunks all numbers are wanted
        const int64_t first = std::min(begin(p) * chunk_, n_), last = std::min(begin(p + 1) * chunk_, n_);
        counts_[p] = k_.reaching[dtype_](x_, first, last, depth_ > 1 ? least_ : kTopkLowest, dense, keys, index);
      }
    });
  }

  void write(void* values, int64_t* index) const {
    if (dtype_ == kF32) {
      write(static_cast<const uint32_t*>(x_), static_cast<uint32_t*>(values), index);
    } else {
      write(static_cast<const uint16_t*>(x_), static_cast<uint16_t*>(values), index);
    }
  }

  template <class T>
  void write(const T* x, T* values, int64_t* index) const {
    for (int64_t i = 0; i < q_.k; ++i) {
      values[i] = x[index_[i]];
      index[i] = index_[i];
    }
  }

  Question q_;
  const TopkKernels& k_;
  int64_t pieces_, n_, depth_, chunk_, chunks_;
  const void* x_;
  Dtype dtype_;
  int32_t *keys_, *index_, *where_, *spare_;
  float *maxima_, *values_, *scores_;
  int64_t count_, counts_[kPieces];
  int32_t least_;
  bool answered_, nan_[kPieces];
};

int64_t torch_threads() {
  uint32_t threads = 1;
  NOGEMM_CALL(torch_get_num_threads(&threads));
  return threads;
}

// All rows: each cut over the threads where there are fewer rows than threads and rows are long, else whole rows.
void answer_rows(const Question& q, const char* x, int64_t rows, char* values, int64_t value_bytes, int64_t* index) {
  thread_local Workspace memory;
  const int64_t threads = torch_threads(), row_bytes = q.n * static_cast<int64_t>(item_size(q.dtype));
  const auto one = [&](Row& row, auto& run, int64_t r) {
    row.answer(run, x + r * row_bytes, values + r * q.k * value_bytes, index + r * q.k);
  };
  if (rows < threads && q.n >= kShared) {
    Row row(q, std::min(kPieces, q.n / kPiece));
    row.carve(memory.at_least(row.bytes()));
    for (int64_t r = 0; r < rows; ++r) {
      Phases phases;
      parallel_for(threads, 1, [&](int64_t begin, int64_t end) noexcept {
        for (int64_t w = begin; w < end; ++w) one(row, phases, r);
      });
    }
  } else {
    const int64_t workers = std::max<int64_t>(1, std::min({threads, rows, rows * q.n / kPiece}));
    const int64_t bytes = round_up(Row(q, 1).bytes(), 64);
    char* const own = memory.at_least(workers * bytes);
    parallel_for(workers, 1, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t w = begin; w < end; ++w) {
        Row row(q, 1);
        row.carve(own + w * bytes);
        Alone alone;
        for (int64_t r = rows * w / workers; r < rows * (w + 1) / workers; ++r) one(row, alone, r);
      }
    });
  }
  memory.trim();
}

Dtype dtype_of_row(const Tensor& x, const char* op) {
  for (const Dtype dtype : {kF32, kBF16, kF16})
    if (x.dtype() == torch_dtype(dtype)) return dtype;
  fail(op, "x must be float32, bfloat16 or float16; other dtypes are served by the PyTorch reference");
}

int64_t check_row(const Tensor& x, const char* op) {
  check(x.dim() > 0, op, "x must have a dimension");
  const int64_t n = x.size(x.dim() - 1);
  check(n < std::numeric_limits<int32_t>::max() - 4096, op, "a row of ", n, " numbers is too long");
  return n;
}

void answer(const char* op, StableIValue* stack, const Tensor& x, Question q) {
  q.n = check_row(x, op);
  q.dtype = dtype_of_row(x, op);
  check(q.group >= 0 && q.buckets >= 0 && q.buckets % kTopkStrip == 0 && q.kept >= 0 && q.kept <= kTopkKept, op,
        "group, buckets or kept out of range: ", q.group, ", ", q.buckets, ", ", q.kept);
  check(q.kept == 0 || (q.buckets > 0 && q.buckets <= q.n), op, "buckets must be from 64 to ", q.n, ", got ",
        q.buckets);
  check(q.k >= 0 && q.k <= q.places(), op, "k must be from 0 to ", q.places(), ", got ", q.k);
  int64_t sizes[16];
  check(x.dim() <= 16, op, "x has more than 16 dimensions");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes[d] = x.size(d), rows *= x.size(d);
  sizes[x.dim() - 1] = q.k;
  const Dtype dtype = q.group == 0 ? q.dtype : kF32;
  Tensor values = Tensor::empty(sizes, x.dim(), torch_dtype(dtype)),
         index = Tensor::empty(sizes, x.dim(), aoti_torch_dtype_int64());
  if (rows > 0 && q.k > 0) {
    answer_rows(q, x.data<char>(), rows, values.mutable_data<char>(), static_cast<int64_t>(item_size(dtype)),
                index.mutable_data<int64_t>());
  }
  stack[0] = std::move(values).to_stack();
  stack[1] = std::move(index).to_stack();
}

void topk(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous();
  Question q{};
  q.k = take_int(stack[1]), q.sorted = take_bool(stack[2]);
  answer(kTopk, stack, x, q);
}

void topk_approximate(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous();
  Question q{};
  q.k = take_int(stack[1]), q.buckets = take_int(stack[2]), q.kept = take_int(stack[3]);
  q.sorted = take_bool(stack[4]);
  answer(kApproximate, stack, x, q);
}

void topk_grouped(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous();
  Question q{};
  q.k = take_int(stack[1]), q.group = take_int(stack[2]), q.sum = take_bool(stack[3]);
  q.sorted = take_bool(stack[4]);
  check(q.group > 0, kGrouped, "group must be at least 1, got ", q.group);
  answer(kGrouped, stack, x, q);
}

// Numbers are counted first: the results are exactly as long as they must be.
void topk_threshold(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]).contiguous(), threshold = take_tensor(stack[1]).contiguous();
  const int64_t n = check_row(x, kThreshold), rows = n == 0 ? 0 : x.numel() / n;
  const Dtype dtype = dtype_of_row(x, kThreshold);
  int64_t wanted = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) wanted *= x.size(d);
  check(threshold.dtype() == aoti_torch_dtype_float32() && threshold.numel() == wanted, kThreshold,
        "threshold must be float32, one for each of ", wanted, " rows, got ", threshold.shape());
  const TopkKernels& k = kernels().topk;
  const auto item = static_cast<int64_t>(item_size(dtype));
  const int64_t pieces = (n + kPiece - 1) / kPiece, tasks = rows * pieces;
  const char* from = x.data<char>();
  const float* limits = threshold.data<float>();
  Tensor starts = Tensor::empty({wanted + 1}, aoti_torch_dtype_int64());
  auto* const start = starts.mutable_data<int64_t>();
  const Scratch<int64_t> at(tasks + 1);
  at.get()[0] = 0;
  const auto each = [&](const auto& body) {
    parallel_for(tasks, 2, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t / pieces, first = t % pieces * kPiece, last = std::min(first + kPiece, n);
        body(t, from + row * n * item, first, last, ordered(limits[row]));
      }
    });
  };
  each([&](int64_t t, const char* row, int64_t first, int64_t last, int32_t least) noexcept {
    at.get()[t + 1] = k.count[dtype](row, first, last, least);
  });
  for (int64_t t = 0; t < tasks; ++t) at.get()[t + 1] += at.get()[t];
  for (int64_t r = 0; r <= wanted; ++r) start[r] = n == 0 ? 0 : at.get()[r * pieces];
  const int64_t total = at.get()[tasks];
  Tensor values = Tensor::empty({total}, x.dtype()), index = Tensor::empty({total}, aoti_torch_dtype_int64());
  char* const out = values.mutable_data<char>();
  auto* const out_index = index.mutable_data<int64_t>();
  each([&](int64_t t, const char* row, int64_t first, int64_t last, int32_t least) noexcept {
    int32_t keys[kPiece + 64], places[kPiece + 64];
    const int64_t begin = at.get()[t], count = at.get()[t + 1] - begin;
    if (count == 0) return;
    k.reaching[dtype](row, first, last, least, topk_dense(last - first, count), keys, places);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + (begin + i) * item, row + places[i] * item, static_cast<size_t>(item));
      out_index[begin + i] = places[i];
    }
  });
  stack[0] = std::move(values).to_stack();
  stack[1] = std::move(index).to_stack();
  stack[2] = std::move(starts).to_stack();
}

const Register registered_topk(kTopk, topk);
const Register registered_approximate(kApproximate, topk_approximate);
const Register registered_grouped(kGrouped, topk_grouped);
const Register registered_threshold(kThreshold, topk_threshold);

}  // namespace
}  // namespace nogemm
