// Pairs of integers sorted by their first, largest first; pairs of equal firsts keep their order.
//
// Few pairs: each one's place is the number of larger firsts. Many: radix sort, on the bits in which firsts differ.
#pragma once
#include "vec.h"

namespace nogemm::NOGEMM_NS {

static int64_t count_above(const int32_t* keys, int64_t n, int32_t limit) {
  const I least = set1(limit);
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) count += __builtin_popcount(mask_bits(lt(least, load(keys + i))));
  for (; i < n; ++i) count += keys[i] > limit;
  return count;
}

inline constexpr int64_t kSortByPlace = 16 * kLanes;  // most pairs whose places are counted

// `spare` holds 2 * count + kLanes numbers. No first is INT32_MIN.
static void sort_by_place(int32_t* first, int32_t* second, int64_t count, int32_t* spare) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  int32_t *const firsts = spare, *const seconds = spare + padded;
  int32_t equal[kSortByPlace] = {};  // [place] pairs that have been put there and behind
  for (int64_t i = 0; i < count; ++i) firsts[i] = first[i], seconds[i] = second[i];
  for (int64_t i = count; i < padded; ++i) firsts[i] = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t larger = count_above(firsts, padded, firsts[i]), place = larger + equal[larger]++;
    first[place] = firsts[i], second[place] = seconds[i];
  }
}

// `spare` holds 2 * count numbers.
static void sort_by_digits(int32_t* first, int32_t* second, int64_t count, int32_t* spare) {
  constexpr int kMostBits = 12;
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    least = first[i] < least ? first[i] : least;
    most = first[i] > most ? first[i] : most;
  }
  const uint32_t top = static_cast<uint32_t>(most), range = top - static_cast<uint32_t>(least);
  const int bits = range == 0 ? 0 : 32 - __builtin_clz(range);
  const int widest = count < 2048 ? 8 : kMostBits, passes = (bits + widest - 1) / widest;
  const int width = passes == 0 ? 0 : (bits + passes - 1) / passes;
  const uint32_t mask = (1u << width) - 1u;
  int32_t *from = first, *from_second = second, *to = spare, *to_second = spare + count;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * width;
    const auto digit = [=](int32_t value) { return ((top - static_cast<uint32_t>(value)) >> shift) & mask; };
    int32_t place[1 << kMostBits];
    for (uint32_t d = 0; d <= mask; ++d) place[d] = 0;
    for (int64_t i = 0; i < count; ++i) ++place[digit(from[i])];
    for (int32_t d = 0, sum = 0; d <= static_cast<int32_t>(mask); ++d) {
      const int32_t here = place[d];
      place[d] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t at = place[digit(from[i])]++;
      to[at] = from[i], to_second[at] = from_second[i];
    }
    int32_t *const other = from, *const other_second = from_second;
    from = to, from_second = to_second, to = other, to_second = other_second;
  }
  if (from == first) return;
  std::memcpy(first, from, static_cast<size_t>(count) * sizeof(int32_t));
  std::memcpy(second, from_second, static_cast<size_t>(count) * sizeof(int32_t));
}

// `spare` holds 2 * count + kLanes numbers. No first is INT32_MIN.
static void sort_pairs(int32_t* first, int32_t* second, int64_t count, int32_t* spare) {
  if (count <= kSortByPlace) {
    sort_by_place(first, second, count, spare);
  } else {
    sort_by_digits(first, second, count, spare);
  }
}

}  // namespace nogemm::NOGEMM_NS
