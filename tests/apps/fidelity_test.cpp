#include "common/fidelity.h"

#include "common/error.h"
#include "common/random_state.h"

#include <remnant/nn/transformer.h>
#include <remnant/plan.h>

#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/utils.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

namespace remnant::app {
namespace {

using at::Tensor;

/// A layer whose residual dropout follows an attention that has none of its own.
nn::TransformerEncoderLayer layer_without_attention_dropout(const Policy& policy) {
  torch::manual_seed(7);
  nn::TransformerEncoderLayer layer(
      nn::TransformerLayerOptions(16, 2).dim_feedforward(24).dropout(0.5).batch_first(true).policy(policy));
  layer->self_attn->options.dropout(0);
  layer->train();
  return layer;
}

/// Cubes, since the squares of what LayerNorm returns add up to a constant.
Examples examples(nn::TransformerEncoderLayer& layer, const Tensor& x) {
  return {static_cast<double>(x.size(0)), [&layer, x] { layer->forward(x).pow(3).mean().backward(); }};
}

TEST(Fidelity, DropoutAfterAPolicyThatDrawsAnywayIsTheSame) {
  for (const Policy& policy : {Policy::exact(), Policy::recompute(), Policy::curve(20), Policy::sampled(20),
                               Policy::sampled(4), Policy::quantized(8)}) {
    nn::TransformerEncoderLayer layer = layer_without_attention_dropout(policy);
    const Tensor x = at::randn({6, 20, 16});
    const Examples all = examples(layer, x);
    const Tensor before = random_state();
    all.accumulate();
    const Fidelity fidelity = check_fidelity(*layer, before, all, std::nullopt);
    EXPECT_FALSE(fidelity.added_variance.has_value());
    const bool approximate = policy == Policy::sampled(4) || policy == Policy::quantized(8);
    if (approximate) {
      EXPECT_GT(fidelity.gradient_error, 1e-5) << policy.str();
      // Other masks would make it about 1.
      EXPECT_LT(fidelity.gradient_error, 0.3) << policy.str();
    } else {
      EXPECT_LT(fidelity.gradient_error, 1e-5) << policy.str();
    }
    EXPECT_EQ(layer->self_attn->options.policy(), policy);
  }
}

/// Two layers whose products, norms and attention keep codes.
struct Coded : torch::nn::Module {
  Coded(int64_t bits, bool norm_first, double dropout) {
    torch::manual_seed(7);
    for (int i = 0; i < 2; ++i) {
      layers.push_back(register_module("layer" + std::to_string(i),
                                       nn::TransformerEncoderLayer(nn::TransformerLayerOptions(16, 2)
                                                                       .dim_feedforward(24)
                                                                       .dropout(dropout)
                                                                       .batch_first(true)
                                                                       .norm_first(norm_first)
                                                                       .memory(Memory::unbiased(bits)))));
    }
  }
  Examples examples(const Tensor& x) {
    return {static_cast<double>(x.size(0)), [this, x] {
              Tensor y = x;
              for (nn::TransformerEncoderLayer& layer : layers) y = layer->forward(y);
              y.pow(3).mean().backward();
            }};
  }
  std::vector<nn::TransformerEncoderLayer> layers;
};

TEST(Fidelity, CodesAreComparedWithWhatTheyStandFor) {
  const Tensor x = at::randn({6, 20, 16});
  for (const bool norm_first : {false, true}) {
    for (const double dropout : {0.0, 0.5}) {
      double coarser = 0.5;  // other masks would make it about 1
      for (const int64_t bits : {2, 4, 8}) {
        const auto owner = std::make_shared<Coded>(bits, norm_first, dropout);
        Coded& model = *owner;
        const Examples all = model.examples(x);
        const std::array<Examples, 2> halves{model.examples(x.slice(0, 0, 3)),
                                             model.examples(x.slice(0, 3, 6))};
        double error = 0, added = 0;
        constexpr int draws = 20;
        for (int i = 0; i < draws; ++i) {
          model.zero_grad();
          const Tensor before = random_state();
          all.accumulate();
          const Tensor after = random_state(), gradient = model.layers[0]->linear1->weight.grad().clone();
          const Fidelity fidelity = check_fidelity(model, before, all, halves);
          EXPECT_TRUE(at::equal(random_state(), after));
          EXPECT_TRUE(at::equal(model.layers[0]->linear1->weight.grad(), gradient));
          error += fidelity.gradient_error / draws;
          added += *fidelity.added_variance / draws;
        }
        EXPECT_LT(error, coarser) << bits << " bits, dropout " << dropout;
        EXPECT_GT(error, 1e-4);
        EXPECT_GT(added, 0);
        coarser = error / 1.5;
      }
    }
  }
}

TEST(Fidelity, TheNoiseOfCodesIsTheirDistanceFromTheExactGradient) {
  const auto owner = std::make_shared<Coded>(4, true, 0.0);
  Coded& model = *owner;
  const Tensor x = at::randn({6, 20, 16});
  const Examples all = model.examples(x);
  const std::array<Examples, 2> halves{model.examples(x.slice(0, 0, 3)), model.examples(x.slice(0, 3, 6))};
  const auto gradients = [&] {
    std::vector<Tensor> found;
    for (const Tensor& parameter : model.parameters()) found.push_back(parameter.grad().clone());
    return found;
  };
  const auto squares = [](const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]).square().sum().item<double>();
    return sum;
  };
  set_memory(model, LayerMemory::parse("norm=output"));
  std::array<std::vector<Tensor>, 2> parts;
  for (size_t i = 0; i < 2; ++i) {
    model.zero_grad();
    halves.at(i).accumulate();
    parts.at(i) = gradients();
  }
  model.zero_grad();
  all.accumulate();
  const std::vector<Tensor> exact = gradients();
  const double variance = squares(parts[0], parts[1]) / 4;
  set_memory(model, Memory::unbiased(4));
  double added = 0, distance = 0;
  for (int i = 0; i < 60; ++i) {
    model.zero_grad();
    const Tensor before = random_state();
    all.accumulate();
    distance += squares(gradients(), exact) / variance;
    added += *check_fidelity(model, before, all, halves).added_variance;
  }
  EXPECT_NEAR(added / distance, 1, 0.15);
}

TEST(Fidelity, TheErrorsAverageIsTheVarianceThatAnUnbiasedPolicyAdds) {
  nn::TransformerEncoderLayer layer = layer_without_attention_dropout(Policy::sampled(4));
  for (torch::nn::Dropout* dropout : {&layer->dropout, &layer->dropout1, &layer->dropout2}) {
    (*dropout)->options.p(0);
  }
  const Tensor x = at::randn({6, 20, 16});
  const Examples all = examples(layer, x);
  const std::array<Examples, 2> halves{examples(layer, x.slice(0, 0, 3)), examples(layer, x.slice(0, 3, 6))};
  // Attention's own projections are all that sampling disturbs in a single layer.
  const auto gradient = [&] {
    const nn::MultiheadAttention& attention = layer->self_attn;
    return at::cat({attention->in_proj_weight.grad().flatten(), attention->in_proj_bias.grad()});
  };
  constexpr int64_t kDraws = 100;
  Tensor sum, squares;
  double error = 0, added = 0;
  for (int64_t i = 0; i < kDraws; ++i) {
    layer->zero_grad();
    const Tensor before = random_state();
    all.accumulate();
    const Fidelity fidelity = check_fidelity(*layer, before, all, halves);
    added += *fidelity.added_variance / kDraws;
    error += fidelity.gradient_error * fidelity.gradient_error / kDraws;
    const Tensor g = gradient().to(at::kDouble);
    sum = i == 0 ? g : sum + g;
    squares = i == 0 ? g.square() : squares + g.square();
  }
  const double variance = (squares / kDraws - (sum / kDraws).square()).sum().item<double>();
  const auto squared_norm = [&] {
    double total = 0;
    for (const Tensor& parameter : layer->parameters()) {
      total += parameter.grad().to(at::kDouble).square().sum().item<double>();
    }
    return total;
  };
  layer->self_attn->options.policy(Policy::recompute());
  layer->zero_grad();
  all.accumulate();
  const double norm = squared_norm();
  EXPECT_NEAR(error * norm / variance, 1, 0.05);

  const auto flat = [&](const Examples& half) {
    layer->zero_grad();
    half.accumulate();
    std::vector<Tensor> found;
    for (const Tensor& parameter : layer->parameters()) found.push_back(parameter.grad().clone());
    return found;
  };
  const std::vector<Tensor> a = flat(halves[0]), b = flat(halves[1]);
  double distance = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    distance += (a[i] - b[i]).to(at::kDouble).square().sum().item<double>();
  }
  EXPECT_NEAR(added, error * norm / (distance / 4), 1e-3 * added);
}

TEST(Fidelity, APassThatDrawsOtherNumbersIsRefusedAndLeavesNoTrace) {
  nn::TransformerEncoderLayer layer = layer_without_attention_dropout(Policy::curve(2));
  const Tensor x = at::randn({2, 20, 16});
  int64_t passes = 0;
  const Examples all{2, [&] {
                       if (++passes == 2) at::rand({1});
                       layer->forward(x).pow(3).mean().backward();
                     }};
  const Tensor before = random_state();
  all.accumulate();
  const Tensor after = random_state(), gradient = layer->linear1->weight.grad(), copy = gradient.clone();
  EXPECT_THROW(check_fidelity(*layer, before, all, std::nullopt), Error);
  EXPECT_TRUE(at::equal(random_state(), after));
  EXPECT_TRUE(layer->linear1->weight.grad().is_same(gradient));
  EXPECT_TRUE(at::equal(gradient, copy));
  EXPECT_EQ(layer->self_attn->options.policy(), Policy::curve(2));
}

TEST(Fidelity, AModelWithoutAttentionIsRefused) {
  torch::nn::Linear linear(3, 2);
  const Examples all{1, [&] { linear(at::randn({4, 3})).sum().backward(); }};
  EXPECT_THROW(check_fidelity(*linear, random_state(), all, std::nullopt), Error);
}

}  // namespace
}  // namespace remnant::app
