// CPU autocast: products take the lower precision, as torch's do; norms compute in float32 whatever comes in
// and keep their input's dtype, again as torch's do on CPU; a sum takes the wider of its two dtypes; losses
// come out in float32. Ops that are not here (dropout, activations) run in their input's dtype.

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;

constexpr auto kCpu = c10::DeviceType::CPU;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Casts happen above autograd; the op below is called without this key.
using Below = c10::impl::ExcludeDispatchKeyGuard;
constexpr auto kKey = c10::DispatchKey::AutocastCPU;

template <typename T>
T lower(const T& x) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kCpu), x, kCpu);
}

template <typename T>
T cast(at::ScalarType type, const T& x) {
  return at::autocast::cached_cast(type, x, kCpu);
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const OptionalTensor& mask, bool causal, double dropout, std::optional<double> scale,
                     c10::string_view policy, at::OptionalIntArrayRef window,
                     const OptionalGenerator& generator) {
  static const auto op = find<decltype(attention)>("remnant::attention");
  const Below guard(kKey);
  return op.call(lower(query), lower(key), lower(value), mask, causal, dropout, scale, policy, window,
                 generator);
}

std::tuple<at::Tensor, at::Tensor> attention_with_weights(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const OptionalTensor& mask,
    bool causal, double dropout, std::optional<double> scale, c10::string_view policy,
    at::OptionalIntArrayRef window, const OptionalGenerator& generator) {
  static const auto op = find<decltype(attention_with_weights)>("remnant::attention_with_weights");
  const Below guard(kKey);
  return op.call(lower(query), lower(key), lower(value), mask, causal, dropout, scale, policy, window,
                 generator);
}

at::Tensor attention_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, bool causal,
                            double dropout, std::optional<double> scale, c10::string_view policy,
                            at::OptionalIntArrayRef window, const OptionalGenerator& generator) {
  static const auto op = find<decltype(attention_packed)>("remnant::attention_packed");
  const Below guard(kKey);
  return op.call(lower(query), lower(key), lower(value), cu_seqlens_q, cu_seqlens_k, causal, dropout, scale,
                 policy, window, generator);
}

at::Tensor attention_coded(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const OptionalTensor& mask, bool causal, double dropout,
                           std::optional<double> scale, at::OptionalIntArrayRef window, int64_t bits,
                           const OptionalGenerator& generator) {
  static const auto op = find<decltype(attention_coded)>("remnant::attention_coded");
  const Below guard(kKey);
  return op.call(lower(query), lower(key), lower(value), mask, causal, dropout, scale, window, bits,
                 generator);
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                  c10::string_view policy, const OptionalGenerator& generator) {
  static const auto op = find<decltype(linear)>("remnant::linear");
  const Below guard(kKey);
  // Codes are of the tensor that the caller has: a cast copy would be another for each reader.
  const at::Tensor x = policy == "exact" ? lower(input) : input;
  return op.call(x, lower(weight), lower(bias), policy, generator);
}

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                  c10::string_view policy, const OptionalGenerator& generator) {
  static const auto op = find<decltype(conv2d)>("remnant::conv2d");
  const Below guard(kKey);
  return op.call(lower(input), lower(weight), lower(bias), stride, padding, dilation, groups, policy,
                 generator);
}

// Products in half precision leave nothing to rebuild an input from: float32, whatever comes in.
at::Tensor reversible_chain(const at::Tensor& input, at::TensorList weights, at::TensorList scales,
                            at::TensorList shifts, at::TensorList means, at::TensorList vars, double momentum,
                            double eps, double slope, c10::string_view activation, at::IntArrayRef anchors,
                            at::IntArrayRef residues, const OptionalTensor& errors) {
  static const auto op = find<decltype(reversible_chain)>("remnant::reversible_chain");
  const Below guard(kKey);
  const at::Tensor x = input.scalar_type() == at::kDouble ? input : cast(at::kFloat, input);
  return op.call(x, weights, scales, shifts, means, vars, momentum, eps, slope, activation, anchors, residues,
                 errors);
}

at::Tensor feed_forward(const at::Tensor& input, const at::Tensor& weight1, const OptionalTensor& bias1,
                        const at::Tensor& weight2, const OptionalTensor& bias2, c10::string_view activation,
                        double dropout, c10::string_view policy, const OptionalGenerator& generator) {
  static const auto op = find<decltype(feed_forward)>("remnant::feed_forward");
  const Below guard(kKey);
  return op.call(lower(input), lower(weight1), lower(bias1), lower(weight2), lower(bias2), activation,
                 dropout, policy, generator);
}

// A floating mask is added to scores in any dtype, as attention takes it.
at::Tensor multihead_attention(const at::Tensor& query, const OptionalTensor& memory,
                               const at::Tensor& in_weight, const OptionalTensor& in_bias,
                               const at::Tensor& out_weight, const OptionalTensor& out_bias, int64_t heads,
                               const OptionalTensor& mask, bool causal, double dropout, bool keep_output,
                               const OptionalGenerator& generator) {
  static const auto op = find<decltype(multihead_attention)>("remnant::multihead_attention");
  const Below guard(kKey);
  return op.call(lower(query), lower(memory), lower(in_weight), lower(in_bias), lower(out_weight),
                 lower(out_bias), heads, mask, causal, dropout, keep_output, generator);
}

at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& target, int64_t ignore_index, double label_smoothing,
                                int64_t reduction) {
  static const auto op = find<decltype(linear_cross_entropy)>("remnant::linear_cross_entropy");
  const Below guard(kKey);
  return op.call(lower(input), lower(weight), lower(bias), target, ignore_index, label_smoothing, reduction);
}

// Parameters of another dtype than the input's: float32 ones are taken beside half inputs.
OptionalTensor norm_parameter(const at::Tensor& input, const OptionalTensor& x) {
  return x.has_value() && x->scalar_type() != input.scalar_type() ? cast(at::kFloat, x) : x;
}

at::Tensor layer_norm(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      double eps, c10::string_view policy) {
  static const auto op = find<decltype(layer_norm)>("remnant::layer_norm");
  const Below guard(kKey);
  return op.call(input, norm_parameter(input, weight), norm_parameter(input, bias), eps, policy);
}

at::Tensor rms_norm(const at::Tensor& input, const OptionalTensor& weight, std::optional<double> eps,
                    c10::string_view policy) {
  static const auto op = find<decltype(rms_norm)>("remnant::rms_norm");
  const Below guard(kKey);
  return op.call(input, norm_parameter(input, weight), eps, policy);
}

at::Tensor dropout_add(const at::Tensor& input, const at::Tensor& residual, double p,
                       const OptionalGenerator& generator) {
  static const auto op = find<decltype(dropout_add)>("remnant::dropout_add");
  const Below guard(kKey);
  const auto type = c10::promoteTypes(input.scalar_type(), residual.scalar_type());
  return op.call(cast(type, input), cast(type, residual), p, generator);
}

std::tuple<at::Tensor, at::Tensor> dropout_add_layer_norm(const at::Tensor& input, const at::Tensor& residual,
                                                          double p, const OptionalTensor& weight,
                                                          const OptionalTensor& bias, double eps,
                                                          const OptionalGenerator& generator, bool need_sum,
                                                          c10::string_view policy) {
  static const auto op = find<decltype(dropout_add_layer_norm)>("remnant::dropout_add_layer_norm");
  const Below guard(kKey);
  const auto type = c10::promoteTypes(input.scalar_type(), residual.scalar_type());
  const at::Tensor x = cast(type, input);
  return op.call(x, cast(type, residual), p, norm_parameter(x, weight), norm_parameter(x, bias), eps,
                 generator, need_sum, policy);
}

at::Tensor conv_norm_act(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups, c10::string_view norm, bool training,
                         double momentum, double eps, c10::string_view activation, c10::string_view memory,
                         const OptionalGenerator& generator, bool recompute) {
  static const auto op = find<decltype(conv_norm_act)>("remnant::conv_norm_act");
  const Below guard(kKey);
  return op.call(lower(input), lower(weight), lower(bias), norm_weight, norm_bias, running_mean, running_var,
                 lower(residual), stride, padding, dilation, groups, norm, training, momentum, eps,
                 activation, memory, generator, recompute);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, AutocastCPU, m) {
  m.impl("attention", TORCH_FN(attention));
  m.impl("attention_with_weights", TORCH_FN(attention_with_weights));
  m.impl("attention_coded", TORCH_FN(attention_coded));
  m.impl("attention_packed", TORCH_FN(attention_packed));
  m.impl("conv2d", TORCH_FN(conv2d));
  m.impl("linear", TORCH_FN(linear));
  m.impl("reversible_chain", TORCH_FN(reversible_chain));
  m.impl("conv_norm_act", TORCH_FN(conv_norm_act));
  m.impl("feed_forward", TORCH_FN(feed_forward));
  m.impl("multihead_attention", TORCH_FN(multihead_attention));
  m.impl("linear_cross_entropy", TORCH_FN(linear_cross_entropy));
  m.impl("layer_norm", TORCH_FN(layer_norm));
  m.impl("rms_norm", TORCH_FN(rms_norm));
  m.impl("dropout_add", TORCH_FN(dropout_add));
  m.impl("dropout_add_layer_norm", TORCH_FN(dropout_add_layer_norm));
}

}  // namespace remnant::autograd
