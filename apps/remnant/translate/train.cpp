#include "translate/train.h"

#include "common/error.h"
#include "common/random_state.h"

#include <remnant/ops/attention.h>

#include <ATen/Parallel.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <utility>

namespace remnant::app::translate {
namespace {

using at::Tensor;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

ModelOptions model_options(const TrainOptions& options, const Vocabulary& source, const Vocabulary& target) {
  return {.source_words = source.size(),
          .target_words = target.size(),
          .hidden = options.hidden,
          .layers = options.layers,
          .heads = options.heads,
          .feed_forward = options.feed_forward,
          .max_length = options.max_length,
          .dropout = options.dropout,
          .policy = Policy::parse(options.attention)};
}

CorpusSource corpus_source(const TrainOptions& options) {
  return {options.data, options.source, options.target, options.pairs};
}

std::string fingerprint_of(const Corpus& corpus) {
  std::string all;
  for (const ParallelText* part : {&corpus.train, &corpus.validation, &corpus.test}) {
    for (size_t i = 0; i < part->source.size(); ++i) all += part->source[i] + '\t' + part->target[i] + '\n';
  }
  return fingerprint(all);
}

/// A batch as the trainer sees it; `model` must outlive it.
Minibatch minibatch(TransformerImpl& model, const Batch& batch) {
  Minibatch made{
      batch.predicted, batch.source_tokens + batch.predicted, {batch.source, batch.target}, [&model, batch] {
        const Tensor input = batch.target.slice(1, 0, batch.target.size(1) - 1);
        return model.loss(batch.source, batch.source_padding, input, batch.target.slice(1, 1));
      }};
  if (batch.source_padding.defined()) made.inputs.push_back(batch.source_padding);
  return made;
}

std::vector<Minibatch> minibatches(TransformerImpl& model, const std::vector<Batch>& batches) {
  std::vector<Minibatch> made;
  made.reserve(batches.size());
  for (const Batch& batch : batches) made.push_back(minibatch(model, batch));
  return made;
}

class TranslationTask final : public Task {
 public:
  TranslationTask(const TrainOptions& options, const RunFolder& run, const Corpus& corpus)
      : options_(options), run_(run) {
    encode_corpus(corpus);
    torch::manual_seed(static_cast<uint64_t>(options_.seed));
    model_ = Transformer(model_options(options_, source_vocabulary_, target_vocabulary_));
  }

  torch::nn::Module& model() override { return *model_; }

  int64_t start_epoch(int64_t epoch) override {
    rows_ = batches_by_length(train_, options_.batch_size, options_.seed, epoch);
    return static_cast<int64_t>(rows_.size());
  }

  std::vector<Minibatch> batches(int64_t first, int64_t count) override {
    return minibatches(*model_, made(first, count));
  }

  std::array<std::vector<Minibatch>, 2> halves(int64_t first, int64_t count) override {
    const std::array<std::vector<Batch>, 2> parts = translate::halves(made(first, count));
    return {minibatches(*model_, parts[0]), minibatches(*model_, parts[1])};
  }

  /// The epoch's batch of median size.
  Probe probe() override {
    auto batches = batches_by_length(train_, options_.batch_size, options_.seed, 0);
    const auto cells = [&](const std::vector<int64_t>& rows) {
      size_t source = 0, target = 0;
      for (const int64_t row : rows) {
        source = std::max(source, train_.source[row].size());
        target = std::max(target, train_.target[row].size());
      }
      return rows.size() * (source + target);
    };
    const auto middle = batches.begin() + static_cast<int64_t>(batches.size() / 2);
    std::nth_element(batches.begin(), middle, batches.end(),
                     [&](const auto& a, const auto& b) { return cells(a) < cells(b); });
    const Batch batch = make_batch(train_, *middle);
    const int64_t sentences = batch.source.size(0), source = batch.source.size(1),
                  target = batch.target.size(1) - 1;
    const auto residual = [&](int64_t queries, int64_t keys) {
      return attention_bytes(options_, sentences, queries, keys);
    };
    const auto part = [this, batch](int64_t count, int64_t /*length*/) {
      Batch first = batch;
      first.source = batch.source.narrow(0, 0, count).contiguous();
      if (batch.source_padding.defined()) {
        first.source_padding = batch.source_padding.narrow(0, 0, count).contiguous();
      }
      first.target = batch.target.narrow(0, 0, count).contiguous();
      return minibatch(*model_, first);
    };
    return {minibatch(*model_, batch),
            {{"sentences", sentences}, {"source_length", source}, {"target_length", target}},
            std::to_string(sentences) + " x (" + std::to_string(source) + " + " + std::to_string(target) +
                ") words",
            residual(source, source) + residual(target, target) + residual(target, source),
            part,
            sentences};
  }

  std::string describe() const override {
    const auto words = [](const Vocabulary& vocabulary, const std::string& language) {
      return std::to_string(vocabulary.size()) + " " + language;
    };
    return std::to_string(train_.size()) + " training, " + std::to_string(validation_.size()) +
           " validation and " + std::to_string(test_.size()) + " test pairs; " +
           words(source_vocabulary_, options_.source) + " and " + words(target_vocabulary_, options_.target) +
           " words";
  }

  std::vector<std::string> notes() const override {
    std::vector<std::string> notes;
    if (skipped_ > 0) notes.push_back(std::to_string(skipped_) + " pairs with an empty side are left out");
    const int64_t truncated = train_.truncated + validation_.truncated + test_.truncated;
    if (truncated > 0) {
      notes.push_back(std::to_string(truncated) + " sentences are cut to --max-length " +
                      std::to_string(options_.max_length));
    }
    return notes;
  }

  Validation validate() override {
    const Scores scores = evaluate(*model_, validation_, target_vocabulary_, 1, options_.batch_size);
    return {{{"bleu", scores.tokens.score}, {"perplexity", scores.perplexity}},
            {{"perplexity", scores.perplexity},
             {"bleu", scores.tokens.score},
             {"bleu_detokenised", scores.detokenised.score}},
            "perplexity " + format_fixed(scores.perplexity, 3) + "  BLEU " +
                format_fixed(scores.tokens.score, 2)};
  }

  Measures none_yet() const override { return {{"bleu", -1}, {"perplexity", 0}}; }
  bool better(double bleu, double best) const override { return bleu > best; }

  TestResult test(const Measures& best) override {
    TrainedModel trained = load_model(run_.path());
    const Scores scores = evaluate(*trained.model, test_, target_vocabulary_, 1, options_.batch_size);
    TestResult result;
    result.summary["bleu"] = scores.tokens.score;
    result.summary["bleu_signature"] = scores.tokens.signature;
    result.summary["bleu_detokenised"] = scores.detokenised.score;
    result.summary["bleu_detokenised_signature"] = scores.detokenised.signature;
    result.summary["test_perplexity"] = scores.perplexity;
    result.summary["validation_perplexity"] = best[1].second;
    result.summary["validation_bleu"] = best[0].second;
    result.more = ordered_json::object();
    const Policy policy = Policy::parse(options_.attention);
    if (policy.kind == PolicyKind::curve)
      result.more["curve_evicted_share"] = evicted_share(train_, policy.m);
    result.text = "test perplexity " + format_fixed(scores.perplexity, 3) + "\ntest BLEU " +
                  format_fixed(scores.tokens.score, 2) + "  lower-cased words, greedy  " +
                  scores.tokens.signature + "\ntest BLEU " + format_fixed(scores.detokenised.score, 2) +
                  "  detokenised text, greedy  " + scores.detokenised.signature + "\n";
    return result;
  }

 private:
  void encode_corpus(const Corpus& corpus) {
    const auto words = [&](const std::vector<std::string>& text, const std::string& language) {
      return tokenize_all(text, language);
    };
    const auto train_source = words(corpus.train.source, options_.source);
    const auto train_target = words(corpus.train.target, options_.target);
    source_vocabulary_ = Vocabulary::build(train_source, options_.min_frequency);
    target_vocabulary_ = Vocabulary::build(train_target, options_.min_frequency);
    const auto encode = [&](const ParallelText& text, const auto& source, const auto& target) {
      return encode_pairs(text, source, target, source_vocabulary_, target_vocabulary_, options_.max_length);
    };
    train_ = encode(corpus.train, train_source, train_target);
    validation_ = encode(corpus.validation, words(corpus.validation.source, options_.source),
                         words(corpus.validation.target, options_.target));
    test_ = encode(corpus.test, words(corpus.test.source, options_.source),
                   words(corpus.test.target, options_.target));
    skipped_ = corpus.train.skipped_empty + corpus.validation.skipped_empty + corpus.test.skipped_empty;

    source_vocabulary_.save(run_.path() / "source.vocabulary");
    target_vocabulary_.save(run_.path() / "target.vocabulary");
    write_config(run_, config_of(options_),
                 {{"source_words", source_vocabulary_.size()},
                  {"target_words", target_vocabulary_.size()},
                  {"data_fingerprint", fingerprint_of(corpus)}});
  }

  std::vector<Batch> made(int64_t first, int64_t count) const {
    std::vector<Batch> group;
    for (int64_t i = first; i < first + count; ++i) group.push_back(make_batch(train_, rows_[i]));
    return group;
  }

  TrainOptions options_;
  RunFolder run_;
  Pairs train_, validation_, test_;
  int64_t skipped_ = 0;
  Vocabulary source_vocabulary_, target_vocabulary_;
  Transformer model_ = nullptr;
  std::vector<std::vector<int64_t>> rows_;  ///< of the epoch's batches
};

}  // namespace

TrainOptions checked(TrainOptions options) {
  require_at_least("pairs", options.pairs, 1);
  require_at_least("min-freq", options.min_frequency, 1);
  require_at_least("max-length", options.max_length, 3);
  check_transformer(options);
  if (options.source == options.target) throw UsageError("--source and --target are the same language");
  options.data = absolute_data(options.data, "captions");
  return options;
}

TrainOptions options_from_json(const ordered_json& config) { return read_options<TrainOptions>(config); }

StepCost accumulate_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16) {
  return app::accumulate_gradients(minibatches(model, batches), bf16);
}

Fidelity check_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16,
                         const Tensor& random_before) {
  const std::array<std::vector<Batch>, 2> parts = halves(batches);
  return app::check_gradients(model, minibatches(model, batches),
                              {minibatches(model, parts[0]), minibatches(model, parts[1])}, bf16,
                              random_before);
}

TrainedModel load_model(const fs::path& path) {
  TrainedModel trained;
  trained.options = options_of_run<TrainOptions>(path);
  trained.source_vocabulary = Vocabulary::load(path / "source.vocabulary");
  trained.target_vocabulary = Vocabulary::load(path / "target.vocabulary");
  const KeepRandomState keep;
  trained.model =
      Transformer(model_options(trained.options, trained.source_vocabulary, trained.target_vocabulary));
  load_best_model(path, *trained.model);
  return trained;
}

Pairs load_pairs(const TrainedModel& trained, const std::string& data, const std::string& split) {
  CorpusSource from = corpus_source(trained.options);
  if (!data.empty()) from.data = data;
  const ParallelText text = load_split(from, split);
  return encode_pairs(text, tokenize_all(text.source, from.source_language),
                      tokenize_all(text.target, from.target_language), trained.source_vocabulary,
                      trained.target_vocabulary, trained.options.max_length);
}

ordered_json train(const TrainOptions& options) {
  const TrainOptions ready = checked(options);
  if (ready.threads > 0) at::set_num_threads(static_cast<int>(ready.threads));
  // Before the folder is made: a wrong --data leaves nothing behind. Until here there is nothing to
  // save, so a signal ends the program at once.
  const Corpus corpus = load_corpus(corpus_source(ready));
  const Interrupt interrupt;
  const ordered_json config = config_of(ready);
  const RunFolder run = prepare_run(ready, config, fixed_keys(ready));
  require_same_data(run, ready, fingerprint_of(corpus));
  TranslationTask task(ready, run, corpus);
  return app::train(task, ready, run, config);
}

}  // namespace remnant::app::translate
