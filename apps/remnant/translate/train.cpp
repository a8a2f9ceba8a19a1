#include "translate/train.h"

#include "common/error.h"
#include "common/fidelity.h"
#include "common/random_state.h"

#include <remnant/memory.h>
#include <remnant/ops/attention.h>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/utils.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <limits>
#include <map>
#include <optional>
#include <type_traits>
#include <utility>

namespace remnant::app::translate {
namespace {

using at::Tensor;
using nlohmann::ordered_json;
namespace fs = std::filesystem;

/// bfloat16 matrix products on the CPU while alive.
class Autocast {
 public:
  explicit Autocast(bool enabled)
      : enabled_(enabled),
        was_enabled_(at::autocast::is_autocast_enabled(at::kCPU)),
        previous_(at::autocast::get_autocast_dtype(at::kCPU)) {
    if (!enabled_) return;
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (!enabled_) return;
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, was_enabled_);
    at::autocast::set_autocast_dtype(at::kCPU, previous_);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool enabled_, was_enabled_;
  at::ScalarType previous_;
};

/// Sum of the losses of all target words of the batch, over `words`.
Tensor batch_loss(TransformerImpl& model, const Batch& batch, int64_t words, bool bf16) {
  const Tensor input = batch.target.slice(1, 0, batch.target.size(1) - 1);
  const Tensor next = batch.target.slice(1, 1);
  const Autocast autocast(bf16);
  return model.loss(batch.source, batch.source_padding, input, next) / static_cast<double>(words);
}

/// Adam on the fused kernel, with its state in the open for checkpoints.
class Adam {
 public:
  explicit Adam(const TransformerImpl& model) {
    for (const auto& item : model.named_parameters()) {
      names_.push_back(item.key());
      parameters_.push_back(item.value());
      // Gradients live from the start, so that no step's peak counts them.
      parameters_.back().mutable_grad() = at::zeros_like(item.value(), at::MemoryFormat::Contiguous).detach();
      gradients_.push_back(parameters_.back().grad());
      mean_.push_back(at::zeros_like(item.value()).detach());
      square_.push_back(at::zeros_like(item.value()).detach());
      steps_.push_back(at::full({}, 0.0, at::kFloat));
    }
  }

  void zero_gradients() { at::_foreach_zero_(gradients_); }

  /// Scales the gradients to a norm of at most `largest`; returns the norm before.
  double clip(double largest) {
    const double norm = at::stack(at::_foreach_norm(gradients_)).norm().item<double>();
    const double scale = largest / (norm + 1e-6);
    if (scale < 1) at::_foreach_mul_(gradients_, scale);
    return norm;
  }

  void step(double learning_rate) {
    const at::NoGradGuard no_grad;
    at::_foreach_add_(steps_, 1);
    at::_fused_adam_(parameters_, gradients_, mean_, square_, {}, steps_, learning_rate, 0.9, 0.999,
                     /*weight_decay=*/0, 1e-8, /*amsgrad=*/false, /*maximize=*/false);
  }

  /// The state's tensors by name; loading copies into them.
  std::map<std::string, Tensor> state() const {
    std::map<std::string, Tensor> tensors;
    for (size_t i = 0; i < names_.size(); ++i) {
      tensors["adam.mean." + names_[i]] = mean_[i];
      tensors["adam.square." + names_[i]] = square_[i];
    }
    tensors["adam.step"] = steps_.front();
    return tensors;
  }

  void set_steps(const Tensor& step) {
    for (Tensor& each : steps_) each.copy_(step);
  }

 private:
  std::vector<std::string> names_;
  std::vector<Tensor> parameters_, gradients_, mean_, square_, steps_;
};

std::map<std::string, Tensor> tensors_of(const TransformerImpl& model) {
  std::map<std::string, Tensor> tensors;
  for (const auto& item : model.named_parameters()) tensors[item.key()] = item.value().detach();
  return tensors;
}

void copy_tensors(const LoadedTensors& loaded, const std::map<std::string, Tensor>& into,
                  const fs::path& file) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : into) {
    const auto found = loaded.tensors.find(name);
    if (found == loaded.tensors.end()) throw Error(file.string() + " lacks the tensor " + name);
    if (found->second.sizes() != tensor.sizes() || found->second.scalar_type() != tensor.scalar_type()) {
      std::ostringstream message;
      message << file.string() << ": tensor " << name << " should be " << tensor.sizes() << " of "
              << tensor.scalar_type() << ", got " << found->second.sizes() << " of "
              << found->second.scalar_type();
      throw Error(message.str());
    }
    Tensor target = tensor;
    target.copy_(found->second);
  }
}

std::string metadata(const LoadedTensors& loaded, const std::string& name, const fs::path& file) {
  const auto found = loaded.metadata.find(name);
  if (found == loaded.metadata.end()) throw Error(file.string() + " lacks the field " + name);
  return found->second;
}

template <typename T>
T number(const LoadedTensors& loaded, const std::string& name, const fs::path& file) {
  const std::string text = metadata(loaded, name, file);
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size()) return value;
  throw Error(file.string() + ": the field " + name + " should be a number, got '" + text + "'");
}

std::string exact_text(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string two_digits(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.2g", value);
  return text;
}

std::string json_key(std::string flag) {
  std::replace(flag.begin(), flag.end(), '-', '_');
  return flag;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

ordered_json config_of(const TrainOptions& options) {
  ordered_json config;
  config["program"] = "translate";
  config["version"] = REMNANT_VERSION;
  config["attention"] = options.attention;
  visit_options(options, [&](const char* flag, const auto& field, Resume, const char*) {
    config[json_key(flag)] = field;
  });
  return config;
}

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

void check(const TrainOptions& options) {
  const auto at_least = [](const char* flag, int64_t value, int64_t least) {
    if (value < least) {
      throw UsageError(std::string("--") + flag + " should be at least " + std::to_string(least) + ", got " +
                       std::to_string(value));
    }
  };
  at_least("pairs", options.pairs, 1);
  at_least("min-freq", options.min_frequency, 1);
  at_least("max-length", options.max_length, 3);
  at_least("hidden", options.hidden, 1);
  at_least("layers", options.layers, 1);
  at_least("heads", options.heads, 1);
  at_least("feed-forward", options.feed_forward, 1);
  at_least("batch-size", options.batch_size, 1);
  at_least("accumulate", options.accumulate, 1);
  at_least("seed", options.seed, 0);
  at_least("epochs", options.epochs, 1);
  at_least("max-steps", options.max_steps, 0);
  at_least("checkpoint-every", options.checkpoint_every, 0);
  at_least("fidelity-every", options.fidelity_every, 0);
  at_least("threads", options.threads, 0);
  if (options.hidden % options.heads != 0) {
    throw UsageError("--heads should divide --hidden, got " + std::to_string(options.heads) + " and " +
                     std::to_string(options.hidden));
  }
  if (!(options.dropout >= 0 && options.dropout < 1)) throw UsageError("--dropout should be in [0, 1)");
  if (!(options.learning_rate > 0)) throw UsageError("--lr should be above 0");
  if (!(options.clip > 0)) throw UsageError("--clip should be above 0");
  if (options.precision != "fp32" && options.precision != "bf16") {
    throw UsageError("--precision should be fp32 or bf16, got '" + options.precision + "'");
  }
  if (options.source == options.target) throw UsageError("--source and --target are the same language");
}

CorpusSource corpus_source(const TrainOptions& options) {
  return {options.data, options.source, options.target, options.pairs};
}

class Trainer {
 public:
  Trainer(const TrainOptions& options, const Corpus& corpus)
      : options_(options), run_(prepare_folder(options)), started_(std::chrono::steady_clock::now()) {
    encode_corpus(corpus);
    torch::manual_seed(static_cast<uint64_t>(options_.seed));
    model_ = Transformer(model_options(options_, source_vocabulary_, target_vocabulary_));
    adam_.emplace(*model_);
    recover_directory(run_.path() / "best");
    const bool resumed = options_.resume && fs::exists(run_.path() / "checkpoint");
    if (resumed) {
      load_checkpoint();
    } else {
      if (fs::exists(run_.path() / "metrics.jsonl")) run_.drop_metrics_after(0);
    }
    announce(resumed);
    if (!fs::exists(run_.path() / "memory.json")) write_memory();
    events_ = std::make_unique<EventWriter>(run_.path());
  }

  ordered_json run() {
    while (epoch_ < options_.epochs) {
      train_epoch();
      validate();
      const bool stop = out_of_steps();
      if (!stop) {
        ++epoch_;
        position_ = 0;
      }
      save_checkpoint();
      if (stop) break;
    }
    return summarise();
  }

 private:
  struct Record {
    int64_t step, epoch, kept_bytes, peak_bytes;
    double loss, step_ms;
    std::optional<double> gradient_error, added_variance;
  };

  /// An existing run is only gone on with when it is the same training.
  static RunFolder prepare_folder(const TrainOptions& options) {
    if (options.out.empty()) throw UsageError("--out is needed: the folder of the run");
    RunFolder run = RunFolder::create(options.out, options.resume);
    ordered_json config = config_of(options);
    if (options.resume && fs::exists(run.path() / "config.json")) {
      const ordered_json before = run.read_json("config.json");
      const auto same = [&](const std::string& key) {
        if (before.contains(key) && before[key] == config[key]) return;
        const std::string old_value = before.contains(key) ? before[key].dump() : "nothing";
        throw Error("cannot resume " + run.path().string() + ": its " + key + " is " + old_value +
                    ", this command says " + config[key].dump());
      };
      same("program");
      same("attention");
      visit_options(options, [&](const char* flag, const auto&, Resume resume, const char*) {
        if (resume == Resume::same) same(json_key(flag));
      });
    }
    return run;
  }

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

    const fs::path source_file = run_.path() / "source.vocabulary",
                   target_file = run_.path() / "target.vocabulary";
    if (options_.resume && fs::exists(source_file) && fs::exists(target_file)) {
      if (!(Vocabulary::load(source_file) == source_vocabulary_ &&
            Vocabulary::load(target_file) == target_vocabulary_)) {
        throw Error("cannot resume " + run_.path().string() + ": the training text in " + options_.data +
                    " is not the one that it was started with");
      }
    } else {
      source_vocabulary_.save(source_file);
      target_vocabulary_.save(target_file);
    }
    ordered_json config = config_of(options_);
    config["threads"] = at::get_num_threads();
    config["source_words"] = source_vocabulary_.size();
    config["target_words"] = target_vocabulary_.size();
    run_.write_json("config.json", config);
  }

  void announce(bool resumed) const {
    for (const auto& item : model_->named_parameters()) parameters_ += item.value().numel();
    if (options_.quiet) return;
    std::cerr << config_of(options_).dump() << "\n"
              << train_.size() << " training, " << validation_.size() << " validation and " << test_.size()
              << " test pairs; " << source_vocabulary_.size() << " " << options_.source << " and "
              << target_vocabulary_.size() << " " << options_.target << " words; "
              << fixed(static_cast<double>(parameters_) / 1e6, 1) << " M parameters; "
              << at::get_num_threads() << " threads\n";
    if (skipped_ > 0) std::cerr << skipped_ << " pairs with an empty side are left out\n";
    const int64_t truncated = train_.truncated + validation_.truncated + test_.truncated;
    if (truncated > 0) {
      std::cerr << truncated << " sentences are cut to --max-length " << options_.max_length << "\n";
    }
    if (resumed) std::cerr << "resumed at step " << step_ << "\n";
  }

  /// Layer by layer what a forward pass keeps, on the epoch's batch of median size.
  void write_memory() {
    const KeepRandomState keep;
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

    model_->train();
    const memory::Recorder recorder(model_.get());
    const Tensor loss = batch_loss(*model_, batch, batch.predicted, options_.precision == "bf16");
    std::vector<Tensor> inputs{batch.source, batch.target};
    if (batch.source_padding.defined()) inputs.push_back(batch.source_padding);
    const memory::Report report = recorder.report({loss}, inputs);

    const int64_t sentences = batch.source.size(0), source = batch.source.size(1),
                  target = batch.target.size(1) - 1;
    const int64_t heads = sentences * options_.heads;
    const Policy policy = Policy::parse(options_.attention);
    const int64_t element = options_.precision == "bf16" ? 2 : 4;
    const auto residual = [&](int64_t queries, int64_t keys) {
      return attention_residual_bytes(policy, heads, queries, keys, element, options_.dropout > 0);
    };
    ordered_json json = ordered_json::parse(report.json());
    if (!json.is_object()) json = {{"rows", json}};
    json["batch"] = {{"sentences", sentences}, {"source_length", source}, {"target_length", target}};
    json["kept_bytes"] = report.kept_bytes;
    json["attention_residual_bytes"] =
        options_.layers * (residual(source, source) + residual(target, target) + residual(target, source));
    run_.write_json("memory.json", json);
    if (!options_.quiet) {
      std::cerr << "a batch of " << sentences << " x (" << source << " + " << target << ") words keeps "
                << format_bytes(report.kept_bytes) << " for backward, of which attention's policy "
                << format_bytes(json["attention_residual_bytes"].get<int64_t>()) << "\n";
    }
  }

  bool out_of_steps() const { return options_.max_steps > 0 && step_ >= options_.max_steps; }

  void train_epoch() {
    const auto batches = batches_by_length(train_, options_.batch_size, options_.seed, epoch_);
    const int64_t total = static_cast<int64_t>(batches.size());
    const int64_t steps = (total + options_.accumulate - 1) / options_.accumulate;
    if (position_ < total) {
      Progress progress("epoch " + std::to_string(epoch_ + 1) + "/" + std::to_string(options_.epochs), steps,
                        options_.quiet);
      model_->train();
      while (position_ < total && !out_of_steps()) {
        std::vector<Batch> group;
        for (int64_t i = 0; i < options_.accumulate && position_ < total; ++i) {
          group.push_back(make_batch(train_, batches[position_++]));
        }
        train_step(group, progress, (position_ + options_.accumulate - 1) / options_.accumulate);
        if (Interrupt::requested()) {
          progress.clear();
          save_and_stop();
        }
        if (options_.checkpoint_every > 0 && step_ % options_.checkpoint_every == 0) save_checkpoint();
      }
      progress.clear();
    }
    // Before validation, so that a crash there costs no training.
    save_checkpoint();
  }

  void train_step(const std::vector<Batch>& group, Progress& progress, int64_t step_of_epoch) {
    const bool checked = options_.fidelity_every > 0 && (step_ + 1) % options_.fidelity_every == 0;
    const Tensor random_before = checked ? random_state() : Tensor();
    auto start = std::chrono::steady_clock::now();
    adam_->zero_gradients();
    const StepCost cost = accumulate_gradients(*model_, group, options_.precision == "bf16");
    std::optional<Fidelity> fidelity;
    if (checked) {
      const auto pause = std::chrono::steady_clock::now();
      fidelity = check_gradients(*model_, group, options_.precision == "bf16", random_before);
      start += std::chrono::steady_clock::now() - pause;  // the step's time is that without the check
    }
    const double norm = adam_->clip(options_.clip);
    if (!std::isfinite(cost.loss) || !std::isfinite(norm)) {
      progress.clear();
      throw Error("training diverged: loss or gradient is not finite at step " + std::to_string(step_ + 1) +
                  "; try a smaller --lr (the last checkpoint is kept)");
    }
    adam_->step(options_.learning_rate);
    ++step_;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    int64_t tokens = 0;
    for (const Batch& batch : group) tokens += batch.source_tokens + batch.predicted;
    const double speed = static_cast<double>(tokens) / std::max(seconds, 1e-9);
    Record record{step_, epoch_ + 1, cost.kept_bytes, cost.peak_bytes, cost.loss, seconds * 1e3, {}, {}};
    ordered_json line = {{"step", step_},
                         {"epoch", epoch_ + 1},
                         {"seconds", elapsed()},
                         {"loss", cost.loss},
                         {"lr", options_.learning_rate},
                         {"tokens_per_second", speed},
                         {"kept_bytes", cost.kept_bytes},
                         {"peak_bytes", cost.peak_bytes},
                         {"gradient_norm", norm},
                         {"step_ms", seconds * 1e3}};
    if (fidelity.has_value()) {
      record.gradient_error = fidelity->gradient_error;
      record.added_variance = fidelity->added_variance;
      line["gradient_error"] = fidelity->gradient_error;
      if (fidelity->added_variance.has_value()) line["added_variance"] = *fidelity->added_variance;
      report(*fidelity, progress);
    }
    records_.push_back(record);
    run_.append_metrics(line);
    events_->scalar("train/loss", cost.loss, step_);
    events_->scalar("train/tokens_per_second", speed, step_);
    events_->scalar("memory/kept_bytes", static_cast<double>(cost.kept_bytes), step_);
    events_->scalar("memory/peak_bytes", static_cast<double>(cost.peak_bytes), step_);
    progress.update(step_of_epoch, {"loss " + fixed(cost.loss, 3), fixed(speed / 1e3, 1) + "k tokens/s",
                                    "kept " + format_bytes(cost.kept_bytes)});
  }

  void report(const Fidelity& fidelity, Progress& progress) {
    std::string text =
        "step " + std::to_string(step_) + ": gradient error " + two_digits(fidelity.gradient_error);
    events_->scalar("fidelity/gradient_error", fidelity.gradient_error, step_);
    if (fidelity.added_variance.has_value()) {
      text += ", added variance " + two_digits(*fidelity.added_variance) + " of the minibatch's";
      events_->scalar("fidelity/added_variance", *fidelity.added_variance, step_);
    }
    if (options_.quiet) return;
    progress.clear();
    std::cerr << text << "\n";
  }

  void validate() {
    Scores scores;
    try {
      const KeepRandomState keep;
      scores = evaluate(*model_, validation_, target_vocabulary_, 1, options_.batch_size);
    } catch (const Interrupted&) {
      save_and_stop();
    }
    double loss = 0;
    int64_t count = 0;
    for (const Record& record : records_) {
      if (record.epoch != epoch_ + 1) continue;
      loss += record.loss;
      ++count;
    }
    loss /= static_cast<double>(std::max<int64_t>(count, 1));
    const bool better = scores.tokens.score > best_bleu_;
    if (better) {
      best_bleu_ = scores.tokens.score;
      best_perplexity_ = scores.perplexity;
      best_epoch_ = epoch_ + 1;
      replace_directory_atomically(run_.path() / "best", [&](const fs::path& folder) {
        save_tensors(folder / "model.safetensors", tensors_of(*model_),
                     {{"step", std::to_string(step_)}, {"epoch", std::to_string(best_epoch_)}});
      });
    }
    run_.append_metrics({{"step", step_},
                         {"epoch", epoch_ + 1},
                         {"seconds", elapsed()},
                         {"validation_perplexity", scores.perplexity},
                         {"validation_bleu", scores.tokens.score},
                         {"validation_bleu_detokenised", scores.detokenised.score}});
    events_->scalar("validation/perplexity", scores.perplexity, step_);
    events_->scalar("validation/bleu", scores.tokens.score, step_);
    events_->flush();
    std::cout << "epoch " << epoch_ + 1 << "  step " << step_ << "  loss " << fixed(loss, 3)
              << "  validation perplexity " << fixed(scores.perplexity, 3) << "  BLEU "
              << fixed(scores.tokens.score, 2) << (better ? " (best)" : "") << "  "
              << format_duration(elapsed()) << std::endl;
  }

  [[noreturn]] void save_and_stop() {
    save_checkpoint();
    events_->flush();
    std::cerr << "interrupted: saved step " << step_ << " in " << run_.path().string()
              << "; the same command with --resume goes on\n";
    throw Interrupted();
  }

  void save_checkpoint() const {
    replace_directory_atomically(run_.path() / "checkpoint", [&](const fs::path& folder) {
      save_tensors(folder / "model.safetensors", tensors_of(*model_));
      std::map<std::string, Tensor> tensors = adam_->state();
      tensors["random.cpu"] = random_state();
      save_tensors(folder / "training.safetensors", tensors,
                   {{"step", std::to_string(step_)},
                    {"epoch", std::to_string(epoch_)},
                    {"position", std::to_string(position_)},
                    {"best_epoch", std::to_string(best_epoch_)},
                    {"best_bleu", exact_text(best_bleu_)},
                    {"best_perplexity", exact_text(best_perplexity_)}});
    });
  }

  void load_checkpoint() {
    const fs::path folder = run_.path() / "checkpoint";
    const fs::path model_file = folder / "model.safetensors", training_file = folder / "training.safetensors";
    copy_tensors(load_tensors(model_file), tensors_of(*model_), model_file);
    const LoadedTensors training = load_tensors(training_file);
    std::map<std::string, Tensor> state = adam_->state();
    copy_tensors(training, state, training_file);
    adam_->set_steps(state.at("adam.step"));
    const auto random = training.tensors.find("random.cpu");
    if (random == training.tensors.end())
      throw Error(training_file.string() + " lacks the tensor random.cpu");
    set_random_state(random->second);
    step_ = number<int64_t>(training, "step", training_file);
    epoch_ = number<int64_t>(training, "epoch", training_file);
    position_ = number<int64_t>(training, "position", training_file);
    best_epoch_ = number<int64_t>(training, "best_epoch", training_file);
    best_bleu_ = number<double>(training, "best_bleu", training_file);
    best_perplexity_ = number<double>(training, "best_perplexity", training_file);
    run_.drop_metrics_after(step_);
    load_records();
  }

  /// A value that is not on every line; JSON has no infinity and says null.
  static std::optional<double> measure_of(const ordered_json& line, const char* key) {
    if (!line.contains(key)) return std::nullopt;
    return line[key].is_number() ? line[key].get<double>() : std::numeric_limits<double>::infinity();
  }

  void load_records() {
    const fs::path file = run_.path() / "metrics.jsonl";
    if (!fs::exists(file)) return;
    for (const std::string& line : read_lines(file)) {
      const ordered_json json = ordered_json::parse(line, nullptr, false);
      if (!json.is_object()) continue;
      seconds_before_ = std::max(seconds_before_, json.value("seconds", 0.0));
      if (!json.contains("loss")) continue;
      records_.push_back({json.value("step", int64_t{0}), json.value("epoch", int64_t{0}),
                          json.value("kept_bytes", int64_t{0}), json.value("peak_bytes", int64_t{0}),
                          json.value("loss", 0.0), json.value("step_ms", 0.0),
                          measure_of(json, "gradient_error"), measure_of(json, "added_variance")});
    }
  }

  double elapsed() const {
    return seconds_before_ +
           std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  }

  ordered_json summarise() {
    const TrainedModel best = load_model(run_.path());
    Transformer model = best.model;
    const Scores scores = evaluate(*model, test_, target_vocabulary_, 1, options_.batch_size);
    std::vector<double> milliseconds, kept;
    int64_t most_kept = 0, peak = 0;
    std::optional<double> gradient_error, added_variance;
    const auto worst = [](std::optional<double>& most, const std::optional<double>& value) {
      if (value.has_value()) most = std::max(most.value_or(0.0), *value);
    };
    for (const Record& record : records_) {
      milliseconds.push_back(record.step_ms);
      kept.push_back(static_cast<double>(record.kept_bytes));
      most_kept = std::max(most_kept, record.kept_bytes);
      peak = std::max(peak, record.peak_bytes);
      worst(gradient_error, record.gradient_error);
      worst(added_variance, record.added_variance);
    }
    const ordered_json memory = run_.read_json("memory.json");
    const Policy policy = Policy::parse(options_.attention);
    ordered_json summary;
    summary["attention"] = options_.attention;
    summary["bleu"] = scores.tokens.score;
    summary["bleu_signature"] = scores.tokens.signature;
    summary["bleu_detokenised"] = scores.detokenised.score;
    summary["bleu_detokenised_signature"] = scores.detokenised.signature;
    summary["test_perplexity"] = scores.perplexity;
    summary["validation_perplexity"] = best_perplexity_;
    summary["validation_bleu"] = best_bleu_;
    summary["best_epoch"] = best_epoch_;
    summary["epochs"] = epoch_;
    summary["steps"] = step_;
    summary["seconds"] = elapsed();
    summary["kept_bytes"] = most_kept;
    summary["kept_bytes_median"] = static_cast<int64_t>(median(kept));
    summary["peak_bytes"] = peak;
    summary["attention_residual_bytes"] = memory.value("attention_residual_bytes", int64_t{0});
    summary["step_ms_median"] = median(milliseconds);
    if (gradient_error.has_value()) summary["gradient_error_worst"] = *gradient_error;
    if (added_variance.has_value()) summary["added_variance_worst"] = *added_variance;
    summary["parameters"] = parameters_;
    summary["seed"] = options_.seed;
    summary["threads"] = at::get_num_threads();
    summary["version"] = REMNANT_VERSION;
    if (policy.kind == PolicyKind::curve) summary["curve_evicted_share"] = evicted_share(train_, policy.m);
    run_.write_json("summary.json", summary);
    std::cout << "test perplexity " << fixed(scores.perplexity, 3) << "\n"
              << "test BLEU " << fixed(scores.tokens.score, 2) << "  lower-cased words, greedy  "
              << scores.tokens.signature << "\n"
              << "test BLEU " << fixed(scores.detokenised.score, 2) << "  detokenised text, greedy  "
              << scores.detokenised.signature << std::endl;
    return summary;
  }

  TrainOptions options_;
  RunFolder run_;
  std::chrono::steady_clock::time_point started_;
  double seconds_before_ = 0;
  Pairs train_, validation_, test_;
  int64_t skipped_ = 0;
  mutable int64_t parameters_ = 0;
  Vocabulary source_vocabulary_, target_vocabulary_;
  Transformer model_ = nullptr;
  std::optional<Adam> adam_;
  std::unique_ptr<EventWriter> events_;
  std::vector<Record> records_;
  int64_t step_ = 0, epoch_ = 0, position_ = 0;  ///< position: batches of this epoch already seen
  int64_t best_epoch_ = 0;
  double best_bleu_ = -1, best_perplexity_ = 0;
};

}  // namespace

TrainOptions checked(TrainOptions options) {
  check(options);
  try {
    options.attention = Policy::parse(options.attention).str();
  } catch (const c10::Error& error) {
    // The library's own words; the policy came from the command line.
    throw UsageError(error.what_without_backtrace());
  }
  // The run can then be evaluated from any folder.
  if (options.data != "captions") options.data = fs::absolute(options.data).lexically_normal().string();
  return options;
}

TrainOptions options_from_json(const ordered_json& config) {
  TrainOptions options;
  const auto read = [&](const std::string& key, auto& field) {
    try {
      field = config.at(key).get<std::decay_t<decltype(field)>>();
    } catch (const nlohmann::json::exception&) {
      throw Error("config.json: the field " + key + " is missing or malformed");
    }
  };
  read("attention", options.attention);
  visit_options(options, [&](const char* flag, auto& field, Resume resume, const char*) {
    const std::string key = json_key(flag);
    // What does not shape the model may be younger than the run.
    if (resume == Resume::same || config.contains(key)) read(key, field);
  });
  return options;
}

StepCost accumulate_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16) {
  int64_t words = 0;
  for (const Batch& batch : batches) words += batch.predicted;
  StepCost cost;
  const memory::PeakMeter meter;
  for (const Batch& batch : batches) {
    const int64_t before = meter.live_bytes();
    const Tensor loss = batch_loss(model, batch, words, bf16);
    cost.kept_bytes = std::max(cost.kept_bytes, meter.live_bytes() - before);
    loss.backward();
    cost.loss += loss.item<double>();
  }
  cost.peak_bytes = meter.peak_bytes();
  return cost;
}

Fidelity check_gradients(TransformerImpl& model, const std::vector<Batch>& batches, bool bf16,
                         const Tensor& random_before) {
  const auto examples = [&](const std::vector<Batch>& part) {
    int64_t words = 0;
    for (const Batch& batch : part) words += batch.predicted;
    return Examples{static_cast<double>(words),
                    [&model, &part, bf16] { accumulate_gradients(model, part, bf16); }};
  };
  const std::array<std::vector<Batch>, 2> parts = halves(batches);
  std::optional<std::array<Examples, 2>> split;
  if (!parts[0].empty() && !parts[1].empty()) split = {examples(parts[0]), examples(parts[1])};
  return check_fidelity(model, random_before, examples(batches), split);
}

TrainedModel load_model(const fs::path& path) {
  const RunFolder run = RunFolder::open(path);
  TrainedModel trained;
  trained.options = options_from_json(run.read_json("config.json"));
  trained.source_vocabulary = Vocabulary::load(path / "source.vocabulary");
  trained.target_vocabulary = Vocabulary::load(path / "target.vocabulary");
  recover_directory(path / "best");
  fs::path file = path / "best" / "model.safetensors";
  if (!fs::exists(file)) {
    file = path / "checkpoint" / "model.safetensors";
    if (!fs::exists(file)) throw Error(path.string() + " holds no model yet: its training has not saved one");
    std::cerr << "no epoch of this run is complete: taking its latest checkpoint\n";
  }
  const KeepRandomState keep;
  trained.model =
      Transformer(model_options(trained.options, trained.source_vocabulary, trained.target_vocabulary));
  copy_tensors(load_tensors(file), tensors_of(*trained.model), file);
  trained.model->eval();
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
  return Trainer(ready, corpus).run();
}

}  // namespace remnant::app::translate
