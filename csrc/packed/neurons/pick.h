// Which neurons of a packed HireFFN are computed exactly, and which of them answer.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "packed/neurons/state.h"

namespace nogemm::hire {

// Members of the given groups; the last group may be short. Returns how many.
inline int64_t spell_out(const HireHeader& h, const int32_t* groups, int64_t count, int32_t* members) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t m = groups[i] * h.group; m < (groups[i] + 1) * h.group && m < h.hidden; ++m)
      members[found++] = static_cast<int32_t>(m);
  return found;
}

// keys[i] = the sum of group i's members; values are those of the listed groups, one after the other.
inline void sum_groups(const HireHeader& h, const float* values, const int32_t* groups, int64_t count, float* keys) {
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = (groups == nullptr ? i : groups[i]) * h.group;
    const int64_t members = first + h.group < h.hidden ? h.group : h.hidden - first;
    float sum = 0;
    for (int64_t m = 0; m < members; ++m) sum += values[at++];
    keys[i] = sum;
  }
}

struct Cutoffs {
  double wide, keep;
};
inline Cutoffs cutoffs_of(const HireHeader& h, const float* scores) {
  if (h.select == kActive) return {0.0, 0.0};
  double sum = 0, square = 0;
  for (int64_t i = 0; i < h.hidden; ++i) sum += scores[i];
  const double mean = sum / static_cast<double>(h.hidden);
  for (int64_t i = 0; i < h.hidden; ++i) square += (scores[i] - mean) * (scores[i] - mean);
  const double spread = std::sqrt(square / static_cast<double>(h.hidden)),
               none = -std::numeric_limits<double>::infinity();
  return {std::isinf(h.wide_z) ? none : mean + h.wide_z * spread,
          std::isinf(h.keep_z) ? none : mean + h.keep_z * spread};
}

// A token's neurons as somebody else has chosen them.
inline void pick_masked(const Layer& l, const uint8_t* mask, TokenState& t) {
  t.kept_count = 0;
  for (int64_t i = 0; i < l.h->hidden; ++i) {
    t.kept[t.kept_count] = static_cast<int32_t>(i);
    t.kept_count += mask[i] != 0;
  }
  std::memcpy(t.candidates, t.kept, static_cast<size_t>(t.kept_count) * sizeof(int32_t));
  t.candidate_count = t.kept_count;
}

// Mean plus so many deviations of a token's selecting values, from its moments.
inline float cutoff_from_moments(const HireHeader& h, const float* moments) {
  double square = 0;
  for (int64_t i = 1; i < h.d + 2; ++i) square += static_cast<double>(moments[i]) * moments[i];
  return static_cast<float>(moments[0] + h.keep_z * std::sqrt(square));
}

inline void pick_candidates(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  if (l.all()) {
    for (int64_t i = 0; i < h.groups; ++i) t.groups[i] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < h.hidden; ++i) t.candidates[i] = static_cast<int32_t>(i);
    t.candidate_count = h.hidden;
    return;
  }
  if (h.select == kTopK) {
    l.k->keys(h.key, t.scores, h.hidden);
    if (h.group > 1) sum_groups(h, t.scores, nullptr, h.groups, t.scores);
    const int32_t* always = l.at<int32_t>(h.always);
    for (int64_t i = 0; i < h.always_count; ++i) t.scores[always[i]] = std::numeric_limits<float>::infinity();
    const int64_t found = l.k->select(t.scores, h.groups, h.candidates, t.groups);
    t.candidate_count = spell_out(h, t.groups, found, t.candidates);
    return;
  }
  const float *error = l.at(h.margin_error), *size = l.at(h.margin_size);
  const double limit = h.select == kGaussian ? t.cutoff : cutoffs_of(h, t.scores).wide;
  float square = 0;
  for (int64_t i = 0; i < h.d; ++i) square += t.x[i] * t.x[i];
  const float norm = std::sqrt(square);
  t.candidate_count = 0;
  for (int64_t i = 0; i < h.hidden; ++i) {
    const float margin = error != nullptr ? norm * error[i] + t.sketch.scale * size[i] : 0.0f;
    if (t.scores[i] + margin > limit) t.candidates[t.candidate_count++] = static_cast<int32_t>(i);
  }
}

// The neurons that answer; t.exact is moved along, so that it belongs to t.kept afterwards.
inline void pick_kept(const Layer& l, TokenState& t) {
  const HireHeader& h = *l.h;
  t.kept_count = 0;
  if (h.select == kGaussian) {  // what answers is the part above the cutoff
    for (int64_t j = 0; j < t.candidate_count; ++j) {
      if (!(t.exact[j] > t.cutoff)) continue;
      t.exact[t.kept_count] = t.exact[j] - t.cutoff;
      t.kept[t.kept_count++] = t.candidates[j];
    }
    return;
  }
  if (h.select != kTopK) {
    const double limit = cutoffs_of(h, l.all() ? t.exact : t.scores).keep;
    for (int64_t j = 0; j < t.candidate_count; ++j) {
      if (!(t.exact[j] > limit)) continue;
      t.exact[t.kept_count] = t.exact[j];
      t.kept[t.kept_count++] = t.candidates[j];
    }
    return;
  }
  const int64_t groups = l.all() ? h.groups : h.candidates;
  float* keys = t.scores;
  std::memcpy(keys, t.exact, static_cast<size_t>(t.candidate_count) * sizeof(float));
  l.k->keys(h.key, keys, t.candidate_count);
  if (h.group > 1) sum_groups(h, keys, t.groups, groups, keys);
  const int32_t* always = l.at<int32_t>(h.always);
  for (int64_t i = 0, a = 0; i < groups && a < h.always_count; ++i) {
    while (a < h.always_count && always[a] < t.groups[i]) ++a;
    if (a < h.always_count && always[a] == t.groups[i]) keys[i] = std::numeric_limits<float>::infinity();
  }
  const int64_t found = l.k->select(keys, groups, h.kept, t.chosen);
  for (int64_t i = 0; i < found; ++i) {
    const int64_t group = t.groups[t.chosen[i]];
    for (int64_t m = 0; m < h.group && group * h.group + m < h.hidden; ++m) {
      t.exact[t.kept_count] = t.exact[t.chosen[i] * h.group + m];
      t.kept[t.kept_count++] = static_cast<int32_t>(group * h.group + m);
    }
  }
}

inline void mark(const HireHeader& h, const int32_t* neurons, int64_t count, uint8_t* marks) {
  std::memset(marks, 0, static_cast<size_t>(h.hidden));
  for (int64_t i = 0; i < count; ++i) marks[neurons[i]] = 1;
}

}  // namespace nogemm::hire
