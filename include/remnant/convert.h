#pragma once

#include <remnant/export.h>
#include <remnant/setting.h>

#include <string>
#include <vector>

namespace torch::nn {
class AnyModule;
class Module;
}  // namespace torch::nn

namespace remnant {

/// What a conversion did, by paths in the model ("" is the model itself).
struct REMNANT_API Conversion {
  struct Left {
    std::string name;
    std::string reason;  ///< one sentence
  };
  std::vector<std::string> converted;  ///< replaced by this call
  std::vector<Left> left;              ///< of a kind that could be replaced, but not here
  /// For people, a line each.
  std::string table() const;
};

/// Replaces torch::nn modules of `model` by remnant::nn's, which keep what `memory` says, and gives the
/// setting to those that already are remnant::nn's: MultiheadAttention, TransformerEncoderLayer and
/// -DecoderLayer, TransformerEncoder and -Decoder, LayerNorm over the last dimension, and Dropout; under
/// codes also Linear, GELU and SiLU. Others keep no more under remnant::nn and stay.
///
/// A Conv1d, 2d or 3d, the BatchNorm or GroupNorm of as many channels behind it and a ReLU, LeakyReLU or SiLU
/// behind that (or none) become one unit as remnant::conv_norm_act, where they follow each other in a
/// torch::nn::Sequential: each part stays in its place with its tensors, and the last one computes, so that
/// the Sequential as a whole can be called, and not one part alone. A 1x1 convolution with a stride and no
/// activation, a shortcut, keeps its input alone. What a unit returns may be changed in place.
///
/// Parameters are the very same tensors, in the same order under the same names, and linear layers, norms
/// and dropouts inside of Transformer layers the same modules, so that optimizers, train and eval mode,
/// requires_grad, devices, dtypes and sharing hold on. Outputs and gradients are equal up to rounding;
/// dropout draws from the same distribution. The CPU generator's state stays. Convert a clone, rather than
/// clone what has been converted: torch::nn::Transformer's clone cannot copy encoders of another type.
///
/// C++ calls a module's forward by its static type, so only what is called through a torch::nn::AnyModule
/// can be replaced: the parts of a torch::nn::Sequential, encoder and decoder of a torch::nn::Transformer,
/// and what a class names by nn::ConvertibleParts. The rest is `left` as it is, with its reason: members
/// declared by their type, elements of a ModuleList, and modules that remnant::nn has no equal for, such as
/// a layer with an activation function of the user's or a convolution that pads by reflection.
///
/// Throws c10::Error for a budget, which needs `plan`; the model is then as it was.
REMNANT_API Conversion convert(torch::nn::Module& model, const LayerMemory& memory);
/// The same, and what `model` holds is replaced itself where it can be.
REMNANT_API Conversion convert(torch::nn::AnyModule& model, const LayerMemory& memory);

/// Puts torch::nn modules in the place of remnant::nn's, in the same places as `convert` and with the same
/// tensors: outputs are bit for bit those of the model before `convert`. What only remnant::nn can do
/// (norm_first, batch_first, layers without bias) is left as it is.
REMNANT_API Conversion convert_back(torch::nn::Module& model);
REMNANT_API Conversion convert_back(torch::nn::AnyModule& model);

namespace nn {

/// What a class derives from whose members `convert` may replace.
class REMNANT_API ConvertibleParts {
 public:
  virtual ~ConvertibleParts() = default;
  /// Members that the class calls as torch::nn::AnyModule, each registered as a submodule too.
  virtual std::vector<torch::nn::AnyModule*> convertible_parts() = 0;
};

}  // namespace nn

}  // namespace remnant
