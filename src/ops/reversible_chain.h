#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

/// A chain of layers activation(batch_norm(conv2d(x))) of equal width that is walked back from its output.
namespace remnant::ops {

/// leaky: the negative side times slope. maxmin: the larger and the smaller of channels c and c + C / 2.
enum class ChainActivation { leaky, maxmin };

struct ChainOptions {
  ChainActivation activation = ChainActivation::leaky;
  double slope = 0.5, eps = 1e-5, momentum = 0.1;
  std::vector<int64_t> anchors;   ///< layers whose input is kept
  std::vector<int64_t> residues;  ///< layers of whose input the low 16 bits are kept (float64: 32)
};

/// Of each layer. The running statistics are changed by the forward alone.
struct ChainTensors {
  std::vector<at::Tensor> weights, scales, shifts, running_means, running_vars;
};

/// What the forward keeps of one layer.
struct KeptOfLayer {
  at::Tensor ring;             ///< FullConvolution::ring; undefined where the input is not rebuilt
  at::Tensor mean, deviation;  ///< of the convolution's output: batch mean, 1 / standard deviation
  at::Tensor signs;            ///< of the norm's output, one bit an element
  at::Tensor hidden,
      columns;       ///< [N, k, H, W]: channels of the convolution's output that the norm hides; which
  at::Tensor input;  ///< of an anchor
  at::Tensor residue, step;  ///< of the input: its low bits, and what they count
  at::Tensor probes;         ///< [N, 4], products of the input with probe_signs
};

struct ChainKept {
  std::vector<KeptOfLayer> layers;
  at::Tensor probes;  ///< of the output, as of each input
};

/// Throws unless the tensors fit together.
void check_chain(const at::Tensor& input, const ChainTensors& tensors, const ChainOptions& options);

/// The output, channels last. Fills `kept` unless it is null.
at::Tensor chain_forward(const at::Tensor& input, const ChainTensors& tensors, const ChainOptions& options,
                         ChainKept* kept);

struct ChainGradients {
  at::Tensor input;
  std::vector<at::Tensor> weights, scales, shifts;
};

/// `errors`: [layers] float64, receives the measured relative error of each input that was rebuilt. What
/// fails its check is made again by the layers below; throws where that does not give what the forward had.
ChainGradients chain_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& output,
                              const ChainTensors& tensors, const ChainOptions& options, const ChainKept& kept,
                              bool needs_input, const at::Tensor& errors);

/// Anchors and residues with which no input of these samples is rebuilt with a larger relative error than
/// `limit`, by running the chain and walking it back.
void plan_chain(const at::Tensor& samples, const ChainTensors& tensors, ChainOptions& options, double limit);

}  // namespace remnant::ops
