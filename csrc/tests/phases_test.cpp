// Phases of packed layers: whole calls are the layers' own, first phases write no output, wrong requests are
// refused.
#include "packed/host/phases.h"

#include "check.h"
#include "lookup_reference.h"
#include "tree_reference.h"

namespace {

using check::expect;

void run_here(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  for (int64_t w = 0; w < workers; ++w) body(w, arg);
}

struct Packed {
  int64_t kind;
  const void* data;
  int64_t bytes, d, d_out;
};

using Forward = void (*)(const void*, const void*, int64_t, int64_t, void*, int64_t, void*, const NogemmHost*);

void compare_phases(const Packed& p, Forward forward, int64_t tokens, int64_t threads) {
  const std::string what = check::text("phases of kind ", p.kind, ", ", tokens, " tokens, ", threads, " threads");
  const NogemmHost host{threads, run_here, nullptr};
  const lookup_reference::Buffer scratch(nogemm_phase_workspace(p.kind, p.data, tokens, threads) + 64);
  const std::vector<float> x = lookup_reference::uniform(5, static_cast<size_t>(tokens * p.d), 1.5f);
  const std::vector<float> untouched(static_cast<size_t>(tokens * p.d_out), 7.0f);
  std::vector<float> own = untouched, whole = untouched, first = untouched;
  forward(p.data, x.data(), NOGEMM_X_FP32, p.d, own.data(), tokens, scratch.as<void>(), &host);
  nogemm_phase_run(p.kind, NOGEMM_PHASE_WHOLE, p.data, x.data(), whole.data(), tokens, scratch.as<void>(), &host);
  nogemm_phase_run(p.kind, NOGEMM_PHASE_FIRST, p.data, x.data(), first.data(), tokens, scratch.as<void>(), &host);
  expect(whole == own, what + ": the whole call is not the layer");
  expect(first == untouched, what + ": the first phase wrote to y");
  expect(whole != untouched, what + ": control: the whole call wrote nothing");
}

void refusals(const Packed& p) {
  int64_t d = 0, d_out = 0;
  const auto checked = [&](int64_t kind, int64_t phase) {
    return nogemm_phase_check(kind, phase, p.data, p.bytes, &d, &d_out);
  };
  expect(checked(p.kind, NOGEMM_PHASE_WHOLE) == nullptr && d == p.d && d_out == p.d_out, "a good buffer was refused");
  expect(checked(p.kind, NOGEMM_PHASE_FIRST) == nullptr, "a first phase was refused");
  expect(checked(p.kind, 2) != nullptr, "an unknown phase was accepted");
  expect(checked(3, NOGEMM_PHASE_WHOLE) != nullptr, "an unknown kind was accepted");
  expect(checked(1 - p.kind, NOGEMM_PHASE_WHOLE) != nullptr, "a buffer of another kind was accepted");
  expect(checked(NOGEMM_KIND_HIRE, NOGEMM_PHASE_FIRST) != nullptr, "HiRE has one phase");
}

}  // namespace

void phases_tests() {
  const char* error = nullptr;
  for (int64_t mode = 0; mode < 3; ++mode) {
    const lookup_reference::Model lookup = lookup_reference::make_model({40, 72, 5, 4, 16}, 3);
    const lookup_reference::Buffer rows = lookup_reference::pack(lookup.spec(mode), &error);
    const Packed a{NOGEMM_KIND_LOOKUP, rows.as<void>(), rows.bytes, 40, 72};
    const tree_reference::Model tree = tree_reference::make_model({40, 72, 2, 4, 1, NOGEMM_GELU, true, true}, 3);
    const tree_reference::Buffer nodes = tree_reference::pack(tree.spec(mode), &error);
    const Packed b{NOGEMM_KIND_TREE, nodes.as<void>(), nodes.bytes(), 40, 72};
    for (int64_t tokens : {1, 5, 40, 1100})
      for (int64_t threads : {1, 2}) {
        compare_phases(a, nogemm_lookup_forward, tokens, threads);
        compare_phases(b, nogemm_tree_forward, tokens, threads);
      }
    refusals(a);
    refusals(b);
  }
}
