#include "vision/train.h"

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
#include <map>
#include <memory>
#include <numeric>
#include <utility>

namespace remnant::app::vision {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr double kPi = 3.14159265358979323846, kMomentum = 0.9;

DataSource data_source(const TrainOptions& options) { return {options.data, options.images}; }

bool channels_last(const TrainOptions& options) { return options.layout == "channels-last"; }

/// What is trained on: read before the run's folder is made, so that wrong data leave nothing behind.
struct Data {
  explicit Data(const TrainOptions& options) : set(load_dataset(data_source(options))) {
    std::string all;
    for (const LabelledImages* part : {&set.train, &set.validation, &set.test}) {
      all.append(part->labels.begin(), part->labels.end());
      all.append(part->pixels.begin(), part->pixels.end());
    }
    fingerprint = app::fingerprint(all);
    normalisation = normalisation_of(set.train);
  }

  Dataset set;
  std::string fingerprint;
  Normalisation normalisation;
};

Classifier make_model(const TrainOptions& options, size_t classes) {
  Classifier model(ModelOptions{options.model, options.width, options.depth, static_cast<int64_t>(classes),
                                options.activation, options.init});
  if (!channels_last(options)) return model;
  for (at::Tensor& parameter : model->parameters()) {
    // Kernels would otherwise rearrange the weight in every step.
    if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(at::MemoryFormat::ChannelsLast));
  }
  return model;
}

Answers answers_of(ClassifierImpl& model, const LabelledImages& images, const Normalisation& normalisation,
                   bool last, int64_t batch_size) {
  const at::NoGradGuard no_grad;
  model.eval();
  std::vector<int64_t> all(images.size());
  std::iota(all.begin(), all.end(), 0);
  Answers answers(images.size());
  for (const std::vector<int64_t>& rows : cut(all, batch_size)) {
    stop_if_interrupted();
    const Batch batch = make_batch(images, rows, normalisation, {}, last);
    answers.add(rows, model.forward(batch.images), batch.labels);
  }
  return answers;
}

class VisionTask final : public Task {
 public:
  VisionTask(const TrainOptions& options, const RunFolder& run, const Data& data)
      : options_(options), run_(run), data_(data) {
    torch::manual_seed(static_cast<uint64_t>(options_.seed));
    model_ = make_model(options_, data_.set.names.size());
  }

  torch::nn::Module& model() override { return *model_; }

  std::unique_ptr<Optimizer> make_optimizer() override {
    return std::make_unique<Sgd>(*model_, kMomentum, options_.weight_decay);
  }

  double rate_factor(double epochs) const override { return vision::rate_factor(options_, epochs); }

  /// When a chain plans anew what it keeps.
  std::map<std::string, at::Tensor> state() override {
    std::map<std::string, at::Tensor> tensors;
    for (const auto& item : model_->named_modules()) {
      if (auto* chain = item.value()->as<Chain>())
        tensors["plan." + item.key()] = chain->chain().plan_state();
    }
    return tensors;
  }

  void load_state(const std::map<std::string, at::Tensor>& state) override {
    for (const auto& item : model_->named_modules()) {
      if (auto* chain = item.value()->as<Chain>()) {
        chain->chain().set_plan_state(state.at("plan." + item.key()));
      }
    }
  }

  std::string unit() const override { return "images"; }

  int64_t start_epoch(int64_t epoch) override {
    std::mt19937_64 random = epoch_random(options_.seed, epoch);
    std::vector<int64_t> rows(data_.set.train.size());
    std::iota(rows.begin(), rows.end(), 0);
    shuffle(rows, random);
    rows_ = cut(rows, options_.batch_size);
    if (options_.augment) {
      // All at once, so that an epoch that is resumed in its middle sees the same.
      moves_.resize(rows.size());
      const auto shift = [&] { return static_cast<int8_t>(random() % (2 * kMargin + 1) - kMargin); };
      for (Move& move : moves_) {
        move.x = shift();
        move.y = shift();
        move.flip = random() % 2 == 1;
      }
    }
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

  Probe probe() override {
    start_epoch(0);
    const auto images = static_cast<int64_t>(rows_.front().size());
    const Minibatch whole = minibatch(rows_.front());
    const auto part = [this, whole](int64_t count, int64_t /*length*/) {
      return minibatch({whole.inputs[0].narrow(0, 0, count), whole.inputs[1].narrow(0, 0, count)});
    };
    return {whole, {{"images", images}}, std::to_string(images) + " images", {}, part, images};
  }

  std::string describe() const override {
    return std::to_string(data_.set.train.size()) + " training, " +
           std::to_string(data_.set.validation.size()) + " validation and " +
           std::to_string(data_.set.test.size()) + " test images of " +
           std::to_string(data_.set.names.size()) + " classes";
  }

  std::vector<std::string> notes() const override {
    std::string held_out = data_.set.held_out_validation ? "validation" : "";
    if (data_.set.held_out_test) held_out += held_out.empty() ? "test" : " and test";
    if (held_out.empty()) return {};
    return {"every tenth training image of a class is held out for " + held_out};
  }

  Validation validate() override {
    const Scores scores = scores_of(*model_, data_.set.validation);
    const Measures measures{{"accuracy", scores.accuracy()}, {"loss", scores.loss}};
    return {measures, measures,
            "accuracy " + format_fixed(scores.accuracy(), 4) + "  loss " + format_fixed(scores.loss, 3)};
  }

  Measures none_yet() const override { return {{"accuracy", -1}, {"loss", 0}}; }
  bool better(double accuracy, double best) const override { return accuracy > best; }

  TestResult test(const Measures& best) override {
    TrainedModel trained = load_model(run_.path());
    const Scores scores = scores_of(*trained.model, data_.set.test);
    TestResult result;
    result.summary = {{"memory", options_.memory},         {"accuracy", scores.accuracy()},
                      {"test_loss", scores.loss},          {"validation_accuracy", best[0].second},
                      {"validation_loss", best[1].second}, {"labels", data_.set.names},
                      {"confusion", scores.confusion}};
    result.more = ordered_json::object();
    result.text = "test accuracy " + format_fixed(scores.accuracy(), 4) + "  loss " +
                  format_fixed(scores.loss, 3) + "\n";
    return result;
  }

 private:
  Minibatch minibatch(const std::vector<int64_t>& rows) {
    return minibatch(make_batch(data_.set.train, rows, data_.normalisation, moves_, channels_last(options_)));
  }
  Minibatch minibatch(const Batch& batch) {
    const int64_t count = batch.images.size(0);
    return {count, count, {batch.images, batch.labels}, [this, batch] {
              return model_->loss(batch.images, batch.labels);
            }};
  }

  Scores scores_of(ClassifierImpl& model, const LabelledImages& images) const {
    return answers_of(model, images, data_.normalisation, channels_last(options_), options_.batch_size)
        .scores(images.labels, static_cast<int64_t>(data_.set.names.size()));
  }

  TrainOptions options_;
  RunFolder run_;
  const Data& data_;
  Classifier model_ = nullptr;
  std::vector<std::vector<int64_t>> rows_;  ///< of the epoch's batches
  std::vector<Move> moves_;                 ///< of the epoch's images
};

}  // namespace

namespace {

/// Puts the model's own sizes in place of 0.
void check_model(TrainOptions& options) {
  require_at_least("width", options.width, 0);
  require_at_least("depth", options.depth, 0);
  const bool chain = options.model == "chain", reversible = options.model == "reversible";
  require_one_of("activation", options.activation, {"maxmin", "leaky"});
  require_one_of("init", options.init, {"orthogonal", "he"});
  if (!chain && (options.activation != "maxmin" || options.init != "orthogonal")) {
    throw UsageError("--activation and --init are for chain; --model is " + options.model);
  }
  if (is_resnet(options.model)) {
    if (options.width == 0) options.width = 16;
    if (options.depth != 0) {
      throw UsageError("--depth is for reversible and chain; " + options.model +
                       " has its depth in its name");
    }
    return;
  }
  if (!chain && !reversible) {
    throw UsageError(
        "--model should be reversible, chain or resnetN with N = 6 n + 2, such as resnet20; got '" +
        options.model + "'");
  }
  if (options.width == 0) options.width = 32;
  if (options.depth == 0) options.depth = chain ? 16 : 9;
  if (options.width % 2 != 0) {
    throw UsageError("--width of " + options.model + " should be even, got " + std::to_string(options.width));
  }
  if (reversible) require_at_least("depth", options.depth, 3);
}

/// What the model's layers know of settings.
void check_setting(const TrainOptions& options) {
  if (is_resnet(options.model)) return;  // any
  if (options.memory == "eager" || options.memory == "exact" || options.memory.ends_with(".json")) return;
  throw UsageError("--memory of " + options.model + " should be eager, exact or a file named .json, got " +
                   options.memory);
}

}  // namespace

TrainOptions checked(TrainOptions options) {
  require_at_least("images", options.images, 100);
  check_model(options);
  if (options.memory.empty()) options.memory = "exact";
  require_one_of("layout", options.layout, {"channels-last", "contiguous"});
  require_one_of("schedule", options.schedule, {"cosine", "step", "constant"});
  if (!(options.warm_up >= 0)) throw UsageError("--warm-up should be at least 0");
  if (!(options.weight_decay >= 0)) throw UsageError("--weight-decay should be at least 0");
  check_shared(options);
  check_setting(options);
  options.data = absolute_data(options.data, "generated");
  return options;
}

double rate_factor(const TrainOptions& options, double epochs) {
  if (epochs < options.warm_up) {
    // Never 0, not even in the first step.
    constexpr double least = 0.1;
    return least + (1 - least) * epochs / options.warm_up;
  }
  const double done = epochs / static_cast<double>(options.epochs);
  if (options.schedule == "cosine") return (1 + std::cos(kPi * std::min(done, 1.0))) / 2;
  if (options.schedule == "step") return done < 0.5 ? 1 : done < 0.75 ? 0.1 : 0.01;
  return 1;
}

TrainedModel load_model(const fs::path& path) {
  TrainedModel trained;
  trained.options = options_of_run<TrainOptions>(path);
  const ordered_json config = RunFolder::open(path).read_json("config.json");
  const auto read = [&](const char* key, auto& field) {
    try {
      config.at(key).get_to(field);
    } catch (const nlohmann::json::exception&) {
      throw Error(std::string("config.json: the field ") + key + " is missing or malformed");
    }
  };
  read("labels", trained.names);
  read("mean", trained.normalisation.mean);
  read("deviation", trained.normalisation.deviation);
  const KeepRandomState keep;
  trained.model = make_model(trained.options, trained.names.size());
  load_best_model(path, *trained.model);
  return trained;
}

Answers answer(TrainedModel& trained, const LabelledImages& images, int64_t batch_size) {
  return answers_of(*trained.model, images, trained.normalisation, channels_last(trained.options),
                    batch_size);
}

LabelledImages load_split(const TrainedModel& trained, const std::string& data, const std::string& split) {
  require_one_of("split", split, {"train", "val", "test"});
  if (!data.empty() && data != "generated" && !fs::is_directory(data)) return read_images(data);
  DataSource from = data_source(trained.options);
  if (!data.empty()) from.data = data;
  Dataset set = load_dataset(from);
  return std::move(split == "train" ? set.train : split == "val" ? set.validation : set.test);
}

ordered_json train(const TrainOptions& options) {
  const TrainOptions ready = checked(options);
  if (ready.threads > 0) at::set_num_threads(static_cast<int>(ready.threads));
  const Data data(ready);
  const Interrupt interrupt;
  const ordered_json config = config_of(ready);
  const RunFolder run = prepare_run(ready, config, fixed_keys(ready));
  require_same_data(run, ready, data.fingerprint);
  write_config(run, config,
               {{"labels", data.set.names},
                {"mean", data.normalisation.mean},
                {"deviation", data.normalisation.deviation},
                {"data_fingerprint", data.fingerprint}});
  VisionTask task(ready, run, data);
  return app::train(task, ready, run, config);
}

}  // namespace remnant::app::vision
