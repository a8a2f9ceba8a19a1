// Settings: what layers keep changes their bytes and nothing else.

#include <remnant/memory.h>
#include <remnant/nn/layers.h>
#include <remnant/nn/transformer.h>
#include <remnant/plan.h>
#include <remnant/setting.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/utils.h>

#include <cmath>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace remnant {
namespace {

using at::Tensor;

std::string message(const std::function<void()>& run) {
  try {
    run();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(Memory, IsReadAndWritten) {
  for (const char* text : {"eager", "exact", "unbiased:bits=4", "unbiased:bits=8", "budget=60MB",
                           "budget=1500kB,bits=4", "budget=1500kB", "budget=7B", "budget=2GB"}) {
    EXPECT_EQ(Memory::parse(text).str(), text);
  }
  EXPECT_EQ(Memory::parse("budget=0.5GB").bytes, 500000000);
  EXPECT_EQ(Memory::parse("budget=1.5KiB").bytes, 1536);
  EXPECT_NE(message([] { Memory::parse("exakt"); }).find("did you mean 'exact'"), std::string::npos);
  EXPECT_NE(message([] { Memory::parse("budget=60"); }).find("as in budget=60MB, got '60'"),
            std::string::npos);
  EXPECT_NE(message([] { Memory::parse("unbiased:bits=3"); }).find("8, 4 or 2 bits"), std::string::npos);
  EXPECT_NE(message([] { Memory::parse("unbiassed"); }).find("did you mean 'unbiased:bits=4'"),
            std::string::npos);
  EXPECT_NE(message([] { Memory::parse("unbiased"); }).find("did you mean 'unbiased:bits=4'"),
            std::string::npos);
  EXPECT_NE(message([] { Memory::parse("budgt"); }).find("did you mean 'budget=60MB'"), std::string::npos);
  EXPECT_NE(message([] { Memory::unbiased(5); }).find("got 5"), std::string::npos);
  EXPECT_NE(message([] { Memory::parse("budget=-1MB"); }).find("at least 1 B"), std::string::npos);
  for (const char* text :
       {"budget=60MB,", "budget=60MB,bits=3", "budget=60MB,bit=4", "budget=60MB,bits=44"}) {
    EXPECT_NE(message([&] { Memory::parse(text); }).find("as in budget=60MB,bits=4, got"), std::string::npos)
        << text;
  }
  EXPECT_NE(message([] { LayerMemory{Memory::budget(10)}; }).find("remnant::plan"), std::string::npos);
}

TEST(LayerMemory, IsReadAndWritten) {
  for (const char* text :
       {"attention=input,hidden=recompute,dropout=seed,norm=output", "checkpoint",
        "attention=projections,hidden=keep,dropout=noise,norm=input",
        "attention=projections,hidden=keep,dropout=seed,norm=output,bits=4",
        "attention=input,hidden=keep,dropout=seed,norm=output,policy=curve:m=4,paper_text"}) {
    EXPECT_EQ(LayerMemory::parse(text).str(), text);
  }
  EXPECT_EQ(LayerMemory::parse("exact"), LayerMemory(Memory::exact()));
  EXPECT_EQ(LayerMemory::parse("norm=output").hidden, true);
  EXPECT_EQ(LayerMemory::parse("unbiased:bits=2"), LayerMemory(Memory::unbiased(2)));
  EXPECT_NE(message([] { LayerMemory::parse("norm=output,bits=5"); }).find("0, 2, 4 or 8, got '5'"),
            std::string::npos);
  EXPECT_NE(message([] { LayerMemory::parse("hidden=recompute,norm=output,bits=4"); }).find("hidden=keep"),
            std::string::npos);
  EXPECT_NE(message([] { LayerMemory::parse("attention=inptu"); }).find("did you mean 'input'"),
            std::string::npos);
  EXPECT_NE(message([] { LayerMemory::parse("hiden=keep"); }).find("did you mean 'hidden'"),
            std::string::npos);
  EXPECT_NE(message([] { LayerMemory::parse("hidden=maybe"); }).find("recompute or keep"), std::string::npos);
}

TEST(LayerMemory, TakesAPolicyOfAttention) {
  for (const char* text :
       {"recompute", "curve:m=4", "curve:m=4,paper_text", "quantized:bits=4", "sampled:m=128", "top:m=32"}) {
    LayerMemory want = Memory::exact();
    want.policy = Policy::parse(text);
    EXPECT_EQ(LayerMemory::parse(text), want) << text;
    EXPECT_EQ(LayerMemory::parse(want.str()), want) << want.str();
  }
  EXPECT_EQ(LayerMemory::parse("exact"), LayerMemory(Memory::exact()));
  EXPECT_NE(message([] { LayerMemory::parse("curv:m=4"); }).find("did you mean 'curve'"), std::string::npos);
  EXPECT_NE(message([] { LayerMemory::parse("attention=eager,policy=top:m=2"); }).find("takes no policy"),
            std::string::npos);
  EXPECT_NE(message([] { LayerMemory::parse("norm=output,bits=4,policy=top:m=2"); }).find("no policy"),
            std::string::npos);
}

nn::TransformerLayerOptions options(bool norm_first, double dropout) {
  return nn::TransformerLayerOptions(32, 4)
      .dim_feedforward(80)
      .norm_first(norm_first)
      .activation(norm_first ? nn::Activation::gelu : nn::Activation::relu)
      .dropout(dropout)
      .batch_first(true);
}

/// Two encoder layers and a decoder layer that attends what they give.
struct Model : torch::nn::Module {
  explicit Model(const nn::TransformerLayerOptions& layer) {
    encoder = register_module("encoder", torch::nn::ModuleList());
    encoder->push_back(nn::TransformerEncoderLayer(layer));
    encoder->push_back(nn::TransformerEncoderLayer(layer));
    decoder = register_module("decoder", nn::TransformerDecoderLayer(layer));
  }
  Tensor forward(const Tensor& source, const Tensor& padding, const Tensor& target) {
    Tensor x = source;
    for (const auto& layer : *encoder) {
      x = layer->as<nn::TransformerEncoderLayer>()->forward(x, {}, padding);
    }
    return decoder->forward(target, x, {}, {}, {}, padding, /*tgt_is_causal=*/true);
  }
  torch::nn::ModuleList encoder = nullptr;
  nn::TransformerDecoderLayer decoder = nullptr;
};

struct Inputs {
  Tensor source = at::randn({3, 17, 32}), target = at::randn({3, 11, 32});
  Tensor padding = at::rand({3, 17}).gt(0.7);
};

TEST(SetMemory, APolicyIsThatOfTheLayersAttention) {
  Model model(options(true, 0.0).policy(Policy::top(3)));
  auto& layer = *model.encoder[0]->as<nn::TransformerEncoderLayer>();
  const auto policies = [&] {
    return std::vector<Policy>{layer.self_attn->options.policy(), model.decoder->self_attn->options.policy(),
                               model.decoder->multihead_attn->options.policy()};
  };
  set_memory(model, {{"*", LayerMemory::parse("curve:m=2")}});
  EXPECT_EQ(policies(), std::vector<Policy>(3, Policy::curve(2)));
  const auto given = get_memory(model);
  // The setting takes it away again.
  set_memory(model, Memory::exact());
  EXPECT_EQ(policies(), std::vector<Policy>(3, Policy::top(3)));
  set_memory(model, given);
  EXPECT_EQ(policies(), std::vector<Policy>(3, Policy::curve(2)));
  // From the start.
  nn::TransformerEncoderLayer built(options(true, 0.0).memory(LayerMemory::parse("quantized:bits=8")));
  EXPECT_EQ(built->self_attn->options.policy(), Policy::quantized(8));

  struct Normed : torch::nn::Module {
    nn::LayerNorm norm = register_module("norm", nn::LayerNorm(torch::nn::LayerNormOptions({4})));
    nn::TransformerEncoderLayer layer =
        register_module("layer", nn::TransformerEncoderLayer(options(true, 0.0)));
  } normed;
  EXPECT_NE(message([&] {
              set_memory(normed, {{"norm", LayerMemory::parse("curve:m=2")}});
            }).find("'curve:m=2' is a policy of attention, which no layer has that fits the pattern 'norm'"),
            std::string::npos);
  set_memory(normed, {{"*", LayerMemory::parse("curve:m=2")}});
  EXPECT_EQ(normed.layer->self_attn->options.policy(), Policy::curve(2));
  set_memory(normed, get_memory(normed));
}

std::vector<Tensor> gradients(Model& model, const Inputs& in, Tensor* output = nullptr) {
  for (Tensor& parameter : model.parameters()) parameter.mutable_grad() = Tensor();
  const Tensor y = model.forward(in.source, in.padding, in.target);
  if (output != nullptr) *output = y.detach();
  (y * at::randn(y.sizes(), at::make_generator<at::CPUGeneratorImpl>(5))).sum().backward();
  std::vector<Tensor> grads;
  for (const Tensor& parameter : model.parameters()) grads.push_back(parameter.grad().clone());
  return grads;
}

TEST(SetMemory, APolicysGradientIsThatOfTheModule) {
  const Inputs in;
  torch::manual_seed(4);
  Model model(options(true, 0.0).policy(Policy::curve(2)));
  set_memory(model, Memory::exact());
  const std::vector<Tensor> want = gradients(model, in);
  torch::manual_seed(4);
  Model same(options(true, 0.0));
  set_memory(same, {{"*", LayerMemory::parse("curve:m=2")}});
  const std::vector<Tensor> have = gradients(same, in);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_TRUE(at::equal(have[i], want[i])) << i;
}

class Settings : public testing::TestWithParam<std::tuple<const char*, bool>> {};

TEST_P(Settings, ChangeNoGradient) {
  const auto& [text, norm_first] = GetParam();
  torch::manual_seed(1);
  Model model(options(norm_first, 0.0));
  for (Tensor& parameter : model.parameters()) {
    // Weights and biases of normalisations that differ from 1 and 0, some of them 0.
    if (parameter.dim() == 1)
      parameter.set_data(at::randn(parameter.sizes()) * at::rand(parameter.sizes()).gt(0.1));
  }
  const Inputs in;
  Tensor want_output, output;
  set_memory(model, Memory::eager());
  const std::vector<Tensor> want = gradients(model, in, &want_output);
  set_memory(model, LayerMemory::parse(text));
  const std::vector<Tensor> have = gradients(model, in, &output);
  EXPECT_TRUE(at::allclose(output, want_output, 1e-4, 1e-5));
  const std::vector<std::string> names = model.named_parameters().keys();
  for (size_t i = 0; i < want.size(); ++i) {
    const double scale = want[i].abs().max().item<double>();
    EXPECT_LT((have[i] - want[i]).abs().max().item<double>(), 2e-5 * scale + 1e-6) << names[i];
  }
  // And the model evaluates as before.
  model.eval();
  const at::NoGradGuard no_grad;
  const Tensor evaluated = model.forward(in.source, in.padding, in.target);
  set_memory(model, Memory::eager());
  EXPECT_TRUE(at::allclose(model.forward(in.source, in.padding, in.target), evaluated, 1e-4, 1e-5));
}

Tensor flat_gradient(Model& model, const Inputs& in) {
  std::vector<Tensor> grads = gradients(model, in);
  for (Tensor& grad : grads) grad = grad.flatten();
  return at::cat(grads);
}

class Unbiased : public testing::TestWithParam<std::tuple<int64_t, bool>> {};

// |mean of N draws - g|^2 is the draws' variance / N where nothing is biased, give or take a tenth with so
// many parameters.
TEST_P(Unbiased, TheMeanOfDrawsIsTheGradient) {
  const auto& [bits, norm_first] = GetParam();
  torch::manual_seed(2);
  Model model(options(norm_first, 0.0));
  const Inputs in;
  set_memory(model, Memory::eager());
  const Tensor exact = flat_gradient(model, in);
  set_memory(model, Memory::unbiased(bits));
  constexpr int draws = 150;
  Tensor sum = at::zeros_like(exact), squares = at::zeros_like(exact);
  for (int i = 0; i < draws; ++i) {
    const Tensor error = flat_gradient(model, in) - exact;
    sum += error;
    squares += error.square();
  }
  const double variance = (squares / draws - (sum / draws).square()).sum().item<double>();
  const double of_mean = (sum / draws).square().sum().item<double>();
  EXPECT_GT(variance, 0);
  // Two coded numbers are multiplied in a norm's backward, and scores go through an exponential: what is left
  // of that after 2 bits is still far below the variance.
  EXPECT_LT(of_mean, 1.3 * variance / draws + (bits == 2 ? 0.005 : 0.0005) * variance);
  EXPECT_GT(of_mean, 0.7 * variance / draws);
  // Finer codes, less variance: 8 bits are within 1.5 percent of the gradient's own size.
  if (bits == 8) {
    EXPECT_LT(std::sqrt(variance), 0.015 * exact.norm().item<double>());
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, Unbiased, testing::Combine(testing::Values(2, 4, 8), testing::Bool()));

TEST(UnbiasedSetting, KeepsCodesAlone) {
  torch::manual_seed(3);
  Model model(options(false, 0.1));
  const Inputs in;
  const auto kept = [&](const LayerMemory& memory) {
    set_memory(model, memory);
    const Tensor y = model.forward(in.source, in.padding, in.target);
    return memory::kept_bytes({y}, {y, in.source, in.target, in.padding});
  };
  const int64_t whole = kept(LayerMemory::parse("norm=output"));  // the same tensors as they are
  const int64_t eight = kept(Memory::unbiased(8)), four = kept(Memory::unbiased(4)),
                two = kept(Memory::unbiased(2));
  EXPECT_LT(eight, whole * 0.4);
  EXPECT_LT(four, eight);
  EXPECT_LT(two, four);

  // The table says what attention should keep.
  set_memory(model, Memory::unbiased(4));
  const memory::Recorder recorder(&model);
  const Tensor y = model.forward(in.source, in.padding, in.target);
  const memory::Report report = recorder.report({y}, {y, in.source, in.target, in.padding});
  int described = 0;
  for (const memory::SavedRow& row : report.rows) {
    EXPECT_FALSE(row.dtype == "Float" && row.kept_bytes > 4 * 3 * 4 * 17) << row.layer << " " << row.op;
    if (row.policy.find("bits=4") != std::string::npos && row.predicted_bytes >= 0) ++described;
  }
  EXPECT_GT(described, 0);
}

INSTANTIATE_TEST_SUITE_P(All, Settings,
                         testing::Combine(testing::Values("exact", "checkpoint", "norm=output",
                                                          "hidden=recompute", "attention=output,norm=output",
                                                          "attention=input",
                                                          "attention=automatic,hidden=recompute"),
                                          testing::Bool()));

TEST(Settings, DropTheSameAgainInBackward) {
  // In float64 and one dimension at a time: a gradient that met another mask than the forward would not be
  // the slope of the loss at this seed.
  for (const char* text : {"exact", "checkpoint", "attention=output,hidden=recompute,norm=output"}) {
    for (const bool norm_first : {false, true}) {
      torch::manual_seed(2);
      Model model(options(norm_first, 0.3).memory(LayerMemory::parse(text)));
      model.to(at::kDouble);
      const Tensor source = at::randn({2, 7, 32}, at::kDouble).requires_grad_();
      const Tensor target = at::randn({2, 5, 32}, at::kDouble), g = at::randn({2, 5, 32}, at::kDouble);
      const auto loss = [&](const Tensor& x) {
        torch::manual_seed(3);
        return (model.forward(x, {}, target) * g).sum();
      };
      loss(source).backward();
      const Tensor direction = at::randn_like(source);
      const double step = 1e-5;
      const at::NoGradGuard no_grad;
      const double slope =
          ((loss(source + direction * step) - loss(source - direction * step)) / (2 * step)).item<double>();
      EXPECT_NEAR((source.grad() * direction).sum().item<double>(), slope, 1e-4 * (1 + std::abs(slope)))
          << text << norm_first;
    }
  }
}

int64_t kept(Model& model, const Inputs& in) {
  const Tensor y = model.forward(in.source, in.padding, in.target);
  return memory::kept_bytes({y}, {y, in.source, in.target, in.padding});
}

TEST(Settings, KeepLessAndLess) {
  Model model(options(false, 0.1));
  const Inputs in;
  int64_t before = std::numeric_limits<int64_t>::max();
  for (const char* text : {"eager", "norm=output", "hidden=recompute,norm=output",
                           "attention=output,hidden=recompute,norm=output",
                           "attention=input,hidden=recompute,norm=output", "checkpoint"}) {
    set_memory(model, LayerMemory::parse(text));
    // Generator states, of 5 kB, are no part of the comparison at this size.
    const int64_t bytes = kept(model, in) - (std::string(text) == "checkpoint" ? 3 * 5056 : 0);
    EXPECT_LT(bytes, before) << text;
    before = bytes;
  }
}

TEST(Settings, GoByPatterns) {
  Model model(options(false, 0.1));
  set_memory(model, {{"*", Memory::exact()}, {"encoder.*", LayerMemory::parse("checkpoint")}});
  const auto found = get_memory(model);
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0], (std::pair<std::string, LayerMemory>("encoder.0", LayerMemory::parse("checkpoint"))));
  EXPECT_EQ(found[1].second, LayerMemory::parse("checkpoint"));
  EXPECT_EQ(found[2], (std::pair<std::string, LayerMemory>("decoder", Memory::exact())));
  EXPECT_NE(message([&] {
              set_memory(model, {{"decoder", Memory::eager()}, {"layers.*", Memory::exact()}});
            }).find("no layer fits the pattern 'layers.*'; the model's are encoder.0, encoder.1, decoder"),
            std::string::npos);
  EXPECT_EQ(get_memory(model), found);
}

TEST(Plan, FitsItsBudget) {
  torch::manual_seed(4);
  Model model(options(true, 0.1));
  const Inputs in;
  const auto loss = [&] { return model.forward(in.source, in.padding, in.target).square().sum(); };
  set_memory(model, LayerMemory::parse("norm=output"));
  const Tensor random = at::globalContext().defaultGenerator(at::kCPU).get_state();
  const Plan roomy = plan(model, loss, 1000000000);
  EXPECT_TRUE(at::equal(at::globalContext().defaultGenerator(at::kCPU).get_state(), random));
  for (const Tensor& parameter : model.parameters()) EXPECT_FALSE(parameter.grad().defined());
  ASSERT_EQ(roomy.layers.size(), 3u);
  EXPECT_EQ(roomy.predicted_kept_bytes, roomy.measured_kept_bytes);
  const int64_t budget = roomy.measured_peak_bytes * 6 / 10;
  const Plan tight = plan(model, loss, budget);
  EXPECT_LE(tight.measured_peak_bytes, budget);
  EXPECT_LT(tight.measured_kept_bytes, roomy.measured_kept_bytes);
  // What was chosen is set, and does what the plan says.
  for (size_t l = 0; l < 3; ++l) EXPECT_EQ(get_memory(model)[l].second, tight.layers[l].memory);
  EXPECT_NE(tight.table().find("predicted"), std::string::npos);

  const auto before = get_memory(model);
  const std::string refusal = message([&] { plan(model, loss, 1000); });
  EXPECT_NE(refusal.find("the smallest peak found for these inputs is"), std::string::npos) << refusal;
  EXPECT_EQ(get_memory(model), before);
  torch::nn::ModuleList none;
  EXPECT_NE(message([&] { plan(*none, loss, 1000); }).find("no layer of the model knows"), std::string::npos);
}

TEST(Plan, MayTakeCodes) {
  torch::manual_seed(5);
  Model model(options(true, 0.1));
  const Inputs in;
  const auto loss = [&] { return model.forward(in.source, in.padding, in.target).square().sum(); };
  set_memory(model, Memory::unbiased(2));
  memory::PeakMeter meter;
  for (int i = 0; i < 2; ++i) {
    meter.reset();
    loss().backward();
  }
  const int64_t budget = meter.peak_bytes();  // codes in every layer fit it
  const Plan tight = plan(model, loss, budget, 2);
  EXPECT_LE(tight.measured_peak_bytes, budget);
  for (size_t l = 0; l < 3; ++l) EXPECT_EQ(get_memory(model)[l].second, tight.layers[l].memory);
  const auto before = get_memory(model);
  EXPECT_NE(message([&] { plan(model, loss, budget, 3); }).find("8, 4 or 2 bits, got 3"), std::string::npos);
  EXPECT_EQ(get_memory(model), before);
}

TEST(Settings, ArePrinted) {
  std::ostringstream text;
  text << *nn::TransformerEncoderLayer(options(false, 0.1).memory(Memory::exact()));
  EXPECT_NE(text.str().find("attention=automatic,hidden=recompute,dropout=seed,norm=output"),
            std::string::npos)
      << text.str();
}

}  // namespace
}  // namespace remnant
