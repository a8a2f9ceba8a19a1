// Chains and coupling blocks that are walked back, held against the same layers run by torch.

#include <remnant/memory.h>
#include <remnant/nn/init.h>
#include <remnant/nn/reversible.h>
#include <remnant/ops/conv.h>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <limits>

namespace {

using remnant::nn::ReversibleChain;
using remnant::nn::ReversibleChainOptions;
using torch::Tensor;

double relative(const Tensor& x, const Tensor& y) {
  return (x.detach().to(torch::kDouble) - y.detach().to(torch::kDouble)).norm().item<double>() /
         y.detach().to(torch::kDouble).norm().item<double>();
}

Tensor eager_chain(const ReversibleChain& chain, Tensor x) {
  for (const auto& child : chain->children()) x = child->as<remnant::nn::ReversibleLayerImpl>()->forward(x);
  return x;
}

ReversibleChain copy_of(const ReversibleChain& chain, torch::Dtype dtype) {
  auto copy = ReversibleChain(std::dynamic_pointer_cast<remnant::nn::ReversibleChainImpl>(chain->clone()));
  copy->to(dtype);
  return copy;
}

void expect_same_gradients(const ReversibleChain& chain, const ReversibleChain& other, double tolerance) {
  const auto have = chain->named_parameters(), want = other->named_parameters();
  for (const auto& each : want) {
    EXPECT_LT(relative(have[each.key()].grad(), each.value().grad()), tolerance) << each.key();
  }
}

class Chain : public testing::Test {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    remnant::reset_inversion_counters();
  }
};

TEST_F(Chain, GradientsAndStatisticsAreThoseOfTorch) {
  for (const auto& [dtype, activation] : {std::pair{torch::kFloat, "leaky"},
                                          {torch::kDouble, "leaky"},
                                          {torch::kFloat, "maxmin"},
                                          {torch::kDouble, "maxmin"}}) {
    ReversibleChainOptions options(6, 12);
    options.activation = activation;
    ReversibleChain chain(options);
    chain->to(dtype);
    ReversibleChain reference = copy_of(chain, torch::kDouble);
    const Tensor start = torch::randn({5, 6, 10, 13});
    const Tensor grad = torch::randn_like(start);
    for (int step = 0; step < 2; ++step) {
      const Tensor x = start.to(dtype, false, true).set_requires_grad(true);
      const Tensor wide = start.to(torch::kDouble).set_requires_grad(true);
      chain->zero_grad();
      reference->zero_grad();
      const Tensor y = chain(x), want = eager_chain(reference, wide);
      EXPECT_LT(relative(y, want), 1e-5);
      // A gradient that is expanded, and one that is not contiguous.
      const Tensor g =
          step == 0 ? grad.slice(0, 0, 1).expand_as(grad) : grad.transpose(2, 3).contiguous().transpose(2, 3);
      y.backward(g.to(dtype));
      want.backward(g.to(torch::kDouble));
      EXPECT_LT(relative(x.grad(), wide.grad()), dtype == torch::kFloat ? 1e-3 : 1e-7);
      expect_same_gradients(chain, reference, dtype == torch::kFloat ? 1e-3 : 1e-7);
    }
    const auto buffers = chain->named_buffers();
    for (const auto& each : reference->named_buffers()) {
      EXPECT_LT(relative(buffers[each.key()], each.value()), 1e-5) << each.key();
    }
    EXPECT_EQ(buffers["3.norm.num_batches_tracked"].item<int64_t>(), 2);
    EXPECT_EQ(remnant::inversion_counters().failed, 0);
    chain->eval();
    reference->eval();
    EXPECT_LT(relative(chain(start.to(dtype)), eager_chain(reference, start.to(torch::kDouble))), 1e-5);
    chain->train();
    reference->train();
  }
}

TEST_F(Chain, HasTorchsNames) {
  const ReversibleChain chain(4, 2);
  std::vector<std::string> names;
  for (const auto& each : chain->named_parameters()) names.push_back(each.key());
  for (const auto& each : chain->named_buffers()) names.push_back(each.key());
  const std::vector<std::string> expected{
      "0.conv.weight",       "0.norm.weight",      "0.norm.bias",
      "1.conv.weight",       "1.norm.weight",      "1.norm.bias",
      "0.norm.running_mean", "0.norm.running_var", "0.norm.num_batches_tracked",
      "1.norm.running_mean", "1.norm.running_var", "1.norm.num_batches_tracked"};
  EXPECT_EQ(names, expected);
}

TEST_F(Chain, ASecondStepEqualsAFreshFirst) {
  ReversibleChain chain(6, 8);
  const Tensor x = torch::randn({3, 6, 9, 9});
  const auto step = [&](ReversibleChain& which) {
    which->zero_grad();
    which(x).square().sum().backward();
    std::vector<Tensor> grads;
    for (const Tensor& each : which->parameters()) grads.push_back(each.grad().clone());
    return grads;
  };
  step(chain);
  const auto second = step(chain);
  ReversibleChain fresh = copy_of(chain, torch::kFloat);
  const auto first = step(fresh);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(first[i].equal(second[i])) << i;
}

// Weights that amplify without bound, and a plan that does not know: the check fires, the forward is run
// again.
TEST_F(Chain, AFailedCheckIsMadeGood) {
  ReversibleChainOptions options(6, 10);
  options.slope = 0.05;
  for (const bool anchored : {false, true}) {
    ReversibleChain chain(options);
    torch::NoGradGuard no_grad;
    for (auto& each : chain->named_parameters()) {
      if (each.key().find("conv") != std::string::npos) torch::nn::init::kaiming_normal_(each.value());
    }
    chain->set_plan(anchored ? std::vector<int64_t>{4} : std::vector<int64_t>{}, {});
    ReversibleChain reference = copy_of(chain, torch::kDouble);
    const torch::AutoGradMode grad(true);
    remnant::reset_inversion_counters();
    const Tensor x = torch::randn({4, 6, 12, 12});
    chain(x).square().sum().backward();
    eager_chain(reference, x.to(torch::kDouble)).square().sum().backward();
    expect_same_gradients(chain, reference, 1e-2);
    const auto counters = remnant::inversion_counters();
    EXPECT_GE(counters.failed, 1);
    EXPECT_GE(counters.repeated, 1);
    // All that lies below the first failure, and the layer that failed.
    EXPECT_LE(counters.repeated, anchored ? 14 : 10);
    EXPECT_GT(chain->errors().gt(1e-3).sum().item<int64_t>(), 0);
  }
}

std::string message_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

// Behind autograd's back: `.data` has no version to check.
TEST_F(Chain, AChangedParameterIsFound) {
  for (const char* name : {"3.conv.weight", "3.norm.weight", "5.norm.bias"}) {
    for (const bool anchored : {false, true}) {
      ReversibleChain chain(8, 6);
      chain->set_plan(anchored ? std::vector<int64_t>{4} : std::vector<int64_t>{}, {});
      const Tensor loss = chain(torch::randn({8, 8, 16, 16})).square().sum();
      Tensor changed = chain->named_parameters()[name].data();
      changed.add_(torch::randn_like(changed), 0.3);
      EXPECT_NE(message_of([&] { loss.backward(); }).find("behind autograd's back"), std::string::npos)
          << name;
    }
  }
}

TEST_F(Chain, AChangedInputIsFoundWhereItIsNeeded) {
  ReversibleChain chain(8, 6);
  Tensor x = torch::randn({8, 8, 16, 16});
  Tensor y = chain(x);
  const Tensor loss = y.sum();
  x.data().add_(1);
  y.data().add_(1);
  EXPECT_NE(message_of([&] { loss.backward(); }).find("behind autograd's back"), std::string::npos);
}

TEST_F(Chain, AChangedOutputIsMadeAgain) {
  for (const int64_t layers : {1, 6}) {
    for (const bool anchored : {false, true}) {
      ReversibleChain chain(8, layers);
      chain->set_plan(anchored ? std::vector<int64_t>{layers - 1} : std::vector<int64_t>{}, {});
      ReversibleChain reference = copy_of(chain, torch::kDouble);
      const Tensor x = torch::randn({8, 8, 16, 16}), grad = torch::randn_like(x);
      remnant::reset_inversion_counters();
      Tensor y = chain(x);
      const Tensor loss = (y * grad).sum();
      y.data()[0].add_(1);
      loss.backward();
      (eager_chain(reference, x.to(torch::kDouble)) * grad).sum().backward();
      expect_same_gradients(chain, reference, 1e-3);
      EXPECT_EQ(remnant::inversion_counters().failed, 1);
    }
  }
}

// The statistics of a norm in evaluation are constants, and stay what they are.
TEST_F(Chain, AFrozenNormRunsTheLayersByTorch) {
  ReversibleChain chain(6, 4);
  chain->children()[2]->as<remnant::nn::ReversibleLayerImpl>()->norm->eval();
  ReversibleChain reference = copy_of(chain, torch::kFloat);
  reference->children()[2]->as<remnant::nn::ReversibleLayerImpl>()->norm->eval();
  const Tensor x = torch::randn({4, 6, 8, 8}) * 3 + 1;
  const Tensor y = chain(x), want = eager_chain(reference, x);
  EXPECT_TRUE(y.equal(want));
  y.square().mean().backward();
  want.square().mean().backward();
  expect_same_gradients(chain, reference, 1e-6);
  const auto buffers = chain->named_buffers();
  for (const auto& each : reference->named_buffers()) {
    EXPECT_TRUE(buffers[each.key()].equal(each.value())) << each.key();
  }
  EXPECT_EQ(buffers["2.norm.num_batches_tracked"].item<int64_t>(), 0);
}

TEST_F(Chain, ThePlanSetsAnchorsWhereTheyAreNeeded) {
  ReversibleChainOptions options(6, 10);
  options.slope = 0.05;
  ReversibleChain chain(options);
  {
    const torch::NoGradGuard no_grad;
    for (auto& each : chain->named_parameters()) {
      if (each.key().find("conv") != std::string::npos) torch::nn::init::kaiming_normal_(each.value());
    }
    // A singular layer: nothing but its input will do.
    chain->named_parameters()["5.conv.weight"].select(0, 2).zero_();
  }
  chain(torch::randn({4, 6, 12, 12})).square().sum().backward();
  EXPECT_TRUE(std::count(chain->anchors().begin(), chain->anchors().end(), 5) == 1);
  EXPECT_FALSE(chain->residues().empty());
  EXPECT_EQ(remnant::inversion_counters().failed, 0);
}

TEST_F(Chain, ScalesOfZeroAndShiftsThatHideThem) {
  ReversibleChain chain(6, 5);
  {
    const torch::NoGradGuard no_grad;
    auto parameters = chain->named_parameters();
    parameters["2.norm.weight"][1] = 0;
    parameters["2.norm.weight"][3] = 1e-12;
    parameters["3.norm.bias"][0] = 100;
    parameters["1.norm.weight"].neg_();
  }
  ReversibleChain reference = copy_of(chain, torch::kDouble);
  const Tensor x = torch::randn({4, 6, 8, 8});
  chain(x).square().mean().backward();
  eager_chain(reference, x.to(torch::kDouble)).square().mean().backward();
  EXPECT_EQ(remnant::inversion_counters().failed, 0);
  expect_same_gradients(chain, reference, 1e-3);
}

TEST_F(Chain, NanAndInfReachTheGradients) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    ReversibleChain chain(4, 3);
    Tensor x = torch::randn({2, 4, 6, 6});
    x[1][2][3][3] = bad;
    chain(x).square().sum().backward();
    EXPECT_FALSE(chain->parameters()[0].grad().isfinite().all().item<bool>());
  }
}

int64_t kept_by_chain(int64_t depth, const std::vector<int64_t>& anchors,
                      const std::vector<int64_t>& residues) {
  ReversibleChain chain(8, depth);
  chain->set_plan(anchors, residues);
  const Tensor x = torch::randn({4, 8, 16, 16}).set_requires_grad(true);
  const remnant::memory::Recorder recorder(chain.ptr().get());
  return recorder.report({chain(x).sum()}, {x}).kept_bytes;
}

TEST_F(Chain, KeptBytesAreTheirClosedForm) {
  const int64_t input = 4 * 8 * 16 * 16 * 4, ring = 4 * 8 * (18 * 18 - 16 * 16) * 4;
  const int64_t signs = 4 * 8 * 16 * 16 / 8, statistics = 2 * 8 * 4, sums = 4 * 4 * 4;
  const auto expected = [&](int64_t depth, int64_t anchors, int64_t residues) {
    return input + depth * (signs + statistics + 8) + (depth - 1 - anchors) * (ring + sums) + sums +
           anchors * input + residues * (input / 2 + 8);
  };
  EXPECT_EQ(kept_by_chain(6, {}, {}), expected(6, 0, 0));
  EXPECT_EQ(kept_by_chain(6, {3}, {}), expected(6, 1, 0));
  EXPECT_EQ(kept_by_chain(6, {}, {2, 4}), expected(6, 0, 2));
}

TEST_F(Chain, MistakesAreSentences) {
  EXPECT_THROW(ReversibleChain(4, 0), c10::Error);
  ReversibleChainOptions even(4, 2);
  even.kernel_size = 4;
  EXPECT_THROW(ReversibleChain{even}, c10::Error);
  ReversibleChainOptions odd(7, 2);
  odd.activation = "maxmin";
  EXPECT_NE(message_of([&] { ReversibleChain{odd}; }).find("in pairs, got 7"), std::string::npos);
  for (const double limit : {-1.0, 0.0, std::numeric_limits<double>::quiet_NaN()}) {
    ReversibleChainOptions bad(4, 2);
    bad.limit = limit;
    EXPECT_NE(message_of([&] { ReversibleChain{bad}; }).find("limit and plan_every"), std::string::npos);
  }
  ReversibleChain chain(4, 2);
  EXPECT_THROW(chain(torch::randn({2, 5, 6, 6})), c10::Error);
  for (const int64_t layer : {-1, 2}) {
    EXPECT_NE(message_of([&] { chain->set_plan({}, {layer}); }).find("from 0 to 1"), std::string::npos);
    EXPECT_NE(message_of([&] { chain->set_plan({layer}, {}); }).find("from 0 to 1"), std::string::npos);
  }
  EXPECT_TRUE(chain->anchors().empty());
  const Tensor state = chain->plan_state();
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), 0.5, -2.0}) {
    for (const int64_t place : {0, 1, 4}) {
      Tensor wrong = state.clone();
      wrong[place] = bad;
      EXPECT_NE(message_of([&] { chain->set_plan_state(wrong); }).find("plan_state()"), std::string::npos);
    }
  }
  chain->set_plan_state(state);  // with errors that are NaN
}

// --- coupling --------------------------------------------------------------------------------------

struct BranchImpl : torch::nn::Module {
  BranchImpl(int64_t in, int64_t out, double rate)
      : conv(torch::nn::Conv2dOptions(in, out, 3).padding(1).bias(false)), norm(out), dropout(rate) {
    register_module("conv", conv);
    register_module("norm", norm);
    register_module("dropout", dropout);
  }
  Tensor forward(const Tensor& x) { return torch::relu(dropout(norm(conv(x)))); }
  torch::nn::Conv2d conv;
  torch::nn::BatchNorm2d norm;
  torch::nn::Dropout dropout;
};
TORCH_MODULE(Branch);

torch::nn::AnyModule branch(int64_t in, int64_t out, double dropout) {
  return torch::nn::AnyModule(Branch(in, out, dropout));
}

Tensor eager_coupling(remnant::nn::Coupling& block, const Tensor& x) {
  auto halves = x.chunk(2, 1);
  const auto step = [&](torch::nn::AnyModule& function, const Tensor& from, const Tensor& to) {
    const Tensor made = function.forward<Tensor>(from);
    if (!block->affine()) return to + made;
    const auto parts = made.chunk(2, 1);
    return to * parts[0].tanh().exp() + parts[1];
  };
  const Tensor y1 = step(block->f, halves[1], halves[0]);
  return torch::cat({y1, step(block->g, y1, halves[1])}, 1);
}

class Couplings : public testing::TestWithParam<std::tuple<bool, double>> {};

TEST_P(Couplings, GradientsAndStatisticsAreThoseOfTorch) {
  const auto [affine, dropout] = GetParam();
  torch::manual_seed(3);
  std::vector<remnant::nn::Coupling> blocks;
  for (int i = 0; i < 4; ++i) {
    const int64_t out = affine ? 8 : 4;
    blocks.push_back(affine
                         ? remnant::nn::affine_coupling(branch(4, out, dropout), branch(4, out, dropout))
                         : remnant::nn::additive_coupling(branch(4, out, dropout), branch(4, out, dropout)));
  }
  remnant::nn::ReversibleSequence sequence(blocks);
  sequence->to(torch::kDouble);
  const Tensor start = torch::randn({3, 8, 7, 5}, torch::kDouble);
  const Tensor grad = torch::randn_like(start);
  std::vector<std::vector<Tensor>> results;
  std::vector<Tensor> before;
  for (const Tensor& each : sequence->buffers()) before.push_back(each.clone());
  for (const bool reversible : {true, false}) {
    {
      const torch::NoGradGuard no_grad;
      for (size_t i = 0; i < before.size(); ++i) sequence->buffers()[i].copy_(before[i]);
    }
    torch::manual_seed(5);
    sequence->zero_grad();
    const Tensor x = start.clone().set_requires_grad(true);
    Tensor y = x;
    if (reversible) {
      y = sequence(x);
    } else {
      for (auto& block : blocks) y = eager_coupling(block, y);
    }
    y.backward(grad);
    std::vector<Tensor> found{y.detach(), x.grad()};
    for (const Tensor& each : sequence->parameters()) found.push_back(each.grad().clone());
    for (const Tensor& each : sequence->buffers()) found.push_back(each.clone().to(torch::kDouble));
    results.push_back(found);
  }
  for (size_t i = 0; i < results[0].size(); ++i) EXPECT_LT(relative(results[0][i], results[1][i]), 1e-9) << i;
}

INSTANTIATE_TEST_SUITE_P(All, Couplings, testing::Combine(testing::Bool(), testing::Values(0.0, 0.3)));

// --- coupling in half precision ---

class Autocast {
 public:
  explicit Autocast(bool enabled) : enabled_(enabled) {
    if (!enabled_) return;
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (!enabled_) return;
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool enabled_;
};

remnant::nn::ReversibleSequence sequence_of(int64_t depth, bool affine, double dropout = 0) {
  std::vector<remnant::nn::Coupling> blocks;
  for (int64_t i = 0; i < depth; ++i) {
    const auto half = [&] { return branch(4, affine ? 8 : 4, dropout); };
    auto f = half();
    blocks.push_back(affine ? remnant::nn::affine_coupling(std::move(f), half())
                            : remnant::nn::additive_coupling(std::move(f), half()));
  }
  return remnant::nn::ReversibleSequence(blocks);
}

Tensor eager_sequence(remnant::nn::ReversibleSequence& sequence, Tensor x) {
  for (const auto& child : sequence->children()) {
    remnant::nn::Coupling block(std::dynamic_pointer_cast<remnant::nn::CouplingImpl>(child));
    x = eager_coupling(block, x);
  }
  return x;
}

struct HalfCase {
  torch::Dtype input, weights;
  bool autocast, affine;
  int64_t depth;
  torch::Dtype output;
};

class HalfCouplings : public testing::TestWithParam<HalfCase> {};

// Held against float64: about as near as torch's own in half precision. Below its noise nothing can be told.
TEST_P(HalfCouplings, TrainAsTorchDoes) {
  const HalfCase& c = GetParam();
  torch::manual_seed(3);
  remnant::nn::ReversibleSequence sequence = sequence_of(c.depth, c.affine, 0.2);
  sequence->to(c.weights);
  const Tensor start = torch::randn({4, 8, 12, 12}).to(c.input);
  const Tensor grad = torch::randn({4, 8, 12, 12});
  // Wherever blocks and their input lie in memory, and with sums that outgrow the input by far.
  for (const auto& [scale, last] : {std::pair{1.0, false}, {1.0, true}, {1e-3, false}}) {
    std::vector<std::vector<Tensor>> results;
    for (const int which : {0, 1, 2}) {  // blocks, torch in half, torch in float64
      sequence->zero_grad();
      torch::manual_seed(5);
      const bool wide = which == 2;
      sequence->to(wide ? torch::kDouble : c.weights);
      Tensor x = (start * scale).to(wide ? torch::kDouble : c.input);
      if (last) x = x.contiguous(torch::MemoryFormat::ChannelsLast);
      x.set_requires_grad(true);
      Tensor y;
      {
        const Autocast autocast(c.autocast && !wide);
        y = which == 0 ? sequence(x) : eager_sequence(sequence, x);
      }
      EXPECT_EQ(y.scalar_type(), wide ? torch::kDouble : c.output);
      y.backward(grad.to(y.scalar_type()));
      EXPECT_EQ(x.grad().scalar_type(), x.scalar_type());
      std::vector<Tensor> found{y.detach(), x.grad()};
      std::vector<Tensor> all;
      for (const Tensor& each : sequence->parameters()) {
        all.push_back(each.grad().to(torch::kDouble).reshape(-1));
      }
      found.push_back(torch::cat(all));
      results.push_back(found);
      sequence->to(c.weights);
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
      EXPECT_LT(relative(results[0][i], results[2][i]), 2 * relative(results[1][i], results[2][i]) + 1e-3)
          << i << " " << scale;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, HalfCouplings,
    testing::Values(HalfCase{torch::kFloat, torch::kFloat, true, false, 12, torch::kFloat},
                    HalfCase{torch::kBFloat16, torch::kFloat, true, false, 12, torch::kBFloat16},
                    HalfCase{torch::kBFloat16, torch::kBFloat16, false, false, 12, torch::kBFloat16},
                    HalfCase{torch::kHalf, torch::kHalf, false, false, 3, torch::kHalf},
                    HalfCase{torch::kFloat, torch::kFloat, true, true, 6, torch::kFloat},
                    HalfCase{torch::kBFloat16, torch::kBFloat16, false, true, 6, torch::kBFloat16}));

TEST(HalfCouplingMemory, IsConstantInDepth) {
  for (const int64_t depth : {2, 9}) {
    torch::manual_seed(1);
    remnant::nn::ReversibleSequence sequence = sequence_of(depth, false);
    const Tensor x = torch::randn({2, 8, 12, 12}).set_requires_grad(true);
    const Autocast autocast(true);
    const remnant::memory::Recorder recorder(sequence.ptr().get());
    const Tensor y = sequence(x);
    EXPECT_EQ(recorder.report({y.sum()}, {x}).kept_bytes, 2 * 8 * 12 * 12 * 5 + 2 * 4 * 4);
    // Without gradients the sums are the same to the bit.
    sequence->zero_grad();
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(sequence(x).equal(y));
  }
}

// The optimizer changes weights that autocast has cast in the backward.
TEST(HalfCouplingMemory, TheNextForwardSeesNewWeights) {
  torch::manual_seed(1);
  remnant::nn::ReversibleSequence sequence = sequence_of(1, false);
  const Tensor x = torch::randn({2, 8, 6, 6});
  const auto run = [&] {
    const Autocast autocast(true);
    return sequence(x);
  };
  run().square().sum().backward();
  {
    const torch::NoGradGuard no_grad;
    sequence->parameters()[0].neg_();
  }
  const Tensor y = run();
  at::autocast::clear_cache();
  EXPECT_TRUE(y.equal(run()));
}

// The chain, its plan and its backward are in float32, also where the backward runs within the region.
TEST_F(Chain, StaysInFloat32UnderAutocast) {
  ReversibleChainOptions options(8, 6);
  options.slope = 0.1;
  ReversibleChain chain(options), other(options);
  torch::NoGradGuard no_grad;
  for (size_t i = 0; i < chain->parameters().size(); ++i)
    other->parameters()[i].copy_(chain->parameters()[i]);
  const torch::AutoGradMode grad(true);
  const Tensor x = torch::randn({4, 8, 9, 9});
  chain(x).square().sum().backward();
  {
    const Autocast autocast(true);
    other(x).square().sum().backward();
  }
  EXPECT_EQ(chain->anchors(), other->anchors());
  EXPECT_EQ(chain->residues(), other->residues());
  expect_same_gradients(other, chain, 1e-6);
}

// --- what a coupling's functions depend on ---

struct ScaledImpl : torch::nn::Module {
  explicit ScaledImpl(Tensor by_in) : by(std::move(by_in)) {}
  Tensor forward(const Tensor& x) { return x.tanh() * by; }
  Tensor by;
};
TORCH_MODULE(Scaled);

remnant::nn::Coupling scaled_by(const Tensor& by) {
  return remnant::nn::additive_coupling(torch::nn::AnyModule(Scaled(by)), torch::nn::AnyModule(Scaled(by)));
}

TEST(CouplingCaptures, LeavesGetTheirGradients) {
  torch::manual_seed(1);
  const auto leaf = [&] { return torch::full({3, 1}, 0.7, torch::kDouble).set_requires_grad(true); };
  for (const bool input_needs : {true, false}) {
    const Tensor mine = leaf(), theirs = leaf();
    int calls = 0;
    mine.register_hook([&](const Tensor& grad) {
      ++calls;
      return grad * 2;
    });
    remnant::nn::Coupling block = scaled_by(mine), reference = scaled_by(theirs);
    const Tensor x = torch::randn({2, 6, 5}, torch::kDouble).set_requires_grad(input_needs);
    block(x).square().sum().backward();
    eager_coupling(reference, x).square().sum().backward();
    EXPECT_LT(relative(mine.grad(), 2 * theirs.grad()), 1e-12);
    EXPECT_GE(calls, 1);
  }
}

TEST(CouplingCaptures, AGraphFromOutsideIsRefused) {
  const Tensor leaf = torch::ones({3, 1}).set_requires_grad(true);
  const Tensor x = torch::randn({2, 6, 5}).set_requires_grad(true);
  const Tensor loss = scaled_by(leaf * 2)(x).sum();
  EXPECT_NE(message_of([&] { loss.backward(); }).find("computed outside of it"), std::string::npos);
  scaled_by((leaf * 2).detach())(x).sum().backward();
}

TEST(CouplingCaptures, HooksOfParametersRunOnce) {
  torch::manual_seed(1);
  remnant::nn::ReversibleSequence sequence = sequence_of(2, false);
  const Tensor x = torch::randn({2, 8, 5, 5});
  sequence(x).square().sum().backward();
  const Tensor parameter = sequence->parameters()[0];
  const Tensor plain = parameter.grad().clone();
  sequence->zero_grad();
  int calls = 0;
  parameter.register_hook([&](const Tensor& grad) {
    ++calls;
    return grad * 2;
  });
  sequence(x).square().sum().backward();
  EXPECT_EQ(calls, 1);
  EXPECT_LT(relative(parameter.grad(), 2 * plain), 1e-5);
}

TEST(CouplingMemory, FrozenBlocksKeepNothing) {
  remnant::nn::ReversibleSequence sequence = sequence_of(2, false);
  for (Tensor& each : sequence->parameters()) each.set_requires_grad(false);
  const Tensor x = torch::randn({2, 8, 5, 5});
  EXPECT_FALSE(sequence(x).requires_grad());
  sequence->parameters()[3].set_requires_grad(true);
  EXPECT_TRUE(sequence(x).requires_grad());
}

int64_t kept_by_blocks(int64_t depth) {
  std::vector<remnant::nn::Coupling> blocks;
  for (int64_t i = 0; i < depth; ++i) {
    blocks.push_back(remnant::nn::additive_coupling(branch(4, 4, 0), branch(4, 4, 0)));
  }
  remnant::nn::ReversibleSequence sequence(blocks);
  const Tensor x = torch::randn({2, 8, 12, 12}).set_requires_grad(true);
  const remnant::memory::Recorder recorder(sequence.ptr().get());
  return recorder.report({sequence(x).sum()}, {x}).kept_bytes;
}

TEST(CouplingMemory, IsConstantInDepth) {
  EXPECT_EQ(kept_by_blocks(2), 2 * 8 * 12 * 12 * 4 + 2 * 4 * 4);
  EXPECT_EQ(kept_by_blocks(9), kept_by_blocks(2));
}

struct CountsCallsImpl : torch::nn::Module {
  Tensor forward(const Tensor& x) { return x * static_cast<double>(++calls); }
  int calls = 0;
};
TORCH_MODULE(CountsCalls);

TEST(CouplingMemory, AFunctionThatDoesNotRepeatItselfIsFound) {
  remnant::nn::Coupling block = remnant::nn::additive_coupling(torch::nn::AnyModule(CountsCalls()),
                                                               torch::nn::AnyModule(CountsCalls()));
  const Tensor x = torch::randn({2, 4, 3}).set_requires_grad(true);
  const Tensor y = block(x);
  EXPECT_THROW(y.sum().backward(), c10::Error);
  EXPECT_THROW(block(torch::randn({2, 3, 3})), c10::Error);
}

// --- initialisers ----------------------------------------------------------------------------------

Tensor singular_values(const Tensor& weight, int64_t size) {
  const Tensor a = torch::fft::rfft2(weight.to(torch::kDouble), {{size, size}}).permute({2, 3, 0, 1});
  return torch::linalg_svdvals(a);
}

TEST(Init, DiracOrthogonalKeepsTheSpectrumNearOne) {
  torch::manual_seed(1);
  for (const auto& [out, in] : {std::pair{8, 8}, {16, 8}, {8, 16}}) {
    Tensor weight = torch::empty({out, in, 3, 3});
    remnant::nn::init::dirac_orthogonal_(weight, 0.0);
    EXPECT_LT((singular_values(weight, 10) - 1).abs().max().item<double>(), 1e-6);
    EXPECT_LT(remnant::nn::init::spectrum_penalty(weight).item<double>(), 1e-9);
    remnant::nn::init::dirac_orthogonal_(weight, 0.02);
    EXPECT_GT(singular_values(weight, 10).min().item<double>(), 0.5);
  }
  Tensor grouped = torch::empty({8, 2, 3, 3});
  remnant::nn::init::dirac_orthogonal_(grouped, 0.0, 4);
  for (int64_t g = 0; g < 4; ++g) {
    EXPECT_LT((singular_values(grouped.narrow(0, 2 * g, 2), 8) - 1).abs().max().item<double>(), 1e-6);
  }
  EXPECT_THROW(remnant::nn::init::dirac_orthogonal_(torch::empty({4, 4})), c10::Error);
}

TEST(Init, ThePenaltyIsThatOfTheSpectrumAndMendsIt) {
  torch::manual_seed(1);
  Tensor weight = (torch::randn({6, 4, 3, 3}, torch::kDouble) * 0.2).set_requires_grad(true);
  const int64_t size = 12;  // enough for products of two kernels
  const Tensor a = torch::fft::fft2(weight.detach(), {{size, size}}).permute({2, 3, 0, 1});
  const Tensor gram = torch::matmul(a.mH(), a);
  const Tensor r = torch::diagonal(torch::real(gram), 0, 2, 3).mean();
  const Tensor want =
      (gram - r * torch::eye(4, torch::kDouble)).abs().square().sum({2, 3}).mean() / (r * r * 4);
  EXPECT_NEAR(remnant::nn::init::spectrum_penalty(weight).item<double>(), want.item<double>(), 1e-9);
  const auto worst = [&] {
    const Tensor values = singular_values(weight.detach(), 12);
    return values.min().item<double>() / values.square().mean().sqrt().item<double>();
  };
  const double before = worst();
  torch::optim::SGD optimizer({weight}, 0.05);
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    remnant::nn::init::spectrum_penalty(weight).backward();
    optimizer.step();
  }
  EXPECT_GT(worst(), 2 * before);
  EXPECT_GT(worst(), 0.5);
}

}  // namespace
