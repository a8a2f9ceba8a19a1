#pragma once

#include "classify/data.h"
#include "classify/model.h"
#include "common/options.h"
#include "common/scores.h"
#include "common/trainer.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace remnant::app::classify {

struct TrainOptions : TransformerOptions {
  static constexpr const char* kProgram = "classify";
  TrainOptions() {
    hidden = 128;
    layers = 2;
    heads = 4;
    feed_forward = 512;
    batch_size = 32;
    learning_rate = 1e-3;
  }
  std::string language = "en";
  int64_t texts = 4000, min_frequency = 2, max_words = 20000, max_length = 512;
};

/// Calls visit(flag name, field, Resume, help) for every option that is written to config.json.
template <typename Options, typename Visit>
void visit_options(Options& o, const Visit& visit) {
  visit("data", o.data, Resume::same,
        "folder with train (val, test) .tsv or .txt, a .tsv file, or generated (film reviews)");
  visit("texts", o.texts, Resume::same, "of the generated reviews");
  visit("language", o.language, Resume::same, "whose rules find words and lower case");
  visit("min-freq", o.min_frequency, Resume::same, "rarer words become <unk>");
  visit("max-words", o.max_words, Resume::same, "as do all but that many most frequent words");
  visit("max-length", o.max_length, Resume::same, "words of a text that are read, at most 8192");
  visit_model_options(o, visit, "layers");
  visit_training_options(o, visit, "texts a batch");
}

/// The options with the policy in its usual spelling and the data's path made absolute. Throws
/// UsageError on values that cannot be.
TrainOptions checked(TrainOptions options);

/// The label of every text. Throws Interrupted once a signal came.
Answers answer(ClassifierImpl& model, const Examples& examples, int64_t batch_size);

/// Leaves the model in evaluation mode.
Scores evaluate(ClassifierImpl& model, const Examples& examples, int64_t label_count, int64_t batch_size);

/// A model read back from a run's folder.
struct TrainedModel {
  TrainOptions options;
  Vocabulary vocabulary;
  std::vector<std::string> labels;
  Classifier model = nullptr;  ///< best by validation; in evaluation mode
};

TrainedModel load_model(const std::filesystem::path& run);

/// "train", "val" or "test" of the run's data or of another folder, or all of a file. Throws UsageError on
/// any other name.
LabelledTexts load_split(const TrainedModel& trained, const std::string& data, const std::string& split);
/// Texts ready for the model; without their labels where `with_labels` is not set.
Examples encode_for(const TrainedModel& trained, const LabelledTexts& texts, bool with_labels);

/// Trains, or goes on with, the run in options.out, then tests its best model; returns summary.json.
nlohmann::ordered_json train(const TrainOptions& options);

}  // namespace remnant::app::classify
