#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#ifndef NOGEMM_VERSION
#error "the build defines NOGEMM_VERSION"
#endif
#define NOGEMM_EXPORT extern "C" __attribute__((visibility("default")))

namespace nogemm {
namespace {

struct Level {
  const KernelTable* table;
  bool (*supported)();
};

#if defined(NOGEMM_X86)
bool has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }
bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

const Level kLevels[] = {
    {&scalar::kTable, always},
#if defined(NOGEMM_X86)
    {&avx2::kTable, has_avx2},        {&avx512::kTable, has_avx512},
    {&avx512_vnni::kTable, has_vnni}, {&avx512_bf16::kTable, has_bf16},
#elif defined(NOGEMM_AARCH64)
    {&neon::kTable, always},
#endif
};

// Held by NOGEMM_MAX_ISA, a machine answers as one would that has nothing above that level.
const char* const kHeld = std::getenv("NOGEMM_MAX_ISA");

bool known(const char* name) {
  for (const Level& level : kLevels) {
    if (std::strcmp(name, level.table->name) == 0) return true;
  }
  return false;
}

bool offered(const Level& level) {
  if (!level.supported()) return false;
  if (kHeld == nullptr || *kHeld == '\0' || !known(kHeld)) return true;  // environment_choice refuses an unknown name
  for (const Level* above = &level; above != std::end(kLevels); ++above) {
    if (std::strcmp(kHeld, above->table->name) == 0) return true;
  }
  return false;
}

struct Choice {
  const KernelTable* table;  // null when `error` says why
  std::string error;
};

std::string supported_names() {
  std::string names;
  for (const Level& level : kLevels) {
    if (offered(level)) names += (names.empty() ? "" : ", ") + std::string(level.table->name);
  }
  return names;
}

Choice choose(const char* name) {
#if defined(NOGEMM_X86)
  __builtin_cpu_init();
#endif
  const bool best = name == nullptr || *name == '\0';
  const KernelTable* table = nullptr;
  for (const Level& level : kLevels) {
    if (best ? offered(level) : std::strcmp(name, level.table->name) == 0) {
      if (!offered(level)) {
        const std::string why =
            level.supported() ? "' is above NOGEMM_MAX_ISA=" + std::string(kHeld) : "' is not supported by this CPU";
        return {nullptr, "instruction set '" + std::string(name) + why + "; supported: " + supported_names()};
      }
      table = level.table;
    }
  }
  if (table == nullptr) {
    return {nullptr, "unknown instruction set '" + std::string(name) + "'; supported here: " + supported_names()};
  }
  return {table, ""};
}

const Choice& environment_choice() {
  static const Choice choice = [] {
    if (kHeld != nullptr && *kHeld != '\0' && !known(kHeld)) {
      return Choice{nullptr, "NOGEMM_MAX_ISA: unknown instruction set '" + std::string(kHeld) + "'"};
    }
    Choice c = choose(std::getenv("NOGEMM_ISA"));
    if (c.table == nullptr) c.error = "NOGEMM_ISA: " + c.error;
    return c;
  }();
  return choice;
}

// Null until nogemm_set_isa succeeds; then it overrules the environment.
std::atomic<const KernelTable*> forced{nullptr};

const KernelTable* current() {
  const KernelTable* table = forced.load(std::memory_order_acquire);
  return table != nullptr ? table : environment_choice().table;
}

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = current();
  if (table == nullptr) throw std::runtime_error(environment_choice().error);
  return *table;
}

}  // namespace nogemm

NOGEMM_EXPORT const char* nogemm_isa() {
  const nogemm::KernelTable* table = nogemm::current();
  return table != nullptr ? table->name : "";
}

NOGEMM_EXPORT const char* nogemm_isa_error() {
  return nogemm::current() != nullptr ? nullptr : nogemm::environment_choice().error.c_str();
}

NOGEMM_EXPORT const char* nogemm_isa_supported(int i) {
  for (const nogemm::Level& level : nogemm::kLevels) {
    if (offered(level) && i-- == 0) return level.table->name;
  }
  return nullptr;
}

NOGEMM_EXPORT const char* nogemm_set_isa(const char* name) {
  thread_local std::string error;
  nogemm::Choice choice = nogemm::choose(name);
  if (choice.table == nullptr) {
    error = choice.error;
    return error.c_str();
  }
  nogemm::forced.store(choice.table, std::memory_order_release);
  return nullptr;
}

NOGEMM_EXPORT const char* nogemm_version() { return NOGEMM_VERSION; }
