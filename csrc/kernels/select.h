// The count largest keys of a row, ties to the lowest index, without sorting the row.
//
// Keys become integers of the same order. The cutoff is bracketed by counting how many keys lie above a
// guess: guesses come from mean and spread, then from interpolation, every third one halves the bracket; few
// keys left in it are sorted. A count is one pass over a row that lies in the first- or second-level cache,
// so half a dozen of them cost less than one pass that fills a histogram.
#pragma once
#include "sort_pairs.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int kSelectSort = 64;  // keys sorted at the end
// NaN, above infinity, and the least number, -infinity, as ordered integers.
inline constexpr int32_t kOrderedNan = 0x7f800001, kOrderedLowest = -0x7f800001;

NOGEMM_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
NOGEMM_INLINE float unordered(int32_t order) {
  const int32_t bits = order ^ ((order >> 31) & 0x7fffffff);
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// The integer of the same order: -0 equals 0, all NaN are one number above infinity.
NOGEMM_INLINE I ordered(F k) {
  // Adding zero turns -0 into 0. Negative numbers: all bits but the sign are flipped.
  const I bits = as_int(k + zero());
  const I order = blend(any_bit(bits, set1(INT32_MIN)), bits ^ set1(INT32_MAX), bits);
  return blend(eq(k, k), order, set1(kOrderedNan));
}

// In place: keys to ordered integers. Returns the cutoff to try first: mean + z std of
// the finite keys.
static float order_keys(float* keys, int64_t n, double z) {
  F sum = zero(), square = zero(), used = zero();
  const F one = set1(1.0f), largest = set1(1e18f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const F k = left == kLanes ? load(keys + i) : load_part(keys + i, left);
    const M fits = le(abs(k), largest);
    const F v = blend(fits, k, zero());
    sum = sum + v;
    square = fma(v, v, square);
    used = used + blend(fits, one, zero());
    const I order = ordered(k);
    if (left == kLanes) {
      store(keys + i, as_float(order));
    } else {
      store_part(keys + i, as_float(order), left);
    }
  }
  const double total = hsum(sum), squares = hsum(square);
  const double number = static_cast<double>(hsum(used)) - static_cast<double>((kLanes - n % kLanes) % kLanes);
  if (number < 1) return 0.0f;
  const double mean = total / number, variance = squares / number - mean * mean;
  return static_cast<float>(mean + z * std::sqrt(variance > 0 ? variance : 0.0));
}

// The place-th largest of the keys in (low, high], of which there are at most kSelectSort; low is INT32_MIN -
// 1 or a key.
static int32_t place_among(const int32_t* keys, int64_t n, int64_t low, int32_t high, int64_t place) {
  int32_t found[kSelectSort];
  int count = 0;
  const auto insert = [&](int32_t key) {
    if (key <= low || key > high || count == kSelectSort) return;
    int at = count++;
    for (; at > 0 && found[at - 1] < key; --at) found[at] = found[at - 1];
    found[at] = key;
  };
  // Few keys lie above low: look closer only where one does.
  const I least = set1(static_cast<int32_t>(low < INT32_MIN ? INT32_MIN : low)), most = set1(high);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const I k = load(keys + i);
    uint32_t inside = mask_bits(~lt(most, k));
    if (low >= INT32_MIN) inside &= mask_bits(lt(least, k));
    for (; inside != 0; inside &= inside - 1) insert(keys[i + __builtin_ctz(inside)]);
  }
  for (; i < n; ++i) insert(keys[i]);
  return found[place];
}

// The count-th largest of n ordered keys, 0 < count <= n.
static int32_t cutoff_of(const int32_t* keys, int64_t n, int64_t count, float guess) {
  int64_t low = int64_t{INT32_MIN} - 1,
          high = INT32_MAX;  // above low: `count` keys or more; above high: fewer
  int64_t above_low = n, above_high = 0;
  float step = std::fabs(guess) * 0.0625f + 1e-30f;
  for (int turn = 0; high - low > 1 && above_low - above_high > kSelectSort; ++turn) {
    int64_t middle = low + (high - low) / 2;
    const bool bracketed = low >= INT32_MIN && high < INT32_MAX;
    if (!bracketed && turn < 6) {
      int32_t bits;
      std::memcpy(&bits, &guess, sizeof bits);
      middle = ordered(bits);
    } else if (bracketed && turn % 3 != 2) {
      const double a = unordered(static_cast<int32_t>(low)), b = unordered(static_cast<int32_t>(high));
      const double share = static_cast<double>(above_low - count) / static_cast<double>(above_low - above_high);
      const float between = static_cast<float>(a + (b - a) * (0.02 + 0.96 * share));
      int32_t bits;
      std::memcpy(&bits, &between, sizeof bits);
      if (between == between) middle = ordered(bits);
    }
    middle = middle <= low ? low + 1 : middle >= high ? high - 1 : middle;
    const int64_t above = count_above(keys, n, static_cast<int32_t>(middle));
    if (above >= count) {
      low = middle, above_low = above, guess += step;
    } else {
      high = middle, above_high = above, guess -= step;
    }
    step *= 2;
  }
  if (high - low <= 1) return static_cast<int32_t>(high);
  return place_among(keys, n, low, static_cast<int32_t>(high), count - above_high - 1);
}

// The z that a normal distribution exceeds with probability p: a rational fit good to 5e-4, which a first
// guess needs no better.
NOGEMM_INLINE double normal_quantile(double p) {
  const double q = p < 0.5 ? p : 1.0 - p, t = std::sqrt(-2.0 * std::log(q > 1e-12 ? q : 1e-12));
  const double z =
      t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
  return p < 0.5 ? z : -z;
}

// chosen[0..count) = the indices of the count largest keys, increasing. Destroys keys. Returns count, at most
// n.
static int64_t select_top(float* keys, int64_t n, int64_t count, int32_t* chosen) {
  if (count >= n) {
    for (int64_t i = 0; i < n; ++i) chosen[i] = static_cast<int32_t>(i);
    return n;
  }
  if (count <= 0) return 0;
  const float guess = order_keys(keys, n, normal_quantile(static_cast<double>(count) / static_cast<double>(n)));
  const int32_t* order = reinterpret_cast<const int32_t*>(keys);
  const int32_t limit = cutoff_of(order, n, count, guess);
  int64_t equal = count - count_above(order, n, limit), found = 0;
  const I least = set1(limit);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const I k = load(order + i);
    const uint32_t below = mask_bits(lt(k, least));
    uint32_t take = ~below & (kLanes == 32 ? ~0u : (1u << kLanes) - 1u);
    for (; take != 0; take &= take - 1) {
      const int64_t at = i + __builtin_ctz(take);
      if (order[at] == limit && --equal < 0) continue;
      chosen[found++] = static_cast<int32_t>(at);
    }
  }
  for (; i < n; ++i) {
    if (order[i] < limit || (order[i] == limit && --equal < 0)) continue;
    chosen[found++] = static_cast<int32_t>(i);
  }
  return found;
}

}  // namespace nogemm::NOGEMM_NS
