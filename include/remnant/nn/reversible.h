#pragma once

#include <remnant/export.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/conv.h>

#include <cstdint>
#include <string>
#include <vector>

namespace remnant::nn {

struct REMNANT_API ReversibleChainOptions {
  ReversibleChainOptions(int64_t channels_in, int64_t layers_in) : channels(channels_in), layers(layers_in) {}
  int64_t channels, layers;
  int64_t kernel_size = 3;  ///< odd; zero padding keeps the size
  /// "leaky", leaky_relu; or "maxmin": the larger and the smaller of channels c and c + channels / 2, in
  /// their places, which by itself amplifies no error (docs/convolution.md has what it learned in trial).
  std::string activation = "leaky";
  double slope = 0.5;  ///< of leaky_relu's negative side, above 0
  double eps = 1e-5, momentum = 0.1;
  double noise = 0.02;      ///< of dirac_orthogonal_, which draws the weights
  double limit = 2e-4;      ///< relative error of a rebuilt input beyond which a plan resets it
  int64_t plan_every = 64;  ///< forwards in training between plans; also after an error above 2 limit
};

/// activation(batch_norm(conv2d(x))): parameters and buffers conv.weight, norm.weight, norm.bias,
/// norm.running_mean, norm.running_var, norm.num_batches_tracked, as torch's own have them.
class REMNANT_API ReversibleLayerImpl : public torch::nn::Cloneable<ReversibleLayerImpl> {
 public:
  explicit ReversibleLayerImpl(const ReversibleChainOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& input);

  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d norm{nullptr};
  ReversibleChainOptions options;
};
TORCH_MODULE(ReversibleLayer);

/// A run of layers of equal width, stride 1, whose backward walks from the last output back to the input:
/// modules "0", "1" and so on, each a ReversibleLayer. input and output [N, channels, H, W]; output in
/// channels-last order.
///
/// SAVES in training, in units of the input: the input and the output; of each layer a ring ((H + k - 1) (W +
/// k - 1) / (H W) - 1), signs (1 / 32, with maxmin 1 / 64), statistics, 4 numbers a sample; residues, the low
/// 16 bits of a layer's input (1 / 2), where the error of rebuilding would pass `limit`, and anchors, an
/// input itself, where one layer alone passes it. Channels that the norm scales to nearly 0 are kept. A plan
/// is made from 4 samples of a batch that is at hand. Every rebuilt input and the output is checked; one that
/// is off by more than 1e-3 (float64: 1e-7) is made again by running the layers forward from the nearest
/// anchor or the input, and checked again, and the next forward plans anew. Gradients are exact up to
/// rounding times amplification. Running statistics are updated once. In evaluation torch's ops run, and keep
/// what they keep; so they do while the norm of any layer is in evaluation.
///
/// float32 or float64, also under autocast. Input, output and parameters must not be changed before backward:
/// where autograd cannot see it (`.data`), an error is raised if what was made again does not agree. Double
/// backward raises an error.
class REMNANT_API ReversibleChainImpl : public torch::nn::Cloneable<ReversibleChainImpl> {
 public:
  ReversibleChainImpl(int64_t channels, int64_t layers)
      : ReversibleChainImpl(ReversibleChainOptions(channels, layers)) {}
  /// Throws c10::Error unless channels, layers, slope, limit and plan_every are above 0, kernel_size is odd,
  /// and channels are even for maxmin.
  explicit ReversibleChainImpl(const ReversibleChainOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& input);

  /// The current plan: layers whose input is kept, and those of whose input residues are.
  const std::vector<int64_t>& anchors() const { return anchors_; }
  const std::vector<int64_t>& residues() const { return residues_; }
  /// Measured by the last backward: relative error of each layer's input, NaN where it was not rebuilt.
  const at::Tensor& errors() const { return errors_; }
  /// Fixes the plan: no more are made. Throws c10::Error on a layer that is not there.
  void set_plan(std::vector<int64_t> anchors, std::vector<int64_t> residues);
  /// For checkpoints: the plan and what decides when the next is made, float64 [3 layers + 1]. A training
  /// that is resumed with it rebuilds, to the bit, as one that never stopped.
  at::Tensor plan_state() const;
  /// Throws c10::Error on a tensor of another size, and on one that is no such state.
  void set_plan_state(const at::Tensor& state);

  ReversibleChainOptions options;

 private:
  void plan(const at::Tensor& input);

  std::vector<ReversibleLayer> layers_;
  std::vector<int64_t> anchors_, residues_;
  at::Tensor errors_;
  int64_t since_plan_ = -1;  // -1: no plan yet
  bool fixed_ = false;
};
TORCH_MODULE(ReversibleChain);

/// y1 = x1 + F(x2), y2 = x2 + G(y1) over the halves of dimension 1: for any F and G that keep a half's shape,
/// modules "f" and "g".
///
/// SAVES: as a ReversibleSequence of one block. F and G run once more in backward, with the forward's random
/// state and autocast; their buffers (running statistics) are updated once. A leaf that F or G uses without
/// owning it as a parameter gets its gradient in `.grad`, as `backward()` does; torch::autograd::grad() does
/// not see it. A tensor that was computed outside of them and needs a gradient raises an error in backward.
class REMNANT_API CouplingImpl : public torch::nn::Module {
 public:
  CouplingImpl(torch::nn::AnyModule f, torch::nn::AnyModule g, bool affine);
  at::Tensor forward(const at::Tensor& input);
  bool affine() const { return affine_; }

  torch::nn::AnyModule f, g;

 private:
  bool affine_;
};
TORCH_MODULE(Coupling);

/// y1 = x1 + F(x2), y2 = x2 + G(y1).
REMNANT_API Coupling additive_coupling(torch::nn::AnyModule f, torch::nn::AnyModule g);
/// y1 = x1 exp(tanh(s)) + t with (s, t) = F(x2), and y2 likewise from G(y1): F and G give twice a half's
/// channels.
REMNANT_API Coupling affine_coupling(torch::nn::AnyModule f, torch::nn::AnyModule g);

/// Coupling blocks one after the other, modules "0", "1" and so on.
///
/// SAVES: its output, 4 numbers a sample, and for each F or G that draws random numbers a random state (5 kB
/// on a CPU), whatever the depth. The input that comes out at the end of the backward is checked by those
/// numbers; an error is thrown when it is off by more than 1e-3 (float64: 1e-7). Double backward raises an
/// error. Keeps nothing where neither the input nor a parameter needs a gradient.
///
/// A half input, and a float32 one under autocast, is added up exactly, in float64, and F and G get what they
/// would from torch: additive blocks give their input back to the bit however deep they are, affine ones to
/// float64's rounding. SAVES then the output in float32 and a byte an element (4 for affine blocks). The
/// result has the dtype of torch's own sums.
class REMNANT_API ReversibleSequenceImpl : public torch::nn::Module {
 public:
  explicit ReversibleSequenceImpl(std::vector<Coupling> blocks);
  at::Tensor forward(const at::Tensor& input);

 private:
  std::vector<Coupling> blocks_;
};
TORCH_MODULE(ReversibleSequence);

}  // namespace remnant::nn
