// Shared by the two halves of the packer: what is allowed, and where everything lies.
#pragma once
#include <cstdio>

#include "packed/lookup/format.h"
#include "packed/lookup/pack.h"

namespace nogemm {

// Why a specification cannot be packed, or null.
const char* lookup_check_spec(const NogemmLookupSpec& spec);

// The header of a valid specification's buffer.
LookupHeader lookup_layout(const NogemmLookupSpec& spec);

// An error text, valid until the next one of the thread.
template <class... A>
const char* lookup_say(const char* format, A... args) {
  thread_local char message[256];
  std::snprintf(message, sizeof message, format, args...);
  return message;
}

}  // namespace nogemm
