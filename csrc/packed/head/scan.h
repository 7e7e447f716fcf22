// What the scan of a vocabulary head is given (kernels/head_scan.h). Plain data.
#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "packed/neurons/format.h"

namespace nogemm {

inline constexpr int64_t kHeadNumbers = 4;  // of a row: scale8, scale4, err8, err4

struct HeadCodes {
  const uint8_t *eight, *four;   // [group][step][64 rows][4 bytes], see packed/neurons/format.h
  const bf16* numbers;           // [group][kHeadNumbers][64 rows]
  const float* bias;             // [rows padded to groups], or null
  int64_t steps8, steps4, rows;  // rows behind the last one repeat it
};

struct HeadToken {
  FixedToken eight, four;
  float norm8, norm4, shift, slack;
  float floor;     // the best lower bound so far
  int32_t* index;  // rows whose upper bound reached the floor as it was
  float* upper;    // their upper bounds
  int64_t count;
};

}  // namespace nogemm
