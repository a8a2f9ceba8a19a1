#pragma once

#include <remnant/nn/conv.h>
#include <remnant/nn/reversible.h>
#include <remnant/plan.h>

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <string>

namespace remnant::app::vision {

struct ModelOptions {
  std::string model = "resnet20";  ///< resnetN, reversible or chain
  int64_t width = 16;              ///< channels of the first stage
  int64_t depth = 0;               ///< reversible: coupling blocks; chain: layers
  int64_t classes = 10;
  std::string activation = "maxmin";  ///< of chain: maxmin, or leaky with slope 0.5
  std::string init = "orthogonal";    ///< of chain's layers: orthogonal (dirac_orthogonal_) or he
};

/// Whether `model` is the name of a residual network: resnetN with N = 6 n + 2, such as resnet20.
bool is_resnet(const std::string& model);

/// relu(norm(conv(x)) + residual); the convolution is 3x3, initialised as He et al. do. A layer to the
/// planner, under which a unit keeps one tensor, codes, or what PyTorch keeps.
class ConvNormImpl : public nn::ConvNormAct2dImpl, public nn::KeepsByChoice {
 public:
  /// recompute: as of nn::ConvNormActOptions.
  ConvNormImpl(int64_t in, int64_t out, int64_t stride, bool recompute = false);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual = {});
  const LayerMemory& memory() const override { return memory_; }
  void set_memory(const LayerMemory& memory) override;
  std::string refusal(const LayerMemory& memory) const override;

 private:
  LayerMemory memory_ = Memory::exact();
};
TORCH_MODULE(ConvNorm);

/// Two 3x3 convolutions and the block's input. Where they halve the image and double the channels, the input
/// is every other pixel with channels of zeros.
class ResidualBlockImpl : public torch::nn::Module {
 public:
  ResidualBlockImpl(int64_t in, int64_t out, int64_t stride);
  at::Tensor forward(const at::Tensor& x);

 private:
  int64_t stride_, added_channels_;
  ConvNorm first_ = nullptr, second_ = nullptr;
};
TORCH_MODULE(ResidualBlock);

/// Layers that rebuild their inputs in backward, or with the setting eager keep what PyTorch keeps.
class RebuildingImpl : public torch::nn::Module, public nn::KeepsByChoice {
 public:
  const LayerMemory& memory() const override { return memory_; }
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }
  std::string refusal(const LayerMemory& memory) const override;

 protected:
  /// Whether to compute as torch does: asked to, or nothing is kept anyway.
  bool eager() const { return !is_training() || memory_ == LayerMemory(Memory::eager()); }

 private:
  LayerMemory memory_ = Memory::exact();
};

/// nn::ReversibleChain.
class ChainImpl : public RebuildingImpl {
 public:
  explicit ChainImpl(const ModelOptions& options);
  at::Tensor forward(const at::Tensor& x);
  nn::ReversibleChainImpl& chain() { return *chain_; }

 private:
  nn::ReversibleChain chain_ = nullptr;
};
TORCH_MODULE(Chain);

/// What a coupling block adds to one half: two 3x3 convolutions with their norms, a relu between them. It
/// runs again in backward, so that nothing of it is kept.
class BranchImpl : public torch::nn::Module {
 public:
  explicit BranchImpl(int64_t channels);
  at::Tensor forward(const at::Tensor& x);

 private:
  torch::nn::Conv2d first_ = nullptr, second_ = nullptr;
  torch::nn::BatchNorm2d first_norm_ = nullptr, second_norm_ = nullptr;
};
TORCH_MODULE(Branch);

/// Additive coupling blocks.
class CouplingsImpl : public RebuildingImpl {
 public:
  CouplingsImpl(int64_t channels, int64_t blocks);
  at::Tensor forward(const at::Tensor& x);

 private:
  nn::ReversibleSequence blocks_ = nullptr;
};
TORCH_MODULE(Couplings);

/// Labels images. resnetN: the residual networks of He et al., "Deep Residual Learning for Image Recognition"
/// (2015), section 4.2. reversible: the same three stages of coupling blocks, with a convolution of stride 2
/// between stages. chain: a convolution of stride 2 and a plain chain of layers.
class ClassifierImpl : public torch::nn::Module {
 public:
  explicit ClassifierImpl(const ModelOptions& options);

  /// images [B, 3, 32, 32] -> logits [B, classes].
  at::Tensor forward(const at::Tensor& images);
  /// Summed cross-entropy of `labels` [B].
  at::Tensor loss(const at::Tensor& images, const at::Tensor& labels);

 private:
  /// Each adds its blocks and returns the channels that leave the last.
  int64_t add_residual_blocks(int64_t width, int64_t blocks);
  int64_t add_couplings(int64_t width, int64_t blocks);

  ConvNorm stem_ = nullptr;
  torch::nn::Sequential blocks_ = nullptr;
  torch::nn::Linear output_ = nullptr;
};
TORCH_MODULE(Classifier);

}  // namespace remnant::app::vision
