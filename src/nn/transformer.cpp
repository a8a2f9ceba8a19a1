#include <remnant/checkpoint.h>
#include <remnant/memory.h>
#include <remnant/nn/transformer.h>

#include <remnant/ops/activation.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/dropout_add.h>
#include <remnant/ops/feed_forward.h>
#include <remnant/ops/linear.h>
#include <remnant/ops/norm.h>

#include <ATen/ops/dropout.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>

#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>

namespace remnant::nn {
namespace {

using at::Tensor;

/// torch::nn::LayerNorm has no option for it; PyTorch's layers drop this bias too with bias = false.
class LayerNormWithoutBiasImpl final : public torch::nn::LayerNormImpl {
 public:
  explicit LayerNormWithoutBiasImpl(const torch::nn::LayerNormOptions& options) : LayerNormImpl(options) {
    drop_bias();
  }

  void reset() override {
    LayerNormImpl::reset();
    drop_bias();
  }

  // The base's clone makes a LayerNormImpl, whose parameters would not match.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<at::Device>& device) const override {
    auto copy = std::make_shared<LayerNormWithoutBiasImpl>(options);
    const Tensor source = weight.detach();
    copy->weight.set_data(device && source.device() != *device ? source.to(*device) : source.clone());
    copy->train(is_training());
    return copy;
  }

 private:
  void drop_bias() {
    parameters_.erase("bias");
    bias = Tensor();
  }
};

MultiheadAttention make_attention(const TransformerLayerOptions& options) {
  return MultiheadAttention(MultiheadAttentionOptions(options.d_model(), options.nhead())
                                .dropout(options.dropout())
                                .bias(options.bias())
                                .batch_first(options.batch_first())
                                .policy(options.memory().policy.value_or(options.policy()))
                                .keep(options.memory().attention)
                                .bits(options.memory().bits));
}

/// `layer` has the setting until now, whose policy ends with it.
void set_attention(MultiheadAttentionImpl& attention, const TransformerLayerOptions& layer,
                   const LayerMemory& memory) {
  attention.options.keep(memory.attention).bits(memory.bits);
  if (memory.policy.has_value()) {
    attention.options.policy(*memory.policy);
  } else if (layer.memory().policy.has_value()) {
    attention.options.policy(layer.policy());
  }
}

torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias));
}

torch::nn::LayerNorm make_norm(const TransformerLayerOptions& options) {
  const auto norm_options = torch::nn::LayerNormOptions({options.d_model()}).eps(options.layer_norm_eps());
  if (options.bias()) return torch::nn::LayerNorm(norm_options);
  return torch::nn::LayerNorm(std::static_pointer_cast<torch::nn::LayerNormImpl>(
      std::make_shared<LayerNormWithoutBiasImpl>(norm_options)));
}

torch::nn::Dropout make_dropout(const TransformerLayerOptions& options) {
  return torch::nn::Dropout(torch::nn::DropoutOptions(options.dropout()));
}

/// The module holds the probability and the mode.
Tensor drop(const torch::nn::Dropout& module, const Tensor& x, const LayerMemory& memory) {
  const double p = module->options.p();
  if (!module->is_training() || p == 0) return x;
  return memory.noise ? at::dropout(x, p, true) : remnant::dropout(x, p);
}

std::optional<Tensor> optional(const Tensor& x) { return x.defined() ? std::make_optional(x) : std::nullopt; }

/// The policy of ops that keep codes, at a layer's bits.
std::string code_policy(const LayerMemory& memory) {
  return memory.bits > 0 ? "quantized:bits=" + std::to_string(memory.bits) : "exact";
}

Tensor activate(const Tensor& x, Activation activation) {
  return activation == Activation::gelu ? at::gelu(x) : at::relu(x);
}

void check_options(const TransformerLayerOptions& options, const char* name) {
  TORCH_CHECK(options.dim_feedforward() > 0, name, ": dim_feedforward should be positive, got ",
              options.dim_feedforward());
}

void check_last_dim(const Tensor& x, const char* name, const char* argument,
                    const TransformerLayerOptions& options) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == options.d_model(), name, ": ", argument,
              "'s last dimension should be d_model = ", options.d_model(), ", got shape ", x.sizes());
}

constexpr const char* kEncoderName = "remnant::nn::TransformerEncoderLayer";
constexpr const char* kDecoderName = "remnant::nn::TransformerDecoderLayer";

void print_layer(std::ostream& stream, const char* name, const TransformerLayerOptions& options) {
  stream << name << "(d_model=" << options.d_model() << ", nhead=" << options.nhead()
         << ", dim_feedforward=" << options.dim_feedforward() << ", policy=" << options.policy().str() << ", "
         << options.memory().str() << ")";
}

/// x + dropout(block(x)), normalised before the block (pre-norm) or after the sum (post-norm).
template <typename Layer, typename Block>
Tensor residual(const Layer& layer, const Tensor& x, torch::nn::LayerNorm& norm,
                const torch::nn::Dropout& dropout, const Block& block) {
  const LayerMemory& memory = layer.options.memory();
  const bool norm_first = layer.options.norm_first();
  if (memory.norm_input || !layer.is_training()) {
    return norm_first ? x + drop(dropout, block(norm(x)), memory) : norm(x + drop(dropout, block(x), memory));
  }
  const double p = dropout->is_training() ? dropout->options.p() : 0.0, eps = norm->options.eps();
  const auto weight = optional(norm->weight), bias = optional(norm->bias);
  const std::string policy = code_policy(memory);
  if (norm_first) return dropout_add(block(layer_norm(x, weight, bias, eps, policy)), x, p);
  return std::get<0>(
      dropout_add_layer_norm(block(x), x, p, weight, bias, eps, std::nullopt, /*need_sum=*/false, policy));
}

/// body(x...), or under a layer that keeps its inputs alone a checkpoint of it.
template <typename Layer, typename Body, typename... Inputs>
Tensor run_layer(const Layer& layer, const Body& body, const Inputs&... inputs) {
  if (layer.options.memory().checkpoint && layer.is_training()) return remnant::checkpoint(body, inputs...);
  return body(inputs...);
}

template <typename Layer>
Tensor feed_forward_block(Layer& layer, const Tensor& x) {
  const LayerMemory& memory = layer.options.memory();
  const Activation activation = layer.options.activation();
  if (!layer.is_training() || (memory.hidden && memory.bits == 0)) {
    return layer.linear2(drop(layer.dropout, activate(layer.linear1(x), activation), memory));
  }
  return remnant::feed_forward(
      x, layer.linear1->weight, optional(layer.linear1->bias), layer.linear2->weight,
      optional(layer.linear2->bias), activation == Activation::gelu ? "gelu" : "relu",
      layer.dropout->is_training() ? layer.dropout->options.p() : 0.0, code_policy(memory));
}

/// The encoder layer with its attention given as a function of its input.
template <typename SelfAttention>
Tensor encode(TransformerEncoderLayerImpl& layer, const Tensor& src, const SelfAttention& self_attention) {
  const Tensor x = residual(layer, src, layer.norm1, layer.dropout1, self_attention);
  return residual(layer, x, layer.norm2, layer.dropout2,
                  [&](const Tensor& y) { return feed_forward_block(layer, y); });
}

/// The decoder layer with its two attentions given as functions of their input.
template <typename SelfAttention, typename CrossAttention>
Tensor decode(TransformerDecoderLayerImpl& layer, const Tensor& tgt, const SelfAttention& self_attention,
              const CrossAttention& cross_attention) {
  Tensor x = residual(layer, tgt, layer.norm1, layer.dropout1, self_attention);
  x = residual(layer, x, layer.norm2, layer.dropout2, cross_attention);
  return residual(layer, x, layer.norm3, layer.dropout3,
                  [&](const Tensor& y) { return feed_forward_block(layer, y); });
}

}  // namespace

TransformerEncoderLayerImpl::TransformerEncoderLayerImpl(const TransformerLayerOptions& options_in)
    : options(options_in) {
  check_options(options, kEncoderName);
  TransformerEncoderLayerImpl::reset();
}

void TransformerEncoderLayerImpl::reset() {
  const int64_t d_model = options.d_model(), width = options.dim_feedforward();
  self_attn = register_module("self_attn", make_attention(options));
  linear1 = register_module("linear1", make_linear(d_model, width, options.bias()));
  dropout = register_module("dropout", make_dropout(options));
  linear2 = register_module("linear2", make_linear(width, d_model, options.bias()));
  norm1 = register_module("norm1", make_norm(options));
  norm2 = register_module("norm2", make_norm(options));
  dropout1 = register_module("dropout1", make_dropout(options));
  dropout2 = register_module("dropout2", make_dropout(options));
}

Tensor TransformerEncoderLayerImpl::forward(const Tensor& src, const Tensor& src_mask,
                                            const Tensor& src_key_padding_mask, bool is_causal) {
  const memory::LayerScope scope(this);
  check_last_dim(src, kEncoderName, "src", options);
  // A checkpoint outlives this call, and so must all it reads: the layer where somebody owns it. Masks are
  // arguments, since they may have a gradient.
  const auto body = [this, is_causal, owner = weak_from_this().lock()](
                        const Tensor& input, const Tensor& mask, const Tensor& key_padding_mask) {
    return encode(*this, input, [&](const Tensor& x) {
      return std::get<0>(self_attn(x, x, x, key_padding_mask, false, mask, true, is_causal));
    });
  };
  return run_layer(*this, body, src, src_mask, src_key_padding_mask);
}

void TransformerEncoderLayerImpl::set_memory(const LayerMemory& memory) {
  set_attention(*self_attn, options, memory);
  options.memory(memory);
}

void TransformerEncoderLayerImpl::pretty_print(std::ostream& stream) const {
  print_layer(stream, kEncoderName, options);
}

Tensor TransformerEncoderLayerImpl::forward_cached(const Tensor& src, KeyValueCache& cache) {
  const memory::LayerScope scope(this);
  check_last_dim(src, kEncoderName, "src", options);
  return encode(*this, src, [&](const Tensor& x) { return self_attn->forward_self_cached(x, cache); });
}

TransformerDecoderLayerImpl::TransformerDecoderLayerImpl(const TransformerLayerOptions& options_in)
    : options(options_in) {
  check_options(options, kDecoderName);
  TransformerDecoderLayerImpl::reset();
}

void TransformerDecoderLayerImpl::reset() {
  const int64_t d_model = options.d_model(), width = options.dim_feedforward();
  self_attn = register_module("self_attn", make_attention(options));
  multihead_attn = register_module("multihead_attn", make_attention(options));
  linear1 = register_module("linear1", make_linear(d_model, width, options.bias()));
  dropout = register_module("dropout", make_dropout(options));
  linear2 = register_module("linear2", make_linear(width, d_model, options.bias()));
  norm1 = register_module("norm1", make_norm(options));
  norm2 = register_module("norm2", make_norm(options));
  norm3 = register_module("norm3", make_norm(options));
  dropout1 = register_module("dropout1", make_dropout(options));
  dropout2 = register_module("dropout2", make_dropout(options));
  dropout3 = register_module("dropout3", make_dropout(options));
}

void TransformerDecoderLayerImpl::set_memory(const LayerMemory& memory) {
  set_attention(*self_attn, options, memory);
  set_attention(*multihead_attn, options, memory);
  options.memory(memory);
}

void TransformerDecoderLayerImpl::pretty_print(std::ostream& stream) const {
  print_layer(stream, kDecoderName, options);
}

Tensor TransformerDecoderLayerImpl::forward(const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask,
                                            const Tensor& memory_mask, const Tensor& tgt_key_padding_mask,
                                            const Tensor& memory_key_padding_mask, bool tgt_is_causal,
                                            bool memory_is_causal) {
  const remnant::memory::LayerScope scope(this);
  check_last_dim(tgt, kDecoderName, "tgt", options);
  check_last_dim(memory, kDecoderName, "memory", options);
  const auto body = [this, tgt_is_causal, memory_is_causal, owner = weak_from_this().lock()](
                        const Tensor& target, const Tensor& source, const Tensor& mask,
                        const Tensor& source_mask, const Tensor& key_padding_mask,
                        const Tensor& source_key_padding_mask) {
    return decode(
        *this, target,
        [&](const Tensor& x) {
          return std::get<0>(self_attn(x, x, x, key_padding_mask, false, mask, true, tgt_is_causal));
        },
        [&](const Tensor& x) {
          return std::get<0>(multihead_attn(x, source, source, source_key_padding_mask, false, source_mask,
                                            true, memory_is_causal));
        });
  };
  return run_layer(*this, body, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                   memory_key_padding_mask);
}

Tensor TransformerDecoderLayerImpl::forward_cached(const Tensor& tgt, const Tensor& memory,
                                                   const Tensor& memory_key_padding_mask,
                                                   DecoderCache& cache) {
  const remnant::memory::LayerScope scope(this);
  check_last_dim(tgt, kDecoderName, "tgt", options);
  return decode(
      *this, tgt, [&](const Tensor& x) { return self_attn->forward_self_cached(x, cache.self); },
      [&](const Tensor& x) {
        return multihead_attn->forward_cross_cached(x, memory, memory_key_padding_mask, cache.cross);
      });
}

}  // namespace remnant::nn
