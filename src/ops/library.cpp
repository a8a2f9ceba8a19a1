// Every operator's schema, in one place. Residuals are extra outputs of a forward op; what a policy
// does not use has shape [0].

#include <torch/library.h>

TORCH_LIBRARY(remnant, m) {
  const std::vector<at::Tag> random{at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> plain{at::Tag::pt2_compliant_tag};
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float "
      "dropout=0.0, "
      "float? scale=None, str policy='recompute', int[]? window=None, Generator? generator=None) -> Tensor",
      random);
  m.def(
      "attention_with_weights(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, "
      "float dropout=0.0, float? scale=None, str policy='recompute', int[]? window=None, "
      "Generator? generator=None) -> (Tensor, Tensor)",
      random);
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float dropout, "
      "float scale, str policy, int[] window, bool keep, Generator? generator=None) -> (Tensor output, "
      "Tensor lse, "
      "Tensor probabilities, Tensor codes, Tensor table, Tensor seed)",
      random);
  m.def(
      "attention_backward(Tensor grad_output, Tensor? query, Tensor? key, Tensor? value, Tensor? mask, "
      "Tensor? output, Tensor lse, Tensor probabilities, Tensor codes, Tensor table, Tensor seed, "
      "SymInt kv_heads, SymInt keys, bool causal, float dropout, float scale, str policy, int[] window, "
      "bool[4] needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
      plain);
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor? mask, bool causal, float scale, int[] window) -> "
      "Tensor",
      plain);
  m.def(
      "attention_packed(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "bool causal=False, float dropout=0.0, float? scale=None, str policy='recompute', int[]? window=None, "
      "Generator? generator=None) -> Tensor",
      random);
  m.def(
      "attention_packed_forward(Tensor query, Tensor key, Tensor value, int[] cu_seqlens_q, int[] "
      "cu_seqlens_k, bool causal, float dropout, float scale, str policy, int[] window, bool keep, "
      "Generator? generator=None) -> (Tensor output, Tensor lse, Tensor probabilities, Tensor codes, "
      "Tensor table, Tensor seed)",
      random);
  m.def(
      "attention_packed_backward(Tensor grad_output, Tensor? query, Tensor? key, Tensor? value, Tensor? "
      "output, int[] cu_seqlens_q, int[] cu_seqlens_k, Tensor lse, Tensor probabilities, Tensor codes, "
      "Tensor table, Tensor seed, int kv_heads, bool causal, float dropout, float scale, str policy, "
      "int[] window, bool[3] needs) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
      plain);
  m.def(
      "attention_residual_bytes(str policy, int heads, int queries, int keys, int element_bytes, bool "
      "dropout) -> int",
      plain);
  m.def("softmax_approximation(Tensor energy, Tensor? mask=None, int m=5, bool paper_text=False) -> Tensor",
        plain);
  m.def(
      "softmax_approximation_forward(Tensor energy, Tensor? mask, int m, bool keep) -> (Tensor output, "
      "Tensor codes, Tensor table)",
      plain);
  m.def(
      "softmax_approximation_backward(Tensor grad_output, Tensor codes, Tensor table, int m, bool "
      "paper_text) "
      "-> Tensor",
      plain);
  m.def("softmax_input_from_output(Tensor output, Tensor lse) -> Tensor", plain);
  m.def("dropout(Tensor input, float p, Generator? generator=None) -> Tensor", random);
  m.def("dropout_forward(Tensor input, float p, Generator? generator=None) -> (Tensor output, Tensor seed)",
        random);
  m.def("dropout_backward(Tensor grad_output, Tensor seed, float p) -> Tensor", plain);
  m.def(
      "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index=-100, "
      "float label_smoothing=0.0, int reduction=1) -> Tensor",
      plain);
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor? bias, Tensor target, int "
      "ignore_index, "
      "float label_smoothing, int reduction, bool[3] needs) -> (Tensor loss, Tensor grad_input, "
      "Tensor grad_weight, Tensor grad_bias)",
      plain);
  m.def(
      "feed_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str "
      "activation='relu', float dropout=0.0, str policy='exact', Generator? generator=None) -> Tensor",
      random);
  m.def(
      "feed_forward_coded(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str "
      "activation, float dropout, int bits, Generator? generator=None) -> (Tensor output, Tensor seed, "
      "Tensor "
      "codes)",
      random);
  m.def(
      "feed_forward_coded_backward(Tensor grad_output, Tensor? input_codes, Tensor? input_table, Tensor "
      "weight1, Tensor weight2, Tensor seed, Tensor codes, str activation, float dropout, int bits, bool[5] "
      "needs) -> (Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2, Tensor "
      "grad_bias2)",
      plain);
  m.def(
      "feed_forward_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str "
      "activation, float dropout, Generator? generator=None) -> (Tensor output, Tensor seed)",
      random);
  m.def(
      "feed_forward_backward(Tensor grad_output, Tensor input, Tensor weight1, Tensor? bias1, Tensor "
      "weight2, "
      "Tensor seed, str activation, float dropout, bool[5] needs) -> (Tensor grad_input, Tensor "
      "grad_weight1, "
      "Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2)",
      plain);
  m.def(
      "multihead_attention(Tensor query, Tensor? memory, Tensor in_weight, Tensor? in_bias, Tensor "
      "out_weight, "
      "Tensor? out_bias, int heads, Tensor? mask=None, bool causal=False, float dropout=0.0, bool "
      "keep_output=False, Generator? generator=None) -> Tensor",
      random);
  m.def(
      "multihead_attention_forward(Tensor query, Tensor? memory, Tensor in_weight, Tensor? in_bias, Tensor "
      "out_weight, Tensor? out_bias, int heads, Tensor? mask, bool causal, float dropout, bool keep, "
      "Generator? generator=None) -> (Tensor output, Tensor attended, Tensor lse, Tensor seeds)",
      random);
  m.def(
      "multihead_attention_backward(Tensor grad_output, Tensor query, Tensor? memory, Tensor in_weight, "
      "Tensor? in_bias, Tensor out_weight, Tensor attended, Tensor lse, Tensor seeds, int heads, Tensor? "
      "mask, "
      "bool causal, float dropout, bool[6] needs) -> (Tensor grad_query, Tensor grad_memory, Tensor "
      "grad_in_weight, Tensor grad_in_bias, Tensor grad_out_weight, Tensor grad_out_bias)",
      plain);
  m.def("draw_seed(Tensor like, Generator? generator=None) -> Tensor", random);
  m.def("dropout_add(Tensor input, Tensor residual, float p, Generator? generator=None) -> Tensor", random);
  m.def("dropout_add_forward(Tensor input, Tensor residual, Tensor seed, float p) -> Tensor", plain);
  m.def(
      "layer_norm(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, str policy='exact') "
      "-> Tensor",
      random);
  m.def("rms_norm(Tensor input, Tensor? weight=None, float? eps=None, str policy='exact') -> Tensor", random);
  m.def(
      "dropout_add_layer_norm(Tensor input, Tensor residual, float p, Tensor? weight=None, Tensor? "
      "bias=None, "
      "float eps=1e-05, Generator? generator=None, bool need_sum=True, str policy='exact') -> (Tensor, "
      "Tensor)",
      random);
  m.def(
      "norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p, "
      "float eps, bool center, bool need_sum, bool keep, int[] hidden, bool all_hidden, int bits=0) -> "
      "(Tensor output, "
      "Tensor sum, Tensor rstd, Tensor aside)",
      plain);
  m.def(
      "norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor? output, Tensor? rstd, Tensor aside, "
      "Tensor? weight, Tensor? bias, Tensor? seed, float p, bool center, int[] hidden, bool[4] needs) -> "
      "(Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      plain);
  m.def(
      "attention_coded(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float "
      "dropout=0.0, float? scale=None, int[]? window=None, int bits=8, Generator? generator=None) -> Tensor",
      random);
  m.def("activation_coded(Tensor input, int kind, int bits, Generator? generator=None) -> Tensor", random);
  m.def("relu(Tensor input) -> Tensor", plain);
  m.def("leaky_relu(Tensor input, float slope=0.01) -> Tensor", plain);
  m.def("gelu(Tensor input, str approximate='none', str policy='exact') -> Tensor", random);
  m.def("silu(Tensor input, str policy='exact') -> Tensor", random);
  m.def(
      "activation_forward(Tensor input, int kind, float slope, int bits, bool keep) -> (Tensor output, "
      "Tensor "
      "codes)",
      plain);
  m.def(
      "activation_backward(Tensor grad_output, Tensor? input, Tensor codes, int kind, float slope, int bits) "
      "-> Tensor",
      plain);
  m.def("encode(Tensor input, Tensor seed, int bits) -> (Tensor codes, Tensor table)", plain);
  m.def("decode(Tensor codes, Tensor table, int bits, SymInt[] size, ScalarType dtype) -> Tensor", plain);
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias=None, str policy='exact', Generator? generator=None) "
      "-> Tensor",
      random);
  m.def(
      "linear_coded(Tensor input, Tensor weight, Tensor? bias, int bits, Generator? generator=None) -> "
      "Tensor",
      random);
  m.def(
      "linear_coded_backward(Tensor grad_output, Tensor? codes, Tensor? table, Tensor? weight, SymInt "
      "columns, "
      "int bits, bool[3] needs) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      plain);
  m.def(
      "conv_norm_act(Tensor input, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, Tensor? "
      "norm_bias=None, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, Tensor? residual=None, "
      "int[] stride=[1], int[] padding=[0], int[] dilation=[1], int groups=1, str norm='batch', bool "
      "training=True, float momentum=0.1, float eps=1e-05, str activation='relu', str memory='exact', "
      "Generator? generator=None, bool recompute=False) -> Tensor",
      random);
  m.def("shortcut(Tensor input, int stride, int channels, bool average=False) -> Tensor", plain);
  m.def("linear_code_bytes(int elements, int bits) -> int", plain);
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor? bias, Tensor "
      "target, int ignore_index, float label_smoothing, bool[3] needs) -> (Tensor grad_input, Tensor "
      "grad_weight, Tensor grad_bias)",
      plain);
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] "
      "dilation=1, "
      "int groups=1, str policy='exact', Generator? generator=None) -> Tensor",
      random);
  m.def(
      "conv2d_coded(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] "
      "dilation, "
      "int groups, int bits, Generator? generator=None) -> Tensor",
      random);
  m.def(
      "conv2d_coded_backward(Tensor grad_output, Tensor? codes, Tensor? table, Tensor weight, SymInt[] "
      "input, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, int bits, bool[3] needs) -> (Tensor "
      "grad_input, Tensor grad_weight, Tensor grad_bias)",
      plain);
  m.def(
      "conv2d_rebuilt(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] "
      "dilation, int groups, bool least) -> Tensor",
      plain);
  m.def(
      "conv2d_inversion(Tensor weight, int[2] input_size, int[2] stride=1, int[2] padding=0, int[2] "
      "dilation=1, "
      "int groups=1) -> str",
      plain);
  m.def(
      "conv2d_inversion_error(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] "
      "padding=0, "
      "int[2] dilation=1, int groups=1) -> (float error, float kept)",
      plain);
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False) -> Tensor",
      plain);
  m.def(
      "max_pool2d_forward(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "bool ceil_mode) -> (Tensor output, Tensor places)",
      plain);
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor places, SymInt[] input_sizes, int[2] kernel_size, "
      "int[2] "
      "stride, int[2] padding, int[2] dilation) -> Tensor",
      plain);
  m.def("inversion_counters() -> int[]", plain);
  m.def("reset_inversion_counters() -> ()", plain);
  m.def("look_for_derived(bool look) -> bool", plain);
  m.def(
      "reversible_chain(Tensor input, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
      "Tensor(a!)[] "
      "running_means, Tensor(b!)[] running_vars, float momentum=0.1, float eps=1e-05, float slope=0.5, str "
      "activation='leaky', int[] "
      "anchors=[], int[] residues=[], Tensor(c!)? errors=None) -> Tensor",
      plain);
  m.def(
      "reversible_chain_plan(Tensor samples, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
      "float "
      "eps=1e-05, float slope=0.5, str activation='leaky', float limit=0.0002) -> (int[] anchors, int[] "
      "residues)",
      plain);
}
