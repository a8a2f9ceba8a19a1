#pragma once

#include <remnant/export.h>
#include <remnant/plan.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/dropout.h>
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

}  // namespace remnant::nn
