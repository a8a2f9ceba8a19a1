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
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/relu.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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

TEST(Checkpoint, TakesListsOfTensors) {
  const Tensor x = leaf({4, 3}), y = leaf({4, 3});
  const auto function = [](const std::vector<Tensor>& list, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& none, const std::tuple<Tensor, int>& shift) {
    EXPECT_FALSE(none.has_value());
    EXPECT_FALSE(list[1].defined());
    return list[0] * list[2] * *scale + std::get<0>(shift) * std::get<1>(shift);
  };
  const auto gradients = [&](bool with_checkpoint) {
    // Each has a graph of its own, which the loss reaches outside the checkpoint too.
    const Tensor a = x.exp(), b = y.sin(), c = x.cos(), d = y.exp();
    const std::vector<Tensor> list{a, Tensor(), b};
    const std::optional<Tensor> scale = c, none;
    const std::tuple<Tensor, int> shift(d, 3);
    const Tensor out =
        with_checkpoint ? checkpoint(function, list, scale, none, shift) : function(list, scale, none, shift);
    return torch::autograd::grad({(out + a + b + c + d).square().sum()}, {x, y});
  };
  const auto want = gradients(false), have = gradients(true);
  EXPECT_TRUE(at::allclose(have[0], want[0]));
  EXPECT_TRUE(at::allclose(have[1], want[1]));
}

TEST(Checkpoint, GivesEachRunItsOwnArguments) {
  const Tensor x = leaf({4});
  const std::vector<double> list;
  const auto function = [calls = 0](const Tensor& a, std::vector<double>& values) mutable {
    values.push_back(0.0);
    return a * (10.0 * ++calls + static_cast<double>(values.size()));
  };
  const Tensor y = checkpoint(function, x, list);
  EXPECT_TRUE(at::equal(y, x * 11.0));
  for (const bool retain_graph : {true, false}) {
    EXPECT_TRUE(at::equal(torch::autograd::grad({y.sum()}, {x}, {}, retain_graph)[0], at::ones_like(x) * 11));
  }
}

TEST(Checkpoint, HandsUndefinedResultsBack) {
  const Tensor x = leaf({4});
  const auto [none, y, neither] =
      checkpoint([](const Tensor& a) { return std::make_tuple(Tensor(), a * 2, Tensor()); }, x);
  EXPECT_FALSE(none.defined() || neither.defined());
  EXPECT_TRUE(at::equal(torch::autograd::grad({y.sum()}, {x})[0], at::ones_like(x) * 2));
  EXPECT_FALSE(checkpoint([](const Tensor&) { return Tensor(); }, x).defined());
}

TEST(Checkpoint, LeavesWhatItReturnsAsItWas) {
  const Tensor x = leaf({4}), w = leaf({4}), constant = at::ones({4});
  const Tensor middle = x * 1;
  {
    const auto [product, same, other, input] =
        checkpoint([&](const Tensor& a) { return std::make_tuple(a * w, w, constant, a); }, middle);
    EXPECT_TRUE(w.is_leaf());
    EXPECT_FALSE(constant.requires_grad());
    EXPECT_TRUE(at::equal(same, w));
    EXPECT_TRUE(at::equal(other, constant));
    // In place would be the caller's tensors.
    for (const Tensor& each : {same, other, input}) EXPECT_THROW(each.mul_(2), c10::Error);
    (product.sum() + same.sum() * 3 + other.sum() + input.sum() * 5).backward();
  }
  EXPECT_TRUE(at::equal(w.grad(), x + 3));
  EXPECT_TRUE(at::allclose(x.grad(), w + 5));
  EXPECT_TRUE(at::equal(constant, at::ones({4})));
  EXPECT_TRUE(w.is_leaf());
  w.mutable_grad().reset();
  (w * 2).sum().backward();
  EXPECT_TRUE(at::equal(w.grad(), at::ones({4}) * 2));
  // What the function made, and nobody else holds, may change in place; the same twice may not.
  Tensor made = checkpoint([](const Tensor& a) { return a * 3; }, middle);
  made.mul_(2);
  EXPECT_TRUE(at::equal(torch::autograd::grad({made.sum()}, {middle})[0], at::ones({4}) * 6));
  const auto [once, twice] = checkpoint(
      [](const Tensor& a) {
        const Tensor y = a * 3;
        return std::make_tuple(y, y);
      },
      middle);
  EXPECT_THROW(once.mul_(2), c10::Error);
  EXPECT_TRUE(
      at::equal(torch::autograd::grad({once.sum() + twice.sum() * 2}, {middle})[0], at::ones({4}) * 9));
}

TEST(Checkpoint, RefusesACapturedTensorWithAGraph) {
  const Tensor x = leaf({4}), w = leaf({4});
  const Tensor middle = w.exp();
  const Tensor y = checkpoint([&](const Tensor& a) { return a * middle; }, x);
  try {
    (y + middle).sum().backward();
    FAIL() << "expected an error";
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    EXPECT_NE(text.find("(by ExpBackward0)"), std::string::npos) << text;
    EXPECT_NE(text.find("pass it to checkpoint as an argument"), std::string::npos) << text;
  }
  // Within another checkpoint too; but that one's arguments are leaves when it runs again.
  const auto nest = [&](bool of_argument) {
    return checkpoint(
        [of_argument](const Tensor& a) {
          const Tensor inner = of_argument ? a : a.exp();
          return checkpoint([inner](const Tensor& b) { return b * inner; }, a) + inner;
        },
        x);
  };
  EXPECT_THROW(torch::autograd::grad({nest(false).sum()}, {x}), c10::Error);
  EXPECT_TRUE(at::allclose(torch::autograd::grad({nest(true).sum()}, {x})[0], x * 2 + 1));
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

// A bfloat16 region as torch's: casts of weights are cached until its end.
class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
};

TEST(Checkpoint, TrainsUnderAutocastOnTheWeightsOfEachStep) {
  const Tensor x = at::randn({16, 8}), start = at::randn({8, 8});
  const auto losses = [&](bool with_checkpoint) {
    const Tensor w = start.clone().requires_grad_();
    const auto function = [&](const Tensor& a) { return at::linear(a, w); };
    std::vector<double> all;
    for (int step = 0; step < 4; ++step) {
      Tensor loss;
      {
        const Autocast autocast;
        const Tensor y = with_checkpoint ? checkpoint(function, x) : function(x);
        loss = y.to(at::kFloat).square().mean();
      }
      all.push_back(loss.item<double>());
      loss.backward();
      const at::NoGradGuard no_grad;
      w.sub_(w.grad(), 1.0);
      w.mutable_grad().reset();
    }
    return all;
  };
  EXPECT_EQ(losses(true), losses(false));
}

TEST(Checkpoint, RunsAgainWithinTheAutocastRegionOfTheForward) {
  const Tensor x = at::randn({16, 8}), w = leaf({8, 8});
  const auto function = [&](const Tensor& a) { return at::linear(a, w); };
  // The second forward finds the first's cast of the weight in the cache, and so could the second runs.
  const auto gradient = [&](bool with_checkpoint) {
    const Autocast autocast;
    const Tensor hidden = with_checkpoint ? checkpoint(function, x) : function(x);
    const Tensor y = with_checkpoint ? checkpoint(function, hidden) : function(hidden);
    y.to(at::kFloat).square().mean().backward();
    return std::exchange(w.mutable_grad(), Tensor());
  };
  const Tensor want = gradient(false);
  EXPECT_TRUE(at::allclose(gradient(true), want, 2e-2, 2e-2));  // summed in another precision
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
