// The k largest numbers of a row, in about one pass over it.
//
// 1. Maxima of many small buckets. The k-th largest of them, the floor, is reached by k numbers at least, and by few
//    more: fewer than k buckets have a number above it.
// 2. What reaches the floor is collected, out of the chunks that hold any.
// 3. Among these few the k largest are selected (select.h) and sorted (sort_pairs.h).
// The answer is exact for any row. A bad row, whose large numbers share buckets, makes step 2 collect k buckets.
//
// The approximate form keeps the largest few of each bucket, selects among those, and does not look again.
//
// Numbers are compared as integers of the same order (`ordered` in select.h); of equal ones the lowest index wins. In
// the exact form a row is cut into chunks of `depth` vectors, and a lane of a chunk is a bucket. In the approximate
// form number i is in bucket i mod `buckets`. Legend: n numbers a row, k winners.
#pragma once
#include "select.h"

namespace nogemm::NOGEMM_NS {

NOGEMM_INLINE F lowest() { return set1(-__builtin_inff()); }
NOGEMM_INLINE M first_of(int64_t left) { return lt(lane_index(), set1(static_cast<int32_t>(left))); }

// Numbers [at, at + kLanes) of a row of n, -infinity behind its end.
template <class T>
NOGEMM_INLINE F load_row(const T* x, int64_t at, int64_t n) {
  if (at + kLanes <= n) return load(x + at);
  const int64_t left = at < n ? n - at : 0;
  return blend(first_of(left), load_part(x + (n - left), static_cast<int>(left)), lowest());
}

// maxima[chunk][lane] of chunks [begin, end); NaN is left out. Returns whether there was one.
template <class T>
static bool topk_maxima(const void* from, int64_t n, int64_t depth, int64_t begin, int64_t end, float* maxima) {
  const T* x = static_cast<const T*>(from);
  M nan = either_nan(zero(), zero());
  for (int64_t c = begin; c < end; ++c) {
    const int64_t first = c * depth * kLanes, last = first + depth * kLanes;
    F most = lowest();
    if (last <= n) {
      for (int64_t i = first; i < last; i += 2 * kLanes) {  // depth is even
        const F a = load(x + i), b = load(x + i + kLanes);
        nan = nan | either_nan(a, b);
        most = max(max(a, b), most);  // the second operand where one is NaN, so most never is
      }
    } else {
      for (int64_t i = first; i < last; i += kLanes) {
        const F a = load_row(x, i, n);
        nan = nan | either_nan(a, a);
        most = max(a, most);
      }
    }
    store(maxima + c * kLanes, most);
  }
  return mask_bits(nan) != 0;
}

// The k-th largest of count numbers, as an integer; the lowest where there are fewer. Turns them into integers.
static int32_t topk_floor(float* numbers, int64_t count, int64_t k) {
  const float guess = order_keys(numbers, count, normal_quantile(static_cast<double>(k) / static_cast<double>(count)));
  return k > count ? kOrderedLowest : cutoff_of(reinterpret_cast<const int32_t*>(numbers), count, k, guess);
}

// A number that others reach or do not.
struct Floor {
  F number;
  bool nan;
};
NOGEMM_INLINE Floor floor_of(int32_t least) { return {set1(unordered(least)), least == kOrderedNan}; }
NOGEMM_INLINE M reached(const Floor& floor, F v) {  // by NaN: any
  return floor.nan ? either_nan(v, v) : ~lt(v, floor.number);
}

template <class T>
static int64_t topk_count(const void* from, int64_t begin, int64_t end, int32_t least) {
  const T* x = static_cast<const T*>(from);
  const Floor floor = floor_of(least);
  int64_t count = 0, i = begin;
  for (; i + kLanes <= end; i += kLanes) count += __builtin_popcount(mask_bits(reached(floor, load(x + i))));
  if (i < end) count += __builtin_popcount(mask_bits(reached(floor, load_row(x, i, end)) & first_of(end - i)));
  return count;
}

// Numbers [begin, end) that reach the floor, as they are, and their indices, increasing. DENSE: most vectors have one.
template <bool DENSE, class T>
NOGEMM_INLINE int64_t collect(const T* x, int64_t begin, int64_t end, const Floor& floor, int32_t* keys,
                              int32_t* index) {
  int64_t count = 0;
  const auto take = [&](int64_t i, F v, M wanted) {
    const uint32_t bits = mask_bits(wanted);
    if (!DENSE && bits == 0) return;
    compress(keys + count, as_int(v), wanted);
    compress(index + count, set1(static_cast<int32_t>(i)) + lane_index(), wanted);
    count += __builtin_popcount(bits);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const F v = load(x + i);
    take(i, v, reached(floor, v));
  }
  if (i < end) {
    const F v = load_row(x, i, end);
    take(i, v, reached(floor, v) & first_of(end - i));
  }
  return count;
}

// Few are left by now; the lists have room for kLanes more.
static int64_t to_order(int32_t* keys, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(keys + i, ordered(as_float(load(keys + i))));
  return count;
}

// Numbers [begin, end) that reach the floor, as integers. The lists have room for end - begin + kLanes.
template <class T>
static int64_t topk_reaching(const void* from, int64_t begin, int64_t end, int32_t least, bool dense, int32_t* keys,
                             int32_t* index) {
  const T* x = static_cast<const T*>(from);
  const int64_t count = dense ? collect<true>(x, begin, end, floor_of(least), keys, index)
                              : collect<false>(x, begin, end, floor_of(least), keys, index);
  return to_order(keys, count);
}

// The same of chunks [begin, end), those alone whose maxima (integers by now) reach the floor.
template <class T>
static int64_t topk_collect(const void* from, int64_t n, int64_t depth, const float* maxima, int64_t begin, int64_t end,
                            int32_t least, bool dense, int32_t* keys, int32_t* index) {
  const T* x = static_cast<const T*>(from);
  const auto* tops = reinterpret_cast<const int32_t*>(maxima);
  const Floor floor = floor_of(least);
  const I limit = set1(least);
  int64_t count = 0;
  for (int64_t c = begin; c < end; ++c) {
    if (mask_bits(~lt(load(tops + c * kLanes), limit)) == 0) continue;
    const int64_t first = c * depth * kLanes, last = first + depth * kLanes < n ? first + depth * kLanes : n;
    if (first >= n) break;
    count += dense ? collect<true>(x, first, last, floor, keys + count, index + count)
                   : collect<false>(x, first, last, floor, keys + count, index + count);
  }
  return to_order(keys, count);
}

// The k largest of count pairs in order of increasing index, in place and in that order; all of them reach the floor.
static void cut_to(int32_t* keys, int32_t* index, int64_t count, int64_t k, int32_t least) {
  int32_t limit = least;
  int64_t above = count_above(keys, count, limit);
  if (above >= k) {
    limit = cutoff_of(keys, count, k, unordered(least));
    above = count_above(keys, count, limit);
  }
  const I cutoff = set1(limit);
  int64_t equal = k - above, kept = 0;
  for (int64_t i = 0; i < count && kept < k; i += kLanes) {
    const I key = load(keys + i), at = load(index + i);
    const M inside = first_of(count - i), over = lt(cutoff, key) & inside, same = ~lt(key, cutoff) & inside;
    const int64_t more = __builtin_popcount(mask_bits(same & ~over));
    if (equal == 0 || more <= equal) {
      const M take = equal == 0 ? over : same;
      compress(keys + kept, key, take);
      compress(index + kept, at, take);
      kept += __builtin_popcount(mask_bits(take));
      equal -= equal == 0 ? 0 : more;
      continue;
    }
    for (uint32_t left = mask_bits(same); left != 0; left &= left - 1) {
      const int64_t j = i + __builtin_ctz(left);
      if (keys[j] == limit && --equal < 0) continue;
      keys[kept] = keys[j], index[kept++] = index[j];
    }
    equal = 0;
  }
}

// The k largest of count pairs in order of increasing index, k <= count: largest first, or in order of their index.
// The lists have room for kLanes pairs more; `spare` holds 2 k + kLanes numbers.
static void topk_finish(int32_t* keys, int32_t* index, int64_t count, int64_t k, int32_t least, bool sorted,
                        int32_t* spare) {
  if (count > k) cut_to(keys, index, count, k, least);
  if (sorted) sort_pairs(keys, index, k, spare);
}

// How many vectors of buckets one pass over their column has registers for.
constexpr int bucket_vectors(int kept) {
  const int room = (kRegisters - 4) / (2 * kept), most = kTopkStrip / kLanes;
  int vectors = 1;
  while (vectors * 2 <= room && vectors * 2 <= most) vectors *= 2;
  return vectors;
}

// values[place][bucket] and indices of the KEPT largest of each bucket in [begin, end), multiples of kTopkStrip;
// -infinity where there is none above it. Returns whether there was a NaN.
template <class T, int KEPT>
static bool topk_buckets(const void* from, int64_t n, int64_t buckets, int64_t begin, int64_t end, float* values,
                         int32_t* index) {
  constexpr int kVectors = bucket_vectors(KEPT);
  const T* x = static_cast<const T*>(from);
  M nan = either_nan(zero(), zero());
  const int64_t rows = n / buckets;
  for (int64_t column = begin; column < end; column += kVectors * kLanes) {
    F best[KEPT][kVectors];
    I row[KEPT][kVectors];
    NOGEMM_UNROLL for (int s = 0; s < KEPT; ++s) {
      NOGEMM_UNROLL for (int v = 0; v < kVectors; ++v) best[s][v] = lowest(), row[s][v] = set1(0);
    }
    const auto insert = [&](int v, F number, I at) {
      nan = nan | either_nan(number, number);
      // What it is larger than moves one place down; from the last place up, so that nothing is lost.
      M larger = gt(number, best[KEPT - 1][v]);
      NOGEMM_UNROLL for (int s = KEPT - 1; s > 0; --s) {
        const M above = gt(number, best[s - 1][v]);
        best[s][v] = blend(larger, blend(above, best[s - 1][v], number), best[s][v]);
        row[s][v] = blend(larger, blend(above, row[s - 1][v], at), row[s][v]);
        larger = above;
      }
      best[0][v] = blend(larger, number, best[0][v]);
      row[0][v] = blend(larger, at, row[0][v]);
    };
    for (int64_t r = 0; r < rows; ++r) {
      const I at = set1(static_cast<int32_t>(r));
      NOGEMM_UNROLL for (int v = 0; v < kVectors; ++v) insert(v, load(x + r * buckets + column + v * kLanes), at);
    }
    if (rows * buckets < n) {
      const I at = set1(static_cast<int32_t>(rows));
      for (int v = 0; v < kVectors; ++v) insert(v, load_row(x, rows * buckets + column + v * kLanes, n), at);
    }
    NOGEMM_UNROLL for (int s = 0; s < KEPT; ++s) {
      NOGEMM_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t bucket = column + v * kLanes;
        const I first = set1(static_cast<int32_t>(bucket)) + lane_index();
        store(values + s * buckets + bucket, best[s][v]);
        store(index + s * buckets + bucket, times(row[s][v], static_cast<int32_t>(buckets)) + first);
      }
    }
  }
  return mask_bits(nan) != 0;
}

// Pairs by their index, lowest first.
static void sort_by_index(int32_t* keys, int32_t* index, int64_t count, int32_t* spare) {
  for (int64_t i = 0; i < count; ++i) index[i] = ~index[i];
  sort_pairs(index, keys, count, spare);
  for (int64_t i = 0; i < count; ++i) index[i] = ~index[i];
}

// The k largest of count candidates, a multiple of kTopkStrip, as `topk_finish` leaves them. Returns whether there are k
// above -infinity. Destroys values. The lists have room for count + kLanes, `spare` for 2 count + kLanes.
static bool topk_candidates(float* values, const int32_t* places, int64_t count, int64_t k, bool sorted, int32_t* keys,
                            int32_t* index, int32_t* spare) {
  const int32_t least = topk_floor(values, count, k);
  if (least == kOrderedLowest) return false;
  const auto* orders = reinterpret_cast<const int32_t*>(values);
  const I limit = set1(least);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const I key = load(orders + i);
    const M wanted = ~lt(key, limit);
    const uint32_t bits = mask_bits(wanted);
    if (bits == 0) continue;
    compress(keys + found, key, wanted);
    compress(index + found, load(places + i), wanted);
    found += __builtin_popcount(bits);
  }
  // Candidates stand bucket by bucket: what is equal is put in order of index afterwards.
  sort_pairs(keys, index, found, spare);
  for (int64_t i = 0, j; i < k; i = j) {
    for (j = i + 1; j < found && keys[j] == keys[i]; ++j) continue;
    if (j > i + 1) sort_by_index(keys + i, index + i, j - i, spare);
  }
  if (!sorted) sort_by_index(keys, index, k, spare);
  return true;
}

// score[g] = sum or maximum of group g's numbers, for groups [begin, end); the last one of a row may be shorter. Sums
// are added in order; a NaN makes its group NaN.
template <class T>
static void topk_groups(const void* from, int64_t n, int64_t group, bool sum, int64_t begin, int64_t end,
                        float* scores) {
  const T* x = static_cast<const T*>(from);
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = g * group, last = first + group < n ? first + group : n;
    float score = to_float(x[first]);
    for (int64_t i = first + 1; i < last; ++i) {
      const float own = to_float(x[i]);
      score = sum ? score + own : own > score || own != own ? own : score;
    }
    scores[g] = score;
  }
}

template <class T>
static constexpr void set_topk(TopkKernels& t, Dtype dtype) {
  t.maxima[dtype] = topk_maxima<T>;
  t.count[dtype] = topk_count<T>;
  t.reaching[dtype] = topk_reaching<T>;
  t.collect[dtype] = topk_collect<T>;
  t.groups[dtype] = topk_groups<T>;
  t.buckets[0][dtype] = topk_buckets<T, 1>;
  t.buckets[1][dtype] = topk_buckets<T, 2>;
  t.buckets[2][dtype] = topk_buckets<T, 3>;
  t.buckets[3][dtype] = topk_buckets<T, 4>;
}

static constexpr TopkKernels topk_kernels() {
  TopkKernels t{};
  set_topk<float>(t, kF32);
  set_topk<bf16>(t, kBF16);
  set_topk<fp16>(t, kF16);
  t.floor = topk_floor;
  t.finish = topk_finish;
  t.candidates = topk_candidates;
  return t;
}

}  // namespace nogemm::NOGEMM_NS
