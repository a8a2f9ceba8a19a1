#include <remnant/memory.h>
#include <remnant/nn/conv.h>

#include <ATen/Functions.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/serialize.h>

#include <torch/nn/modules/container/any.h>
#include <memory>
#include <sstream>

namespace {

using remnant::nn::ConvNormAct1d;
using remnant::nn::ConvNormAct2d;
using remnant::nn::ConvNormAct3d;
using remnant::nn::ConvNormActOptions;

struct PairImpl : torch::nn::Module {
  PairImpl(int64_t in, int64_t out) {
    auto options = torch::nn::Conv2dOptions(in, out, 3).padding(1).bias(false);
    conv = register_module("conv", torch::nn::Conv2d(options));
    norm = register_module("norm", torch::nn::BatchNorm2d(out));
  }
  at::Tensor forward(const at::Tensor& x) { return at::relu(norm(conv(x))); }
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
};

ConvNormActOptions padded(int64_t in, int64_t out) {
  ConvNormActOptions options(in, out, 3);
  options.padding = {1};
  return options;
}

template <typename From, typename To>
void carry(const From& from, const To& to) {
  std::stringstream stream;
  torch::serialize::OutputArchive out;
  from->save(out);
  out.save_to(stream);
  torch::serialize::InputArchive in;
  in.load_from(stream);
  to->load(in);
}

TEST(ConvNormAct, WeightsLoadBothWays) {
  at::manual_seed(1);
  const auto pair = std::make_shared<PairImpl>(3, 8);
  const at::Tensor x = at::randn({4, 3, 6, 6});
  pair->forward(x);  // running statistics that are not the first
  ConvNormAct2d unit(padded(3, 8));
  carry(pair, unit.ptr());
  ASSERT_EQ(unit->named_parameters().keys(), pair->named_parameters().keys());
  ASSERT_EQ(unit->named_buffers().keys(), pair->named_buffers().keys());
  for (int step = 0; step < 3; ++step) {
    EXPECT_TRUE(at::allclose(unit(x), pair->forward(x), 1e-5, 1e-5));
  }
  EXPECT_TRUE(at::allclose(unit->norm->running_var, pair->norm->running_var));
  EXPECT_EQ(unit->norm->num_batches_tracked.item<int64_t>(), 4);
  const auto back = std::make_shared<PairImpl>(3, 8);
  carry(unit.ptr(), back);
  unit->eval();
  back->eval();
  EXPECT_TRUE(at::allclose(unit(x), back->forward(x), 1e-5, 1e-5));
}

TEST(ConvNormAct, CumulativeAverage) {
  auto options = padded(3, 8);
  options.momentum = std::nullopt;
  ConvNormAct2d unit(options);
  torch::nn::BatchNorm2d norm(torch::nn::BatchNorm2dOptions(8).momentum(std::nullopt));
  for (int step = 0; step < 3; ++step) {
    const at::Tensor x = at::randn({4, 3, 6, 6});
    unit(x);
    norm(at::conv2d(x, unit->conv->weight, {}, 1, 1));
  }
  EXPECT_TRUE(at::allclose(unit->norm->running_mean, norm->running_mean, 1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(unit->norm->running_var, norm->running_var, 1e-5, 1e-6));
}

TEST(ConvNormAct, EveryDimension) {
  ConvNormActOptions options(4, 8, 3);
  options.bias = true;
  options.norm = "group:groups=2";
  options.activation = "silu";
  EXPECT_EQ(ConvNormAct1d(options)(at::randn({2, 4, 7})).sizes(), (std::vector<int64_t>{2, 8, 5}));
  EXPECT_EQ(ConvNormAct2d(options)(at::randn({2, 4, 7, 6})).sizes(), (std::vector<int64_t>{2, 8, 5, 4}));
  options.kernel_size = {1, 2, 3};
  EXPECT_EQ(ConvNormAct3d(options)(at::randn({2, 4, 7, 6, 5})).sizes(),
            (std::vector<int64_t>{2, 8, 7, 5, 3}));
}

TEST(ConvNormAct, KeepsOneTensorAUnit) {
  torch::nn::Sequential model;
  for (int i = 0; i < 4; ++i) model->push_back(ConvNormAct2d(padded(8, 8)));
  const at::Tensor x = at::randn({2, 8, 6, 6});
  const remnant::memory::Recorder recorder(model.ptr().get());
  const at::Tensor y = model->forward(x);
  const int64_t tensor = x.numel() * 4;
  // The four sums, and of each unit 4 numbers in double a channel.
  EXPECT_EQ(recorder.report({y}, {x}).kept_bytes, 4 * tensor + 4 * 4 * 8 * 8);
}

TEST(ConvNormAct, InASequentialAndCloned) {
  torch::nn::Sequential model(ConvNormAct2d(padded(3, 8)), ConvNormAct2d(padded(8, 4)));
  const at::Tensor x = at::randn({2, 3, 6, 6});
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  EXPECT_TRUE(at::equal(model->forward(x), copy->forward(x)));
}

TEST(ConvNormAct, MistakesAreNamed) {
  auto options = padded(3, 8);
  options.activation = "gelu";
  EXPECT_THROW(ConvNormAct2d{options}, c10::Error);
  options = padded(3, 8);
  options.stride = {1, 2, 3};
  EXPECT_THROW(ConvNormAct2d{options}, c10::Error);
  options = padded(3, 8);
  options.memory = remnant::Memory::budget(1000);
  EXPECT_THROW(ConvNormAct2d{options}, c10::Error);
  options = padded(3, 8);
  options.groups = 2;
  EXPECT_THROW(ConvNormAct2d{options}, c10::Error);
}

}  // namespace
