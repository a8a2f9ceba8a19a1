// Conversion changes what modules keep, and neither what they compute nor what they compute it from.

#include "compare.h"

#include <remnant/convert.h>
#include <remnant/memory.h>
#include <remnant/nn/layers.h>
#include <remnant/nn/transformer_stack.h>
#include <remnant/plan.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/transformer.h>
#include <torch/nn/modules/transformercoder.h>
#include <torch/nn/modules/transformerlayer.h>
#include <torch/utils.h>

#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace remnant {
namespace {

using at::Tensor;
using test::expect_close;
using test::expect_error;
using torch::nn::AnyModule;

constexpr int64_t kDim = 32, kHeads = 4, kWidth = 80;

torch::nn::TransformerEncoderLayer encoder_layer(double dropout, bool gelu = false) {
  auto options =
      torch::nn::TransformerEncoderLayerOptions(kDim, kHeads).dim_feedforward(kWidth).dropout(dropout);
  if (gelu) options.activation(torch::kGELU);
  return torch::nn::TransformerEncoderLayer(options);
}

torch::nn::TransformerDecoderLayer decoder_layer(double dropout) {
  return torch::nn::TransformerDecoderLayer(
      torch::nn::TransformerDecoderLayerOptions(kDim, kHeads).dim_feedforward(kWidth).dropout(dropout));
}

torch::nn::LayerNorm norm() { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({kDim})); }

std::vector<std::pair<std::string, const void*>> identities(const torch::nn::Module& model) {
  std::vector<std::pair<std::string, const void*>> found;
  for (const auto& item : model.named_parameters()) {
    found.emplace_back(item.key(), item->unsafeGetTensorImpl());
  }
  return found;
}

std::string printed(const torch::nn::Module& model) {
  std::ostringstream text;
  text << model;
  return text.str();
}

std::vector<std::string> names(const std::vector<Conversion::Left>& left) {
  std::vector<std::string> found;
  for (const auto& each : left) found.push_back(each.name);
  return found;
}

struct Outcome {
  Tensor output;
  std::vector<Tensor> gradients;
};

/// The output, and the gradients of parameters that a fixed gradient of the output gives.
Outcome run(torch::nn::Module& model, const std::function<Tensor()>& forward) {
  model.zero_grad();
  Outcome outcome{forward(), {}};
  outcome.output.backward((at::arange(outcome.output.numel(), outcome.output.options()) * 0.37)
                              .sin()
                              .reshape(outcome.output.sizes()));
  for (const Tensor& parameter : model.parameters()) {
    outcome.gradients.push_back(parameter.grad().defined() ? parameter.grad().clone() : Tensor());
  }
  return outcome;
}

void expect_close(const Outcome& got, const Outcome& expected) {
  expect_close(got.output, expected.output, "output");
  ASSERT_EQ(got.gradients.size(), expected.gradients.size());
  for (size_t i = 0; i < got.gradients.size(); ++i) {
    expect_close(got.gradients[i], expected.gradients[i], "gradient " + std::to_string(i), 1e-9);
  }
}

/// Before, under `memory`, and back again: equal up to rounding, then bit for bit.
void expect_same_there_and_back(torch::nn::Module& model, const std::function<Tensor()>& forward,
                                const LayerMemory& memory, const std::vector<std::string>& converted) {
  const auto parameters = identities(model);
  const std::string text = printed(model);
  const Outcome before = run(model, forward);
  Conversion there = convert(model, memory);
  EXPECT_EQ(there.converted, converted) << there.table();
  EXPECT_TRUE(there.left.empty()) << there.table();
  EXPECT_EQ(identities(model), parameters);
  EXPECT_NE(printed(model).find("remnant::nn"), std::string::npos);
  expect_close(run(model, forward), before);
  const Conversion back = convert_back(model);
  EXPECT_EQ(back.converted, converted) << back.table();
  EXPECT_TRUE(back.left.empty()) << back.table();
  EXPECT_EQ(identities(model), parameters);
  EXPECT_EQ(printed(model), text);
  const Outcome after = run(model, forward);
  EXPECT_TRUE(at::equal(after.output, before.output));
}

class ConvertUnder : public testing::TestWithParam<const char*> {};

TEST_P(ConvertUnder, ASequentialComputesTheSame) {
  torch::manual_seed(1);
  torch::nn::Sequential model(encoder_layer(0.0), norm(), torch::nn::Linear(kDim, kDim), torch::nn::GELU(),
                              torch::nn::Dropout(0.0), encoder_layer(0.0, true));
  test::randomize_parameters(*model);
  model->to(at::kDouble);
  const Tensor x = at::randn({7, 3, kDim}, at::kDouble);
  const auto forward = [&] { return model->forward(x); };
  const std::vector<std::string> converted = {"0", "1", "4", "5"};
  expect_same_there_and_back(*model, forward, LayerMemory::parse(GetParam()), converted);
  model->eval();
  expect_same_there_and_back(*model, forward, LayerMemory::parse(GetParam()), converted);
}

TEST_P(ConvertUnder, ATransformerWithMasksComputesTheSame) {
  torch::manual_seed(2);
  torch::nn::Transformer model(torch::nn::TransformerOptions(kDim, kHeads, 2, 2)
                                   .dim_feedforward(kWidth)
                                   .dropout(0.0)
                                   .activation(torch::kGELU));
  test::randomize_parameters(*model);
  model->to(at::kDouble);
  const Tensor source = at::randn({6, 3, kDim}, at::kDouble), target = at::randn({5, 3, kDim}, at::kDouble);
  const Tensor causal = torch::nn::TransformerImpl::generate_square_subsequent_mask(5).to(at::kDouble);
  Tensor padding = at::zeros({3, 6}, at::kBool);
  padding.narrow(0, 1, 1).narrow(1, 4, 2).fill_(true);
  const auto forward = [&] { return model->forward(source, target, {}, causal, {}, padding, {}, padding); };
  expect_same_there_and_back(*model, forward, LayerMemory::parse(GetParam()),
                             {"encoder", "encoder.norm", "decoder", "decoder.norm"});
}

/// 1, 2 or 3 spatial dimensions; every kind of run, and what is none.
torch::nn::Sequential convolutions() {
  using torch::nn::Conv2d;
  using torch::nn::Conv2dOptions;
  return torch::nn::Sequential(
      Conv2d(Conv2dOptions(3, 8, 3).padding(1)), torch::nn::BatchNorm2d(8),
      torch::nn::ReLU(torch::nn::ReLUOptions(true)),                                            // 0 1 2
      Conv2d(Conv2dOptions(8, 8, {3, 5}).padding(torch::kSame).groups(4)),                      // 3 4 5
      torch::nn::BatchNorm2d(torch::nn::BatchNormOptions(8).momentum(std::nullopt)),            //
      torch::nn::LeakyReLU(torch::nn::LeakyReLUOptions().negative_slope(0.1)),                  //
      Conv2d(Conv2dOptions(8, 6, 3).padding(torch::kValid).dilation(2).bias(false)),            // 6 7 8
      torch::nn::BatchNorm2d(torch::nn::BatchNormOptions(6).affine(false)), torch::nn::SiLU(),  //
      Conv2d(Conv2dOptions(6, 8, 1).stride(2)),                                                 // 9 10
      torch::nn::BatchNorm2d(torch::nn::BatchNormOptions(8).track_running_stats(false)),        //
      Conv2d(Conv2dOptions(8, 8, 3).padding(1)), torch::nn::BatchNorm2d(8),                     // 11 12
      torch::nn::ELU(torch::nn::ELUOptions().inplace(true)), Conv2d(Conv2dOptions(8, 4, 1)),    //
      torch::nn::ReLU());
}

const std::vector<std::string> kRuns = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"};

TEST_P(ConvertUnder, RunsOfConvolutionNormAndActivationComputeTheSame) {
  torch::manual_seed(7);
  torch::nn::Sequential model = convolutions();
  test::randomize_parameters(*model);
  model->to(at::kDouble);
  const Tensor x = at::randn({4, 3, 12, 14}, at::kDouble);
  const auto forward = [&] { return model->forward(x); };
  expect_same_there_and_back(*model, forward, LayerMemory::parse(GetParam()), kRuns);
  model->eval();
  expect_same_there_and_back(*model, forward, LayerMemory::parse(GetParam()), kRuns);
}

TEST_P(ConvertUnder, RunsInOtherDimensionsComputeTheSame) {
  torch::manual_seed(8);
  torch::nn::Sequential line(torch::nn::Conv1d(torch::nn::Conv1dOptions(3, 6, 4).padding(2).stride(2)),
                             torch::nn::BatchNorm1d(6), torch::nn::ReLU(),
                             torch::nn::Conv1d(torch::nn::Conv1dOptions(6, 4, 1)), torch::nn::BatchNorm1d(4));
  torch::nn::Sequential volume(torch::nn::Conv3d(torch::nn::Conv3dOptions(2, 4, {1, 3, 2})),
                               torch::nn::BatchNorm3d(4), torch::nn::SiLU());
  line->to(at::kDouble);
  volume->to(at::kDouble);
  const Tensor x = at::randn({5, 3, 11}, at::kDouble), y = at::randn({3, 2, 4, 5, 6}, at::kDouble);
  expect_same_there_and_back(*line, [&] { return line->forward(x); }, LayerMemory::parse(GetParam()),
                             {"0", "1", "2", "3", "4"});
  expect_same_there_and_back(*volume, [&] { return volume->forward(y); }, LayerMemory::parse(GetParam()),
                             {"0", "1", "2"});
}

TEST_P(ConvertUnder, RunsWithGroupNormComputeTheSame) {
  torch::manual_seed(9);
  using torch::nn::Conv2dOptions;
  torch::nn::Sequential model(torch::nn::Conv2d(Conv2dOptions(3, 8, 3)),
                              torch::nn::GroupNorm(torch::nn::GroupNormOptions(2, 8)), torch::nn::ReLU(),
                              torch::nn::Conv2d(Conv2dOptions(8, 6, 1)),
                              torch::nn::GroupNorm(torch::nn::GroupNormOptions(3, 6).affine(false)));
  test::randomize_parameters(*model);
  model->to(at::kDouble);
  const Tensor x = at::randn({4, 3, 9, 8}, at::kDouble);
  expect_same_there_and_back(*model, [&] { return model->forward(x); }, LayerMemory::parse(GetParam()),
                             {"0", "1", "2", "3", "4"});
}

INSTANTIATE_TEST_SUITE_P(Settings, ConvertUnder,
                         testing::Values("exact", "eager", "checkpoint", "attention=projections"));

/// Calls its parts through AnyModules, two of them the same.
struct Parts : torch::nn::Module, nn::ConvertibleParts {
  explicit Parts(AnyModule stack_in, AnyModule attention_in)
      : attention(std::move(attention_in)), stack(std::move(stack_in)), again(stack) {
    register_module("attention", attention.ptr());
    register_module("stack", stack.ptr());
    register_module("again", again.ptr());
  }
  std::vector<AnyModule*> convertible_parts() override { return {&attention, &stack, &again}; }
  Tensor forward(const Tensor& x, const Tensor& y) {
    using Pair = std::tuple<Tensor, Tensor>;
    const auto [attended, weights] = attention.forward<Pair>(x, y.narrow(-1, 0, 20), y.narrow(-1, 0, 20));
    const Tensor decoded = stack.forward<Tensor>(attended + weights.mean(), y);
    return again.forward<Tensor>(decoded, y);
  }
  AnyModule attention, stack, again;
};

TEST(Convert, NamedPartsAreReplacedAndSharingStays) {
  torch::manual_seed(3);
  for (const bool extra : {false, true}) {
    torch::nn::TransformerDecoder stack(
        torch::nn::TransformerDecoderOptions(decoder_layer(0.0), 2).norm(AnyModule(norm())));
    Parts model(AnyModule(stack),
                AnyModule(torch::nn::MultiheadAttention(torch::nn::MultiheadAttentionOptions(kDim, kHeads)
                                                            .kdim(20)
                                                            .vdim(20)
                                                            .bias(extra)
                                                            .add_bias_kv(extra)
                                                            .add_zero_attn(extra))));
    test::randomize_parameters(model);
    model.to(at::kDouble);
    const Tensor x = at::randn({5, 2, kDim}, at::kDouble), y = at::randn({6, 2, kDim}, at::kDouble);
    expect_same_there_and_back(model, [&] { return model.forward(x, y); }, Memory::exact(),
                               {"attention", "stack", "stack.norm", "again"});
    convert(model, Memory::exact());
    EXPECT_EQ(model.stack.ptr(), model.again.ptr());
    EXPECT_EQ(model.named_children()["again"], model.again.ptr());
  }
}

TEST(Convert, ASecondTimeOnlyTheSettingChanges) {
  torch::nn::Sequential model(encoder_layer(0.1), norm(), torch::nn::Dropout(0.1));
  convert(*model, Memory::exact());
  const auto first = model->children();
  EXPECT_TRUE(convert(*model, Memory::exact()).converted.empty());
  EXPECT_EQ(model->children(), first);
  EXPECT_TRUE(convert(*model, Memory::eager()).converted.empty());
  EXPECT_EQ(model->children(), first);
  for (const auto& [name, memory] : get_memory(*model))
    EXPECT_EQ(memory, LayerMemory(Memory::eager())) << name;
  EXPECT_NE(printed(*model).find("remnant::nn::Dropout(p=0.1, dropout=noise)"), std::string::npos);
  EXPECT_NE(printed(*model).find("norm=input"), std::string::npos);
}

TEST(Convert, ModesFrozenParametersAndRandomStateStay) {
  torch::nn::Sequential model(encoder_layer(0.5), encoder_layer(0.5));
  (*model)[1]->eval();
  (*model)[0]->as<torch::nn::TransformerEncoderLayer>()->dropout1->eval();
  model->parameters()[3].set_requires_grad(false);
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
  const Tensor state = generator.get_state();
  convert(*model, Memory::exact());
  EXPECT_TRUE(at::equal(generator.get_state(), state));
  EXPECT_FALSE(model->parameters()[3].requires_grad());
  const auto* first = (*model)[0]->as<nn::TransformerEncoderLayer>();
  EXPECT_TRUE(first->is_training());
  EXPECT_TRUE(first->self_attn->is_training());
  EXPECT_FALSE(first->dropout1->is_training());
  EXPECT_TRUE(first->dropout2->is_training());
  const auto* second = (*model)[1]->as<nn::TransformerEncoderLayer>();
  EXPECT_FALSE(second->is_training());
  EXPECT_FALSE(second->self_attn->is_training());
  convert_back(*model);
  EXPECT_TRUE(at::equal(generator.get_state(), state));
  EXPECT_FALSE((*model)[1]->is_training());
  EXPECT_FALSE((*model)[0]->as<torch::nn::TransformerEncoderLayer>()->dropout1->is_training());
}

TEST(Convert, WithDropoutTheDistributionStays) {
  torch::manual_seed(4);
  torch::nn::Sequential model(encoder_layer(0.3), torch::nn::Dropout(0.3));
  test::randomize_parameters(*model);
  const Tensor x = at::randn({6, 400, kDim}).narrow(1, 0, 1).expand({6, 400, kDim}).contiguous();
  const auto moments = [&] {
    const at::NoGradGuard no_grad;
    std::vector<Tensor> draws;
    for (int i = 0; i < 8; ++i) draws.push_back(model->forward(x));
    const Tensor all = at::cat(draws, 1);
    return std::make_pair(all.mean(1), all.var(1));
  };
  const auto [mean, variance] = moments();
  convert(*model, Memory::exact());
  const auto [converted_mean, converted_variance] = moments();
  const double count = 3200;
  const Tensor error = (converted_mean - mean).abs() / (2 * variance / count).sqrt();
  EXPECT_LT(error.max().item<double>(), 5.5);
  EXPECT_LT((converted_variance / variance - 1).abs().max().item<double>(), 0.25);
}

TEST(Convert, KeepsLess) {
  torch::nn::Sequential model(encoder_layer(0.1), encoder_layer(0.1), norm(), torch::nn::Dropout(0.1));
  const Tensor x = at::randn({64, 4, kDim});
  const auto kept = [&] {
    const Tensor loss = model->forward(x).sum();
    return memory::kept_bytes({loss}, {loss, x});
  };
  const int64_t before = kept();
  convert(*model, Memory::exact());
  const int64_t after = kept();
  EXPECT_LT(5 * after, before);
  convert_back(*model);
  EXPECT_EQ(kept(), before);
}

TEST(Convert, UnderCodesLinearLayersAndActivationsKeepCodes) {
  torch::manual_seed(3);
  torch::nn::Sequential model(torch::nn::Linear(kDim, kWidth), torch::nn::GELU(),
                              torch::nn::Linear(torch::nn::LinearOptions(kWidth, kDim).bias(false)),
                              torch::nn::SiLU(), torch::nn::Linear(kDim, 3));
  const Tensor x = at::randn({256, kDim});
  const auto outcome = [&] { return run(*model, [&] { return model->forward(x); }); };
  const auto kept = [&] {
    const Tensor loss = model->forward(x).sum();
    return memory::kept_bytes({loss}, {loss, x});
  };
  const std::string text = printed(*model);
  const auto parameters = identities(*model);
  const Outcome before = outcome();
  const int64_t plain = kept();
  EXPECT_TRUE(convert(*model, Memory::exact()).converted.empty());
  const Conversion there = convert(*model, Memory::unbiased(8));
  EXPECT_EQ(there.converted, (std::vector<std::string>{"0", "1", "2", "3", "4"}));
  EXPECT_TRUE(there.left.empty()) << there.table();
  EXPECT_EQ(identities(*model), parameters);
  EXPECT_NE(printed(*model).find("remnant::nn::Linear(in_features=32, out_features=80, bias=1, bits=8)"),
            std::string::npos)
      << printed(*model);
  const Outcome coded = outcome();
  expect_close(coded.output, before.output, "output");
  for (size_t i = 0; i < before.gradients.size(); ++i) {
    EXPECT_LT((coded.gradients[i] - before.gradients[i]).norm().item<double>(),
              0.03 * before.gradients[i].norm().item<double>());
  }
  EXPECT_LT(3 * kept(), plain);
  model->eval();
  EXPECT_TRUE(at::equal(model->forward(x), before.output));  // torch's own operations
  model->train();
  const Conversion back = convert_back(*model);
  EXPECT_EQ(back.converted, there.converted);
  EXPECT_EQ(printed(*model), text);
  EXPECT_EQ(identities(*model), parameters);
  EXPECT_EQ(kept(), plain);
  struct Member : torch::nn::Module {
    torch::nn::Linear inner = register_module("inner", torch::nn::Linear(2, 2));
  } member;
  const Conversion typed = convert(member, Memory::unbiased(4));
  ASSERT_EQ(names(typed.left), std::vector<std::string>{"inner"});
  EXPECT_NE(typed.left[0].reason.find("declare it as remnant::nn::Linear"), std::string::npos);
}

/// What C++ cannot exchange, beside what it can.
struct Typed : torch::nn::Module {
  Typed() {
    auto options = torch::nn::TransformerEncoderLayerOptions(kDim, kHeads).dim_feedforward(kWidth);
    options.activation(std::function<Tensor(const Tensor&)>([](const Tensor& x) { return at::gelu(x); }));
    parts->push_back("own_activation", torch::nn::TransformerEncoderLayer(options));
    parts->push_back("in_place", torch::nn::Dropout(torch::nn::DropoutOptions(0.1).inplace(true)));
    parts->push_back("two_dimensions", torch::nn::LayerNorm(torch::nn::LayerNormOptions({4, kDim})));
    parts->push_back("fine", torch::nn::Dropout(0.1));
    register_module("parts", parts);
    register_module("encoder", encoder);
    list->push_back(encoder_layer(0.1));
    register_module("list", list);
  }
  torch::nn::Sequential parts;
  torch::nn::TransformerEncoder encoder{
      torch::nn::TransformerEncoderOptions(encoder_layer(0.1), 2).norm(AnyModule(norm()))};
  torch::nn::ModuleList list;
};

TEST(Convert, SaysWhatItLeavesAndWhy) {
  Typed model;
  const Conversion result = convert(model, Memory::exact());
  EXPECT_EQ(result.converted, (std::vector<std::string>{"parts.fine", "encoder.norm"}));
  EXPECT_EQ(names(result.left), (std::vector<std::string>{"parts.own_activation", "parts.in_place",
                                                          "parts.two_dimensions", "encoder", "list.0"}));
  const std::vector<std::string> reasons = {"its activation is a function", "inplace", "[4, 32]",
                                            "declare it as remnant::nn::TransformerEncoder",
                                            "ModuleList, whose reader casts it"};
  for (size_t i = 0; i < reasons.size(); ++i) {
    EXPECT_NE(result.left[i].reason.find(reasons[i]), std::string::npos) << result.left[i].reason;
    EXPECT_NE(result.table().find(result.left[i].name + "  left: "), std::string::npos);
  }
  EXPECT_NE(model.parts[0]->as<torch::nn::TransformerEncoderLayer>(), nullptr);
}

TEST(Convert, RunsShareRunningStatisticsAndCloneApart) {
  torch::manual_seed(9);
  torch::nn::Sequential model = convolutions();
  auto plain = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  std::vector<const void*> before;
  before.reserve(model->buffers().size());
  for (const Tensor& buffer : model->buffers()) before.push_back(buffer.unsafeGetTensorImpl());
  convert(*model, Memory::exact());
  auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  for (int step = 0; step < 3; ++step) {
    const Tensor x = at::randn({4, 3, 12, 14});
    model->forward(x);
    plain->forward(x);
  }
  const auto expect_statistics = [](const torch::nn::Module& got, const torch::nn::Module& expected) {
    const auto buffers = got.named_buffers();
    for (const auto& item : expected.named_buffers()) {
      expect_close(buffers[item.key()].to(at::kDouble), item.value().to(at::kDouble), item.key(), 1e-5);
    }
    EXPECT_EQ(buffers.size(), expected.named_buffers().size());
  };
  expect_statistics(*model, *plain);
  EXPECT_EQ(copy->named_buffers()["1.num_batches_tracked"].item<int64_t>(), 0);
  convert_back(*model);
  expect_statistics(*model, *plain);
  size_t i = 0;
  for (const Tensor& buffer : model->buffers()) EXPECT_EQ(buffer.unsafeGetTensorImpl(), before[i++]);
  // The copy goes on by itself.
  convert_back(*copy);
  copy->parameters()[0].data().zero_();
  EXPECT_NE(model->parameters()[0].abs().max().item<float>(), 0);
  EXPECT_EQ((*copy)[0]->as<torch::nn::Conv2d>()->weight.abs().max().item<float>(), 0);
}

TEST(Convert, RunsKeepLess) {
  torch::manual_seed(10);
  torch::nn::Sequential model;
  for (int i = 0; i < 3; ++i) {
    model->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(8, 8, 3).padding(1)));
    model->push_back(torch::nn::BatchNorm2d(8));
    model->push_back(torch::nn::ReLU());
  }
  const Tensor x = at::randn({16, 8, 16, 16});
  const auto kept = [&] {
    const Tensor loss = model->forward(x).sum();
    std::vector<Tensor> known = model->buffers();
    known.push_back(x);
    return memory::kept_bytes({loss}, known);
  };
  const int64_t eager = kept(), tensor = x.numel() * 4, rows = 8 * 4 * 8;
  EXPECT_GE(eager, 6 * tensor);
  convert(*model, Memory::exact());
  EXPECT_EQ(kept(), 3 * (tensor + rows));
  EXPECT_EQ(get_memory(*model).size(), 3);
  set_memory(*model, Memory::unbiased(4));
  EXPECT_LT(kept(), 0.16 * static_cast<double>(eager));
  set_memory(*model, Memory::eager());
  EXPECT_EQ(kept(), eager);
}

TEST(Convert, ARunsOutputMayBeChangedInPlace) {
  torch::manual_seed(11);
  torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).padding(1)),
                              torch::nn::BatchNorm2d(4));
  model->to(at::kDouble);
  const Tensor x = at::randn({4, 4, 8, 8}, at::kDouble);
  const auto forward = [&] { return model->forward(x).add_(x).relu_(); };
  expect_same_there_and_back(*model, forward, Memory::exact(), {"0", "1"});
}

struct OwnSequentialImpl : torch::nn::SequentialImpl {
  using SequentialImpl::SequentialImpl;
};

/// As torchvision's blocks are: members, called by their types.
struct Convolutions : torch::nn::Module {
  Convolutions() {
    register_module("conv", conv);
    register_module("norm", norm);
    register_module("other", torch::nn::Conv2d(4, 8, 3));  // 8 channels before a norm of 4: no run
    register_module("other_norm", torch::nn::BatchNorm2d(4));
    auto own = register_module("own", std::make_shared<OwnSequentialImpl>());
    own->push_back(torch::nn::Conv2d(4, 4, 3));
    own->push_back(torch::nn::BatchNorm2d(4));
    parts->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 3).padding_mode(torch::kReflect)));
    parts->push_back(torch::nn::BatchNorm2d(4));
    parts->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 4, 2).padding(torch::kSame)));
    parts->push_back(torch::nn::BatchNorm2d(4));
    torch::nn::ReLU shared;
    for (int i = 0; i < 2; ++i) {
      parts->push_back(torch::nn::Conv2d(4, 4, 3));
      parts->push_back(torch::nn::BatchNorm2d(4));
      parts->push_back(shared);
    }
    torch::nn::Conv2d extended(4, 4, 3);
    extended->register_parameter("temperature", at::ones({1}));
    parts->push_back(extended);
    parts->push_back(torch::nn::BatchNorm2d(4));
    register_module("parts", parts);
  }
  torch::nn::Conv2d conv{4, 4, 3};
  torch::nn::BatchNorm2d norm{4};
  torch::nn::Sequential parts;
};

TEST(Convert, SaysWhyARunOfConvolutionAndNormStays) {
  Convolutions model;
  const Conversion result = convert(model, Memory::exact());
  EXPECT_TRUE(result.converted.empty()) << result.table();
  EXPECT_EQ(names(result.left), (std::vector<std::string>{"conv", "own.0", "parts.0", "parts.2", "parts.4",
                                                          "parts.7", "parts.10"}));
  const std::vector<std::string> reasons = {"declare a remnant::nn::ConvNormAct2d",
                                            "derived from torch::nn::Sequential",
                                            "other numbers than zeros",
                                            "one side more than the other",
                                            "at another place",
                                            "at another place",
                                            "temperature"};
  for (size_t i = 0; i < reasons.size(); ++i) {
    EXPECT_NE(result.left[i].reason.find(reasons[i]), std::string::npos) << result.left[i].reason;
  }
}

struct OwnLayerImpl : torch::nn::TransformerEncoderLayerImpl {
  using TransformerEncoderLayerImpl::TransformerEncoderLayerImpl;
  Tensor forward(const Tensor& x) { return x * 2; }
};

TEST(Convert, LeavesDerivedClassesAndExtraParameters) {
  auto own = std::make_shared<OwnLayerImpl>(kDim, kHeads);
  auto extended = norm();
  extended->register_parameter("temperature", at::ones({1}));
  torch::nn::Sequential model(own, extended);
  const Conversion result = convert(*model, Memory::exact());
  EXPECT_TRUE(result.converted.empty());
  ASSERT_EQ(names(result.left), (std::vector<std::string>{"0", "1"}));
  EXPECT_NE(result.left[0].reason.find("derived from torch::nn::TransformerEncoderLayer"), std::string::npos);
  EXPECT_NE(result.left[1].reason.find("parameters"), std::string::npos);
  EXPECT_EQ((*model)[0], own);
}

TEST(Convert, BackLeavesWhatTorchCannotSay) {
  torch::nn::Sequential model(
      nn::TransformerEncoderLayer(nn::TransformerLayerOptions(kDim, kHeads).norm_first(true)),
      nn::TransformerEncoder(nn::TransformerLayerOptions(kDim, kHeads).batch_first(true), 2));
  const Conversion result = convert_back(*model);
  EXPECT_TRUE(result.converted.empty());
  ASSERT_EQ(names(result.left), (std::vector<std::string>{"0", "1"}));
  EXPECT_NE(result.left[0].reason.find("norm_first"), std::string::npos);
  EXPECT_NE(result.left[1].reason.find("layers.0"), std::string::npos);
}

TEST(Convert, TheModelItselfInAnAnyModule) {
  torch::manual_seed(5);
  torch::nn::TransformerEncoder encoder(torch::nn::TransformerEncoderOptions(encoder_layer(0.0), 2));
  const Tensor x = at::randn({6, 2, kDim});
  const Tensor expected = encoder->forward(x);
  ASSERT_EQ(names(convert(*encoder, Memory::exact()).left), std::vector<std::string>{""});
  AnyModule model(encoder);
  EXPECT_EQ(convert(model, Memory::exact()).converted, std::vector<std::string>{""});
  EXPECT_NE(model.ptr()->as<nn::TransformerEncoder>(), nullptr);
  expect_close(model.forward<Tensor>(x), expected, "output", 1e-5);
  EXPECT_EQ(convert_back(model).converted, std::vector<std::string>{""});
  EXPECT_TRUE(at::equal(model.forward<Tensor>(x), expected));
  AnyModule empty;
  expect_error([&] { convert(empty, Memory::exact()); }, {"convert: the AnyModule is empty"});
}

TEST(Convert, ABudgetIsRefusedAndChangesNothing) {
  torch::nn::Sequential model(encoder_layer(0.1));
  const auto before = model->children();
  expect_error([&] { convert(*model, Memory::budget(1000)); }, {"remnant::plan"});
  EXPECT_EQ(model->children(), before);
}

TEST(Convert, WhatWasConvertedCanBeClonedAndPlanned) {
  torch::manual_seed(6);
  torch::nn::Sequential model(
      encoder_layer(0.1),
      torch::nn::TransformerEncoder(torch::nn::TransformerEncoderOptions(encoder_layer(0.1), 2)));
  convert(*model, Memory::exact());
  auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  const Tensor x = at::randn({16, 4, kDim});
  model->eval();
  copy->eval();
  EXPECT_TRUE(at::equal(copy->forward(x), model->forward(x)));
  EXPECT_NE(copy->parameters()[0].unsafeGetTensorImpl(), model->parameters()[0].unsafeGetTensorImpl());
  EXPECT_EQ(convert_back(*copy).converted, (std::vector<std::string>{"0", "1"}));
  model->train();
  const Plan planned = plan(*model, [&] { return model->forward(x).sum(); }, 1000000000);
  EXPECT_EQ(planned.layers.size(), 3);
}

/// The example of docs/memory.md.
struct Tagger : torch::nn::Module, remnant::nn::ConvertibleParts {
  Tagger() {
    register_module("embedding", embedding);
    register_module("encoder", encoder.ptr());
  }
  std::vector<torch::nn::AnyModule*> convertible_parts() override { return {&encoder}; }
  at::Tensor forward(const at::Tensor& ids) { return encoder.forward<at::Tensor>(embedding(ids)); }

  torch::nn::Embedding embedding{1000, 32};
  torch::nn::AnyModule encoder{torch::nn::TransformerEncoder(torch::nn::TransformerEncoderLayer(32, 4), 2)};
};

TEST(Convert, TheDocumentationsExample) {
  Tagger model;
  model.eval();
  const Tensor ids = at::arange(12).reshape({6, 2});
  const Tensor expected = model.forward(ids);
  EXPECT_EQ(convert(model, Memory::exact()).table(), "encoder  converted\n");
  EXPECT_NE(model.encoder.ptr()->as<nn::TransformerEncoder>(), nullptr);
  expect_close(model.forward(ids), expected, "output", 1e-5);
  convert_back(model);
  EXPECT_TRUE(at::equal(model.forward(ids), expected));
}

}  // namespace
}  // namespace remnant
