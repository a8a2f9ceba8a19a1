#include <remnant/nn/transformer_stack.h>

#include <ostream>

namespace remnant::nn {
namespace {

using at::Tensor;

template <typename Layer>
std::vector<Layer> make_layers(const TransformerLayerOptions& options, int64_t count) {
  TORCH_CHECK(count >= 0, "a Transformer stack's num_layers should not be negative, got ", count);
  std::vector<Layer> layers;
  layers.reserve(count);
  for (int64_t i = 0; i < count; ++i) layers.push_back(Layer(options));
  return layers;
}

template <typename Stack, typename Layer>
void fill(Stack& stack, const std::vector<Layer>& layers, torch::nn::AnyModule norm) {
  stack.layers = stack.register_module("layers", torch::nn::ModuleList());
  for (const Layer& layer : layers) stack.layers->push_back(layer);
  stack.norm = std::move(norm);
  if (!stack.norm.is_empty()) stack.register_module("norm", stack.norm.ptr());
}

/// What Cloneable asks of a copy: modules of its own in place of those it shares with the original.
template <typename Stack>
void separate(Stack& stack) {
  const torch::nn::ModuleList shared = stack.layers;
  stack.layers = stack.register_module("layers", torch::nn::ModuleList());
  for (const auto& layer : *shared) stack.layers->push_back(layer->clone());
  if (stack.norm.is_empty()) return;
  stack.norm = stack.norm.clone();
  stack.register_module("norm", stack.norm.ptr());
}

}  // namespace

TransformerEncoderImpl::TransformerEncoderImpl(const TransformerLayerOptions& options, int64_t num_layers,
                                               torch::nn::AnyModule norm_in)
    : TransformerEncoderImpl(make_layers<TransformerEncoderLayer>(options, num_layers), std::move(norm_in)) {}

TransformerEncoderImpl::TransformerEncoderImpl(const std::vector<TransformerEncoderLayer>& layers_in,
                                               torch::nn::AnyModule norm_in) {
  fill(*this, layers_in, std::move(norm_in));
}

void TransformerEncoderImpl::reset() { separate(*this); }

void TransformerEncoderImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::TransformerEncoder";
}

Tensor TransformerEncoderImpl::forward(const Tensor& src, const Tensor& src_mask,
                                       const Tensor& src_key_padding_mask, bool is_causal) {
  Tensor x = src;
  for (size_t i = 0; i < layers->size(); ++i) {
    x = layers->at<TransformerEncoderLayerImpl>(i).forward(x, src_mask, src_key_padding_mask, is_causal);
  }
  return norm.is_empty() ? x : norm.forward<Tensor>(x);
}

TransformerDecoderImpl::TransformerDecoderImpl(const TransformerLayerOptions& options, int64_t num_layers,
                                               torch::nn::AnyModule norm_in)
    : TransformerDecoderImpl(make_layers<TransformerDecoderLayer>(options, num_layers), std::move(norm_in)) {}

TransformerDecoderImpl::TransformerDecoderImpl(const std::vector<TransformerDecoderLayer>& layers_in,
                                               torch::nn::AnyModule norm_in) {
  fill(*this, layers_in, std::move(norm_in));
}

void TransformerDecoderImpl::reset() { separate(*this); }

void TransformerDecoderImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::TransformerDecoder";
}

Tensor TransformerDecoderImpl::forward(const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask,
                                       const Tensor& memory_mask, const Tensor& tgt_key_padding_mask,
                                       const Tensor& memory_key_padding_mask, bool tgt_is_causal,
                                       bool memory_is_causal) {
  Tensor x = tgt;
  for (size_t i = 0; i < layers->size(); ++i) {
    x = layers->at<TransformerDecoderLayerImpl>(i).forward(x, memory, tgt_mask, memory_mask,
                                                           tgt_key_padding_mask, memory_key_padding_mask,
                                                           tgt_is_causal, memory_is_causal);
  }
  return norm.is_empty() ? x : norm.forward<Tensor>(x);
}

}  // namespace remnant::nn
