// Kernels of the other ops of a step against plain loops in float64, on every instruction set that this
// machine has, at every length up to twice the vector width and awkward ones. Also run under sanitizers.

#include "kernels/cpu/step_kernels.h"
#include "kernels/cpu/attention_kernels.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace remnant {
namespace {

using kernels::CpuKernels;
using kernels::Element;
using kernels::StepKernels;

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> found;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (const CpuKernels* k = kernels::find_cpu_kernels(name)) found.push_back(k);
  }
  return found;
}

class StepVariant : public testing::TestWithParam<const CpuKernels*> {
 protected:
  const CpuKernels& cpu() const { return *GetParam(); }
  const StepKernels& step() const { return kernels::find_step_kernels(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Cpu, StepVariant, testing::ValuesIn(available()),
                         [](const auto& info) { return std::string(info.param->name); });

std::vector<int64_t> lengths() {
  std::vector<int64_t> n(34);
  std::iota(n.begin(), n.end(), 1);
  for (int64_t more : {63, 64, 65, 255, 256, 257, 1000}) n.push_back(more);
  return n;
}

template <typename T>
std::vector<T> random(int64_t size, uint32_t seed, double low = -1, double high = 1) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> draw(low, high);
  std::vector<T> x(static_cast<size_t>(size));
  for (T& value : x) value = static_cast<T>(draw(engine));
  return x;
}

// The mask as attention's kernels draw it: a row a chunk.
std::vector<double> mask_of(const CpuKernels& cpu, const kernels::Seed& seed, int64_t threshold,
                            int64_t size) {
  const int64_t chunks = (size + kernels::kFlatChunk - 1) / kernels::kFlatChunk;
  std::vector<uint16_t> bits(static_cast<size_t>(chunks * kernels::kFlatChunk));
  cpu.dropout_bits(seed, 0, 0, chunks, 0, kernels::kFlatChunk / kernels::kDropoutColumns, bits.data());
  std::vector<double> mask(static_cast<size_t>(size));
  for (size_t e = 0; e < mask.size(); ++e) {
    mask[e] = bits[e] >= threshold ? kernels::dropout_keep_scale(threshold) : 0;
  }
  return mask;
}

template <typename T>
void compare_norm(const CpuKernels& cpu, const StepKernels& step, int64_t n, bool center, bool hide) {
  constexpr int64_t rows = 3;
  constexpr Element element = sizeof(T) == 8 ? Element::f64 : Element::f32;
  const double tolerance = sizeof(T) == 8 ? 1e-11 : 2e-4;
  const kernels::Seed seed{11, 12, 13};
  const int64_t threshold = kernels::dropout_threshold(0.25);
  const auto x = random<T>(rows * n, 1), residual = random<T>(rows * n, 2), grad = random<T>(rows * n, 3),
             grad_sum = random<T>(rows * n, 4), bias = random<T>(n, 6);
  auto weight = random<T>(n, 5, 0.5, 1.5);
  std::vector<int64_t> hidden;
  for (int64_t j = 0; hide && j < n; j += 3) {
    weight[j] = 0;
    hidden.push_back(j);
  }
  const auto mask = mask_of(cpu, seed, threshold, rows * n);
  std::vector<T> y(rows * n), sum(rows * n), rstd(rows), aside(rows * hidden.size() + 1);
  std::vector<std::max_align_t> scratch(
      static_cast<size_t>(kernels::norm_scratch_bytes(n)) / sizeof(std::max_align_t) + 1);
  kernels::NormForward f;
  f.element = element;
  f.columns = n;
  f.center = center;
  f.eps = 0.1;  // no row of equal values is divided by 0
  f.x = x.data();
  f.residual = residual.data();
  f.weight = weight.data();
  f.bias = bias.data();
  f.drop_threshold = threshold;
  f.seed = seed;
  f.y = y.data();
  f.sum = sum.data();
  f.rstd = rstd.data();
  f.aside_columns = hidden.data();
  f.aside_count = static_cast<int64_t>(hidden.size());
  f.aside = hidden.empty() ? nullptr : aside.data();
  step.norm_forward(f, 0, 2, scratch.data());
  step.norm_forward(f, 2, rows, scratch.data());

  std::vector<T> inverse(n), grad_x(rows * n), grad_residual(rows * n), grad_weight(n), grad_bias(n);
  for (int64_t j = 0; j < n; ++j) inverse[j] = weight[j] == 0 ? T(0) : T(1) / weight[j];
  kernels::NormBackward b;
  b.element = element;
  b.columns = n;
  b.center = center;
  b.grad_y = grad.data();
  b.grad_sum = grad_sum.data();
  b.y = y.data();
  b.rstd = rstd.data();
  b.weight = weight.data();
  b.inverse_weight = inverse.data();
  b.bias = bias.data();
  b.aside_columns = hidden.data();
  b.aside_count = f.aside_count;
  b.aside = f.aside;
  b.drop_threshold = threshold;
  b.seed = seed;
  b.grad_residual = grad_residual.data();
  b.grad_x = grad_x.data();
  b.grad_weight = grad_weight.data();
  b.grad_bias = grad_bias.data();
  step.norm_backward(b, 0, 1, scratch.data());
  step.norm_backward(b, 1, rows, scratch.data());

  std::vector<double> want_weight(n), want_bias(n);
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<double> v(n), normalised(n);
    double mean = 0, square = 0, total = 0, product = 0;
    for (int64_t j = 0; j < n; ++j) {
      v[j] = x[i * n + j] * mask[i * n + j] + residual[i * n + j];
      EXPECT_NEAR(sum[i * n + j], v[j], tolerance);
      if (center) mean += v[j] / static_cast<double>(n);
    }
    for (int64_t j = 0; j < n; ++j) square += (v[j] - mean) * (v[j] - mean) / static_cast<double>(n);
    const double inverse_deviation = 1 / std::sqrt(square + 0.1);
    EXPECT_NEAR(rstd[i], inverse_deviation, tolerance);
    for (int64_t j = 0; j < n; ++j) {
      normalised[j] = (v[j] - mean) * inverse_deviation;
      EXPECT_NEAR(y[i * n + j], normalised[j] * weight[j] + bias[j], tolerance);
      const double h = static_cast<double>(grad[i * n + j]) * weight[j];
      total += h / static_cast<double>(n);
      product += h * normalised[j] / static_cast<double>(n);
      want_weight[j] += grad[i * n + j] * normalised[j];
      want_bias[j] += grad[i * n + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      const double h = static_cast<double>(grad[i * n + j]) * weight[j];
      const double want =
          inverse_deviation * (h - (center ? total : 0) - normalised[j] * product) + grad_sum[i * n + j];
      EXPECT_NEAR(grad_residual[i * n + j], want, tolerance) << n;
      EXPECT_NEAR(grad_x[i * n + j], want * mask[i * n + j], tolerance) << n;
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    EXPECT_NEAR(grad_weight[j], want_weight[j], tolerance) << n;
    EXPECT_NEAR(grad_bias[j], want_bias[j], tolerance);
  }
}

TEST_P(StepVariant, NormsEqualTheirFormula) {
  for (int64_t n : lengths()) {
    compare_norm<float>(cpu(), step(), n, true, false);
    compare_norm<double>(cpu(), step(), n, true, true);
    compare_norm<float>(cpu(), step(), n, false, true);
  }
}

TEST_P(StepVariant, DropoutAddAcrossChunks) {
  const kernels::Seed seed{21, 22, 23};
  const int64_t size = 2 * kernels::kFlatChunk + 77;
  const int64_t threshold = kernels::dropout_threshold(0.4);
  const auto x = random<float>(size, 1), residual = random<float>(size, 2);
  const auto mask = mask_of(cpu(), seed, threshold, size);
  std::vector<float> y(static_cast<size_t>(size));
  kernels::DropoutAdd p;
  p.x = x.data();
  p.residual = residual.data();
  p.y = y.data();
  p.seed = seed;
  p.drop_threshold = threshold;
  // Cuts anywhere: inside of a block of 8 and of a chunk.
  const int64_t cuts[] = {0, 1, 13, 4095, 4100, 6000, 8192, size};
  for (size_t c = 0; c + 1 < std::size(cuts); ++c) step().dropout_add(p, cuts[c], cuts[c + 1]);
  for (size_t e = 0; e < y.size(); ++e) EXPECT_NEAR(y[e], residual[e] + x[e] * mask[e], 1e-6) << e;
}

// Every 16-bit pattern goes through x + 0 and comes back as it was; NaN as some NaN.
TEST_P(StepVariant, HalfTypesWidenAndNarrow) {
  std::vector<uint16_t> x(65536), zero(65536), y(65536);
  std::iota(x.begin(), x.end(), uint16_t{0});
  for (Element element : {Element::bf16, Element::f16}) {
    const int mantissa = element == Element::bf16 ? 7 : 10;
    kernels::DropoutAdd p;
    p.element = element;
    p.x = x.data();
    p.y = y.data();
    step().dropout_add(p, 0, 65536);
    const uint16_t exponent = static_cast<uint16_t>((0x7fff >> mantissa) << mantissa);
    for (size_t e = 0; e < x.size(); ++e) {
      const bool nan = (x[e] & 0x7fff) > exponent;
      if (nan) {
        EXPECT_GT(y[e] & 0x7fff, exponent) << e;
      } else {
        EXPECT_EQ(y[e], x[e]) << e;
      }
    }
  }
}

// Leaky ReLU's bits: y, then a gradient of ones.
TEST_P(StepVariant, OneBitSaysWhatPasses) {
  for (int64_t n : lengths()) {
    auto x = random<float>(n, 1);
    x[static_cast<size_t>(n / 2)] = 0;
    std::vector<float> y(x.size()), g(x.size(), 1.0f), gx(x.size());
    std::vector<uint8_t> codes(static_cast<size_t>(kernels::plane_bytes(n, 1)));
    kernels::Activation p;
    p.size = n;
    p.slope = 0.25;
    p.bits = 1;
    p.x = x.data();
    p.y = y.data();
    p.codes = codes.data();
    step().activation_forward(p, 0, n);
    p.grad = g.data();
    p.grad_x = gx.data();
    step().activation_backward(p, 0, n);
    for (int64_t e = 0; e < n; ++e) {
      EXPECT_EQ(y[e], x[e] > 0 ? x[e] : x[e] * 0.25f) << n;
      EXPECT_EQ(gx[e], x[e] > 0 ? 1.0f : 0.25f) << n;
      EXPECT_EQ((codes[static_cast<size_t>(e / 8)] >> (e % 8)) & 1, x[e] > 0 ? 1 : 0) << n;
    }
  }
}

TEST_P(StepVariant, GeluEqualsItsFormula) {
  for (int64_t n : lengths()) {
    const auto x = random<float>(n, 1, -6, 6);
    std::vector<float> y(x.size()), g(x.size(), 1.0f), gx(x.size());
    kernels::Activation p;
    p.kind = kernels::ActivationKind::gelu;
    p.size = n;
    p.x = x.data();
    p.y = y.data();
    step().activation_forward(p, 0, n);
    p.grad = g.data();
    p.grad_x = gx.data();
    step().activation_backward(p, 0, n);
    for (int64_t e = 0; e < n; ++e) {
      const double v = x[e], below = 0.5 * std::erfc(-v / std::sqrt(2.0));
      EXPECT_NEAR(y[e], v * below, 1e-6) << v;
      EXPECT_NEAR(gx[e], below + v * std::exp(-v * v / 2) / std::sqrt(8 * std::atan(1.0)), 1e-6) << v;
    }
  }
}

TEST_P(StepVariant, FewBitsPickTheIntervalsLevel) {
  for (int64_t bits = 2; bits <= 4; ++bits) {
    const int64_t levels = int64_t{1} << bits;
    std::vector<double> bounds, level;
    for (int64_t k = 0; k + 1 < levels; ++k) bounds.push_back(-1.0 + 2.0 * (k + 0.5) / levels);
    for (int64_t k = 0; k < levels; ++k) level.push_back(10.0 + k);
    for (int64_t n : lengths()) {
      auto x = random<float>(n, 1);
      if (n > 70) x[70] = std::numeric_limits<float>::quiet_NaN();
      std::vector<float> y(x.size()), g(x.size(), 2.0f), gx(x.size());
      std::vector<uint8_t> codes(static_cast<size_t>(kernels::plane_bytes(n, bits) + kernels::mark_bytes(n)));
      kernels::Activation p;
      p.kind = kernels::ActivationKind::silu;
      p.size = n;
      p.bits = bits;
      p.bounds = bounds.data();
      p.levels = level.data();
      p.x = x.data();
      p.y = y.data();
      p.codes = codes.data();
      p.marks = codes.data() + kernels::plane_bytes(n, bits);
      const int64_t cut = std::min(n, kernels::kMarkedElements);
      step().activation_forward(p, 0, cut);
      step().activation_forward(p, cut, n);
      p.grad = g.data();
      p.grad_x = gx.data();
      step().activation_backward(p, cut, n);
      step().activation_backward(p, 0, cut);
      for (int64_t e = 0; e < n; ++e) {
        if (n > 70 && e / 64 == 1) {
          EXPECT_TRUE(std::isnan(gx[e]));
          continue;
        }
        int64_t code = 0;
        for (double b : bounds) code += x[e] > static_cast<float>(b) ? 1 : 0;
        EXPECT_EQ(gx[e], 2.0f * static_cast<float>(level[code])) << n << " " << bits;
      }
    }
  }
}

template <typename T>
void compare_codes(const StepKernels& step, int64_t n, int64_t bits) {
  const auto x = random<T>(n, 1, -2, 5);
  std::vector<uint8_t> codes(static_cast<size_t>(kernels::code_bytes(n, bits)));
  std::vector<uint16_t> table(static_cast<size_t>(2 * kernels::code_groups(n)));
  std::vector<T> back(x.size());
  kernels::LowBits p;
  p.element = sizeof(T) == 8 ? Element::f64 : Element::f32;
  p.size = n;
  p.bits = bits;
  p.x = x.data();
  p.codes = codes.data();
  p.table = table.data();
  p.seed = {3, 4, 5};
  const int64_t cut = std::min(n, 3 * kernels::kCodeGroup);
  step.encode(p, cut, n);
  step.encode(p, 0, cut);
  p.y = back.data();
  step.decode(p, 0, n);
  const auto number = [](uint16_t half) {
    return static_cast<double>(std::bit_cast<float>(uint32_t{half} << 16));
  };
  for (int64_t first = 0; first < n; first += kernels::kCodeGroup) {
    const int64_t size = std::min(kernels::kCodeGroup, n - first);
    const int64_t bytes = (size * bits + 7) / 8;
    const double low = number(table[first / 32]), step_size = number(table[first / 32 + 1]);
    for (int64_t e = 0; e < size; ++e) {
      const uint8_t byte = codes[static_cast<size_t>(first * bits / 8 + e % bytes)];
      const int64_t code = (byte >> (e / bytes * bits)) & ((1 << bits) - 1);
      EXPECT_NEAR(back[first + e], low + step_size * static_cast<double>(code), 1e-5);
      EXPECT_LE(std::abs(back[first + e] - x[first + e]), step_size * 1.001) << n << " " << bits;
    }
  }
}

TEST_P(StepVariant, CodesLieWhereTheLayoutSays) {
  for (int64_t bits : {8, 4, 2}) {
    for (int64_t n : lengths()) {
      compare_codes<float>(step(), n, bits);
      compare_codes<double>(step(), n, bits);
    }
  }
}

// --- codes of a hidden layer -------------------------------------------------------------------------

double gelu(double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double gelu_slope(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(8 * std::atan(1.0));
}

// What the weights of x's corners say that decoding gives in the mean, and the least weight.
struct Mean {
  double value = 0, slope = 0, least = 1;
};
template <typename T>
Mean mean_of(const kernels::HiddenGrid<T>& grid, double x) {
  using Grid = kernels::HiddenGrid<T>;
  int64_t arc = grid.far_arc;
  if (x >= Grid::edge) {
    while (x >= grid.far[arc - grid.far_arc + 1]) ++arc;
  } else {
    arc = grid.arc_of[static_cast<int64_t>((std::max(x, -Grid::edge) + Grid::edge) * Grid::places /
                                           (2 * Grid::edge))];
  }
  const double v = gelu(x), d = gelu_slope(x);
  const double first = grid.first[0][arc] * v + grid.first[1][arc] * d + grid.first[2][arc];
  const double last = grid.last[0][arc] * v + grid.last[1][arc] * d + grid.last[2][arc];
  const auto code = static_cast<int64_t>(grid.code[arc]);
  const int64_t behind = code + (x >= Grid::edge ? 1 : 2);
  const double middle = 1 - first - last;
  Mean m;
  m.least = std::min({first, last, middle});
  m.value = first * grid.value[code] + middle * grid.value[code + 1] + last * grid.value[behind];
  m.slope = first * grid.slope[code] + middle * grid.slope[code + 1] + last * grid.slope[behind];
  return m;
}

TEST(HiddenGrid, CornersOfEveryArcHoldTheCurve) {
  for (int64_t bits : {8, 6, 4}) {
    const auto& grid = kernels::hidden_grid<double>(bits);
    EXPECT_TRUE(std::isnan(grid.value[(1 << bits) - 1]));
    for (int64_t code = 0; code + 2 < int64_t{1} << bits; ++code) {
      EXPECT_TRUE(std::isfinite(grid.value[code]) && std::isfinite(grid.slope[code])) << bits << " " << code;
    }
    for (double x = -12; x < 80000; x += x < 12 ? 0.00173 : 17.3) {
      const Mean m = mean_of(grid, x);
      // Some arcs are taken for lines, which lie up to 5e-5 beside them.
      EXPECT_GT(m.least, -5e-4) << bits << " " << x;
      EXPECT_NEAR(m.value, gelu(x), 6e-5 * std::max(1.0, x)) << bits;
      EXPECT_NEAR(m.slope, gelu_slope(x), 6e-5) << bits << " " << x;
    }
  }
}

template <typename T>
void compare_hidden(const CpuKernels& cpu, int64_t n, kernels::HiddenActivation activation, int64_t bits,
                    double dropout) {
  constexpr int64_t rows = 3, first = 2;
  const bool relu = activation == kernels::HiddenActivation::relu;
  const auto product = random<T>(rows * n, 1, -4, 4), bias = random<T>(n, 2), grad = random<T>(rows * n, 3);
  std::vector<T> hidden = product, back(product.size()), grad_back = grad;
  kernels::HiddenRows<T> p;
  p.columns = n;
  p.first_row = first;
  p.activation = activation;
  p.bias = bias.data();
  p.seed = {3, 4, 5};
  p.threshold = kernels::dropout_threshold(dropout);
  p.keep_scale = static_cast<T>(kernels::dropout_keep_scale(p.threshold));
  p.hidden = hidden.data();
  p.bits = kernels::hidden_code_bits(activation, bits);
  p.code_row_bytes = kernels::hidden_row_bytes(activation, p.bits, n);
  std::vector<uint8_t> codes(static_cast<size_t>((first + rows) * p.code_row_bytes), 0xAB);
  p.codes = codes.data();
  if (!relu) p.grid = &kernels::hidden_grid<T>(p.bits);
  if constexpr (sizeof(T) == 8) {
    cpu.hidden_encode_double(p, 0, 1);
    cpu.hidden_encode_double(p, 1, rows);
  } else {
    cpu.hidden_encode_float(p, 0, 1);
    cpu.hidden_encode_float(p, 1, rows);
  }
  p.hidden = back.data();
  p.grad = grad_back.data();
  p.bias = nullptr;
  if constexpr (sizeof(T) == 8) {
    cpu.hidden_decode_double(p, 0, rows);
  } else {
    cpu.hidden_decode_float(p, 0, rows);
  }
  for (int64_t i = 0; i < first * p.code_row_bytes; ++i) EXPECT_EQ(codes[i], 0xAB);
  // The widest an arc, or a step, is within (-5, 5).
  const double reach = relu ? 5.0 / ((1 << p.bits) - 2) * 1.01 : (bits == 8 ? 0.5 : bits == 4 ? 1.3 : 3.1);
  for (size_t e = 0; e < product.size(); ++e) {
    const double x = product[e] + bias[e % n], factor = dropout > 0 && hidden[e] == 0 ? 0 : p.keep_scale;
    const double value = relu ? std::max(x, 0.0) : gelu(x), slope = relu ? (x > 0 ? 1 : 0) : gelu_slope(x);
    if (!relu || x > 0) {
      EXPECT_NEAR(hidden[e], value * factor, 2e-6 * 5) << n << " " << e;
    }
    EXPECT_NEAR(back[e], value * factor, reach * p.keep_scale) << n << " " << bits << " " << e;
    EXPECT_NEAR(grad_back[e], grad[e] * slope * factor, (relu ? 1e-5 : 0.6) * p.keep_scale)
        << n << " " << bits << " " << e;
    if (factor == 0) {
      EXPECT_EQ(back[e], 0) << n << " " << e;
    }
  }
}

TEST_P(StepVariant, HiddenCodesGiveBackWhatIsNear) {
  for (int64_t n : lengths()) {
    for (int64_t bits : {8, 4, 2}) {
      for (const auto activation : {kernels::HiddenActivation::relu, kernels::HiddenActivation::gelu}) {
        compare_hidden<float>(cpu(), n, activation, bits, n % 2 == 0 ? 0.25 : 0.0);
        compare_hidden<double>(cpu(), n, activation, bits, n % 2 == 0 ? 0.25 : 0.0);
      }
    }
  }
}

}  // namespace
}  // namespace remnant
