#include "lm/train.h"

#include "common/batches.h"
#include "common/error.h"
#include "common/random_state.h"
#include "common/text.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

namespace remnant::app::lm {
namespace {

using at::Tensor;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

TextSource text_source(const TrainOptions& options) { return {options.data, options.sentences}; }

/// "train", "val" or "test".
TokenText& part(Splits& splits, const std::string& name) {
  if (name == "train") return splits.train;
  if (name == "val") return splits.validation;
  if (name == "test") return splits.test;
  throw UsageError("--split should be train, val or test, got '" + name + "'");
}

/// What is trained on: read before the run's folder is made, so that a wrong --data leaves nothing behind.
struct Text {
  std::string fingerprint;
  std::unique_ptr<Tokenizer> tokenizer;
  Splits splits;
};

Text load(const TrainOptions& options) {
  const std::string content = load_text_to_split(text_source(options));
  const TextParts parts = split_text(content);
  const TokenKind kind = parse_tokens(options.tokens);
  const bool made = options.resume && fs::exists(fs::path(options.out) / "config.json");
  Text text;
  text.fingerprint = fingerprint(content);
  text.tokenizer = made ? load_tokenizer(kind, options.out) : make_tokenizer(kind, parts.train);
  text.splits = tokenize_parts(parts, *text.tokenizer);
  if (options.context > text.splits.train.predicted()) {
    throw UsageError("--context " + std::to_string(options.context) +
                     " is longer than the text: its training part has " +
                     std::to_string(text.splits.train.predicted()) + " " + text.tokenizer->name() + "s");
  }
  return text;
}

class LanguageTask final : public Task {
 public:
  LanguageTask(const TrainOptions& options, const RunFolder& run, const Text& text)
      : options_(options), run_(run), text_(text) {
    torch::manual_seed(static_cast<uint64_t>(options_.seed));
    model_ = LanguageModel(encoder_options(options_, text_.tokenizer->size(), options_.context));
  }

  torch::nn::Module& model() override { return *model_; }

  int64_t start_epoch(int64_t epoch) override {
    windows_ = training_windows(text_.splits.train, options_.context, options_.seed, epoch);
    const auto count = static_cast<int64_t>(windows_.size());
    return (count + options_.batch_size - 1) / options_.batch_size;
  }

  std::vector<Minibatch> batches(int64_t first, int64_t count) override {
    std::vector<Minibatch> made;
    for (int64_t i = first; i < first + count; ++i) made.push_back(minibatch(windows_of(i)));
    return made;
  }

  std::array<std::vector<Minibatch>, 2> halves(int64_t first, int64_t count) override {
    std::array<std::vector<Minibatch>, 2> parts;
    for (int64_t i = first; i < first + count; ++i) {
      const auto half = alternate(windows_of(i), static_cast<size_t>(i));
      for (size_t side = 0; side < 2; ++side) {
        if (!half[side].empty()) parts[side].push_back(minibatch(half[side]));
      }
    }
    return parts;
  }

  Probe probe() override {
    start_epoch(0);
    const std::vector<Window> windows = windows_of(0);
    const auto sequences = static_cast<int64_t>(windows.size());
    const Minibatch whole = minibatch(windows);
    const auto part = [this, whole](int64_t count, int64_t length) {
      const auto cut = [&](const Tensor& x) {
        return x.narrow(0, 0, count).narrow(1, 0, length).contiguous();
      };
      return minibatch(cut(whole.inputs[0]), cut(whole.inputs[1]));
    };
    return {whole,
            {{"sequences", sequences}, {"context", options_.context}},
            std::to_string(sequences) + " x " + std::to_string(options_.context) + " " +
                text_.tokenizer->name() + "s",
            attention_bytes(options_, sequences, options_.context, options_.context),
            part,
            sequences,
            whole.inputs[0].size(1)};
  }

  std::string describe() const override {
    return std::to_string(text_.splits.train.predicted()) + " training, " +
           std::to_string(text_.splits.validation.predicted()) + " validation and " +
           std::to_string(text_.splits.test.predicted()) + " test " + text_.tokenizer->name() +
           "s; context " + std::to_string(options_.context);
  }

  Validation validate() override {
    const TextScores scores = scores_of(*model_, text_.splits.validation);
    const Measures measures{{"bits_per_character", scores.bits_per_character()},
                            {"perplexity", scores.perplexity()}};
    return {measures, measures,
            "bits per character " + format_fixed(scores.bits_per_character(), 4) + "  perplexity " +
                format_fixed(scores.perplexity(), 3)};
  }

  Measures none_yet() const override {
    return {{"bits_per_character", std::numeric_limits<double>::infinity()}, {"perplexity", 0}};
  }
  bool better(double bits, double best) const override { return bits < best; }

  TestResult test(const Measures& best) override {
    TrainedModel trained = load_model(run_.path());
    const TextScores scores = scores_of(*trained.model, text_.splits.test);
    TestResult result;
    result.summary = {{"bits_per_character", scores.bits_per_character()},
                      {"bits_per_byte", scores.bits_per_byte()},
                      {"test_perplexity", scores.perplexity()},
                      {"test_characters", scores.characters},
                      {"validation_bits_per_character", best[0].second},
                      {"validation_perplexity", best[1].second}};
    result.more = ordered_json::object();
    result.text = "test bits per character " + format_fixed(scores.bits_per_character(), 4) + "  per byte " +
                  format_fixed(scores.bits_per_byte(), 4) + "  perplexity " +
                  format_fixed(scores.perplexity(), 3) + " a " + text_.tokenizer->name() + "\n";
    return result;
  }

 private:
  std::vector<Window> windows_of(int64_t batch) const {
    const auto count = static_cast<int64_t>(windows_.size());
    const int64_t first = batch * options_.batch_size, end = std::min(first + options_.batch_size, count);
    return {windows_.begin() + first, windows_.begin() + end};
  }

  Minibatch minibatch(const std::vector<Window>& windows) {
    const auto [input, next] = window_tensors(text_.splits.train, windows);
    return minibatch(input, next);
  }
  Minibatch minibatch(const Tensor& input, const Tensor& next) {
    return {input.numel(), input.numel(), {input, next}, [this, input, next] {
              return model_->loss(input, next);
            }};
  }

  TextScores scores_of(LanguageModelImpl& model, const TokenText& text) const {
    return evaluate(model, text, options_.context, options_.batch_size);
  }

  TrainOptions options_;
  RunFolder run_;
  const Text& text_;
  LanguageModel model_ = nullptr;
  std::vector<Window> windows_;  ///< of the epoch
};

}  // namespace

TrainOptions checked(TrainOptions options) {
  parse_tokens(options.tokens);
  require_at_least("sentences", options.sentences, 3);
  require_at_least("context", options.context, 1);
  if (options.context > kLongestContext) {
    throw UsageError("--context should be at most " + std::to_string(kLongestContext) + ", got " +
                     std::to_string(options.context));
  }
  check_transformer(options);
  options.data = absolute_data(options.data, "generated");
  return options;
}

double TextScores::perplexity() const { return std::exp2(bits / static_cast<double>(tokens)); }

TextScores evaluate(LanguageModelImpl& model, const TokenText& text, int64_t context, int64_t batch_size) {
  const at::NoGradGuard no_grad;
  model.eval();
  TextScores scores{0, text.predicted(), text.bytes, text.characters};
  const std::vector<Window> windows = evaluation_windows(text, context);
  double nats = 0;
  for (size_t first = 0; first < windows.size();) {
    stop_if_interrupted();
    size_t end = first;
    while (end < windows.size() && end - first < static_cast<size_t>(batch_size) &&
           windows[end].length == windows[first].length) {
      ++end;
    }
    const auto [input, next] = window_tensors(
        text, {windows.begin() + static_cast<int64_t>(first), windows.begin() + static_cast<int64_t>(end)});
    nats += model.loss(input, next).item<double>();
    first = end;
  }
  scores.bits = nats / std::log(2.0);
  return scores;
}

TrainedModel load_model(const fs::path& path) {
  TrainedModel trained;
  trained.options = options_of_run<TrainOptions>(path);
  trained.tokenizer = load_tokenizer(parse_tokens(trained.options.tokens), path);
  const KeepRandomState keep;
  trained.model =
      LanguageModel(encoder_options(trained.options, trained.tokenizer->size(), trained.options.context));
  load_best_model(path, *trained.model);
  return trained;
}

TokenText load_split(const TrainedModel& trained, const std::string& split) {
  Splits splits;
  TokenText& chosen = part(splits, split);  // a wrong name is known before the text is read
  const std::string text = load_text_to_split(text_source(trained.options));
  splits = tokenize_parts(split_text(text), *trained.tokenizer);
  return std::move(chosen);
}

ordered_json train(const TrainOptions& options) {
  const TrainOptions ready = checked(options);
  if (ready.threads > 0) at::set_num_threads(static_cast<int>(ready.threads));
  const Text text = load(ready);
  const Interrupt interrupt;
  const ordered_json config = config_of(ready);
  const RunFolder run = prepare_run(ready, config, fixed_keys(ready));
  require_same_data(run, ready, text.fingerprint);
  write_config(run, config, {{"vocabulary", text.tokenizer->size()}, {"data_fingerprint", text.fingerprint}});
  text.tokenizer->save(run.path());
  LanguageTask task(ready, run, text);
  return app::train(task, ready, run, config);
}

}  // namespace remnant::app::lm
