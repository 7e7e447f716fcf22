// The packed LookupFFN against a double-precision reference: every instruction set, odd shapes, all modes and batch regimes.
#include <cstdio>
#include <string>
#include <thread>

#include "dispatch.h"
#include "lookup_compare.h"

using namespace lookup_reference;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAIL lookup [%s]: %s\n", nogemm_isa(), what.c_str());
}

void run_serial(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  for (int64_t w = workers; w-- > 0;) body(w, arg);
}

void run_threads(void*, int64_t workers, void (*body)(int64_t, void*), void* arg) {
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < workers; ++w) threads.emplace_back(body, w, arg);
  for (std::thread& t : threads) t.join();
}

template <class T>
std::vector<T> forward(const Buffer& packed, const Shape& s, const T* x, int64_t dtype, int64_t tokens, int64_t threads,
                       bool serial = false) {
  const NogemmHost host{threads, serial ? run_serial : run_threads, nullptr};
  const Buffer workspace(nogemm_lookup_workspace(packed.as<void>(), tokens, threads));
  std::memset(workspace.as<void>(), 0xff, static_cast<size_t>(workspace.bytes));  // what is read must have been written
  std::vector<T> y(static_cast<size_t>(tokens * s.d_out) + 16, T(77));
  nogemm_lookup_forward(packed.as<void>(), x, dtype, s.d, y.data(), tokens, workspace.as<void>(), &host);
  for (int i = 0; i < 16; ++i) expect(y[static_cast<size_t>(tokens * s.d_out + i)] == T(77), "wrote behind y");
  y.resize(static_cast<size_t>(tokens * s.d_out));
  return y;
}

std::string name_of(const Shape& s, int64_t mode, int64_t tokens) {
  char text[200];
  std::snprintf(text, sizeof text,
                "d %d out %d tables %d bits %d block %d rounds %d k %d score %d mix %g norm %d mode %d N %d", int(s.d),
                int(s.d_out), int(s.tables), int(s.bits), int(s.block), int(s.rounds), int(s.neighbours), int(s.score),
                s.mix, int(s.norm), int(mode), int(tokens));
  return text;
}

const Shape kShapes[] = {
    // d, d_out, tables, bits, block, rounds, neighbours, score, mix, norm, columns, width
    {1, 1, 1, 1, 1, 1, 1, 0, 1.0, false},
    {5, 3, 3, 2, 1, 2, 2, 0, 1.0, true},
    {5, 7, 11, 3, 8, 1, 4, 1, 0.7, true},
    {12, 65, 5, 4, 2, 3, 1, 0, 0.7, true},
    {20, 130, 7, 5, 4, 4, 2, 0, 1.0, true},
    {48, 64, 21, 9, 16, 3, 1, 0, 0.7, true},  // repeats 3, tables straddle them
    {64, 200, 16, 8, 64, 4, 4, 0, 1.0, true},
    {100, 129, 19, 7, 32, 2, 2, 1, 0.7, false},  // padded, repeats 2
    {96, 33, 40, 6, 16, 4, 1, 1, 1.0, true},     // two of eight blocks are padding
    {300, 48, 9, 10, 8, 2, 1, 0, 1.0, true},     // 32 blocks of 16: five butterfly levels
    {37, 50, 6, 6, 0, 1, 1, 0, 1.0, true},       // dense
    {130, 128, 33, 4, 0, 1, 4, 0, 1.0, false},
    {33, 96, 300, 2, 16, 2, 2, 0, 1.0, true},  // 600 lookups: more than one integer sum
    {16, 64, 2, 13, 4, 2, 1, 0, 1.0, true},
    {48, 70, 21, 9, 1, 3, 1, 2, 1.0, true},       // constant scores
    {20, 33, 14, 5, 1, 3, 1, 2, 1.0, false, 30},  // two columns of each repeat are left out
    {9, 17, 30, 3, 0, 1, 1, 2, 1.0, true},
    {100, 40, 40, 7, 32, 2, 2, 0, 0.7, true, 90},      // and tables that straddle the repeats
    {192, 33, 25, 8, 16, 3, 1, 0, 1.0, true, 0, 192},  // 12 blocks, repeats 2
    {330, 20, 13, 6, 8, 2, 2, 1, 0.7, false, 0, 384},  // 24 blocks, merged and padded
    {320, 35, 41, 8, 16, 2, 4, 0, 0.7, true, 0, 320},  // 20 blocks, repeats 2
    {600, 24, 9, 5, 32, 2, 1, 2, 1.0, true, 30, 640},  // 20 blocks, one of them padding, two repeats
};

std::vector<float> tokens_of(const Shape& s, int64_t tokens, uint64_t seed) {
  std::mt19937_64 rng(seed);
  return normal(rng, static_cast<size_t>(tokens * s.d), 1.0, 0.1);
}

// Batches that cover every regime; the large ones (wide tiles, several blocks, two chunks) on small layers only.
std::vector<int64_t> batches(const Shape& s) {
  std::vector<int64_t> n = {1, 2, 3, 5, 16, 17, 70, 263};
  if (s.d <= 48 || s.d_out == 130) n.push_back(1100);
  if (s.d == 48 || s.d_out == 130) n.push_back(3300);
  if (s.d == 1) n.push_back(9000);
  return n;
}

void against_reference() {
  uint64_t seed = 1;
  for (const Shape& s : kShapes)
    for (int64_t mode = 0; mode < 4; ++mode) {
      const Model m = make_model(s, ++seed);
      const char* error = nullptr;
      const Buffer packed = pack(m.spec(mode), &error);
      if (error != nullptr) {
        expect(false, name_of(s, mode, 0) + ": " + error);
        continue;
      }
      for (int64_t tokens : batches(s)) {
        const std::vector<float> x = tokens_of(s, tokens, seed * 1000 + static_cast<uint64_t>(tokens));
        const std::vector<float> y = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 2);
        const Verdict v = compare(m, mode, x.data(), y.data(), tokens);
        char text[100];
        std::snprintf(text, sizeof text, ": error %g, %d jumps", v.error, int(v.taken));
        const double most = (mode == 0 ? 0.002 : 0.03) * static_cast<double>(tokens * s.tables * s.bits) + 2;
        expect(v.error <= tolerance(mode).relative && static_cast<double>(v.taken) <= most,
               name_of(s, mode, tokens) + text);
        const std::vector<float> one = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 1);
        const std::vector<float> three = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 3, true);
        expect(one == y && three == y, name_of(s, mode, tokens) + ": depends on the number of threads");
      }
    }
}

// Sums of int8 and int4 rows are integers, so they are the same bits on every instruction set. Constant scores and a dense projection
// in fixed point leave nothing else that could differ.
void same_integer_sums() {
  const Shape shapes[] = {{37, 200, 600, 2, 0, 1, 1, NOGEMM_LOOKUP_CONSTANT, 1.0, false},
                          {20, 65, 7, 5, 0, 1, 1, NOGEMM_LOOKUP_CONSTANT, 1.0, false}};
  for (const Shape& s : shapes) {
    const Model m = make_model(s, 17);
    const char* error = nullptr;
    for (const int64_t mode : {NOGEMM_LOOKUP_INT8, NOGEMM_LOOKUP_INT4}) {
      const Buffer packed = pack(m.spec(mode), &error);
      for (int64_t tokens : {1, 3, 40, 1100}) {
        const std::vector<float> x = tokens_of(s, tokens, 23);
        std::vector<float> first;
        for (int i = 0; nogemm_isa_supported(i) != nullptr; ++i) {
          nogemm_set_isa(nogemm_isa_supported(i));
          const std::vector<float> y = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 2);
          if (i == 0) first = y;
          expect(y == first, name_of(s, mode, tokens) + ": integer sums differ from the first instruction set's");
        }
      }
    }
  }
  nogemm_set_isa(nullptr);
}

bool all_nan(const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isnan(y[i])) return false;
  return true;
}

void broken_tokens() {
  for (const Shape& s : kShapes)
    for (int64_t mode = 0; mode < 4; ++mode)
      for (int64_t tokens : {1, 3, 40, 1100}) {
        const Model m = make_model(s, 99);
        const char* error = nullptr;
        const Buffer packed = pack(m.spec(mode), &error);
        std::vector<float> x = tokens_of(s, tokens, 5);
        const std::vector<float> clean = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 2);
        const int64_t broken = tokens / 2;
        for (float bad : {NAN, INFINITY, -INFINITY}) {
          x[static_cast<size_t>(broken * s.d + s.d / 2)] = bad;
          const std::vector<float> y = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 2);
          expect(all_nan(y.data() + broken * s.d_out, s.d_out),
                 name_of(s, mode, tokens) + ": a broken token looks whole");
          bool others = true;
          for (int64_t n = 0; n < tokens; ++n)
            if (n != broken)
              others = others && std::memcmp(y.data() + n * s.d_out, clean.data() + n * s.d_out,
                                             static_cast<size_t>(s.d_out) * 4) == 0;
          expect(others, name_of(s, mode, tokens) + ": a broken token changed others");
        }
      }
}

uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// bf16 in and out is fp32 in and out of the same numbers, rounded once.
void other_dtypes() {
  const Shape s = kShapes[7];
  const Model m = make_model(s, 3);
  const char* error = nullptr;
  const Buffer packed = pack(m.spec(NOGEMM_LOOKUP_INT8), &error);
  for (int64_t tokens : {1, 50, 1100}) {
    std::vector<float> x = tokens_of(s, tokens, 11);
    std::vector<uint16_t> narrow(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      narrow[i] = to_bf16(x[i]);
      const uint32_t wide = static_cast<uint32_t>(narrow[i]) << 16;
      std::memcpy(&x[i], &wide, 4);
    }
    const std::vector<float> y = forward(packed, s, x.data(), NOGEMM_X_FP32, tokens, 2);
    const std::vector<uint16_t> y16 = forward(packed, s, narrow.data(), NOGEMM_X_BF16, tokens, 2);
    bool same = true;
    for (size_t i = 0; i < y.size(); ++i) same = same && to_bf16(y[i]) == y16[i];
    expect(same, "bf16 in and out differs from fp32 rounded");
  }
  const std::vector<uint16_t> halves(static_cast<size_t>(s.d), 0x3c00);  // 1.0 in fp16
  const std::vector<float> ones(static_cast<size_t>(s.d), 1.0f);
  const std::vector<float> y = forward(packed, s, ones.data(), NOGEMM_X_FP32, 1, 1);
  const std::vector<uint16_t> y16 = forward(packed, s, halves.data(), NOGEMM_X_FP16, 1, 1);
  bool near = true;
  for (size_t i = 0; i < y.size(); ++i) {
    const int exponent = (y16[i] >> 10) & 31, fraction = y16[i] & 1023;
    const double half = std::ldexp(exponent == 0 ? fraction : fraction + 1024, (exponent == 0 ? 1 : exponent) - 25);
    near = near && std::fabs((y16[i] & 0x8000 ? -half : half) - y[i]) <= 1e-3 * std::fabs(y[i]) + 1e-6;
  }
  expect(near, "fp16 in and out differs from fp32 rounded");
}

// Compressed rows pack to what their decompressed values would give; in int4, steps that fit stay as they are.
void compressed_rows() {
  const Shape s = kShapes[6];
  const Model m = make_model(s, 21);
  const int64_t rows = s.tables << s.bits;
  std::vector<int8_t> steps(static_cast<size_t>(rows * s.d_out));
  std::vector<float> scale(static_cast<size_t>(rows));
  Model wide = m;
  for (int64_t r = 0; r < rows; ++r) {
    scale[r] = 0.01f + 0.001f * static_cast<float>(r % 7);
    for (int64_t c = 0; c < s.d_out; ++c) {
      steps[r * s.d_out + c] = static_cast<int8_t>(c == 0 ? 127 : (r * 31 + c * 17) % 255 - 127);
      wide.rows[r * s.d_out + c] = scale[r] * static_cast<float>(steps[r * s.d_out + c]);
    }
  }
  NogemmLookupSpec spec = m.spec(NOGEMM_LOOKUP_FP32);
  spec.tables_dtype = NOGEMM_LOOKUP_INT8;
  spec.table_rows = steps.data();
  spec.row_scale = scale.data();
  const char* error = nullptr;
  const std::vector<float> x = tokens_of(s, 20, 8);
  for (int64_t mode = 0; mode < 4; ++mode) {
    spec.mode = mode;
    const Buffer packed = pack(spec, &error), other = pack(wide.spec(mode), &error);
    const std::vector<float> a = forward(packed, s, x.data(), NOGEMM_X_FP32, 20, 1);
    const std::vector<float> b = forward(other, s, x.data(), NOGEMM_X_FP32, 20, 1);
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, static_cast<double>(std::fabs(a[i] - b[i])));
    expect(error == nullptr && worst < 1e-4, "int8 rows pack differently from their values");
  }
  for (int8_t& step : steps) step = static_cast<int8_t>(step % 7);  // none is 7: made anew, steps would be other ones
  spec.mode = NOGEMM_LOOKUP_INT8;
  const Buffer bytes = pack(spec, &error);
  spec.mode = NOGEMM_LOOKUP_INT4;
  const Buffer halves = pack(spec, &error);
  expect(forward(bytes, s, x.data(), NOGEMM_X_FP32, 20, 1) == forward(halves, s, x.data(), NOGEMM_X_FP32, 20, 1),
         "steps that fit into int4 are changed");
}

void refused() {
  const Model m = make_model(kShapes[6], 1);
  const NogemmLookupSpec good = m.spec(NOGEMM_LOOKUP_FP32);
  const auto refuses = [](NogemmLookupSpec s) {
    const char* error = nullptr;
    const Buffer packed = pack(s, &error);
    return error != nullptr && nogemm_lookup_pack_size(&s) == -1;
  };
  const auto with = [&good](int64_t NogemmLookupSpec::* field, int64_t value) {
    NogemmLookupSpec s = good;
    s.*field = value;
    return s;
  };
  using S = NogemmLookupSpec;
  expect(refuses(with(&S::bits, 17)) && refuses(with(&S::bits, 0)) && refuses(with(&S::tables, 0)) &&
             refuses(with(&S::block, 48)) && refuses(with(&S::block, 128)) && refuses(with(&S::neighbours, 3)) &&
             refuses(with(&S::rounds, 0)) && refuses(with(&S::repeats, 1)) && refuses(with(&S::mode, 4)) &&
             refuses(with(&S::d, 0)) && refuses(with(&S::d_out, -1)) && refuses(with(&S::score, 3)) &&
             refuses(with(&S::score, 2)) && refuses(with(&S::columns, 65)) && refuses(with(&S::columns, -1)) &&
             refuses(with(&S::columns, 60)) && refuses(with(&S::tables, int64_t{1} << 40)) &&
             refuses(with(&S::width, 0)) && refuses(with(&S::width, 32)) && refuses(with(&S::width, 96)) &&
             refuses(with(&S::width, 192)) && refuses(with(&S::width, 160)) && refuses(with(&S::width, 112)),
         "a bad specification was packed");
  NogemmLookupSpec s = good;
  s.table_rows = nullptr;
  expect(refuses(s), "null tables were packed");

  const char* error = nullptr;
  const Buffer packed = pack(good, &error);
  int64_t d = 0, d_out = 0;
  expect(nogemm_lookup_check(packed.as<void>(), packed.bytes, &d, &d_out) == nullptr && d == 64 && d_out == 200,
         "a good buffer was refused");
  expect(nogemm_lookup_check(packed.as<void>(), packed.bytes - 64, &d, &d_out) != nullptr,
         "a short buffer was accepted");
  expect(nogemm_lookup_check(packed.as<void>(), 8, &d, &d_out) != nullptr, "a stub was accepted");
  expect(nogemm_lookup_check(packed.as<char>() + 8, packed.bytes - 8, &d, &d_out) != nullptr,
         "a shifted buffer was accepted");
  for (int byte : {0, 9, 17, 40, 100}) {
    packed.as<char>()[byte] ^= 4;
    expect(nogemm_lookup_check(packed.as<void>(), packed.bytes, &d, &d_out) != nullptr,
           "a damaged header was accepted");
    packed.as<char>()[byte] ^= 4;
  }
}

// The comparison must be able to fail.
void negative_controls() {
  const Shape s = kShapes[5];
  const Model m = make_model(s, 77);
  const char* error = nullptr;
  for (int64_t mode = 0; mode < 4; ++mode) {
    const Buffer packed = pack(m.spec(mode), &error);
    const std::vector<float> x = tokens_of(s, 20, 4);
    std::vector<float> y = forward(packed, s, x.data(), NOGEMM_X_FP32, 20, 1);
    const double allowed = tolerance(mode).relative;
    expect(compare(m, mode, x.data(), y.data(), 20).error <= allowed, "control: the right output failed");
    const float kept = y[70];
    y[70] += 1.0f;
    expect(!(compare(m, mode, x.data(), y.data(), 20).error <= allowed), "control: a wrong element passed");
    y[70] = NAN;
    expect(!(compare(m, mode, x.data(), y.data(), 20).error <= allowed), "control: a NaN passed");
    y[70] = kept;
    Model other = m;
    other.shape.mix = 0.69;
    other.weight[0] += 2.0f;
    expect(!(compare(other, mode, x.data(), y.data(), 20).error <= allowed), "control: another projection passed");
    other = m;
    for (int64_t c = 0; c < s.d_out; ++c) std::swap(other.rows[c], other.rows[s.d_out + c]);
    for (int64_t r = 0; r < 512 * s.d_out; ++r) other.rows[r] = m.rows[(r + s.d_out) % (512 * s.d_out)];
    expect(!(compare(other, mode, x.data(), y.data(), 20).error <= allowed), "control: shifted rows passed");
  }
}

}  // namespace

int lookup_tests(int first) {
  failures = 0;
  refused();
  same_integer_sums();
  for (int i = first; nogemm_isa_supported(i) != nullptr; ++i) {
    nogemm_set_isa(nogemm_isa_supported(i));
    against_reference();
    broken_tokens();
    other_dtypes();
    compressed_rows();
    negative_controls();
    std::printf("lookup [%s]: %d failures so far\n", nogemm_isa(), failures);
  }
  nogemm_set_isa(nullptr);
  return failures;
}
