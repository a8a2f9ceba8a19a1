#pragma once

#include "common/options.h"
#include "common/trainer.h"
#include "lm/data.h"
#include "lm/model.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace remnant::app::lm {

struct TrainOptions : TransformerOptions {
  static constexpr const char* kProgram = "lm";
  TrainOptions() {
    layers = heads = 4;
    feed_forward = 1024;
    batch_size = 16;
  }
  std::string tokens = "bytes";
  int64_t sentences = 20000, context = 256;
};

/// Calls visit(flag name, field, Resume, help) for every option that is written to config.json.
template <typename Options, typename Visit>
void visit_options(Options& o, const Visit& visit) {
  visit("data", o.data, Resume::same, "text file, gzip or not, or generated (from a grammar)");
  visit("sentences", o.sentences, Resume::same, "of the generated text");
  visit("tokens", o.tokens, Resume::same, "bytes or sentencepiece:vocabulary=N");
  visit("context", o.context, Resume::same, "tokens that the model sees at once, at most 8192");
  visit_model_options(o, visit, "layers");
  visit_training_options(o, visit, "sequences of --context tokens a batch");
}

/// The options with the policy in its usual spelling and the data's path made absolute. Throws
/// UsageError on values that cannot be.
TrainOptions checked(TrainOptions options);

/// How well a model predicts a text.
struct TextScores {
  double bits = 0;  ///< of the whole text
  int64_t tokens = 0, bytes = 0, characters = 0;
  double bits_per_character() const { return bits / static_cast<double>(characters); }
  double bits_per_byte() const { return bits / static_cast<double>(bytes); }
  double perplexity() const;  ///< a token
};

/// Every token is predicted once, from those before it in its window of `context`. Leaves the model in
/// evaluation mode. Throws Interrupted once a signal came.
TextScores evaluate(LanguageModelImpl& model, const TokenText& text, int64_t context, int64_t batch_size);

/// A model read back from a run's folder.
struct TrainedModel {
  TrainOptions options;
  std::unique_ptr<Tokenizer> tokenizer;
  LanguageModel model = nullptr;  ///< best by validation; in evaluation mode
};

TrainedModel load_model(const std::filesystem::path& run);

/// "train", "val" or "test" of the run's text. Throws UsageError on any other name.
TokenText load_split(const TrainedModel& trained, const std::string& split);

/// Trains, or goes on with, the run in options.out, then tests its best model; returns summary.json.
nlohmann::ordered_json train(const TrainOptions& options);

}  // namespace remnant::app::lm
