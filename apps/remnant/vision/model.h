#pragma once

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <string>

namespace remnant::app::vision {

struct ModelOptions {
  std::string model = "resnet20";
  int64_t width = 16;  ///< channels of the first stage
  int64_t classes = 10;
};

/// Whether `model` is the name of a residual network: resnetN with N = 6 n + 2, such as resnet20.
bool is_resnet(const std::string& model);

/// relu(norm(conv(x)) + residual).
class ConvNormReluImpl : public torch::nn::Module {
 public:
  ConvNormReluImpl(int64_t in, int64_t out, int64_t stride);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual = {});

 private:
  torch::nn::Conv2d conv_ = nullptr;
  torch::nn::BatchNorm2d norm_ = nullptr;
};
TORCH_MODULE(ConvNormRelu);

/// Two 3x3 convolutions and the block's input. Where they halve the image and double the channels, the input
/// is every other pixel with channels of zeros.
class ResidualBlockImpl : public torch::nn::Module {
 public:
  ResidualBlockImpl(int64_t in, int64_t out, int64_t stride);
  at::Tensor forward(const at::Tensor& x);

 private:
  int64_t stride_, added_channels_;
  ConvNormRelu first_ = nullptr, second_ = nullptr;
};
TORCH_MODULE(ResidualBlock);

/// Labels images: the residual networks of He et al., "Deep Residual Learning for Image Recognition" (2015),
/// section 4.2, with their initialisation of convolutions.
class ClassifierImpl : public torch::nn::Module {
 public:
  explicit ClassifierImpl(const ModelOptions& options);

  /// images [B, 3, 32, 32] -> logits [B, classes].
  at::Tensor forward(const at::Tensor& images);
  /// Summed cross-entropy of `labels` [B].
  at::Tensor loss(const at::Tensor& images, const at::Tensor& labels);

 private:
  ConvNormRelu stem_ = nullptr;
  torch::nn::ModuleList blocks_ = nullptr;
  torch::nn::Linear output_ = nullptr;
};
TORCH_MODULE(Classifier);

}  // namespace remnant::app::vision
