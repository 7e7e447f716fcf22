// Which rows each token names, the other way round, and the passes over them that kernels/neuron_rows.h
// needs.
#pragma once
#include <atomic>
#include <limits>

#include "bindings/tensor.h"

namespace nogemm {

// A list of rows per token, of a matrix [..., D] whose leading dimensions are counted through.
struct NamedRows {
  const int32_t* index;  // [tokens, visits], negative: none
  int64_t tokens, visits, rows, width;
  bool padded;  // some entry is negative
  int64_t uses() const { return tokens * visits; }
  // Few uses of each row: neither sorting them nor copying the rows pays.
  bool few() const { return uses() < 16 * rows; }
};

// The matrix of a list: R rows of D.
inline int64_t row_count(const Tensor& rows, const char* op) {
  check(rows.dim() >= 2, op, "rows must be [..., D], got shape ", rows.shape());
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < rows.dim(); ++d) count *= rows.size(d);
  return count;
}

// Checks a list: `tokens` is what it has a line for each of.
inline NamedRows named_rows(const Tensor& index, const Tensor& tokens, int64_t rows, int64_t width, const char* op) {
  check(index.dtype() == aoti_torch_dtype_int32() && index.dim() == 2 && tokens.dim() == 2 &&
            tokens.size(0) == index.size(0),
        op, "expected an int32 index [N, P] and [N, ...], got index ", index.shape(), " and ", tokens.shape());
  NamedRows n{index.data<int32_t>(), index.size(0), index.size(1), rows, width, false};
  check(n.uses() < std::numeric_limits<int32_t>::max(), op, "too many uses for 32-bit numbers");
  std::atomic<bool> wrong{false}, padded{false};
  parallel_for(n.uses(), 1 << 15, [&](int64_t begin, int64_t end) noexcept {
    int32_t largest = -1, least = 0;
    for (int64_t i = begin; i < end; ++i) {
      largest = n.index[i] > largest ? n.index[i] : largest;
      least = n.index[i] < least ? n.index[i] : least;
    }
    if (largest >= rows) wrong.store(true);
    if (least < 0) padded.store(true);
  });
  n.padded = padded.load();
  for (int64_t i = 0; wrong.load() && i < n.uses(); ++i)
    if (n.index[i] >= rows)
      fail<std::out_of_range>(op, "index[", i / n.visits, ", ", i % n.visits, "] = ", n.index[i], " is outside [0, ",
                              rows, "), the rows");
  return n;
}

// Every use of a row, sorted by row, tokens in order: starts [R + 1], and of each use its token and its place
// in the lists. Pieces of tokens are counted and placed side by side; the result does not depend on who does
// it.
struct Uses {
  static constexpr int64_t kPieces = 8;
  Scratch<int32_t> starts, token, place;

  explicit Uses(const NamedRows& n) : starts(n.rows + 1), token(n.uses()), place(n.uses()) {
    const Scratch<int32_t> counts(kPieces * n.rows);
    const auto piece_start = [&](int64_t p) { return n.tokens * p / kPieces * n.visits; };
    parallel_for(kPieces, 1, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t p = begin; p < end; ++p) {
        int32_t* own = counts.get() + p * n.rows;
        std::memset(own, 0, static_cast<size_t>(n.rows) * sizeof(int32_t));
        for (int64_t i = piece_start(p); i < piece_start(p + 1); ++i)
          if (n.index[i] >= 0) ++own[n.index[i]];
      }
    });
    int32_t total = 0;
    for (int64_t r = 0; r < n.rows; ++r) {
      starts.get()[r] = total;
      for (int64_t p = 0; p < kPieces; ++p) {
        int32_t& slot = counts.get()[p * n.rows + r];
        const int32_t here = slot;
        slot = total;
        total += here;
      }
    }
    starts.get()[n.rows] = total;
    parallel_for(kPieces, 1, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t p = begin; p < end; ++p) {
        int32_t* own = counts.get() + p * n.rows;
        for (int64_t i = piece_start(p); i < piece_start(p + 1); ++i) {
          if (n.index[i] < 0) continue;
          const int32_t at = own[n.index[i]]++;
          token.get()[at] = static_cast<int32_t>(i / n.visits);
          place.get()[at] = static_cast<int32_t>(i);
        }
      }
    });
  }

  // The weights of uses, sorted as they are.
  template <class T>
  Scratch<float> sort(const T* weights, int64_t rows) const {
    Scratch<float> sorted(starts.get()[rows]);
    parallel_for(starts.get()[rows], 1 << 14, [&](int64_t begin, int64_t end) noexcept {
      for (int64_t e = begin; e < end; ++e) sorted.get()[e] = weights[place.get()[e]];
    });
    return sorted;
  }
};

// Calls body(begin, end) on ranges of rows with about as many uses each: the rows near the root of a tree are
// used by every token. A row's result is its own, so the cut makes no difference to any.
template <class Body>
void by_rows(const int32_t* starts, int64_t rows, const Body& body) {
  constexpr int64_t kPieces = 64;
  const int64_t work = rows + starts[rows];
  const auto first = [&](int64_t piece) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + starts[middle] < work * piece / kPieces) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_for(kPieces, 1, [&](int64_t begin, int64_t end) noexcept {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t from = first(p), to = p + 1 == kPieces ? rows : first(p + 1);
      if (from < to) body(from, to);
    }
  });
}

// Copies columns of a matrix side by side, [rows][slice].
inline void copy_slice(const void* matrix, Dtype dtype, int64_t rows, int64_t width, int64_t column, float* sliced) {
  GatherShape shape{};
  shape.tokens = rows;
  shape.width = width;
  parallel_for(rows, 256, [&](int64_t begin, int64_t end) noexcept {
    kernels().neuron.copy[dtype](shape, matrix, column, sliced, begin, end);
  });
}

using RowKernel = void (*)(const NeuronPass&, int64_t, int64_t);

// All slices of a pass over `rows` rows: `first`, then `second` unless it is null, while a slice of the
// tokens is in the cache.
inline void over_rows(NeuronPass pass, int64_t rows, RowKernel first, RowKernel second, const void* x, int64_t tokens,
                      Dtype dtype) {
  const int64_t slice = kernels().neuron.slice;
  const Scratch<float> sliced(tokens * slice);
  pass.sliced = sliced.get();
  for (pass.column = 0; pass.column < pass.width; pass.column += slice) {
    copy_slice(x, dtype, tokens, pass.width, pass.column, sliced.get());
    by_rows(pass.starts, rows, [&](int64_t begin, int64_t end) noexcept {
      first(pass, begin, end);
      if (second != nullptr) second(pass, begin, end);
    });
  }
}

// Numbers of any dtype as float32: a copy, or the tensor's own.
class Floats {
 public:
  Floats(const Tensor& t, Dtype dtype) : copy_(dtype == kF32 ? 0 : t.numel()) {
    data_ = dtype == kF32 ? t.data<float>() : copy_.get();
    const char* from = t.data<char>();
    const int64_t item = static_cast<int64_t>(item_size(dtype));
    if (dtype == kF32) return;
    parallel_for(t.numel(), 1 << 15, [&](int64_t begin, int64_t end) noexcept {
      kernels().hire.read[dtype](from + begin * item, copy_.get() + begin, end - begin);
    });
  }
  const float* get() const { return data_; }

 private:
  Scratch<float> copy_;
  const float* data_;
};

// float32 results for a tensor of any dtype: computed in place, or converted by `finish`.
class FloatsOut {
 public:
  FloatsOut(Tensor& t, Dtype dtype) : copy_(dtype == kF32 ? 0 : t.numel()), tensor_(&t), dtype_(dtype) {}
  float* get() { return dtype_ == kF32 ? tensor_->mutable_data<float>() : copy_.get(); }
  void finish() {
    if (dtype_ == kF32) return;
    char* to = tensor_->mutable_data<char>();
    const int64_t item = static_cast<int64_t>(item_size(dtype_));
    parallel_for(tensor_->numel(), 1 << 15, [&](int64_t begin, int64_t end) noexcept {
      kernels().hire.write[dtype_](copy_.get() + begin, to + begin * item, end - begin);
    });
  }

 private:
  Scratch<float> copy_;
  Tensor* tensor_;
  Dtype dtype_;
};

}  // namespace nogemm
