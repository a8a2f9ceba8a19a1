#pragma once

#include "common/options.h"
#include "common/scores.h"
#include "common/trainer.h"
#include "vision/data.h"
#include "vision/model.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace remnant::app::vision {

struct TrainOptions : TrainingOptions {
  static constexpr const char* kProgram = "vision";
  static constexpr const char* kCompared = "memory";
  TrainOptions() {
    learning_rate = 0.1;
    clip = 0;
    epochs = 20;
  }
  std::string& compared() { return memory; }
  std::string model = "resnet20", schedule = "cosine", layout = "channels-last", activation = "maxmin",
              init = "orthogonal";
  int64_t images = 5000, width = 0, depth = 0;
  double weight_decay = 1e-4, warm_up = 1;
  bool augment = true;
};

/// Calls visit(flag name, field, Resume, help) for every option that is written to config.json.
template <typename Options, typename Visit>
void visit_options(Options& o, const Visit& visit) {
  visit("data", o.data, Resume::same,
        "folder in CIFAR-10's binary format (train.bin and test.bin, or data_batch_1.bin to test_batch.bin; "
        ".gz "
        "too), a file of it, or generated (shapes and textures)");
  visit("images", o.images, Resume::same, "of the generated ones");
  visit("model", o.model, Resume::same,
        "resnet20, or any resnetN with N = 6 n + 2; reversible, of coupling blocks; chain, of plain layers");
  visit(
      "width", o.width, Resume::same,
      "channels of the first stage, the next have 2 and 4 times as many; 0: 16, of reversible and chain 32");
  visit("depth", o.depth, Resume::same, "blocks of reversible, 0: 9; layers of chain, 0: 16");
  visit("activation", o.activation, Resume::same, "of chain: maxmin, or leaky with slope 0.5");
  visit("init", o.init, Resume::same,
        "weights of chain's layers: orthogonal (at the kernel's centre, with noise), or he");
  visit("layout", o.layout, Resume::same, "of activations in memory: channels-last or contiguous");
  visit("augment", o.augment, Resume::same, "move training images by up to 4 pixels and flip half of them");
  visit("schedule", o.schedule, Resume::same,
        "of the learning rate over all epochs: cosine to 0, step (a tenth from 1/2 and from 3/4 on) or "
        "constant");
  visit("warm-up", o.warm_up, Resume::same,
        "epochs over which the learning rate rises to --lr, 0.5 for half of one");
  visit("weight-decay", o.weight_decay, Resume::same, "of weights, not of normalisations and biases");
  visit_shared_options(
      o, visit, "images a batch",
      "what layers keep: exact (the default), eager; for resnetN also unbiased:bits=4, "
      "budget=60MB (of a step's peak; budget=60MB,bits=4: codes too), or a JSON file of {layer "
      "pattern: choices}");
}

/// The options with the model's own sizes and setting where none is given, the setting in its usual spelling
/// and the data's path made absolute. Throws UsageError on values that cannot be.
TrainOptions checked(TrainOptions options);

/// The learning rate after `epochs` passes over the data, in units of --lr.
double rate_factor(const TrainOptions& options, double epochs);

/// A model read back from a run's folder.
struct TrainedModel {
  TrainOptions options;
  std::vector<std::string> names;  ///< of the labels
  Normalisation normalisation;
  Classifier model = nullptr;  ///< best by validation; in evaluation mode
};

TrainedModel load_model(const std::filesystem::path& run);

/// The label of every image; leaves the model in evaluation mode. Throws Interrupted once a signal came.
Answers answer(TrainedModel& trained, const LabelledImages& images, int64_t batch_size);

/// "train", "val" or "test" of the run's data or of another folder, or all of a file. Throws UsageError on
/// any other name.
LabelledImages load_split(const TrainedModel& trained, const std::string& data, const std::string& split);

/// Trains, or goes on with, the run in options.out, then tests its best model; returns summary.json.
nlohmann::ordered_json train(const TrainOptions& options);

}  // namespace remnant::app::vision
