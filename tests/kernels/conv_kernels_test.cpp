// The passes around a convolution against plain loops in float64, on every instruction set that this machine
// has: both orders of memory, channels below, at and beyond whole vectors, parameters of a sample each, and
// ranges that end inside a row. Also run under sanitizers.

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/step_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

namespace remnant {
namespace {

using kernels::ConvUnit;
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

class ConvVariant : public testing::TestWithParam<const CpuKernels*> {
 protected:
  const StepKernels& step() const { return kernels::find_step_kernels(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Cpu, ConvVariant, testing::ValuesIn(available()),
                         [](const auto& info) { return std::string(info.param->name); });

template <typename T>
std::vector<T> random(int64_t size, uint32_t seed, double low = -1, double high = 1) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> draw(low, high);
  std::vector<T> x(static_cast<size_t>(size));
  for (T& value : x) value = static_cast<T>(draw(engine));
  return x;
}

constexpr int64_t kSamples = 3, kPositions = 7;

struct Shape {
  bool planes;
  int64_t channels, sets;
  int64_t size() const { return kSamples * kPositions * channels; }
  // Element e's place in the parameters.
  size_t index(int64_t e) const {
    const int64_t sample = e / (kPositions * channels);
    const int64_t channel = planes ? e / kPositions % channels : e % channels;
    return static_cast<size_t>((sets == 1 ? 0 : sample) * channels + channel);
  }
};

std::vector<Shape> shapes() {
  std::vector<Shape> found;
  for (const bool planes : {true, false}) {
    for (const int64_t channels : {1, 3, 4, 8, 15, 16, 17, 32, 48, 64, 71, 128, 130}) {
      for (const int64_t sets : {int64_t{1}, kSamples}) found.push_back({planes, channels, sets});
    }
  }
  return found;
}

// Runs f over the whole in ranges that begin and end anywhere.
template <typename F>
void in_parts(int64_t size, F&& f) {
  const int64_t first = size / 5, second = size / 5 + std::min<int64_t>(size - size / 5, 3);
  f(0, first);
  f(first, second);
  f(second, size);
}

template <typename T>
struct Case {
  explicit Case(const Shape& shape_in) : shape(shape_in) {
    problem.element = sizeof(T) == 8 ? Element::f64 : Element::f32;
    problem.planes = shape.planes;
    problem.channels = shape.channels;
    problem.positions = kPositions;
    problem.sets = shape.sets;
  }
  std::vector<T> parameter(uint32_t seed) const {
    return random<T>(shape.sets * shape.channels, seed, 0.5, 2);
  }
  double tolerance() const { return sizeof(T) == 8 ? 1e-12 : 2e-5; }

  Shape shape;
  ConvUnit problem;
};

template <typename T>
void compare_forward(const StepKernels& step, const Shape& shape, bool with_residual) {
  Case<T> c(shape);
  const auto x = random<T>(shape.size(), 1), residual = random<T>(shape.size(), 2);
  const auto scale = c.parameter(3), shift = c.parameter(4), factor = c.parameter(5), offset = c.parameter(6);
  std::vector<T> u(x.size()), s(x.size()), y(x.size());
  ConvUnit& p = c.problem;
  p.scale = scale.data();
  p.shift = shift.data();
  p.factor = factor.data();
  p.offset = offset.data();
  p.slope = 0.25;
  p.x = x.data();
  if (with_residual) p.residual = residual.data();
  p.u = u.data();
  p.s = s.data();
  p.y = y.data();
  in_parts(shape.size(), [&](int64_t begin, int64_t end) { step.unit_forward(p, begin, end); });
  for (int64_t e = 0; e < shape.size(); ++e) {
    const size_t i = shape.index(e), at = static_cast<size_t>(e);
    const double normal = double{x[at]} * scale[i] + shift[i];
    const double sum = normal * factor[i] + offset[i] + (with_residual ? double{residual[at]} : 0.0);
    ASSERT_NEAR(u[at], normal, c.tolerance()) << shape.channels << " " << e;
    ASSERT_NEAR(s[at], sum, c.tolerance()) << shape.channels << " " << e;
    ASSERT_NEAR(y[at], sum > 0 ? sum : 0.25 * sum, c.tolerance()) << shape.channels << " " << e;
  }
}

TEST_P(ConvVariant, ForwardEqualsItsFormula) {
  for (const Shape& shape : shapes()) {
    for (const bool with_residual : {false, true}) {
      compare_forward<float>(step(), shape, with_residual);
      compare_forward<double>(step(), shape, with_residual);
    }
  }
}

void compare_sums(const std::vector<double>& have, const std::vector<double>& want, double tolerance,
                  const Shape& shape) {
  for (size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(have[i], want[i], tolerance) << shape.channels << " " << i;
}

template <typename T>
void compare_moments(const StepKernels& step, const Shape& shape) {
  Case<T> c(shape);
  const auto x = random<T>(shape.size(), 1, -1, 3), pivot = c.parameter(2);
  const size_t parameters = pivot.size();
  std::vector<double> sums(2 * parameters, 1.0), want(2 * parameters, 1.0);
  c.problem.x = x.data();
  c.problem.shift = pivot.data();
  c.problem.sums = sums.data();
  in_parts(shape.size(), [&](int64_t begin, int64_t end) { step.unit_moments(c.problem, begin, end); });
  for (int64_t e = 0; e < shape.size(); ++e) {
    const double v = double{x[static_cast<size_t>(e)]} - pivot[shape.index(e)];
    want[shape.index(e)] += v;
    want[parameters + shape.index(e)] += v * v;
  }
  compare_sums(sums, want, 10 * c.tolerance(), shape);
}

TEST_P(ConvVariant, MomentsAddUp) {
  for (const Shape& shape : shapes()) {
    compare_moments<float>(step(), shape);
    compare_moments<double>(step(), shape);
  }
}

// kept: the sum and a residual, u alone, or both u and the sum.
template <typename T>
void compare_backward(const StepKernels& step, const Shape& shape, const std::string& kept) {
  Case<T> c(shape);
  const auto grad = random<T>(shape.size(), 1), u = random<T>(shape.size(), 2),
             s = random<T>(shape.size(), 3), residual = random<T>(shape.size(), 4);
  const auto factor = c.parameter(5), offset = c.parameter(6), of_grad = c.parameter(7),
             of_u = c.parameter(8), constant = c.parameter(9);
  const size_t parameters = factor.size();
  ConvUnit& p = c.problem;
  p.grad = grad.data();
  p.slope = 0.25;
  p.residual_slope = 0.5;
  p.factor = factor.data();
  p.offset = offset.data();
  if (kept != "sum") p.u = const_cast<T*>(u.data());
  if (kept != "u") p.s = const_cast<T*>(s.data());
  if (kept == "sum") p.residual = residual.data();
  std::vector<double> sums(2 * parameters), want(2 * parameters);
  p.sums = sums.data();
  std::vector<T> grad_x(grad.size()), grad_residual(grad.size());
  p.of_grad = of_grad.data();
  p.of_u = of_u.data();
  p.constant = constant.data();
  p.grad_x = grad_x.data();
  p.grad_residual = grad_residual.data();
  in_parts(shape.size(), [&](int64_t begin, int64_t end) {
    step.unit_reduce(p, begin, end);
    step.unit_backward(p, begin, end);
  });
  for (int64_t e = 0; e < shape.size(); ++e) {
    const size_t i = shape.index(e), at = static_cast<size_t>(e);
    const double beside = residual[at] > 0 ? double{residual[at]} : 0.5 * double{residual[at]};
    const double normal = kept == "sum" ? s[at] - beside : double{u[at]};
    // Rounded as it is there: its sign decides.
    const T sum = kept == "u" ? static_cast<T>(double{u[at]} * factor[i] + offset[i]) : s[at];
    const double g = sum > 0 ? double{grad[at]} : 0.25 * double{grad[at]};
    want[i] += g;
    want[parameters + i] += g * normal;
    ASSERT_NEAR(grad_residual[at], g, c.tolerance()) << kept << " " << shape.channels << " " << e;
    ASSERT_NEAR(grad_x[at], g * of_grad[i] + of_u[i] * normal + constant[i], c.tolerance())
        << kept << " " << shape.channels << " " << e;
  }
  compare_sums(sums, want, 10 * c.tolerance(), shape);
}

TEST_P(ConvVariant, BackwardEqualsItsFormula) {
  for (const Shape& shape : shapes()) {
    for (const char* kept : {"sum", "u", "both"}) {
      compare_backward<float>(step(), shape, kept);
      compare_backward<double>(step(), shape, kept);
    }
  }
}

// A step in bfloat16, as wide as it is.
double step_of(uint16_t half) { return std::bit_cast<float>(uint32_t{half} << 16); }

// Signed codes read by a formula of their layout: a sign and a level for each side of 0.
template <typename T>
void compare_signed_codes(const StepKernels& step, int64_t n, int64_t bits) {
  auto x = random<T>(n, 1, -2, 5);
  for (size_t e = 0; e < x.size(); e += 5) x[e] = 0;
  std::vector<uint8_t> codes(static_cast<size_t>(kernels::code_bytes(n, bits)));
  std::vector<uint16_t> table(static_cast<size_t>(2 * kernels::code_groups(n)));
  std::vector<T> back(x.size());
  kernels::LowBits p;
  p.element = sizeof(T) == 8 ? Element::f64 : Element::f32;
  p.size = n;
  p.bits = bits;
  p.kinked = true;
  p.x = x.data();
  p.y = back.data();
  p.codes = codes.data();
  p.table = table.data();
  p.seed = {3, 4, 5};
  const int64_t cut = std::min(n, 3 * kernels::kCodeGroup);
  step.encode(p, cut, n);
  step.encode(p, 0, cut);
  step.decode(p, 0, n);
  const int64_t levels = (int64_t{1} << (bits - 1)) - 1;
  for (int64_t first = 0; first < n; first += kernels::kCodeGroup) {
    const int64_t size = std::min(kernels::kCodeGroup, n - first), bytes = (size * bits + 7) / 8;
    const size_t entry = static_cast<size_t>(first / kernels::kCodeGroup * 2);
    const double below = step_of(table[entry]), above = step_of(table[entry + 1]);
    double lowest = 0, highest = 0;
    for (int64_t e = first; e < first + size; ++e) {
      lowest = std::min(lowest, double{x[static_cast<size_t>(e)]});
      highest = std::max(highest, double{x[static_cast<size_t>(e)]});
    }
    // The steps reach the outermost values, and hardly further.
    EXPECT_GE(below * levels, -lowest * (1 - 1e-6));
    EXPECT_LE(below * levels, -lowest * (1 + 0x1p-6) + 1e-30);
    EXPECT_GE(above * levels, highest * (1 - 1e-6));
    EXPECT_LE(above * levels, highest * (1 + 0x1p-6) + 1e-30);
    for (int64_t e = 0; e < size; ++e) {
      const size_t at = static_cast<size_t>(first + e);
      const int64_t code = (codes[static_cast<size_t>(first * bits / 8 + e % bytes)] >> (e / bytes * bits)) &
                           ((int64_t{1} << bits) - 1);
      const bool negative = (code & (levels + 1)) != 0;
      const double level = static_cast<double>(code & levels), side = negative ? below : above;
      EXPECT_EQ(negative, !(x[at] > 0)) << n << " " << bits;
      EXPECT_EQ(std::signbit(back[at]), negative) << n << " " << bits;
      EXPECT_NEAR(back[at], negative ? -level * side : level * side, 1e-6 * side);
      EXPECT_LE(std::abs(back[at] - x[at]), side * 1.0001) << n << " " << bits;
    }
  }
}

TEST_P(ConvVariant, SignedCodesLieWhereTheLayoutSays) {
  for (const int64_t bits : {8, 4, 2}) {
    for (const int64_t n : {1, 2, 7, 31, 63, 64, 65, 127, 128, 129, 300, 1000}) {
      compare_signed_codes<float>(step(), n, bits);
      compare_signed_codes<double>(step(), n, bits);
    }
  }
}

}  // namespace
}  // namespace remnant
