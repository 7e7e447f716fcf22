// nogemm::packed_hire(Tensor x, Tensor packed, int d_out) -> Tensor
// nogemm::packed_neurons(Tensor x, Tensor packed, int d_out, Tensor mask) -> Tensor
// nogemm::packed_hire_chosen(Tensor x, Tensor packed, int hidden, bool kept) -> Tensor
// nogemm::top_indices(Tensor keys, int count) -> Tensor
// nogemm::sketch_and_select(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? always, int key, int
// group, int count) -> Tensor
#include <limits>

#include "bindings/packed.h"
#include "packed/host/activations.h"
#include "packed/neurons/run.h"

namespace nogemm {
namespace {

constexpr const char* kPacked = "packed_hire";
constexpr const char* kNeurons = "packed_neurons";
constexpr const char* kChosen = "packed_hire_chosen";
constexpr const char* kTop = "top_indices";
constexpr const char* kSketch = "sketch_and_select";
constexpr int64_t kTokens = 16;  // tokens that share a pass over the codes

const char* check_buffer(const void* packed, int64_t bytes, int64_t* d, int64_t* d_out) {
  if (const char* error = hire_check(packed, bytes)) return error;
  if (const char* error = hire_check_body(packed)) return error;
  *d = static_cast<const HireHeader*>(packed)->d;
  *d_out = static_cast<const HireHeader*>(packed)->d_out;
  return nullptr;
}

// The whole layer; `mask` null: it chooses its neurons itself.
void run(const char* op, StableIValue* stack, const Tensor* mask) {
  static_assert(NOGEMM_X_FP32 == static_cast<int>(kF32) && NOGEMM_X_BF16 == static_cast<int>(kBF16) &&
                NOGEMM_X_FP16 == static_cast<int>(kF16));
  thread_local Workspace workspace;
  const auto bytes = [](const void* packed, int64_t tokens, int64_t threads) {
    return hire_workspace(*static_cast<const HireHeader*>(packed), tokens, threads);
  };
  const auto forward = [op, mask](const void* packed, const void* x, int64_t x_dtype, int64_t, void* y, int64_t tokens,
                                  void* scratch, const NogemmHost* host) {
    const auto* h = static_cast<const HireHeader*>(packed);
    check(mask == nullptr || (h->sketch == 0 && mask->dim() == 2 && mask->size(0) == tokens &&
                              mask->size(1) == h->hidden && mask->dtype() == aoti_torch_dtype_bool()),
          op, "mask must be bool [tokens, neurons], for a layer packed without a sketch");
    if (tokens == 0) return;
    hire_forward(kernels(), packed, x, static_cast<Dtype>(x_dtype), mask == nullptr ? nullptr : mask->data<uint8_t>(),
                 y, tokens, scratch, *host);
  };
  run_packed(op, stack, workspace, check_buffer, bytes, forward);
}

void packed_hire(StableIValue* stack, uint64_t, uint64_t) { run(kPacked, stack, nullptr); }

void packed_neurons(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor mask = take_tensor(stack[3]).contiguous();
  run(kNeurons, stack, &mask);
}

void packed_hire_chosen(StableIValue* stack, uint64_t, uint64_t) {
  thread_local Workspace workspace;
  const PackedCall call = take_packed(kChosen, stack, check_buffer);
  const auto* h = call.packed.data<HireHeader>();
  const int64_t hidden = take_int(stack[2]);
  check(hidden == h->hidden, kChosen, "the layer has ", h->hidden, " neurons, hidden is ", hidden);
  const bool kept = take_bool(stack[3]);
  Tensor chosen = Tensor::empty({call.tokens, h->hidden}, aoti_torch_dtype_bool());
  char* scratch = workspace.at_least(hire_workspace(*h, call.tokens, call.host.threads));
  if (call.tokens > 0) {
    hire_choose(kernels(), h, call.x.data(), static_cast<Dtype>(call.x_dtype), kept, chosen.mutable_data<uint8_t>(),
                call.tokens, scratch, call.host);
  }
  workspace.trim();
  stack[0] = std::move(chosen).to_stack();
}

void top_indices(StableIValue* stack, uint64_t, uint64_t) {
  Tensor keys = take_tensor(stack[0]).contiguous();
  const int64_t count = take_int(stack[1]);
  check(keys.dtype() == aoti_torch_dtype_float32() && keys.dim() == 2, kTop, "keys must be float32 [N, G], got shape ",
        keys.shape());
  const int64_t tokens = keys.size(0), groups = keys.size(1);
  check(count >= 0 && count <= groups, kTop, "count must be from 0 to ", groups, ", got ", count);
  Tensor chosen = Tensor::empty({tokens, count}, aoti_torch_dtype_int32());
  const float* from = keys.data<float>();
  auto* out = chosen.mutable_data<int32_t>();
  const HireKernels& k = kernels().hire;
  const Scratch<float> copy(tokens * groups);
  float* copies = copy.get();
  parallel_for(tokens, 1 + (1 << 14) / (groups + 1), [&](int64_t begin, int64_t end) noexcept {
    for (int64_t n = begin; n < end; ++n) {
      std::memcpy(copies + n * groups, from + n * groups, static_cast<size_t>(groups) * sizeof(float));
      k.select(copies + n * groups, groups, count, out + n * count);
    }
  });
  stack[0] = std::move(chosen).to_stack();
}

// int8 codes [F, D] to the layout of packed/neurons/format.h, sketch group by sketch group.
void lay_out(const int8_t* codes, int64_t hidden, int64_t width, int64_t steps, uint8_t* out, int64_t begin,
             int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    for (int64_t s = 0; s < steps; ++s) {
      uint8_t* step = out + (g * steps + s) * 4 * kSketchRows;
      for (int64_t r = 0; r < kSketchRows; ++r) {
        const int64_t row = g * kSketchRows + r;
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t c = s * 4 + j;
          step[4 * r + j] = static_cast<uint8_t>((row < hidden && c < width ? codes[row * width + c] : 0) + 128);
        }
      }
    }
  }
}

struct Selection {
  SketchRows rows;
  int64_t hidden, width, steps, padded, groups, group, key, count;
  const int32_t* always;
  int64_t always_count;
  const float* x;
  int32_t* chosen;
};

// Tokens [begin, end), at most kTokens; scores hold kTokens rows, codes hold kTokens rows of 4 steps bytes.
void select_tokens(const Selection& s, int64_t begin, int64_t end, float* scores, int8_t* codes) {
  const HireKernels& k = kernels().hire;
  SketchToken tokens[kTokens];
  for (int64_t n = begin; n < end; ++n) {
    SketchToken& t = tokens[n - begin];
    int8_t* own = codes + (n - begin) * s.steps * 4;
    t.scale = k.token(s.x + n * s.width, s.width, s.steps * 4, own, &t.sum);
    t.codes = own;
    t.scores = scores + (n - begin) * s.padded;
  }
  k.scores(s.rows, 0, s.padded / kSketchRows, tokens, end - begin);
  for (int64_t n = begin; n < end; ++n) {
    float* keys = tokens[n - begin].scores;
    k.keys(s.key, keys, s.hidden);
    for (int64_t i = 0; s.group > 1 && i < s.groups; ++i) {
      float sum = 0;
      for (int64_t m = i * s.group; m < (i + 1) * s.group && m < s.hidden; ++m) sum += keys[m];
      keys[i] = sum;
    }
    for (int64_t i = 0; i < s.always_count; ++i) keys[s.always[i]] = std::numeric_limits<float>::infinity();
    k.select(keys, s.groups, s.count, s.chosen + n * s.count);
  }
}

void check_selection(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& bias,
                     const Tensor& always, const Selection& s) {
  check(x.dtype() == aoti_torch_dtype_float32() && x.dim() == 2, kSketch, "x must be float32 [N, D], got ", x.shape());
  check(codes.dtype() == aoti_torch_dtype_int8() && codes.dim() == 2 && codes.size(1) == x.size(1), kSketch,
        "codes must be int8 [F, D], got ", codes.shape(), " for x ", x.shape());
  check(scale.dtype() == aoti_torch_dtype_float32() && scale.numel() == s.hidden, kSketch,
        "scale must be float32 [F], got ", scale.shape());
  check(!bias.defined() || (bias.dtype() == aoti_torch_dtype_float32() && bias.numel() == s.hidden), kSketch,
        "bias must be float32 [F]");
  check(!always.defined() || always.dtype() == aoti_torch_dtype_int32(), kSketch, "always must be int32");
  check(s.key >= kKeySigned && s.key < NOGEMM_ACTIVATIONS && s.group >= 1 && s.count >= 0 && s.count <= s.groups,
        kSketch, "key, group or count out of range: ", s.key, ", ", s.group, ", ", s.count);
  for (int64_t i = 0; i < s.always_count; ++i)
    check(s.always[i] >= 0 && s.always[i] < s.groups, kSketch, "always names group ", s.always[i], " of ", s.groups);
}

void sketch_and_select(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x = take_tensor(stack[0]).contiguous(), codes = take_tensor(stack[1]).contiguous(),
         scale = take_tensor(stack[2]).contiguous(), bias = take_optional_tensor(stack[3]),
         always = take_optional_tensor(stack[4]);
  if (bias.defined()) bias = std::move(bias).contiguous();
  if (always.defined()) always = std::move(always).contiguous();
  Selection s{};
  s.hidden = codes.dim() == 2 ? codes.size(0) : 0;
  s.width = codes.dim() == 2 ? codes.size(1) : 0;
  s.key = take_int(stack[5]), s.group = take_int(stack[6]), s.count = take_int(stack[7]);
  s.groups = s.group < 1 ? 0 : (s.hidden + s.group - 1) / s.group;
  s.always = always.defined() ? always.data<int32_t>() : nullptr;
  s.always_count = always.defined() ? always.numel() : 0;
  check_selection(x, codes, scale, bias, always, s);
  const int64_t tokens = x.size(0);
  Tensor chosen = Tensor::empty({tokens, s.count}, aoti_torch_dtype_int32());
  s.padded = (s.hidden + kSketchRows - 1) / kSketchRows * kSketchRows;
  s.steps = (s.width + 3) / 4;
  s.x = x.data<float>();
  s.chosen = chosen.mutable_data<int32_t>();
  const Scratch<float> numbers(2 * s.padded);
  std::memset(numbers.get(), 0, static_cast<size_t>(2 * s.padded) * sizeof(float));
  std::memcpy(numbers.get(), scale.data(), static_cast<size_t>(s.hidden) * sizeof(float));
  if (bias.defined()) std::memcpy(numbers.get() + s.padded, bias.data(), static_cast<size_t>(s.hidden) * sizeof(float));
  const Scratch<uint8_t> layout(s.padded * s.steps * 4 + 8192);
  const int8_t* code_data = codes.data<int8_t>();
  parallel_for(s.padded / kSketchRows, 4, [&](int64_t begin, int64_t end) noexcept {
    lay_out(code_data, s.hidden, s.width, s.steps, layout.get(), begin, end);
  });
  s.rows = {layout.get(), numbers.get(), numbers.get() + s.padded, s.steps, false};
  const int64_t pieces = (tokens + kTokens - 1) / kTokens;
  const Scratch<float> scores(pieces * kTokens * s.padded);
  const Scratch<int8_t> token_codes(pieces * kTokens * s.steps * 4);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) noexcept {
    // One thread's pieces reuse the scores of its first one.
    for (int64_t p = begin; p < end; ++p) {
      const int64_t stop = (p + 1) * kTokens < tokens ? (p + 1) * kTokens : tokens;
      select_tokens(s, p * kTokens, stop, scores.get() + begin * kTokens * s.padded,
                    token_codes.get() + begin * kTokens * s.steps * 4);
    }
  });
  stack[0] = std::move(chosen).to_stack();
}

const Register registered_packed(kPacked, packed_hire);
const Register registered_neurons(kNeurons, packed_neurons);
const Register registered_chosen(kChosen, packed_hire_chosen);
const Register registered_top(kTop, top_indices);
const Register registered_sketch(kSketch, sketch_and_select);

}  // namespace
}  // namespace nogemm
