// Rows of neurons named by a list: dot products with one token, and weighted sums into one output.
//
// The lists come in increasing order, rows are a few KiB each: far enough apart that the hardware does not
// see the next one coming, so rows are fetched ahead by hand. A dot product's order depends on the width
// alone, a sum runs in list order.
#pragma once
#include "activation.h"
#include "packed/neurons/format.h"
#include "sketch.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kRowsTogether = 4;
inline constexpr int kColumnVectors = 16;
inline constexpr int64_t kColumns = kColumnVectors * kLanes;

template <class T, int ROWS>
NOGEMM_INLINE void dot_rows(const T* const* row, const float* x, int64_t width, const char* const* ahead, float* out) {
  F acc[ROWS][2];
  for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = zero();
  constexpr int64_t kStep =
      64 / static_cast<int64_t>(sizeof(T)) > 2 * kLanes ? 64 / static_cast<int64_t>(sizeof(T)) : 2 * kLanes;
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    for (int r = 0; r < ROWS; ++r) prefetch(ahead[r] + c * static_cast<int64_t>(sizeof(T)));
    for (int64_t v = 0; v < kStep; v += 2 * kLanes) {
      const F a = load(x + c + v), b = load(x + c + v + kLanes);
      for (int r = 0; r < ROWS; ++r) {
        acc[r][0] = fma(load(row[r] + c + v), a, acc[r][0]);
        acc[r][1] = fma(load(row[r] + c + v + kLanes), b, acc[r][1]);
      }
    }
  }
  for (; c < width; c += kLanes) {
    const int n = static_cast<int>(width - c < kLanes ? width - c : kLanes);
    const F a = load_part(x + c, n);
    for (int r = 0; r < ROWS; ++r) acc[r][0] = fma(load_part(row[r] + c, n), a, acc[r][0]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = hsum(acc[r][0] + acc[r][1]);
}

// out[j] = <row index[j], x> * scale + bias for j in [begin, end); -1 in the list gives 0. `known` places of
// the list may be read, to fetch rows ahead.
template <class T>
static void bundle_dots(const BundleRows& rows, const int32_t* index, int64_t begin, int64_t end, int64_t known,
                        const float* x, float* out) {
  for (int64_t j = begin; j < end; j += kRowsTogether) {
    const T* row[kRowsTogether];
    const char* ahead[kRowsTogether];
    float dots[kRowsTogether];
    for (int r = 0; r < kRowsTogether; ++r) {
      const int64_t here = j + r < end ? j + r : end - 1,
                    next = j + r + kRowsTogether < known ? j + r + kRowsTogether : here;
      row[r] = reinterpret_cast<const T*>(rows.base + (index[here] < 0 ? 0 : index[here]) * rows.stride);
      ahead[r] = rows.base + (index[next] < 0 ? 0 : index[next]) * rows.stride;
    }
    dot_rows<T, kRowsTogether>(row, x, rows.width, ahead, dots);
    for (int r = 0; r < kRowsTogether && j + r < end; ++r) {
      const int32_t i = index[j + r];
      const float dot = rows.scale == nullptr ? dots[r] : dots[r] * rows.scale[i < 0 ? 0 : i];
      out[j + r] = i < 0 ? 0.0f : rows.bias == nullptr ? dot : dot + rows.bias[i];
    }
  }
}

// A token in 16-bit fixed point, x ~ scale * (256 high + low), as two planes of signed bytes (zeros behind
// the width): what int8 rows are multiplied with. Finer than bfloat16, and the integer sums are exact. |256
// high + low| <= 32512.
static void split_token(const float* x, int64_t width, int64_t padded, int8_t* planes, FixedToken* out) {
  F largest = zero();
  for (int64_t i = 0; i < width; i += kLanes)
    largest = max(abs(load_part(x + i, static_cast<int>(width - i < kLanes ? width - i : kLanes))), largest);
  float top[kLanes], most = 0x1p-110f;  // below: neither the step nor its inverse is a normal number
  store(top, largest);
  for (int l = 0; l < kLanes; ++l) most = top[l] > most ? top[l] : most;
  const float inverse = 32512.0f / most;
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float scaled = std::nearbyint(x[i] * inverse);
    const int32_t q = static_cast<int32_t>(scaled > 32512.0f ? 32512.0f : scaled < -32512.0f ? -32512.0f : scaled);
    const int32_t high = (q + 128) >> 8, low = q - 256 * high;
    planes[i] = static_cast<int8_t>(high);
    planes[padded + i] = static_cast<int8_t>(low);
    high_sum += high, low_sum += low;
  }
  std::memset(planes + width, 0, static_cast<size_t>(padded - width));
  std::memset(planes + padded + width, 0, static_cast<size_t>(padded - width));
  *out = {planes, planes + padded, high_sum, low_sum, padded, most / 32512.0f};
}

// bundle_dots for int8 rows, which are padded with zeros to 64 bytes.
static void bundle_dots_fixed(const BundleRows& rows, const int32_t* index, int64_t begin, int64_t end,
                              const FixedToken& x, float* out) {
  for (int64_t j = begin; j < end; j += kRowsTogether) {
    const int8_t* row[kRowsTogether];
    const char* ahead[kRowsTogether];
    float dots[kRowsTogether];
    for (int r = 0; r < kRowsTogether; ++r) {
      const int64_t here = j + r < end ? j + r : end - 1,
                    next = j + r + kRowsTogether < end ? j + r + kRowsTogether : here;
      row[r] = reinterpret_cast<const int8_t*>(rows.base + index[here] * rows.stride);
      ahead[r] = rows.base + index[next] * rows.stride;
    }
    fixed_dots<kRowsTogether>(row, x, ahead, dots);
    for (int r = 0; r < kRowsTogether && j + r < end; ++r)
      out[j + r] = dots[r] * rows.scale[index[j + r]] + rows.bias[index[j + r]];
  }
}

template <class T, int VECTORS, bool PART>
NOGEMM_INLINE void sum_columns(const BundleRows& rows, const int32_t* index, const float* weights, int64_t count,
                               int64_t known, int64_t column, int last, float* y) {
  constexpr int64_t kAhead = 12;
  F acc[VECTORS];
  const int64_t offset = column * static_cast<int64_t>(sizeof(T));
  for (int v = 0; v < VECTORS; ++v)
    acc[v] = PART ? load_part(rows.bias + column, last) : load(rows.bias + column + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    if (j + kAhead < known)
      prefetch_row(rows.base + index[j + kAhead] * rows.stride + offset,
                   VECTORS * kLanes * static_cast<int64_t>(sizeof(T)));
    const T* row = reinterpret_cast<const T*>(rows.base + index[j] * rows.stride) + column;
    const F w = set1(weights[j]);
    for (int v = 0; v < VECTORS; ++v) acc[v] = fma(PART ? load_part(row, last) : load(row + v * kLanes), w, acc[v]);
  }
  for (int v = 0; v < VECTORS; ++v) {
    if (PART) {
      store_part(y + column, acc[v], last);
    } else {
      store(y + column + v * kLanes, acc[v]);
    }
  }
}

// y[begin..end) = bias + sum_j weights[j] * row index[j]; begin a multiple of kColumns. Weights hold the
// rows' scales already. `known` as in bundle_dots.
template <class T>
static void bundle_sum(const BundleRows& rows, const int32_t* index, const float* weights, int64_t count, int64_t known,
                       int64_t begin, int64_t end, float* y) {
  int64_t c = begin;
  for (; c + kColumns <= end; c += kColumns)
    sum_columns<T, kColumnVectors, false>(rows, index, weights, count, known, c, 0, y);
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) sum_columns<T, 4, false>(rows, index, weights, count, known, c, 0, y);
  for (; c < end; c += kLanes) {
    const int last = static_cast<int>(end - c < kLanes ? end - c : kLanes);
    sum_columns<T, 1, true>(rows, index, weights, count, known, c, last, y);
  }
}

// weights[j] = act(gate[j]) * up[j] (up null: 1; with up_relu max(up, 0)) * scale[index[j]] (scale null: 1).
static void hidden_weights(int64_t act, bool up_relu, const float* gate, const float* up, const float* scale,
                           const int32_t* index, int64_t count, float* weights) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int n = static_cast<int>(count - j < kLanes ? count - j : kLanes);
    F h = activate(act, load_part(gate + j, n));
    if (up != nullptr) {
      const F u = load_part(up + j, n);
      h = h * (up_relu ? max(zero(), u) : u);
    }
    store_part(weights + j, h, n);
  }
  if (scale == nullptr) return;
  for (int64_t j = 0; j < count; ++j) weights[j] *= scale[index[j]];
}

template <class T>
static void to_floats(const void* x_void, float* out, int64_t count) {
  const T* x = static_cast<const T*>(x_void);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}
template <class T>
static void from_floats(const float* in, void* y_void, int64_t count) {
  T* y = static_cast<T*>(y_void);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(in + i));
  for (; i < count; ++i) from_float(in[i], y[i]);
}

}  // namespace nogemm::NOGEMM_NS
