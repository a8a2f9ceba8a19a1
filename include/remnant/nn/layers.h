#pragma once

#include <remnant/export.h>
#include <remnant/plan.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <vector>

namespace remnant::nn {

/// torch.nn.Dropout. SAVES: 16 bytes, or with a setting's dropout=noise PyTorch's noise.
class REMNANT_API DropoutImpl : public torch::nn::Cloneable<DropoutImpl>, public KeepsByChoice {
 public:
  explicit DropoutImpl(double p = 0.5) : DropoutImpl(torch::nn::DropoutOptions(p)) {}
  /// Throws c10::Error unless p is in [0, 1), and when `inplace` is set.
  explicit DropoutImpl(const torch::nn::DropoutOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }
  const LayerMemory& memory() const override { return memory_; }
  at::Tensor forward(const at::Tensor& input);

  torch::nn::DropoutOptions options;

 private:
  LayerMemory memory_ = Memory::exact();
};
TORCH_MODULE(Dropout);

/// torch.nn.LayerNorm over the last dimension: parameters weight and bias. SAVES: its output, as
/// remnant::layer_norm says, or with a setting's norm=input what PyTorch saves, with its bits codes of the
/// output.
class REMNANT_API LayerNormImpl : public torch::nn::Cloneable<LayerNormImpl>, public KeepsByChoice {
 public:
  explicit LayerNormImpl(std::vector<int64_t> normalized_shape)
      : LayerNormImpl(torch::nn::LayerNormOptions(std::move(normalized_shape))) {}
  /// Throws c10::Error unless normalized_shape has one dimension.
  explicit LayerNormImpl(const torch::nn::LayerNormOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }
  const LayerMemory& memory() const override { return memory_; }
  at::Tensor forward(const at::Tensor& input);

  torch::nn::LayerNormOptions options;
  at::Tensor weight, bias;

 private:
  LayerMemory memory_ = Memory::exact();
};
TORCH_MODULE(LayerNorm);

/// torch.nn.Linear: parameters weight and bias, initialised as torch's. SAVES: its input, or with a setting's
/// bits its codes, as remnant::linear says, in training.
class REMNANT_API LinearImpl : public torch::nn::Cloneable<LinearImpl>, public KeepsByChoice {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const torch::nn::LinearOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }
  const LayerMemory& memory() const override { return memory_; }
  at::Tensor forward(const at::Tensor& input);

  torch::nn::LinearOptions options;
  at::Tensor weight, bias;

 private:
  LayerMemory memory_ = Memory::exact();
};
TORCH_MODULE(Linear);

/// torch.nn.GELU. SAVES: its input, or with a setting's bits codes of its derivative, as remnant::gelu says,
/// in training.
class REMNANT_API GELUImpl : public torch::nn::Cloneable<GELUImpl>, public KeepsByChoice {
 public:
  explicit GELUImpl(torch::nn::GELUOptions options_in = {}) : options(std::move(options_in)) {}
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }
  const LayerMemory& memory() const override { return memory_; }
  at::Tensor forward(const at::Tensor& input);

  torch::nn::GELUOptions options;

 private:
  LayerMemory memory_ = Memory::exact();
};
TORCH_MODULE(GELU);

/// torch.nn.SiLU. SAVES: as GELU.
class REMNANT_API SiLUImpl : public torch::nn::Cloneable<SiLUImpl>, public KeepsByChoice {
 public:
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }
  const LayerMemory& memory() const override { return memory_; }
  at::Tensor forward(const at::Tensor& input);

 private:
  LayerMemory memory_ = Memory::exact();
};
TORCH_MODULE(SiLU);

}  // namespace remnant::nn
