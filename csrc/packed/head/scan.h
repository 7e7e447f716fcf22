// What the scan of a vocabulary head is given (kernels/head_scan.h). Plain data.
#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "packed/neurons/format.h"

namespace nogemm {

inline constexpr int64_t kHeadNumbers = 4;  // of a row: scale8, scale4, err8, err4

struct HeadCodes {
  const uint8_t *eight, *four, *rest;  // [group][step][64 rows][4 bytes], see packed/neurons/format.h
  const bf16* numbers;                 // [group][kHeadNumbers][64 rows]
  const float* bias;                   // [rows], or null
  int64_t steps8, steps4, steps_rest;  // 0: that part is not read
  int64_t rows;                        // those behind the last one repeat it
};

// A row, and its upper bound.
struct HeadRow {
  float value;
  int32_t index;
};

struct HeadToken {
  FixedToken eight, four, rest;  // the last two have one plane, `high`
  const float* noise;            // [rows], added to the logits, or null
  float norm8, norm4, shift, slack;
  float* floor;   // scan: the best lower bound so far, of all pieces; threads raise it while they scan
  HeadRow* list;  // scan: rows whose upper bound reached the floor as it was
  int64_t count;
  float* estimates;  // estimate: [rows]
};

}  // namespace nogemm
