#pragma once

#include "common/fidelity.h"
#include "common/optimizer.h"
#include "common/options.h"
#include "common/run_folder.h"

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace remnant::app {

/// One batch, ready for the model.
struct Minibatch {
  int64_t terms = 0;               ///< examples, or words, that count in the loss
  int64_t tokens = 0;              ///< for the speed, in Task::unit(): all that the model sees, less padding
  std::vector<at::Tensor> inputs;  ///< what the step would hold anyway
  std::function<at::Tensor()> loss;  ///< the forward pass: the loss summed over the terms
};

/// What one training step cost.
struct StepCost {
  double loss = 0;
  int64_t kept_bytes = 0;  ///< most that one of the batches kept
  int64_t peak_bytes = 0;
};

class StepTrace;

/// Adds to the parameters' gradients that of the mean loss a term over all of `batches`, one batch after
/// the other: N batches give what one batch of all their examples would. `trace`, if any, observes.
StepCost accumulate_gradients(const std::vector<Minibatch>& batches, bool bf16, StepTrace* trace = nullptr);

/// How far the gradient that accumulate_gradients, started from `random_before`, has left in the parameters
/// is from the exact one. Changes nothing. `halves` hold the examples of `batches` in two parts; no added
/// variance where one of them is empty.
Fidelity check_gradients(torch::nn::Module& model, const std::vector<Minibatch>& batches,
                         const std::array<std::vector<Minibatch>, 2>& halves, bool bf16,
                         const at::Tensor& random_before);

/// Named numbers in a fixed order.
using Measures = std::vector<std::pair<std::string, double>>;

/// What a program found on its validation data.
struct Validation {
  Measures best;   ///< what the run remembers of its best epoch, and events show; the first decides
  Measures lines;  ///< for metrics.jsonl, each as "validation_NAME"
  std::string text;
};

/// The test of the best model.
struct TestResult {
  nlohmann::ordered_json summary;  ///< at the start of summary.json, behind the setting that compare compares
  nlohmann::ordered_json more;     ///< at its end
  std::string text;
};

/// The batch on which memory.json reports.
struct Probe {
  Minibatch batch;
  nlohmann::ordered_json shape;
  std::string text;                                 ///< "32 x 256 bytes"
  std::optional<int64_t> attention_residual_bytes;  ///< where the model has attention
  /// The first `sequences` examples of the batch, cut to `length` positions where `length` above is not 0:
  /// what the whole batch keeps is foretold from small parts, under this setting and under eager.
  std::function<Minibatch(int64_t sequences, int64_t length)> part;
  int64_t sequences = 0, length = 0;
};

/// What a program trains: its data, its model and its measures. Trainer does the rest.
class Task {
 public:
  virtual ~Task() = default;
  virtual torch::nn::Module& model() = 0;
  /// Adam unless a program says otherwise.
  virtual std::unique_ptr<Optimizer> make_optimizer();
  /// What the learning rate is multiplied by once `epochs` passes over the data, and parts of one, are done.
  virtual double rate_factor(double /*epochs*/) const { return 1; }
  /// What a checkpoint needs beyond parameters, buffers and the optimiser's state; loading copies into these
  /// tensors and hands them to load_state().
  virtual std::map<std::string, at::Tensor> state() { return {}; }
  virtual void load_state(const std::map<std::string, at::Tensor>& /*state*/) {}
  /// What the speed counts.
  virtual std::string unit() const { return "tokens"; }
  /// Orders the batches of an epoch, a function of seed and epoch alone; returns how many there are.
  virtual int64_t start_epoch(int64_t epoch) = 0;
  /// `count` batches of the epoch from `first` on.
  virtual std::vector<Minibatch> batches(int64_t first, int64_t count) = 0;
  /// The examples of those batches in two parts of like lengths.
  virtual std::array<std::vector<Minibatch>, 2> halves(int64_t first, int64_t count) = 0;
  virtual Probe probe() = 0;
  /// One line about the data, and further lines about what was left out of them.
  virtual std::string describe() const = 0;
  virtual std::vector<std::string> notes() const { return {}; }
  /// Throws Interrupted once a signal came.
  virtual Validation validate() = 0;
  /// Validation::best before any epoch.
  virtual Measures none_yet() const = 0;
  /// Whether a run's first measure is better than that of its best epoch so far.
  virtual bool better(double measure, double best) const = 0;
  /// Tests the best model, read back from the run. Throws Interrupted once a signal came.
  virtual TestResult test(const Measures& best) = 0;
};

/// Trains, or goes on with, a run, then tests its best model: steps, checkpoints, metrics, what the run keeps
/// in memory. `config` is what the run's config.json says of the command line. Epochs' results go to standard
/// output, the rest to standard error. Returns summary.json. Throws Interrupted after saving when a signal
/// came.
nlohmann::ordered_json train(Task& task, const TrainingOptions& options, const RunFolder& run,
                             const nlohmann::ordered_json& config);

/// The running statistics of a model's normalisations, put back at the end: looking at a model in training
/// does not change it.
class KeepBuffers {
 public:
  explicit KeepBuffers(const torch::nn::Module& model);
  ~KeepBuffers();
  KeepBuffers(const KeepBuffers&) = delete;
  KeepBuffers& operator=(const KeepBuffers&) = delete;

 private:
  std::vector<at::Tensor> buffers_, values_;
};

/// Copies the best model of a run into `model`, or, with a word on standard error, its latest checkpoint
/// where no epoch is complete. Throws Error on a file that is missing, damaged or of another model.
void load_best_model(const std::filesystem::path& run, torch::nn::Module& model);

}  // namespace remnant::app
