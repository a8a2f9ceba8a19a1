#pragma once

#include "common/options.h"
#include "common/trainer.h"
#include "translate/data.h"
#include "translate/decode.h"
#include "translate/model.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace remnant::app::translate {

struct TrainOptions : TransformerOptions {
  static constexpr const char* kProgram = "translate";
  std::string source = "de", target = "en";
  int64_t pairs = 20000, min_frequency = 2, max_length = 100;
};

/// Calls visit(flag name, field, Resume, help) for every option that is written to config.json: the
/// one list behind flags, defaults, help, config.json and the check on resume. `attention` and
/// `out` are apart, since `compare` takes several policies and makes several folders.
template <typename Options, typename Visit>
void visit_options(Options& o, const Visit& visit) {
  visit("data", o.data, Resume::same, "folder with train, val and test texts, or captions (generated)");
  visit("source", o.source, Resume::same, "language to translate from: the ending of its files");
  visit("target", o.target, Resume::same, "language to translate to");
  visit("pairs", o.pairs, Resume::same, "sentence pairs of the captions corpus");
  visit("min-freq", o.min_frequency, Resume::same, "rarer words become <unk>");
  visit("max-length", o.max_length, Resume::same, "longest sentence, begin and end marks included");
  visit_model_options(o, visit, "layers of the encoder, and of the decoder");
  visit_training_options(o, visit, "sentences a batch");
}

/// The options with the policy in its usual spelling and the data's path made absolute. Throws
/// UsageError on values that cannot be.
TrainOptions checked(TrainOptions options);

/// A run as config.json describes it; as app::read_options.
TrainOptions options_from_json(const nlohmann::ordered_json& config);

/// As app::accumulate_gradients: the loss is a mean over target words.
StepCost accumulate_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16);

/// As app::check_gradients, on the halves of `batches`.
Fidelity check_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16,
                         const at::Tensor& random_before);

/// A model read back from a run's folder.
struct TrainedModel {
  TrainOptions options;
  Vocabulary source_vocabulary, target_vocabulary;
  Transformer model = nullptr;  ///< best by validation BLEU; in evaluation mode
};

TrainedModel load_model(const std::filesystem::path& run);

/// Trains, or goes on with, the run in options.out, then tests its best model; returns summary.json.
/// Epochs' results go to standard output, the rest to standard error. Throws Interrupted after
/// saving when a signal came.
nlohmann::ordered_json train(const TrainOptions& options);

/// Splits of the corpus ready for a trained model.
Pairs load_pairs(const TrainedModel& trained, const std::string& data, const std::string& split);

}  // namespace remnant::app::translate
