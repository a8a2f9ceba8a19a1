#include <remnant/ops/dropout.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace remnant {
namespace {

TEST(Dropout, RateAndScale) {
  at::manual_seed(1);
  const int64_t size = 1 << 20;
  for (double p : {0.1, 0.5, 0.9}) {
    const at::Tensor y = dropout(at::ones({size}), p);
    const double realised = std::round(p * 65536) / 65536;
    const double zeros = (y == 0).sum().item<double>() / static_cast<double>(size);
    // 5 standard deviations of a binomial.
    EXPECT_NEAR(zeros, realised, 5 * std::sqrt(p * (1 - p) / static_cast<double>(size)));
    EXPECT_FLOAT_EQ(y.max().item<float>(), static_cast<float>(1 / (1 - realised)));
  }
}

TEST(Dropout, NeighboursAreIndependent) {
  at::manual_seed(2);
  const int64_t size = 1 << 20;
  const at::Tensor x = (dropout(at::ones({size}), 0.5) > 0).to(at::kDouble) - 0.5;
  for (int64_t lag : {1, 2, 7, 8, 9, 16, 64, 4096}) {
    const double correlation =
        4 * (x.narrow(0, 0, size - lag) * x.narrow(0, lag, size - lag)).mean().item<double>();
    EXPECT_LT(std::abs(correlation), 5 / std::sqrt(static_cast<double>(size))) << lag;
  }
}

TEST(Dropout, BackwardDrawsTheSameMaskAgain) {
  const at::Tensor x = at::randn({37, 129}).requires_grad_();
  const at::Tensor y = dropout(x, 0.3);
  const at::Tensor gradient = torch::autograd::grad({y.sum()}, {x})[0];
  EXPECT_TRUE(at::equal(gradient == 0, y == 0));
}

TEST(Dropout, DoesNotDependOnThreads) {
  const int threads = at::get_num_threads();
  const at::Tensor x = at::randn({300, 301});
  std::vector<at::Tensor> outputs;
  for (int count : {1, 2}) {
    at::set_num_threads(count);
    at::manual_seed(9);
    outputs.push_back(dropout(x, 0.2));
  }
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(outputs[0], outputs[1]));
}

TEST(Dropout, ZeroIsTheInputItselfAndOneIsRefused) {
  const at::Tensor x = at::randn({5});
  EXPECT_TRUE(dropout(x, 0.0).is_same(x));
  EXPECT_THROW(dropout(x, 1.0), c10::Error);
  EXPECT_THROW(dropout(x, -0.1), c10::Error);
}

TEST(Dropout, NanSurvives) {
  const at::Tensor x = at::ones({1000}) * std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(dropout(x, 0.5).isnan().all().item<bool>());
}

}  // namespace
}  // namespace remnant
