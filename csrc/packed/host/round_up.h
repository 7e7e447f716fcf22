// Sizes in whole steps.
#pragma once
#include <cstdint>

namespace nogemm {

// static: a copy of its own in every file, as everything that code of several instruction sets shares.
static constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace nogemm
