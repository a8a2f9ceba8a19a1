#pragma once

#include <remnant/nn/transformer.h>

#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/modulelist.h>

#include <vector>

namespace remnant::nn {

/// torch.nn.TransformerEncoder: parameters layers.0.*, layers.1.*, ..., norm.*.
class REMNANT_API TransformerEncoderImpl : public torch::nn::Cloneable<TransformerEncoderImpl> {
 public:
  /// num_layers new layers, and after them `norm`, if any.
  TransformerEncoderImpl(const TransformerLayerOptions& options, int64_t num_layers,
                         torch::nn::AnyModule norm = {});
  /// These very layers.
  explicit TransformerEncoderImpl(const std::vector<TransformerEncoderLayer>& layers,
                                  torch::nn::AnyModule norm = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// Shapes and masks as in TransformerEncoderLayer.
  at::Tensor forward(const at::Tensor& src, const at::Tensor& src_mask = {},
                     const at::Tensor& src_key_padding_mask = {}, bool is_causal = false);

  torch::nn::ModuleList layers = nullptr;
  torch::nn::AnyModule norm;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())}, {2, torch::nn::AnyValue(at::Tensor())},
                           {3, torch::nn::AnyValue(false)})
};
TORCH_MODULE(TransformerEncoder);

/// torch.nn.TransformerDecoder: parameters layers.0.*, layers.1.*, ..., norm.*.
class REMNANT_API TransformerDecoderImpl : public torch::nn::Cloneable<TransformerDecoderImpl> {
 public:
  /// num_layers new layers, and after them `norm`, if any.
  TransformerDecoderImpl(const TransformerLayerOptions& options, int64_t num_layers,
                         torch::nn::AnyModule norm = {});
  /// These very layers.
  explicit TransformerDecoderImpl(const std::vector<TransformerDecoderLayer>& layers,
                                  torch::nn::AnyModule norm = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// Shapes and masks as in TransformerDecoderLayer.
  at::Tensor forward(const at::Tensor& tgt, const at::Tensor& memory, const at::Tensor& tgt_mask = {},
                     const at::Tensor& memory_mask = {}, const at::Tensor& tgt_key_padding_mask = {},
                     const at::Tensor& memory_key_padding_mask = {}, bool tgt_is_causal = false,
                     bool memory_is_causal = false);

  torch::nn::ModuleList layers = nullptr;
  torch::nn::AnyModule norm;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(at::Tensor())}, {3, torch::nn::AnyValue(at::Tensor())},
                           {4, torch::nn::AnyValue(at::Tensor())}, {5, torch::nn::AnyValue(at::Tensor())},
                           {6, torch::nn::AnyValue(false)}, {7, torch::nn::AnyValue(false)})
};
TORCH_MODULE(TransformerDecoder);

}  // namespace remnant::nn
