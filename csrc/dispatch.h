// Which instruction set runs. Levels are ordered: each implies the ones before it on x86.
//
// The best supported level is chosen on first use. The environment variable NOGEMM_ISA forces one; a name
// that is unknown, or known but not supported by this CPU, is remembered as an error and reported by the
// first call that needs a kernel (or by `nogemm_isa_error`), never by a crash while the library loads.
// NOGEMM_MAX_ISA holds the library to a level: those above it are as good as not supported.
#pragma once
#include "kernel_table.h"

namespace nogemm {

// The table in force; throws std::runtime_error if NOGEMM_ISA asks for something this CPU cannot run.
const KernelTable& kernels();

}  // namespace nogemm

// Plain C entry points for ctypes. Strings live as long as the library, error strings until the next call on
// the same thread.
extern "C" {
// Name of the level in force, or "" if NOGEMM_ISA or NOGEMM_MAX_ISA is wrong (see nogemm_isa_error).
const char* nogemm_isa();
// Why no level is in force, or null.
const char* nogemm_isa_error();
// The i-th supported level's name, from slowest to fastest; null past the end.
const char* nogemm_isa_supported(int i);
// Forces a level for the whole process; null or "" chooses the best. Returns an error message, or null on
// success. Not to be called while an operator runs.
const char* nogemm_set_isa(const char* name);
// Version of the library, as in the package's metadata.
const char* nogemm_version();
}
