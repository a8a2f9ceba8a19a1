#include <remnant/memory.h>
#include <remnant/ops/linear_cross_entropy.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>

namespace remnant {
namespace {

void compare(int64_t tokens, int64_t classes, double smoothing, int64_t reduction, bool with_bias,
             at::ScalarType type, double tolerance) {
  const auto options = at::TensorOptions().dtype(type);
  const at::Tensor x = at::randn({tokens, 12}, options).requires_grad_();
  const at::Tensor w = at::randn({classes, 12}, options).requires_grad_();
  const at::Tensor b = at::randn({classes}, options).requires_grad_();
  at::Tensor target = at::randint(0, classes, {tokens});
  if (tokens > 1) target.slice(0, 0, tokens, 5).fill_(-100);
  const std::optional<at::Tensor> bias = with_bias ? std::optional<at::Tensor>(b) : std::nullopt;
  const at::Tensor loss = linear_cross_entropy(x, w, bias, target, -100, smoothing, reduction);
  const at::Tensor expected =
      at::cross_entropy_loss(at::linear(x, w, bias), target, {}, reduction, -100, smoothing);
  EXPECT_TRUE(at::allclose(loss, expected, tolerance, tolerance)) << loss << expected;
  std::vector<at::Tensor> inputs{x, w};
  if (with_bias) inputs.push_back(b);
  // Upstream factors other than 1, of either sign where there are several.
  const at::Tensor factor = at::randn_like(loss) * 3;
  const auto have = torch::autograd::grad({loss}, inputs, {factor});
  const auto want = torch::autograd::grad({expected}, inputs, {factor});
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_TRUE(at::allclose(have[i], want[i], tolerance, tolerance)) << i;
  }
}

TEST(LinearCrossEntropy, EqualsLinearThenCrossEntropy) {
  for (int64_t reduction : {at::Reduction::None, at::Reduction::Mean, at::Reduction::Sum}) {
    for (double smoothing : {0.0, 0.1}) {
      compare(1, 2, smoothing, reduction, true, at::kDouble, 1e-10);
      compare(70, 33, smoothing, reduction, false, at::kDouble, 1e-10);
      // Several chunks, the last one short.
      compare(300, 9001, smoothing, reduction, true, at::kDouble, 1e-10);
      compare(300, 9001, smoothing, reduction, true, at::kFloat, 1e-4);
    }
  }
}

TEST(LinearCrossEntropy, NeverMakesTheWholeLogits) {
  const int64_t tokens = 4096, classes = 8000;
  const at::Tensor x = at::randn({tokens, 16}).requires_grad_();
  const at::Tensor w = at::randn({classes, 16}).requires_grad_();
  const at::Tensor target = at::randint(0, classes, {tokens});
  for (int64_t reduction : {at::Reduction::None, at::Reduction::Mean}) {
    memory::PeakMeter meter;
    linear_cross_entropy(x, w, std::nullopt, target, -100, 0.0, reduction).sum().backward();
    EXPECT_LT(meter.peak_bytes(), tokens * classes * 4 / 8);
  }
}

TEST(LinearCrossEntropy, HoldsTheSmallerOfTwoGradients) {
  const int64_t tokens = 100, features = 64;
  for (const int64_t classes : {5, 63, 64, 200}) {
    const at::Tensor x = at::randn({tokens, features}).requires_grad_();
    const at::Tensor w = at::randn({classes, features}).requires_grad_();
    const at::Tensor loss = linear_cross_entropy(x, w, std::nullopt, at::randint(0, classes, {tokens}));
    EXPECT_EQ(memory::kept_bytes({loss}, {loss, x, w}),
              4 * (tokens * std::min(classes, features) + classes * features));
  }
}

TEST(LinearCrossEntropy, EmptyAndIgnored) {
  const at::Tensor w = at::randn({5, 3});
  EXPECT_TRUE(
      std::isnan(linear_cross_entropy(at::randn({2, 3}), w, std::nullopt, at::ones({2}, at::kLong) * -100)
                     .item<float>()));
  EXPECT_EQ(linear_cross_entropy(at::empty({0, 3}), w, std::nullopt, at::empty({0}, at::kLong), -100, 0.0,
                                 at::Reduction::Sum)
                .item<float>(),
            0.0f);
}

// The loss is NaN, as torch's, and one batch of padding alone leaves the parameters alone.
TEST(LinearCrossEntropy, NoTargetGivesGradientsOfZero) {
  for (const int64_t rows : {0, 2}) {
    for (const int64_t classes : {2, 5}) {
      const at::Tensor x = at::randn({rows, 3}).requires_grad_(),
                       w = at::randn({classes, 3}).requires_grad_(),
                       b = at::randn({classes}).requires_grad_();
      const at::Tensor loss = linear_cross_entropy(x, w, b, at::ones({rows}, at::kLong) * -100);
      EXPECT_TRUE(std::isnan(loss.item<float>()));
      loss.backward();
      for (const at::Tensor& each : {x, w, b}) EXPECT_TRUE(each.grad().eq(0).all().item<bool>());
    }
  }
}

// A GradScaler's factor comes with the backward: what is held until then must not have lost the small
// numbers.
TEST(LinearCrossEntropy, HalfPrecisionKeepsWhatAScaleWillRaise) {
  constexpr int64_t rows = 512, columns = 32, scale = 65536;
  for (const int64_t classes : {16, 64}) {
    const at::Tensor x = at::randn({rows, columns}), w = at::randn({classes, columns}) * 2;
    const at::Tensor target = x.to(at::kHalf).to(at::kFloat).mm(w.to(at::kHalf).to(at::kFloat).t()).argmax(1);
    const auto gradients = [&](at::ScalarType type) {
      const at::Tensor leaf = x.to(at::kHalf).to(type).requires_grad_(),
                       weight = w.to(at::kHalf).to(type).requires_grad_();
      (linear_cross_entropy(leaf, weight, std::nullopt, target) * scale).backward();
      EXPECT_EQ(leaf.grad().scalar_type(), type);
      EXPECT_EQ(weight.grad().scalar_type(), type);
      return leaf.grad().to(at::kDouble);
    };
    const at::Tensor wanted = gradients(at::kDouble), found = gradients(at::kHalf);
    EXPECT_LT((found - wanted).norm().item<double>(), 2e-3 * wanted.norm().item<double>());
    EXPECT_LT(found.eq(0).sum().item<int64_t>(), rows * columns / 20);
  }
}

TEST(LinearCrossEntropy, AnIgnoredRowHasNoGradientWhateverArrives) {
  const at::Tensor x = at::randn({2, 3}).requires_grad_(), w = at::randn({5, 3});
  const at::Tensor target = at::ones({2}, at::kLong);
  target[0] = -100;
  const at::Tensor losses = linear_cross_entropy(x, w, std::nullopt, target, -100, 0.0, at::Reduction::None);
  EXPECT_EQ(losses[0].item<float>(), 0.0f);
  at::Tensor arriving = at::ones({2});
  arriving[0] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor grad = torch::autograd::grad({losses}, {x}, {arriving})[0];
  EXPECT_TRUE((grad[0] == 0).all().item<bool>());
  EXPECT_TRUE(grad[1].isfinite().all().item<bool>());
}

TEST(LinearCrossEntropy, MistakesAreNamed) {
  const at::Tensor x = at::randn({4, 3}), w = at::randn({5, 3});
  const auto error_of = [&](const at::Tensor& target) -> std::string {
    try {
      linear_cross_entropy(x, w, std::nullopt, target);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "";
  };
  EXPECT_NE(error_of(at::ones({4}, at::kLong) * 5).find("target 5 is out of bounds"), std::string::npos);
  EXPECT_NE(error_of(at::ones({3}, at::kLong)).find("target must be [4]"), std::string::npos);
  EXPECT_NE(error_of(at::ones({4})).find("int64"), std::string::npos);
}

TEST(LinearCrossEntropy, NanReachesLossAndGradient) {
  at::Tensor x = at::randn({4, 3});
  x[1][0] = std::numeric_limits<float>::quiet_NaN();
  x.requires_grad_();
  const at::Tensor w = at::randn({5, 3}).requires_grad_();
  const at::Tensor loss = linear_cross_entropy(x, w, std::nullopt, at::ones({4}, at::kLong));
  EXPECT_TRUE(std::isnan(loss.item<float>()));
  loss.backward();
  EXPECT_TRUE(w.grad().isnan().any().item<bool>());
}

}  // namespace
}  // namespace remnant
