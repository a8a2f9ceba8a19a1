#pragma once

#include <remnant/export.h>
#include <remnant/setting.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace remnant {

/// Gives every layer of `model` that knows settings (remnant::nn's Transformer layers, at any depth) this
/// one. Weights stay as they are. Returns how many layers that were. Throws c10::Error for a budget, which
/// needs `plan`.
REMNANT_API int64_t set_memory(torch::nn::Module& model, const LayerMemory& memory);

/// What each of those layers keeps, by its path in the model, in the order of the model.
REMNANT_API std::vector<std::pair<std::string, LayerMemory>> get_memory(torch::nn::Module& model);

/// The same by patterns of paths, in which * stands for any characters: the last pattern that fits a layer
/// decides, and a layer that none fits stays as it is. Throws c10::Error, having changed nothing, on a
/// pattern that fits no layer, or with a policy none that has attention, and on a layer that cannot do what
/// was decided.
REMNANT_API void set_memory(torch::nn::Module& model,
                            const std::vector<std::pair<std::string, LayerMemory>>& patterns);

/// One layer's part in a plan.
struct REMNANT_API PlannedLayer {
  std::string name;  ///< its path in the model
  LayerMemory memory;
  int64_t kept_bytes = 0;   ///< what it keeps by itself, predicted
  double milliseconds = 0;  ///< what its choice adds to a step over the fastest one, predicted
  /// What its codes add, or would add, to the variance of the gradient of all parameters, over that
  /// gradient's square; measured with every other layer exact. 0 in a plan without bits.
  double code_variance = 0;
};

/// Bytes of a step on `batch` sequences of `length` positions.
struct REMNANT_API StepBytes {
  int64_t batch = 0, length = 0;
  int64_t kept_bytes = 0, peak_bytes = 0;
};

struct REMNANT_API Plan {
  std::vector<PlannedLayer> layers;
  int64_t budget_bytes = 0;
  /// Of a step: kept at the end of the forward, the peak, and its time, as put together from what each choice
  /// did in every layer at once; and as they were when the chosen mixture ran.
  int64_t predicted_kept_bytes = 0, predicted_peak_bytes = 0;
  int64_t measured_kept_bytes = 0, measured_peak_bytes = 0;
  double predicted_ms = 0, measured_ms = 0;
  /// What the mixture measured on other shapes, where the plan was given a loss that has them; each batch
  /// with each length.
  std::vector<StepBytes> shapes;

  /// The mixture's bytes on a shape that need not have run: those of `shapes`, interpolated linearly in batch
  /// and by a parabola in length, which is how they grow. Meant for shapes from half the planned one up to
  /// it; beyond, it extrapolates. Throws c10::Error without `shapes`, for numbers that are not positive, and
  /// for another batch or length than 1 where 1 was planned for.
  StepBytes predict(int64_t batch, int64_t length) const;

  /// For people: layers that chose alike in one row, and predicted against measured.
  std::string table() const;
};

/// Chooses for each layer of `model` what it keeps, so that a step's peak beyond parameters, gradients and
/// optimizer state fits `budget_bytes` at the least time, and sets it. Gradients equal eager's up to
/// rounding; with `bits` 8, 4 or 2 a layer may also keep codes of so many bits, as under unbiased:bits=b, and
/// then its gradients are unbiased instead.
///
/// loss() runs the model's forward on example inputs and returns the scalar to differentiate. It is called,
/// and its backward, about 25 times: each choice in every layer at once for its bytes and time, then the
/// mixture; with `bits` twice more for each layer, from one random state, for the noise of its codes. A
/// layer's codes are taken for the time that they save over one more than that variance. The model's
/// gradients and the CPU generator's state are as before afterwards. Run it on an otherwise idle machine,
/// with inputs of the largest shape that training will see.
///
/// Throws c10::Error when no layer of the model knows settings, when none is in training, and when nothing
/// fits: with the smallest budget that does; the model is then as it was.
REMNANT_API Plan plan(torch::nn::Module& model, const std::function<at::Tensor()>& loss, int64_t budget_bytes,
                      int64_t bits = 0);

/// The same for batch sequences of length positions, the largest that training will see, where
/// loss(batch, length) runs the model on any such shape up to there. Then runs the mixture on up to five
/// smaller shapes, three steps each, so that Plan::predict knows others.
REMNANT_API Plan plan(torch::nn::Module& model,
                      const std::function<at::Tensor(int64_t batch, int64_t length)>& loss, int64_t batch,
                      int64_t length, int64_t budget_bytes, int64_t bits = 0);

namespace nn {

/// What layers derive from that know settings.
class REMNANT_API KeepsByChoice {
 public:
  virtual ~KeepsByChoice() = default;
  virtual const LayerMemory& memory() const = 0;
  virtual void set_memory(const LayerMemory& memory) = 0;
  /// Whether it has attention, for LayerMemory::policy.
  virtual bool attends() const { return false; }
  /// Empty where it can do as `memory` says, or something near; else what it can do, such as "eager or
  /// exact".
  virtual std::string refusal(const LayerMemory& /*memory*/) const { return {}; }
};

}  // namespace nn

}  // namespace remnant
