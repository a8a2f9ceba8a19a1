// A plan knows what its mixture needs on shapes that it has not run.

#include "compare.h"

#include <remnant/memory.h>
#include <remnant/nn/layers.h>
#include <remnant/nn/transformer_stack.h>
#include <remnant/ops/linear_cross_entropy.h>
#include <remnant/plan.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros_like.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/utils.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace remnant {
namespace {

using at::Tensor;

struct Language : torch::nn::Module {
  Language() {
    register_module("tokens", tokens);
    register_module("layers", layers);
    register_module("output", output);
  }
  Tensor loss(int64_t batch, int64_t length) {
    const Tensor x = layers(tokens(at::randint(0, 50, {batch, length})), Tensor(), Tensor(), true);
    return linear_cross_entropy(x.flatten(0, 1), output->weight, output->bias,
                                at::randint(0, 50, {batch * length}));
  }
  torch::nn::Embedding tokens{50, 64};
  nn::TransformerEncoder layers{
      nn::TransformerLayerOptions(64, 4).dim_feedforward(256).batch_first(true).norm_first(true), 4};
  torch::nn::Linear output{64, 50};
};

struct Bytes {
  int64_t kept = 0, peak = 0;
};

Bytes measured(Language& model, int64_t batch, int64_t length) {
  memory::PeakMeter meter;
  Bytes bytes;
  for (int i = 0; i < 2; ++i) {
    meter.reset();
    model.loss(batch, length).backward();
    bytes.peak = meter.peak_bytes();
  }
  const memory::Recorder recorder(&model);
  const Tensor loss = model.loss(batch, length);
  bytes.kept = recorder.report({loss}, {loss}).kept_bytes;
  return bytes;
}

double relative_error(int64_t predicted, int64_t measured) {
  return std::abs(static_cast<double>(predicted) / static_cast<double>(measured) - 1);
}

TEST(Plan, PredictsShapesThatHaveNotRun) {
  torch::manual_seed(1);
  Language model;
  for (Tensor& parameter : model.parameters()) parameter.mutable_grad() = at::zeros_like(parameter).detach();
  constexpr int64_t batch = 16, length = 128;
  const auto loss = [&](int64_t b, int64_t l) { return model.loss(b, l); };
  const int64_t loose = plan(model, loss, batch, length, 1000000000).measured_peak_bytes;
  set_memory(model, LayerMemory::parse("checkpoint"));
  const int64_t lean = measured(model, batch, length).peak;
  ASSERT_LT(lean, loose);
  for (const double share : {0.2, 0.5, 1.0}) {
    const auto budget = lean + static_cast<int64_t>(share * static_cast<double>(loose - lean));
    const Plan planned = plan(model, loss, batch, length, budget);
    EXPECT_EQ(planned.shapes.size(), 6);
    for (const auto& [b, l] : std::vector<std::pair<int64_t, int64_t>>{{14, 128}, {11, 80}, {16, 112}}) {
      const StepBytes predicted = planned.predict(b, l);
      const Bytes bytes = measured(model, b, l);
      const std::string what = planned.table() + std::to_string(b) + " x " + std::to_string(l);
      EXPECT_LE(relative_error(predicted.kept_bytes, bytes.kept), 0.03)
          << predicted.kept_bytes << " kept " << bytes.kept << "\n"
          << what;
      EXPECT_LE(relative_error(predicted.peak_bytes, bytes.peak), 0.03)
          << predicted.peak_bytes << " peak " << bytes.peak << "\n"
          << what;
    }
    // Where it ran, it knows.
    const StepBytes known = planned.predict(batch, length);
    EXPECT_EQ(known.kept_bytes, planned.shapes.back().kept_bytes);
    EXPECT_EQ(known.peak_bytes, planned.shapes.back().peak_bytes);
  }
}

TEST(Plan, MeasuresTheNoiseOfCodes) {
  torch::manual_seed(1);
  Language model;
  for (Tensor& parameter : model.parameters()) parameter.mutable_grad() = at::ones_like(parameter).detach();
  const Tensor random = at::globalContext().defaultGenerator(at::kCPU).get_state();
  const auto loss = [&] { return model.loss(8, 64); };
  const auto noise = [&](int64_t bits) {
    const Plan planned = plan(model, loss, 1000000000, bits);
    std::vector<double> found;
    for (const PlannedLayer& layer : planned.layers) found.push_back(layer.code_variance);
    EXPECT_EQ(planned.table().find("variance"), std::string::npos)
        << planned.table();  // no layer needs codes
    return found;
  };
  const std::vector<double> none = noise(0), at4 = noise(4), at8 = noise(8);
  for (size_t l = 0; l < 4; ++l) {
    EXPECT_EQ(none[l], 0);
    EXPECT_GT(at8[l], 0);
    EXPECT_LT(at4[l], 0.5);
    // Codes of products' inputs are 17 times as fine, those of queries and keys have 8 bits in both.
    EXPECT_LT(at8[l], at4[l] / 4);
  }
  EXPECT_TRUE(at::equal(at::globalContext().defaultGenerator(at::kCPU).get_state(), random));
  for (const Tensor& parameter : model.parameters())
    EXPECT_TRUE(at::equal(parameter.grad(), at::ones_like(parameter)));
}

TEST(Plan, ARefusalNamesABudgetThatFits) {
  torch::manual_seed(1);
  Language model;
  const auto loss = [&] { return model.loss(4, 32); };
  std::string message;
  try {
    plan(model, loss, 10'000);
  } catch (const c10::Error& error) {
    message = error.what_without_backtrace();
  }
  EXPECT_NE(message.find("fits a budget of 10 kB;"), std::string::npos) << message;
  const std::string before = "inputs is ";
  const size_t begin = message.find(before) + before.size(), end = message.find(" kB: raise", begin);
  ASSERT_NE(end, std::string::npos) << message;
  const int64_t smallest = 1000 * std::stoll(message.substr(begin, end - begin));
  EXPECT_LE(plan(model, loss, smallest).measured_peak_bytes, smallest);
}

TEST(Plan, AModelThatOnlyEvaluatesIsRefused) {
  Language model;
  model.eval();
  const auto loss = [&] { return model.loss(4, 32); };
  test::expect_error([&] { plan(model, loss, 1'000'000'000); }, {"eval mode", "train()"});
}

TEST(Plan, PredictsFromShapesAlone) {
  // (3 + 5 b) (7 + 11 l + 2 l^2), which two batches and three lengths determine.
  const auto bytes = [](int64_t b, int64_t l) { return (3 + 5 * b) * (7 + 11 * l + 2 * l * l); };
  Plan planned;
  test::expect_error([&] { planned.predict(1, 1); }, {"made for one shape", "(batch, length)"});
  for (const int64_t b : {4, 8}) {
    for (const int64_t l : {10, 15, 20}) planned.shapes.push_back({b, l, bytes(b, l), 2 * bytes(b, l)});
  }
  for (const int64_t b : {1, 6, 9}) {
    for (const int64_t l : {1, 13, 30}) {
      EXPECT_EQ(planned.predict(b, l).kept_bytes, bytes(b, l));
      EXPECT_EQ(planned.predict(b, l).peak_bytes, 2 * bytes(b, l));
    }
  }
  test::expect_error([&] { planned.predict(0, 5); }, {"should be positive, got 0 and 5"});
  planned.shapes = {{1, 10, 100, 200}, {1, 20, 200, 400}};
  EXPECT_EQ(planned.predict(1, 15).kept_bytes, 150);
  test::expect_error([&] { planned.predict(2, 15); }, {"a batch of 1 alone, got 2"});
}

}  // namespace
}  // namespace remnant
