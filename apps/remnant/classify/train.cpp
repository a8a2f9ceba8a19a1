#include "classify/train.h"

#include "common/batches.h"
#include "common/error.h"
#include "common/random_state.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <utility>

namespace remnant::app::classify {
namespace {

using at::Tensor;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr int64_t kLongest = 8192;

DataSource data_source(const TrainOptions& options) { return {options.data, options.texts}; }

/// What is trained on: read before the run's folder is made, so that wrong data leave nothing behind.
struct Data {
  std::string fingerprint, held_out;
  std::vector<std::string> labels;
  Vocabulary vocabulary;
  Examples train, validation, test;
  int64_t skipped = 0, repaired = 0;
};

Data load(const TrainOptions& options) {
  const Corpus corpus = load_corpus(data_source(options));
  Data data;
  data.labels = labels_of(corpus.train);
  std::string all;
  for (const LabelledTexts* part : {&corpus.train, &corpus.validation, &corpus.test}) {
    for (int64_t i = 0; i < part->size(); ++i) all += part->labels[i] + '\t' + part->texts[i] + '\n';
    data.skipped += part->skipped_empty;
    data.repaired += part->repaired;
  }
  data.fingerprint = app::fingerprint(all);
  const auto train_words = words_of(corpus.train.texts, options.language);
  data.vocabulary = Vocabulary::build(train_words, options.min_frequency, options.max_words);
  const auto encoded = [&](const LabelledTexts& texts, const std::vector<std::vector<std::string>>& words) {
    return encode(texts, words, data.vocabulary, data.labels, options.max_length);
  };
  data.train = encoded(corpus.train, train_words);
  data.validation = encoded(corpus.validation, words_of(corpus.validation.texts, options.language));
  data.test = encoded(corpus.test, words_of(corpus.test.texts, options.language));
  if (corpus.held_out_validation) data.held_out = "validation";
  if (corpus.held_out_test) data.held_out += data.held_out.empty() ? "test" : " and test";
  return data;
}

class ClassificationTask final : public Task {
 public:
  ClassificationTask(const TrainOptions& options, const RunFolder& run, const Data& data)
      : options_(options), run_(run), data_(data) {
    for (const auto& text : data_.train.texts) lengths_.push_back(static_cast<int64_t>(text.size()));
    torch::manual_seed(static_cast<uint64_t>(options_.seed));
    model_ = Classifier(encoder_options(options_, data_.vocabulary.size(), options_.max_length),
                        static_cast<int64_t>(data_.labels.size()));
  }

  torch::nn::Module& model() override { return *model_; }

  int64_t start_epoch(int64_t epoch) override {
    rows_ = batches_by_length(lengths_, options_.batch_size, options_.seed, epoch);
    return static_cast<int64_t>(rows_.size());
  }

  std::vector<Minibatch> batches(int64_t first, int64_t count) override {
    std::vector<Minibatch> made;
    for (int64_t i = first; i < first + count; ++i) made.push_back(minibatch(rows_[i]));
    return made;
  }

  std::array<std::vector<Minibatch>, 2> halves(int64_t first, int64_t count) override {
    std::array<std::vector<Minibatch>, 2> parts;
    for (int64_t i = first; i < first + count; ++i) {
      const auto half = alternate(rows_[i], static_cast<size_t>(i));
      for (size_t side = 0; side < 2; ++side) {
        if (!half[side].empty()) parts[side].push_back(minibatch(half[side]));
      }
    }
    return parts;
  }

  /// The epoch's batch of median size.
  Probe probe() override {
    auto batches = batches_by_length(lengths_, options_.batch_size, options_.seed, 0);
    const auto cells = [&](const std::vector<int64_t>& rows) {
      int64_t longest = 0;
      for (const int64_t row : rows) longest = std::max(longest, lengths_[row]);
      return static_cast<int64_t>(rows.size()) * longest;
    };
    const auto middle = batches.begin() + static_cast<int64_t>(batches.size() / 2);
    std::nth_element(batches.begin(), middle, batches.end(),
                     [&](const auto& a, const auto& b) { return cells(a) < cells(b); });
    const auto texts = static_cast<int64_t>(middle->size());
    const int64_t length = cells(*middle) / texts;
    const Batch batch = make_batch(data_.train, *middle);
    const auto part = [this, batch](int64_t count, int64_t /*length*/) {
      Batch first = batch;
      first.ids = batch.ids.narrow(0, 0, count).contiguous();
      if (batch.padding.defined()) first.padding = batch.padding.narrow(0, 0, count).contiguous();
      first.labels = batch.labels.narrow(0, 0, count).contiguous();
      return minibatch(first);
    };
    return {minibatch(batch),
            {{"texts", texts}, {"length", length}},
            std::to_string(texts) + " x " + std::to_string(length) + " words",
            attention_bytes(options_, texts, length, length),
            part,
            texts};
  }

  std::string describe() const override {
    return std::to_string(data_.train.size()) + " training, " + std::to_string(data_.validation.size()) +
           " validation and " + std::to_string(data_.test.size()) + " test texts with " +
           std::to_string(data_.labels.size()) + " labels; " + std::to_string(data_.vocabulary.size()) +
           " words";
  }

  std::vector<std::string> notes() const override {
    std::vector<std::string> notes;
    if (!data_.held_out.empty()) {
      notes.push_back("every tenth text of the training set is held out for " + data_.held_out);
    }
    if (data_.skipped > 0)
      notes.push_back(std::to_string(data_.skipped) + " lines without a text are left out");
    if (data_.repaired > 0) {
      notes.push_back(std::to_string(data_.repaired) +
                      " lines are not valid UTF-8: their damaged bytes are replaced");
    }
    const int64_t truncated = data_.train.truncated + data_.validation.truncated + data_.test.truncated;
    if (truncated > 0) {
      notes.push_back(std::to_string(truncated) + " texts are cut to --max-length " +
                      std::to_string(options_.max_length));
    }
    return notes;
  }

  Validation validate() override {
    const Scores scores = scores_of(*model_, data_.validation);
    const Measures measures{{"accuracy", scores.accuracy()}, {"loss", scores.loss}};
    return {measures, measures,
            "accuracy " + format_fixed(scores.accuracy(), 4) + "  loss " + format_fixed(scores.loss, 3)};
  }

  Measures none_yet() const override { return {{"accuracy", -1}, {"loss", 0}}; }
  bool better(double accuracy, double best) const override { return accuracy > best; }

  TestResult test(const Measures& best) override {
    TrainedModel trained = load_model(run_.path());
    const Scores scores = scores_of(*trained.model, data_.test);
    TestResult result;
    result.summary = {{"accuracy", scores.accuracy()},
                      {"test_loss", scores.loss},
                      {"validation_accuracy", best[0].second},
                      {"validation_loss", best[1].second},
                      {"labels", data_.labels},
                      {"confusion", scores.confusion}};
    result.more = ordered_json::object();
    result.text = "test accuracy " + format_fixed(scores.accuracy(), 4) + "  loss " +
                  format_fixed(scores.loss, 3) + "\n";
    return result;
  }

 private:
  Minibatch minibatch(const std::vector<int64_t>& rows) { return minibatch(make_batch(data_.train, rows)); }
  Minibatch minibatch(const Batch& batch) {
    Minibatch made{batch.ids.size(0), batch.tokens, {batch.ids, batch.labels}, [this, batch] {
                     return model_->loss(batch.ids, batch.padding, batch.labels);
                   }};
    if (batch.padding.defined()) made.inputs.push_back(batch.padding);
    return made;
  }

  Scores scores_of(ClassifierImpl& model, const Examples& examples) const {
    return evaluate(model, examples, static_cast<int64_t>(data_.labels.size()), options_.batch_size);
  }

  TrainOptions options_;
  RunFolder run_;
  const Data& data_;
  std::vector<int64_t> lengths_;
  Classifier model_ = nullptr;
  std::vector<std::vector<int64_t>> rows_;  ///< of the epoch's batches
};

}  // namespace

TrainOptions checked(TrainOptions options) {
  require_at_least("texts", options.texts, 20);
  require_at_least("min-freq", options.min_frequency, 1);
  require_at_least("max-words", options.max_words, 1);
  require_at_least("max-length", options.max_length, 1);
  if (options.max_length > kLongest) {
    throw UsageError("--max-length should be at most " + std::to_string(kLongest) + ", got " +
                     std::to_string(options.max_length));
  }
  check_transformer(options);
  options.data = absolute_data(options.data, "generated");
  return options;
}

Answers answer(ClassifierImpl& model, const Examples& examples, int64_t batch_size) {
  const at::NoGradGuard no_grad;
  model.eval();
  Answers answers(examples.size());
  for (const std::vector<int64_t>& rows : sorted_batches(examples.texts, batch_size)) {
    stop_if_interrupted();
    const Batch batch = make_batch(examples, rows);
    answers.add(rows, model.forward(batch.ids, batch.padding), batch.labels);
  }
  return answers;
}

Scores evaluate(ClassifierImpl& model, const Examples& examples, int64_t label_count, int64_t batch_size) {
  return answer(model, examples, batch_size).scores(examples.labels, label_count);
}

TrainedModel load_model(const fs::path& path) {
  TrainedModel trained;
  trained.options = options_of_run<TrainOptions>(path);
  trained.vocabulary = Vocabulary::load(path / "vocabulary");
  const ordered_json config = RunFolder::open(path).read_json("config.json");
  try {
    trained.labels = config.at("labels").get<std::vector<std::string>>();
  } catch (const nlohmann::json::exception&) {
    throw Error("config.json: the field labels is missing or malformed");
  }
  const KeepRandomState keep;
  trained.model =
      Classifier(encoder_options(trained.options, trained.vocabulary.size(), trained.options.max_length),
                 static_cast<int64_t>(trained.labels.size()));
  load_best_model(path, *trained.model);
  return trained;
}

LabelledTexts load_split(const TrainedModel& trained, const std::string& data, const std::string& split) {
  if (split != "train" && split != "val" && split != "test") {
    throw UsageError("--split should be train, val or test, got '" + split + "'");
  }
  if (!data.empty() && !fs::is_directory(data)) return read_labelled(data);
  DataSource from = data_source(trained.options);
  if (!data.empty()) from.data = data;
  Corpus corpus = load_corpus(from);
  return std::move(split == "train" ? corpus.train : split == "val" ? corpus.validation : corpus.test);
}

Examples encode_for(const TrainedModel& trained, const LabelledTexts& texts, bool with_labels) {
  return encode(texts, words_of(texts.texts, trained.options.language), trained.vocabulary,
                with_labels ? trained.labels : std::vector<std::string>(), trained.options.max_length);
}

ordered_json train(const TrainOptions& options) {
  const TrainOptions ready = checked(options);
  if (ready.threads > 0) at::set_num_threads(static_cast<int>(ready.threads));
  const Data data = load(ready);
  const Interrupt interrupt;
  const ordered_json config = config_of(ready);
  const RunFolder run = prepare_run(ready, config, fixed_keys(ready));
  require_same_data(run, ready, data.fingerprint);
  data.vocabulary.save(run.path() / "vocabulary");
  write_config(
      run, config,
      {{"words", data.vocabulary.size()}, {"labels", data.labels}, {"data_fingerprint", data.fingerprint}});
  ClassificationTask task(ready, run, data);
  return app::train(task, ready, run, config);
}

}  // namespace remnant::app::classify
