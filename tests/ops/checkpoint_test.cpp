#include <remnant/checkpoint.h>
#include <remnant/memory.h>
#include <remnant/ops/attention.h>
#include <remnant/ops/dropout.h>

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/relu.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <stdexcept>
#include <string>
#include <tuple>

namespace remnant {
namespace {

using at::Tensor;

Tensor leaf(at::IntArrayRef shape) { return at::randn(shape).requires_grad_(); }

// Drops with PyTorch's generator and with Remnant's.
Tensor block(const Tensor& x, const Tensor& w) {
  const Tensor hidden = at::dropout(at::relu(at::linear(x, w)), 0.3, true);
  return remnant::dropout(at::linear(hidden, w), 0.2);
}

TEST(Checkpoint, GivesTheSameOutputsAndGradients) {
  const Tensor x = leaf({6, 8}), w = leaf({8, 8});
  torch::manual_seed(1);
  const Tensor want = block(x, w);
  const Tensor after = at::rand({3});
  const auto want_grads = torch::autograd::grad({want.square().sum()}, {x, w});
  torch::manual_seed(1);
  const Tensor have = checkpoint(block, x, w);
  EXPECT_TRUE(at::equal(have, want));
  // Numbers drawn afterwards are those that would have come, also once the backward has drawn again.
  EXPECT_TRUE(at::equal(at::rand({3}), after));
  torch::manual_seed(5);
  const Tensor later = at::rand({3});
  torch::manual_seed(5);
  const auto grads = torch::autograd::grad({have.square().sum()}, {x, w}, {}, /*retain_graph=*/true);
  EXPECT_TRUE(at::equal(at::rand({3}), later));
  EXPECT_TRUE(at::equal(grads[0], want_grads[0]));
  EXPECT_TRUE(at::equal(grads[1], want_grads[1]));
  const auto again = torch::autograd::grad({have.square().sum()}, {x, w});
  EXPECT_TRUE(at::equal(again[0], want_grads[0]));
}

TEST(Checkpoint, ReachesCapturedParameters) {
  const Tensor x = at::randn({6, 8}), w = leaf({8, 8});  // no argument needs a gradient
  torch::manual_seed(2);
  block(x, w).square().sum().backward();
  const Tensor want = w.grad().clone();
  w.mutable_grad().reset();
  torch::manual_seed(2);
  checkpoint([&](const Tensor& input) { return block(input, w); }, x).square().sum().backward();
  EXPECT_TRUE(at::equal(w.grad(), want));
}

TEST(Checkpoint, Nests) {
  const Tensor x = leaf({6, 8}), w = leaf({8, 8});
  torch::manual_seed(3);
  block(block(x, w), w).sum().backward();
  const Tensor want_x = x.grad().clone(), want_w = w.grad().clone();
  x.mutable_grad().reset();
  w.mutable_grad().reset();
  torch::manual_seed(3);
  checkpoint(
      [&](const Tensor& input) {
        return checkpoint([&](const Tensor& inner) { return block(inner, w); },
                          checkpoint([&](const Tensor& inner) { return block(inner, w); }, input));
      },
      x)
      .sum()
      .backward();
  EXPECT_TRUE(at::equal(x.grad(), want_x));
  EXPECT_TRUE(at::allclose(w.grad(), want_w, 1e-4, 1e-5));  // summed in another order
}

TEST(Checkpoint, TakesOtherArgumentsAndGivesSeveralResults) {
  const Tensor x = leaf({4, 3}), none;
  const auto function = [](const Tensor& a, double factor, const Tensor& missing, const std::string& sign) {
    EXPECT_FALSE(missing.defined());
    const Tensor b = a * factor;
    return std::make_tuple(sign == "-" ? -b : b, b.square(), a);
  };
  const auto [first, second, same] = checkpoint(function, x, 3.0, none, std::string("-"));
  EXPECT_TRUE(at::equal(first, x * -3.0));
  EXPECT_TRUE(at::equal(same, x));
  // One result is used alone, the others get no gradient.
  const Tensor g = torch::autograd::grad({second.sum()}, {x})[0];
  EXPECT_TRUE(at::allclose(g, x * 18.0, 1e-5, 1e-6));
  const std::vector<Tensor> list =
      checkpoint([](const Tensor& a) { return std::vector<Tensor>{a + 1, a * 2}; }, x);
  ASSERT_EQ(list.size(), 2u);
  const Tensor both = torch::autograd::grad({list[0].sum() + list[1].sum()}, {x})[0];
  EXPECT_TRUE(at::equal(both, at::ones_like(x) * 3));
}

TEST(Checkpoint, KeepsArgumentsAndRandomStateAlone) {
  const Tensor x = leaf({64, 32}), w = leaf({32, 32});
  const Tensor middle = x * 2;
  const Tensor plain = block(middle, w);
  const int64_t eager = memory::kept_bytes({plain}, {middle, plain});
  const Tensor y = checkpoint(block, middle, w);
  const int64_t state = at::detail::getDefaultCPUGenerator().get_state().nbytes();
  EXPECT_EQ(memory::kept_bytes({y}, {middle, y}), state);
  EXPECT_GT(eager, 3 * 64 * 32 * 4);
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(checkpoint(block, middle, w).requires_grad());
}

TEST(Checkpoint, SeesTheAutocastOfTheForward) {
  const Tensor x = leaf({4, 8}), w = leaf({8, 8});
  std::vector<at::ScalarType> seen;
  const auto function = [&](const Tensor& a) {
    const Tensor y = at::linear(a, w);
    seen.push_back(y.scalar_type());
    return y;
  };
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor y = checkpoint(function, x);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  y.sum().backward();
  EXPECT_EQ(seen, (std::vector<at::ScalarType>{at::kBFloat16, at::kBFloat16}));
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST(Checkpoint, LeavesStatesAloneWhenTheFunctionThrows) {
  const Tensor x = leaf({4});
  int calls = 0;
  const Tensor y = checkpoint(
      [&](const Tensor& a) {
        if (++calls == 2) throw std::runtime_error("second run");
        return at::dropout(a, 0.5, true);
      },
      x);
  torch::manual_seed(4);
  const Tensor want = at::rand({3});
  torch::manual_seed(4);
  EXPECT_THROW(y.sum().backward(), std::runtime_error);
  EXPECT_TRUE(at::equal(at::rand({3}), want));
}

TEST(Checkpoint, RefusesASecondDerivative) {
  const Tensor x = leaf({4});
  const Tensor y = checkpoint([](const Tensor& a) { return a.square(); }, x);
  EXPECT_THROW(torch::autograd::grad({y.sum()}, {x}, {}, true, /*create_graph=*/true), c10::Error);
}

}  // namespace
}  // namespace remnant
