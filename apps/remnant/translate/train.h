#pragma once

#include "common/fidelity.h"
#include "common/run_folder.h"
#include "translate/data.h"
#include "translate/decode.h"
#include "translate/model.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace remnant::app::translate {

struct TrainOptions {
  std::string data, source = "de", target = "en", attention = "recompute", precision = "fp32", out;
  int64_t pairs = 20000, min_frequency = 2, max_length = 100;
  int64_t hidden = 256, layers = 3, heads = 8, feed_forward = 512;
  double dropout = 0.1, learning_rate = 5e-4, clip = 1;
  int64_t batch_size = 128, accumulate = 1, seed = 1;
  int64_t epochs = 10, max_steps = 0, checkpoint_every = 500, fidelity_every = 0, threads = 0;
  bool resume = false, quiet = false;
};

/// Whether a run may go on with another value of an option than it was started with.
enum class Resume { same, any };

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
  visit("hidden", o.hidden, Resume::same, "width of the model");
  visit("layers", o.layers, Resume::same, "layers of the encoder, and of the decoder");
  visit("heads", o.heads, Resume::same, "attention heads");
  visit("feed-forward", o.feed_forward, Resume::same, "width of the feed-forward layers");
  visit("dropout", o.dropout, Resume::same, "dropout probability");
  visit("lr", o.learning_rate, Resume::same, "Adam's learning rate");
  visit("clip", o.clip, Resume::same, "largest gradient norm");
  visit("batch-size", o.batch_size, Resume::same, "sentences a batch");
  visit("accumulate", o.accumulate, Resume::same, "batches a step: as one batch that many times larger");
  visit("precision", o.precision, Resume::same, "fp32 or bf16 (autocast; parameters stay fp32)");
  visit("seed", o.seed, Resume::same, "of initial weights, batches and dropout");
  visit("epochs", o.epochs, Resume::any, "passes over the training text");
  visit("max-steps", o.max_steps, Resume::any, "stop after this many steps, 0: no limit");
  visit("checkpoint-every", o.checkpoint_every, Resume::any,
        "steps between checkpoints beside each epoch's, 0: none");
  visit("fidelity-every", o.fidelity_every, Resume::any,
        "steps between comparisons with the exact gradient, 0: none");
  visit("threads", o.threads, Resume::any, "0: all cores");
}

/// The options with the policy in its usual spelling and the data's path made absolute. Throws
/// UsageError on values that cannot be.
TrainOptions checked(TrainOptions options);

/// A run as config.json describes it. Throws Error naming a field that is missing or malformed; one that
/// may change on resume may also be missing.
TrainOptions options_from_json(const nlohmann::ordered_json& config);

/// What one training step cost.
struct StepCost {
  double loss = 0;
  int64_t kept_bytes = 0;  ///< most that one of the batches kept
  int64_t peak_bytes = 0;
};

/// Adds to the parameters' gradients that of the mean loss a word over all of `batches`, one batch
/// after the other: N batches give what one batch of all their sentences would.
StepCost accumulate_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16);

/// How far the gradient that accumulate_gradients, started from `random_before`, has left in the parameters
/// is from the exact one. Changes nothing. No added variance for a single sentence.
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
