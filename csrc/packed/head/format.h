// The packed codes of a vocabulary head: a header of 64-bit numbers, then 64-byte aligned sections. Plain data, the same
// for every instruction set; src/nogemm/ops/packed_head.py writes it. The head's own rows lie elsewhere, [rows][d].
#pragma once
#include <cstdint>

namespace nogemm {

inline constexpr int64_t kHeadMagic = 0x4441454847474e01ll;
inline constexpr int64_t kHeadVersion = 1;

// The header's fields in their order. The only list of them: Python asks for it.
#define NOGEMM_HEAD_FIELDS(I)                                                \
  I(magic)                                                                   \
  I(version)                                                                 \
  I(bytes)                                                                   \
  I(rows)                                                                    \
  I(d)                                                                       \
  I(dtype)  /* of the rows: NOGEMM_X_FP32, NOGEMM_X_BF16 or NOGEMM_X_FP16 */ \
  I(width8) /* leading coordinates, in int8; the others are nibbles */       \
  I(width4) /* those that a search reads, too */                             \
  I(eight)  /* offsets from here on; 0: absent */                            \
  I(four)                                                                    \
  I(rest)                                                                    \
  I(numbers)                                                                 \
  I(project)                                                                 \
  I(mean)                                                                    \
  I(limits)                                                                  \
  I(bias) /* [rows] */

struct HeadHeader {
#define NOGEMM_INTEGER(name) int64_t name;
  NOGEMM_HEAD_FIELDS(NOGEMM_INTEGER)
#undef NOGEMM_INTEGER
};

}  // namespace nogemm
