// The torch-free kernels against float64 loops: every instruction set that this machine has, every
// length up to twice the vector width and awkward ones, misaligned rows. Also run under sanitizers.

#include "kernels/cpu/attention_kernels.h"
#include "reference/attention_reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>
#include <string>
#include <tuple>

namespace remnant {
namespace {

using kernels::CpuKernels;

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> found;
  for (const char* name : {"portable", "avx2", "avx512", "amx"}) {
    if (const CpuKernels* k = kernels::find_cpu_kernels(name)) found.push_back(k);
  }
  return found;
}

class Variant : public testing::TestWithParam<const CpuKernels*> {
 protected:
  const CpuKernels& cpu() const { return *GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Cpu, Variant, testing::ValuesIn(available()),
                         [](const auto& info) { return std::string(info.param->name); });

std::vector<int64_t> lengths() {
  std::vector<int64_t> n(34);
  std::iota(n.begin(), n.end(), 1);
  for (int64_t more : {63, 64, 65, 95, 96, 97, 255, 256, 257, 1000}) n.push_back(more);
  return n;
}

// Vectors handed to a kernel at a chosen misalignment.
template <typename T>
struct Shifted {
  std::vector<T> memory;
  T* data;
  explicit Shifted(size_t size, size_t shift) : memory(size + shift), data(memory.data() + shift) {}
};

TEST_P(Variant, PhiloxKnownAnswers) {
  // Published known answers of Philox 4x32-10.
  struct Case {
    uint32_t counter[4], key[2], out[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Case& c : cases) {
    kernels::Seed seed{c.key[0], c.key[1], c.counter[3] >> 1};
    uint16_t out[8];
    cpu().dropout_bits(seed, c.counter[2], c.counter[1], 1, c.counter[0], 1, out);
    for (int w = 0; w < 4; ++w) {
      EXPECT_EQ(out[2 * w], c.out[w] & 0xffff);
      EXPECT_EQ(out[2 * w + 1], c.out[w] >> 16);
    }
  }
}

TEST_P(Variant, RandomBitsDoNotDependOnTheirBlock) {
  const kernels::Seed seed{1, 2, 3};
  std::vector<uint16_t> whole(20 * 7 * 8), part(3 * 2 * 8);
  cpu().dropout_bits(seed, 5, 0, 20, 0, 7, whole.data());
  cpu().dropout_bits(seed, 5, 11, 3, 4, 2, part.data());
  for (int r = 0; r < 3; ++r) {
    for (int e = 0; e < 16; ++e) EXPECT_EQ(part[r * 16 + e], whole[(11 + r) * 56 + 32 + e]);
  }
}

template <typename T>
void check_curve(const CpuKernels& cpu, T tolerance) {
  std::mt19937_64 random(7);
  for (int64_t n : lengths()) {
    for (int64_t m : {1, 2, 5, 20}) {
      for (double spread : {0.1, 1.0, 8.0, 60.0}) {
        for (bool paper_text : {false, true}) {
          const int64_t rows = 3;
          const size_t shift = static_cast<size_t>(n % 3);
          Shifted<T> z(rows * n, shift), p(rows * n, shift), decoded(rows * n, shift);
          std::normal_distribution<double> normal(0, spread);
          for (int64_t e = 0; e < rows * n; ++e) {
            z.data[e] = random() % 5 == 0 && n > 2 ? -std::numeric_limits<T>::infinity()
                                                   : static_cast<T>(normal(random));
          }
          std::vector<uint8_t> codes(rows * kernels::rank_bytes(n));
          std::vector<T> table(rows * kernels::curve_width(n, m));
          std::vector<std::max_align_t> scratch(
              kernels::curve_scratch_bytes<T>(n) / sizeof(std::max_align_t) + 1);
          kernels::CurveRows<T> problem{rows, n, m, paper_text, z.data, p.data, codes.data(), table.data()};
          kernels::CurveRows<T> back = problem;
          back.output = decoded.data;
          if constexpr (std::is_same_v<T, float>) {
            cpu.curve_encode_float(problem, 0, rows, scratch.data());
            cpu.curve_decode_float(back, 0, rows, scratch.data());
          } else {
            cpu.curve_encode_double(problem, 0, rows, scratch.data());
            cpu.curve_decode_double(back, 0, rows, scratch.data());
          }
          for (int64_t i = 0; i < rows; ++i) {
            const std::vector<double> logits(z.data + i * n, z.data + (i + 1) * n);
            const std::vector<double> exact = reference::softmax(logits);
            const std::vector<double> expected = reference::curve(logits, exact, m, paper_text);
            for (int64_t j = 0; j < n; ++j) {
              ASSERT_NEAR(p.data[i * n + j], exact[j], tolerance) << "n " << n << " m " << m;
              ASSERT_NEAR(decoded.data[i * n + j], expected[j], 50 * tolerance)
                  << "n " << n << " m " << m << " spread " << spread << " paper_text " << paper_text << " j "
                  << j;
            }
          }
        }
      }
    }
  }
}

TEST_P(Variant, CurveFollowsThePaperFloat) { check_curve<float>(cpu(), 1e-6f); }
TEST_P(Variant, CurveFollowsThePaperDouble) { check_curve<double>(cpu(), 1e-14); }

enum class Masking { none, causal, window, boolean, boolean_rows, additive };

struct Shape {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
};

// The upper half of a float's bits.
uint16_t bfloat16_bits(double x) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16);
}

// One problem run through a policy's kernels and through the loops. narrow: inputs that bfloat16 holds, and
// handed over as such.
template <typename T>
void check_attention(const CpuKernels& cpu, const Shape& s, Masking masking, kernels::Keep keep,
                     double dropout, int64_t block_rows, int64_t tile_keys, int64_t lanes, double tolerance,
                     bool narrow = false) {
  std::mt19937_64 random(static_cast<uint64_t>(s.queries * 1000 + s.keys));
  std::normal_distribution<double> normal(0, 1);
  reference::Problem ref;
  ref.batch = s.batch;
  ref.heads = s.heads;
  ref.kv_heads = s.kv_heads;
  ref.queries = s.queries;
  ref.keys = s.keys;
  ref.head_dim = s.head_dim;
  ref.value_dim = s.value_dim;
  ref.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  const auto fill = [&](std::vector<double>& to, int64_t size) {
    to.resize(size);
    for (double& x : to) {
      x = static_cast<T>(normal(random));
      if (narrow) x = std::bit_cast<float>(static_cast<uint32_t>(bfloat16_bits(x)) << 16);
    }
  };
  fill(ref.query, s.batch * s.heads * s.queries * s.head_dim);
  fill(ref.key, s.batch * s.kv_heads * s.keys * s.head_dim);
  fill(ref.value, s.batch * s.kv_heads * s.keys * s.value_dim);
  std::vector<double> grad;
  fill(grad, s.batch * s.heads * s.queries * s.value_dim);
  const auto to_t = [](const std::vector<double>& x) { return std::vector<T>(x.begin(), x.end()); };
  const std::vector<T> q = to_t(ref.query), k = to_t(ref.key), v = to_t(ref.value), g = to_t(grad);

  kernels::AttentionForward<T> f;
  f.batch = s.batch;
  f.heads = s.heads;
  f.kv_heads = s.kv_heads;
  f.queries = s.queries;
  f.keys = s.keys;
  f.head_dim = s.head_dim;
  f.value_dim = s.value_dim;
  const auto view = [](auto* data, int64_t heads, int64_t rows, int64_t dim) {
    return kernels::HeadView<std::remove_pointer_t<decltype(data)>>{data, heads * rows * dim, rows * dim,
                                                                    dim};
  };
  f.query = view(q.data(), s.heads, s.queries, s.head_dim);
  f.key = view(k.data(), s.kv_heads, s.keys, s.head_dim);
  f.value = view(v.data(), s.kv_heads, s.keys, s.value_dim);
  const auto halves = [](const std::vector<double>& x) {
    std::vector<uint16_t> bits(x.size());
    std::transform(x.begin(), x.end(), bits.begin(), bfloat16_bits);
    return bits;
  };
  const std::vector<uint16_t> narrow_q = halves(ref.query), narrow_k = halves(ref.key),
                              narrow_v = halves(ref.value), narrow_g = halves(grad);
  if (narrow) {
    f.bfloat16 = true;
    f.query = f.key = f.value = {};
    f.narrow_query = view(narrow_q.data(), s.heads, s.queries, s.head_dim);
    f.narrow_key = view(narrow_k.data(), s.kv_heads, s.keys, s.head_dim);
    f.narrow_value = view(narrow_v.data(), s.kv_heads, s.keys, s.value_dim);
  }
  f.scale = static_cast<T>(ref.scale);
  f.seed = {11, 22, 33};
  f.drop_threshold = kernels::dropout_threshold(dropout);
  f.keep = keep;
  f.m = 3;
  f.bits = 8;
  f.block_rows = std::min(block_rows, (s.queries + 15) / 16 * 16);
  f.tile_keys = keep == kernels::Keep::curve ? (s.keys + 15) / 16 * 16 : tile_keys;
  f.row_head = s.queries;
  f.row_batch = s.heads * s.queries;

  std::vector<uint8_t> allowed(s.batch * s.keys), allowed_rows(s.queries * s.keys);
  std::vector<T> bias(s.queries * s.keys);
  for (auto& x : allowed) x = random() % 4 != 0;
  for (int64_t j = 0; j < s.keys; ++j) allowed[j] = 0;  // batch 0 attends nothing at all
  for (auto& x : allowed_rows) x = random() % 3 != 0;
  for (int64_t j = 0; j < s.keys; ++j) allowed_rows[s.keys * (s.queries / 2) + j] = 0;  // nor does a row
  for (auto& x : bias) x = static_cast<T>(normal(random));
  switch (masking) {
    case Masking::none:
      break;
    case Masking::causal:
      f.right = 0;
      ref.allowed = [](int64_t, int64_t, int64_t i, int64_t j) { return j <= i; };
      break;
    case Masking::window:
      f.left = 3;
      f.right = 2;
      ref.allowed = [](int64_t, int64_t, int64_t i, int64_t j) { return j >= i - 3 && j <= i + 2; };
      break;
    case Masking::boolean:
      f.mask = {kernels::MaskKind::boolean, allowed.data(), s.keys, 0, 0, 1};
      ref.allowed = [&](int64_t b, int64_t, int64_t, int64_t j) { return allowed[b * s.keys + j] != 0; };
      break;
    case Masking::boolean_rows:
      f.mask = {kernels::MaskKind::boolean, allowed_rows.data(), 0, 0, s.keys, 1};
      ref.allowed = [&](int64_t, int64_t, int64_t i, int64_t j) { return allowed_rows[i * s.keys + j] != 0; };
      break;
    case Masking::additive:
      f.mask = {kernels::MaskKind::additive, bias.data(), 0, 0, s.keys, 1};
      ref.bias = [&](int64_t, int64_t, int64_t i, int64_t j) {
        return static_cast<double>(bias[i * s.keys + j]);
      };
      break;
  }
  if (dropout > 0) {
    ref.drop = [&](int64_t b, int64_t h, int64_t i, int64_t j) {
      const auto words = reference::philox({static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i),
                                            static_cast<uint32_t>(b * s.heads + h), 33u << 1},
                                           11, 22);
      const uint32_t bits = words[(j % 8) / 2] >> (16 * (j % 2)) & 0xffff;
      return bits >= f.drop_threshold ? kernels::dropout_keep_scale(f.drop_threshold) : 0.0;
    };
  }

  const int64_t rows = s.batch * s.heads * s.queries;
  std::vector<T> out(rows * s.value_dim, T(-7)), lse(rows);
  std::vector<T> probabilities(keep == kernels::Keep::probabilities ? rows * s.keys : 0, T(-7));
  f.probabilities = probabilities.data();
  f.output = view(out.data(), s.heads, s.queries, s.value_dim);
  f.lse = lse.data();
  f.code_bytes = keep == kernels::Keep::curve ? kernels::rank_bytes(s.keys) : s.keys;
  f.table_width = keep == kernels::Keep::curve ? kernels::curve_width(s.keys, f.m) : 1;
  std::vector<uint8_t> codes(rows * f.code_bytes);
  std::vector<T> table(rows * f.table_width);
  f.codes = codes.data();
  f.table = table.data();
  std::vector<std::max_align_t> scratch(kernels::attention_scratch_bytes<T>(f) / sizeof(std::max_align_t) +
                                        1);
  const int64_t tasks = kernels::forward_tasks<T>(f, nullptr);
  if constexpr (std::is_same_v<T, float>) {
    cpu.forward_float(f, 0, tasks, scratch.data());
  } else {
    cpu.forward_double(f, 0, tasks, scratch.data());
  }
  const std::vector<double> expected = reference::forward(ref);
  for (size_t e = 0; e < out.size(); ++e) ASSERT_NEAR(out[e], expected[e], tolerance) << "output " << e;

  kernels::AttentionBackward<T> b;
  static_cast<kernels::AttentionProblem<T>&>(b) = f;
  b.lanes = lanes;
  b.grad_output = view(g.data(), s.heads, s.queries, s.value_dim);
  if (narrow) {
    b.grad_output = {};
    b.narrow_grad_output = view(narrow_g.data(), s.heads, s.queries, s.value_dim);
  }
  const bool biased = keep == kernels::Keep::curve;
  if (!biased) b.output = view(static_cast<const T*>(out.data()), s.heads, s.queries, s.value_dim);
  const T stale = T(99);  // gradients must not depend on what was there
  std::vector<T> gq(q.size(), stale), gk(k.size(), stale), gv(v.size(), stale);
  b.grad_query = view(gq.data(), s.heads, s.queries, s.head_dim);
  b.grad_key = view(gk.data(), s.kv_heads, s.keys, s.head_dim);
  b.grad_value = view(gv.data(), s.kv_heads, s.keys, s.value_dim);
  for (b.phase = 0; b.phase < lanes; ++b.phase) {
    // Lanes of a phase may run in any order.
    for (int64_t task = b.tasks() - 1; task >= 0; --task) {
      if constexpr (std::is_same_v<T, float>) {
        cpu.backward_float(b, task, task + 1, scratch.data());
      } else {
        cpu.backward_double(b, task, task + 1, scratch.data());
      }
    }
  }
  const auto identity = [](const auto&, const auto& p) { return p; };
  reference::Gradients want =
      biased ? reference::backward(
                   ref, grad,
                   [&](const auto& z, const auto& p) { return reference::curve(z, p, f.m, false); }, false)
             : reference::backward(ref, grad, identity, true);
  // 8 bits: each p is off by less than a step of max(p) / 255 <= 1 / 255.
  const double slack = keep == kernels::Keep::codes ? 0.5 : tolerance * 10;
  const auto compare = [&](const std::vector<T>& have, const std::vector<double>& expect, const char* name) {
    for (size_t e = 0; e < expect.size(); ++e) {
      ASSERT_NEAR(have[e], expect[e], slack * std::max(1.0, std::abs(expect[e]))) << name << " " << e;
    }
  };
  compare(gq, want.query, "grad_query");
  compare(gk, want.key, "grad_key");
  compare(gv, want.value, "grad_value");
}

TEST_P(Variant, AttentionEveryLength) {
  for (int64_t n : lengths()) {
    if (n > 300) continue;
    check_attention<float>(cpu(), {1, 1, 1, 3, n, 5, 7}, Masking::none, kernels::Keep::lse, 0.0, 16, 64, 1,
                           2e-5);
    check_attention<float>(cpu(), {1, 1, 1, n, 9, 8, 3}, Masking::causal, kernels::Keep::lse, 0.3, 64, 16, 1,
                           2e-5);
    check_attention<float>(cpu(), {1, 1, 1, 1, n, 19, n}, Masking::none, kernels::Keep::lse, 0.0, 16, 32, 1,
                           2e-5);
  }
}

TEST_P(Variant, AttentionEveryHeadSize) {
  for (int64_t d : lengths()) {
    if (d > 257) continue;
    check_attention<float>(cpu(), {1, 2, 1, 18, 35, d, d}, Masking::none, kernels::Keep::lse, 0.1, 16, 16, 1,
                           5e-5);
    check_attention<double>(cpu(), {1, 1, 1, 2, 35, d, d}, Masking::boolean, kernels::Keep::lse, 0.0, 16, 16,
                            1, 1e-12);
  }
}

TEST_P(Variant, AttentionEveryPolicyAndMask) {
  for (Masking masking : {Masking::none, Masking::causal, Masking::window, Masking::boolean,
                          Masking::boolean_rows, Masking::additive}) {
    for (kernels::Keep keep :
         {kernels::Keep::lse, kernels::Keep::probabilities, kernels::Keep::curve, kernels::Keep::codes}) {
      for (double dropout : {0.0, 0.25}) {
        for (const Shape& shape :
             {Shape{2, 4, 2, 33, 21, 8, 6}, Shape{2, 1, 1, 17, 40, 4, 16}, Shape{2, 2, 1, 50, 90, 5, 20}}) {
          check_attention<float>(cpu(), shape, masking, keep, dropout, 64, 128, 1, 1e-5);
          check_attention<float>(cpu(), shape, masking, keep, dropout, 16, 16, 2, 1e-5);
          check_attention<double>(cpu(), shape, masking, keep, dropout, 32, 32, 3, 1e-12);
        }
      }
    }
  }
}

TEST_P(Variant, Bfloat16InputsGoIntoProductsAsTheyAre) {
  for (int64_t d : lengths()) {
    if (d > 97) continue;
    check_attention<float>(cpu(), {1, 2, 1, 18, 35, d, 98 - d}, Masking::causal, kernels::Keep::lse, 0.1, 16,
                           16, 1, 5e-5, true);
  }
  for (int64_t n : lengths()) {
    if (n > 257) continue;
    check_attention<float>(cpu(), {1, 1, 1, n, 53, 8, 24}, Masking::none, kernels::Keep::lse, 0.0, 64, 128, 1,
                           2e-5, true);
    check_attention<float>(cpu(), {1, 1, 1, 33, n, 40, 8}, Masking::boolean_rows, kernels::Keep::lse, 0.3, 64,
                           32, 2, 2e-5, true);
  }
  for (kernels::Keep keep : {kernels::Keep::probabilities, kernels::Keep::curve, kernels::Keep::codes}) {
    check_attention<float>(cpu(), {2, 4, 2, 50, 90, 8, 6}, Masking::additive, keep, 0.25, 64, 128, 1, 2e-5,
                           true);
  }
}

TEST_P(Variant, NanReachesOutputAndGradients) {
  for (kernels::Keep keep : {kernels::Keep::lse, kernels::Keep::curve, kernels::Keep::codes}) {
    const int64_t n = 12, d = 4;
    std::vector<float> q(n * d, 0.5f), k(n * d, 0.25f), v(n * d, 1.0f), out(n * d), g(n * d, 1.0f);
    q[0] = std::numeric_limits<float>::quiet_NaN();
    kernels::AttentionForward<float> f;
    f.batch = f.heads = f.kv_heads = 1;
    f.queries = f.keys = n;
    f.head_dim = f.value_dim = d;
    f.query = f.key = f.value = {q.data(), n * d, n * d, d};
    f.key.data = k.data();
    f.value.data = v.data();
    f.output = {out.data(), n * d, n * d, d};
    f.keep = keep;
    f.m = 2;
    f.bits = 4;
    f.row_head = f.row_batch = n;
    kernels::choose_tiles<float>(f);
    std::vector<float> lse(n), table(n * 8);
    std::vector<uint8_t> codes(n * n);
    f.lse = lse.data();
    f.codes = codes.data();
    f.code_bytes = keep == kernels::Keep::curve ? kernels::rank_bytes(n) : n / 2;
    f.table = table.data();
    f.table_width = keep == kernels::Keep::curve ? kernels::curve_width(n, 2) : 1;
    std::vector<std::max_align_t> scratch(
        kernels::attention_scratch_bytes<float>(f) / sizeof(std::max_align_t) + 1);
    cpu().forward_float(f, 0, kernels::forward_tasks<float>(f, nullptr), scratch.data());
    EXPECT_TRUE(std::isnan(out[0]));
    EXPECT_FALSE(std::isnan(out[d]));
    kernels::AttentionBackward<float> b;
    static_cast<kernels::AttentionProblem<float>&>(b) = f;
    b.grad_output = {g.data(), n * d, n * d, d};
    std::vector<float> gq(n * d), gk(n * d), gv(n * d);
    b.grad_query = {gq.data(), n * d, n * d, d};
    b.grad_key = {gk.data(), n * d, n * d, d};
    b.grad_value = {gv.data(), n * d, n * d, d};
    cpu().backward_float(b, 0, b.tasks(), scratch.data());
    EXPECT_TRUE(std::isnan(gq[0]));
    EXPECT_TRUE(std::isnan(gk[0]));
    EXPECT_TRUE(std::isnan(gv[0]));
  }
}

TEST(Sizes, RanksTakeCeilLog2Bits) {
  EXPECT_EQ(kernels::rank_bits(1), 0);
  EXPECT_EQ(kernels::rank_bits(2), 1);
  EXPECT_EQ(kernels::rank_bits(40), 6);
  EXPECT_EQ(kernels::rank_bits(256), 8);
  EXPECT_EQ(kernels::rank_bits(257), 9);
  EXPECT_EQ(kernels::rank_bytes(1000), 1250);
  EXPECT_EQ(kernels::curve_width(40, 4), 10);
  EXPECT_EQ(kernels::curve_width(5, 4), 7);
}

TEST(Dispatch, UnknownNameIsRefused) {
  EXPECT_EQ(kernels::find_cpu_kernels("sse9"), nullptr);
  EXPECT_STREQ(kernels::find_cpu_kernels("portable")->name, "portable");
}

}  // namespace
}  // namespace remnant
