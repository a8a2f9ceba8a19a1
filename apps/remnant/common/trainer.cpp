#include "common/trainer.h"

#include "common/error.h"
#include "common/random_state.h"
#include "common/step_trace.h"
#include "common/text.h"

#include <remnant/memory.h>
#include <remnant/plan.h>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <utility>

namespace remnant::app {
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

/// The batch's part of the mean loss over `terms`.
Tensor batch_loss(const Minibatch& batch, int64_t terms, bool bf16) {
  const Autocast autocast(bf16);
  return batch.loss() / static_cast<double>(terms);
}

int64_t terms_of(const std::vector<Minibatch>& batches) {
  int64_t terms = 0;
  for (const Minibatch& batch : batches) terms += batch.terms;
  return terms;
}

std::map<std::string, Tensor> tensors_of(const torch::nn::Module& model) {
  std::map<std::string, Tensor> tensors;
  for (const auto& item : model.named_parameters()) tensors[item.key()] = item.value().detach();
  for (const auto& item : model.named_buffers()) tensors[item.key()] = item.value().detach();
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

std::string two_digits(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.2g", value);
  return text;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

class Trainer {
 public:
  Trainer(Task& task, const TrainingOptions& options, const RunFolder& run, const ordered_json& config)
      : task_(task),
        model_(task.model()),
        options_(options),
        run_(run),
        config_(config),
        started_(std::chrono::steady_clock::now()),
        optimizer_(task.make_optimizer()),
        best_(task.none_yet()) {
    for (const auto& item : model_.named_parameters()) parameters_ += item.value().numel();
    recover_directory(run_.path() / "best");
    const bool resumed = options_.resume && fs::exists(run_.path() / "checkpoint");
    if (resumed) {
      load_checkpoint();
    } else {
      if (fs::exists(run_.path() / "metrics.jsonl")) run_.drop_metrics_after(0);
    }
    if (!resumed || !fs::exists(run_.path() / "timeline.json")) traces_left_ = 2;
    announce(resumed);
    set_memory();
    if (!resumed || !has_memory()) write_memory();
    stop_if_interrupted();
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

  bool bf16() const { return options_.precision == "bf16"; }

  void announce(bool resumed) const {
    if (options_.quiet) return;
    std::cerr << config_.dump() << "\n"
              << task_.describe() << "; " << format_fixed(static_cast<double>(parameters_) / 1e6, 1)
              << " M parameters; " << at::get_num_threads() << " threads\n";
    for (const std::string& note : task_.notes()) std::cerr << note << "\n";
    if (resumed) std::cerr << "resumed at step " << step_ << "\n";
  }

  /// The plan of a budget stays with the run: what layers keep decides how they draw dropout, and times
  /// differ from one run to the next. So does a file's content.
  void set_memory() {
    const std::string& setting = options_.memory;
    if (setting == kAttentionAlone) return;
    if (setting.ends_with(".json")) {
      const fs::path file = memory_file(options_);
      const ordered_json layers = read_json_file(file);
      if (file != setting) std::cerr << setting << " is gone: going on with the run's copy of it\n";
      set_memory_of(layers, file);
      run_.write_json(kMemoryCopy, layers);
      return;
    }
    const Memory memory = Memory::parse(setting);
    if (memory.kind != Memory::Kind::budget) {
      remnant::set_memory(model_, memory);
      return;
    }
    budget_ = memory.bytes;
    const fs::path file = run_.path() / "plan.json";
    if (fs::exists(file)) {
      const ordered_json before = run_.read_json("plan.json");
      if (before.value("memory", "") == setting) {
        set_memory_of(before.value("layers", ordered_json()), file);
        return;
      }
    }
    const KeepRandomState keep;
    const KeepBuffers keep_buffers(model_);
    model_.train();
    try {
      const Plan plan = plan_for(largest_batches(), memory);
      if (!options_.quiet) std::cerr << plan.table();
      ordered_json layers, variances = ordered_json::object();
      for (const PlannedLayer& layer : plan.layers) {
        layers[layer.name] = layer.memory.str();
        if (memory.bits > 0) variances[layer.name] = layer.code_variance;
      }
      run_.write_json("plan.json", {{"memory", setting},
                                    {"layers", layers},
                                    {"code_variance", variances},
                                    {"predicted_kept_bytes", plan.predicted_kept_bytes},
                                    {"measured_kept_bytes", plan.measured_kept_bytes},
                                    {"predicted_peak_bytes", plan.predicted_peak_bytes},
                                    {"measured_peak_bytes", plan.measured_peak_bytes}});
    } catch (const c10::Error& error) {
      throw Error(error.what_without_backtrace());
    }
  }

  void set_memory_of(const ordered_json& layers, const fs::path& file) {
    try {
      remnant::set_memory(model_, layer_choices(layers, file));
    } catch (const c10::Error& error) {
      // Its patterns, which only a model can tell to be wrong.
      throw UsageError(file.string() + ": " + error.what_without_backtrace());
    }
  }

  /// All sizes but the rows; padding's, where there is any, stand last.
  static std::vector<int64_t> lengths_of(const Minibatch& batch) {
    std::vector<int64_t> lengths;
    for (const Tensor& input : batch.inputs) {
      lengths.insert(lengths.end(), input.sizes().begin() + 1, input.sizes().end());
    }
    return lengths;
  }

  static bool covers(const Minibatch& a, const Minibatch& b) {
    const std::vector<int64_t> large = lengths_of(a), small = lengths_of(b);
    return a.inputs[0].size(0) >= b.inputs[0].size(0) && large.size() >= small.size() &&
           std::equal(small.begin(), small.end(), large.begin(), std::less_equal<>());
  }

  /// With padding.
  static int64_t elements(const Minibatch& batch) {
    int64_t sum = 0;
    for (const Tensor& input : batch.inputs) sum += input.numel();
    return sum;
  }

  /// Those of all epochs that no other batch covers: most rows, or the longest. The largest first.
  std::vector<Minibatch> largest_batches() {
    std::vector<Minibatch> largest;
    for (int64_t epoch = 0; epoch < options_.epochs; ++epoch) {
      const int64_t total = task_.start_epoch(epoch);
      std::optional<std::vector<int64_t>> lengths;
      bool alike = true;
      for (int64_t i = 0; i < total; ++i) {
        stop_if_interrupted();
        Minibatch batch = task_.batches(i, 1).front();
        const auto covers_it = [&](const Minibatch& other) { return covers(other, batch); };
        if (!lengths.has_value()) lengths = lengths_of(batch);
        alike = alike && lengths_of(batch) == *lengths;
        if (std::any_of(largest.begin(), largest.end(), covers_it)) continue;
        std::erase_if(largest, [&](const Minibatch& other) { return covers(batch, other); });
        largest.push_back(std::move(batch));
      }
      if (alike) break;  // no other epoch has longer ones
    }
    std::sort(largest.begin(), largest.end(),
              [](const Minibatch& a, const Minibatch& b) { return elements(a) > elements(b); });
    constexpr size_t most = 6;
    if (largest.size() > most) largest.resize(most);
    return largest;
  }

  /// A plan for the first batch that holds for all; else for one of them that it did not hold for.
  Plan plan_for(const std::vector<Minibatch>& batches, const Memory& memory) {
    size_t planned = 0;
    for (size_t attempt = 1;; ++attempt) {
      const Minibatch& batch = batches[planned];
      const auto loss = [&] {
        stop_if_interrupted();
        return batch_loss(batch, batch.terms, bf16());
      };
      Plan plan = remnant::plan(model_, loss, memory.bytes, memory.bits);
      int64_t highest = memory.bytes;
      for (size_t i = 0; i < batches.size(); ++i) {
        if (batches.size() == 1) break;
        stop_if_interrupted();
        const int64_t peak = accumulate_gradients({batches[i]}, bf16()).peak_bytes;
        if (peak <= highest) continue;
        highest = peak;
        planned = i;
      }
      optimizer_->zero_gradients();
      if (highest == memory.bytes || attempt == batches.size()) return plan;
    }
  }

  using BytesByLayer = std::map<std::string, double>;

  static BytesByLayer by_layer(const memory::Report& report) {
    BytesByLayer sums;
    for (const memory::SavedRow& row : report.rows) sums[row.layer] += static_cast<double>(row.kept_bytes);
    return sums;
  }

  /// What a batch of probe.sequences keeps, from two of its examples and from four: linear in their number
  /// (one alone may do without copies), and at `lengths` other than the batch's a parabola in the length.
  BytesByLayer extrapolate(const Probe& probe, const std::vector<int64_t>& lengths) {
    const auto weight = [](const std::vector<int64_t>& nodes, size_t i, int64_t x) {
      double product = 1;
      for (size_t j = 0; j < nodes.size(); ++j) {
        if (j == i) continue;
        product *= static_cast<double>(x - nodes[j]) / static_cast<double>(nodes[i] - nodes[j]);
      }
      return product;
    };
    std::vector<int64_t> numbers{1};
    if (probe.sequences >= 2) numbers = {1, 2};
    if (probe.sequences >= 4) numbers = {2, 4};
    BytesByLayer sums;
    for (size_t i = 0; i < numbers.size(); ++i) {
      for (size_t j = 0; j < lengths.size(); ++j) {
        stop_if_interrupted();
        const Minibatch part = probe.part(numbers[i], lengths[j]);
        const memory::Recorder recorder(&model_);
        const Tensor loss = batch_loss(part, part.terms, bf16());
        const double share = weight(numbers, i, probe.sequences) * weight(lengths, j, probe.length);
        for (const auto& [layer, bytes] : by_layer(recorder.report({loss}, part.inputs))) {
          sums[layer] += share * bytes;
        }
      }
    }
    return sums;
  }

  /// Kept, predicted and eager's bytes of each layer. Eager's whole batch may not fit, so its parts are short
  /// as well.
  ordered_json foretell(const Probe& probe, const memory::Report& report) {
    const BytesByLayer kept = by_layer(report), predicted = extrapolate(probe, {probe.length});
    const auto settings = remnant::get_memory(model_);
    remnant::set_memory(model_, Memory::eager());
    constexpr int64_t shortest = 512;
    std::vector<int64_t> lengths{probe.length};
    if (const int64_t part = probe.length / 16; probe.length > shortest) lengths = {part, 2 * part, 3 * part};
    const BytesByLayer eager = extrapolate(probe, lengths);
    if (!settings.empty()) remnant::set_memory(model_, settings);
    std::vector<std::string> order;
    for (const memory::SavedRow& row : report.rows) {
      if (std::find(order.begin(), order.end(), row.layer) == order.end()) order.push_back(row.layer);
    }
    for (const auto& [layer, bytes] : eager) {
      if (!kept.contains(layer)) order.push_back(layer);
    }
    const auto bytes_of = [](const BytesByLayer& sums, const std::string& layer) {
      const auto found = sums.find(layer);
      return found == sums.end() ? int64_t{0} : static_cast<int64_t>(std::llround(found->second));
    };
    ordered_json layers = ordered_json::array();
    for (const std::string& layer : order) {
      layers.push_back({{"layer", layer},
                        {"kept_bytes", bytes_of(kept, layer)},
                        {"predicted_bytes", bytes_of(predicted, layer)},
                        {"eager_bytes", bytes_of(eager, layer)}});
    }
    return layers;
  }

  /// Not one that a crash has damaged, as the end of the training would find.
  bool has_memory() const {
    try {
      return run_.read_json("memory.json").is_object();
    } catch (const Error&) {
      return false;
    }
  }

  /// Layer by layer what a forward pass keeps.
  void write_memory() {
    const KeepRandomState keep;
    const KeepBuffers keep_buffers(model_);
    const Probe probe = task_.probe();
    model_.train();
    const memory::Recorder recorder(&model_);
    const Tensor loss = batch_loss(probe.batch, probe.batch.terms, bf16());
    const memory::Report report = recorder.report({loss}, probe.batch.inputs);

    ordered_json json = ordered_json::parse(report.json());
    if (!json.is_object()) json = {{"rows", json}};
    json["batch"] = probe.shape;
    json["kept_bytes"] = report.kept_bytes;
    if (probe.attention_residual_bytes.has_value()) {
      json["attention_residual_bytes"] = *probe.attention_residual_bytes;
    }
    if (probe.part) json["layers"] = foretell(probe, report);
    run_.write_json("memory.json", json);
    if (!options_.quiet) {
      std::cerr << "a batch of " << probe.text << " keeps " << format_bytes(report.kept_bytes)
                << " for backward";
      // Under a setting, layers decide for themselves what of attention is kept.
      if (options_.memory == kAttentionAlone && probe.attention_residual_bytes.has_value()) {
        std::cerr << ", of which attention's policy " << format_bytes(*probe.attention_residual_bytes);
      }
      std::cerr << "\n";
    }
  }

  bool out_of_steps() const { return options_.max_steps > 0 && step_ >= options_.max_steps; }

  void train_epoch() {
    const int64_t total = task_.start_epoch(epoch_);
    const int64_t steps = (total + options_.accumulate - 1) / options_.accumulate;
    if (position_ < total) {
      Progress progress("epoch " + std::to_string(epoch_ + 1) + "/" + std::to_string(options_.epochs), steps,
                        options_.quiet);
      model_.train();
      while (position_ < total && !out_of_steps()) {
        const int64_t first = position_;
        position_ = std::min(first + options_.accumulate, total);
        const double epochs =
            static_cast<double>(epoch_) + static_cast<double>(first) / static_cast<double>(total);
        const double rate = options_.learning_rate * task_.rate_factor(epochs);
        train_step(first, position_ - first, rate, progress,
                   (position_ + options_.accumulate - 1) / options_.accumulate);
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

  void train_step(int64_t first, int64_t count, double rate, Progress& progress, int64_t step_of_epoch) {
    const std::vector<Minibatch> group = task_.batches(first, count);
    const bool checked = options_.fidelity_every > 0 && (step_ + 1) % options_.fidelity_every == 0;
    const Tensor random_before = checked ? random_state() : Tensor();
    auto start = std::chrono::steady_clock::now();
    optimizer_->zero_gradients();
    // The first step also warms up, so the second replaces what it leaves.
    std::optional<StepTrace> trace;
    if (traces_left_ > 0 && !checked) {
      trace.emplace(model_);
      --traces_left_;
    }
    const StepCost cost = accumulate_gradients(group, bf16(), trace.has_value() ? &*trace : nullptr);
    std::optional<Fidelity> fidelity;
    if (checked) {
      const auto pause = std::chrono::steady_clock::now();
      fidelity = check_gradients(model_, group, task_.halves(first, count), bf16(), random_before);
      start += std::chrono::steady_clock::now() - pause;  // the step's time is that without the check
    }
    if (trace.has_value()) trace->optimizer();
    const double norm = optimizer_->clip(options_.clip);
    if (!std::isfinite(cost.loss) || !std::isfinite(norm)) {
      progress.clear();
      throw Error("training diverged: loss or gradient is not finite at step " + std::to_string(step_ + 1) +
                  "; try a smaller --lr (" +
                  (fs::exists(run_.path() / "checkpoint") ? "the last checkpoint is kept"
                                                          : "there is no checkpoint yet") +
                  ")");
    }
    optimizer_->step(rate);
    ++step_;
    if (budget_ > 0 && cost.peak_bytes > budget_) warn_of(cost.peak_bytes, progress);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (trace.has_value()) trace->write(run_, step_, cost.kept_bytes);
    trace.reset();
    int64_t tokens = 0;
    for (const Minibatch& batch : group) tokens += batch.tokens;
    const double speed = static_cast<double>(tokens) / std::max(seconds, 1e-9);
    Record record{step_, epoch_ + 1, cost.kept_bytes, cost.peak_bytes, cost.loss, seconds * 1e3, {}, {}};
    ordered_json line = {{"step", step_},
                         {"epoch", epoch_ + 1},
                         {"seconds", elapsed()},
                         {"loss", cost.loss},
                         {"lr", rate},
                         {task_.unit() + "_per_second", speed},
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
    events_->scalar("train/" + task_.unit() + "_per_second", speed, step_);
    events_->scalar("memory/kept_bytes", static_cast<double>(cost.kept_bytes), step_);
    events_->scalar("memory/peak_bytes", static_cast<double>(cost.peak_bytes), step_);
    progress.update(step_of_epoch, {"loss " + format_fixed(cost.loss, 3), format_speed(speed),
                                    "kept " + format_bytes(cost.kept_bytes)});
  }

  /// Once. Also of a quiet run: the budget may be all the memory there is.
  void warn_of(int64_t peak, Progress& progress) {
    const auto text = [](int64_t bytes) { return format_fixed(static_cast<double>(bytes) / 1e6, 3) + " MB"; };
    progress.clear();
    std::cerr << "warning: the peak of step " << step_ << ", " << text(peak) << ", is above the budget of "
              << text(budget_) << ", which was planned for smaller batches\n";
    budget_ = 0;
  }

  std::string format_speed(double speed) const {
    const std::string number = speed < 1e4 ? format_fixed(speed, 0) : format_fixed(speed / 1e3, 1) + "k";
    return number + " " + task_.unit() + "/s";
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
    Validation found;
    try {
      const KeepRandomState keep;
      found = task_.validate();
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
    const bool better = task_.better(found.best.front().second, best_.front().second);
    if (better) {
      best_ = found.best;
      best_epoch_ = epoch_ + 1;
      replace_directory_atomically(run_.path() / "best", [&](const fs::path& folder) {
        save_tensors(folder / "model.safetensors", tensors_of(model_),
                     {{"step", std::to_string(step_)}, {"epoch", std::to_string(best_epoch_)}});
      });
    }
    ordered_json line = {{"step", step_}, {"epoch", epoch_ + 1}, {"seconds", elapsed()}};
    for (const auto& [name, value] : found.lines) line["validation_" + name] = value;
    run_.append_metrics(line);
    for (const auto& [name, value] : found.best) events_->scalar("validation/" + name, value, step_);
    events_->flush();
    std::cout << "epoch " << epoch_ + 1 << "  step " << step_ << "  loss " << format_fixed(loss, 3)
              << "  validation " << found.text << (better ? " (best)" : "") << "  "
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
      save_tensors(folder / "model.safetensors", tensors_of(model_));
      std::map<std::string, Tensor> tensors = optimizer_->state();
      tensors.merge(task_.state());
      tensors["random.cpu"] = random_state();
      std::map<std::string, std::string> fields{{"step", std::to_string(step_)},
                                                {"epoch", std::to_string(epoch_)},
                                                {"position", std::to_string(position_)},
                                                {"best_epoch", std::to_string(best_epoch_)}};
      for (const auto& [name, value] : best_) fields["best_" + name] = exact_text(value);
      save_tensors(folder / "training.safetensors", tensors, fields);
    });
  }

  void load_checkpoint() {
    const fs::path folder = run_.path() / "checkpoint";
    const fs::path model_file = folder / "model.safetensors", training_file = folder / "training.safetensors";
    copy_tensors(load_tensors(model_file), tensors_of(model_), model_file);
    const LoadedTensors training = load_tensors(training_file);
    std::map<std::string, Tensor> state = optimizer_->state();
    copy_tensors(training, state, training_file);
    optimizer_->loaded();
    state = task_.state();
    copy_tensors(training, state, training_file);
    task_.load_state(state);
    const auto random = training.tensors.find("random.cpu");
    if (random == training.tensors.end())
      throw Error(training_file.string() + " lacks the tensor random.cpu");
    set_random_state(random->second);
    step_ = number<int64_t>(training, "step", training_file);
    epoch_ = number<int64_t>(training, "epoch", training_file);
    position_ = number<int64_t>(training, "position", training_file);
    best_epoch_ = number<int64_t>(training, "best_epoch", training_file);
    for (auto& [name, value] : best_) value = number<double>(training, "best_" + name, training_file);
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
    const TestResult result = task_.test(best_);
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
    ordered_json summary;
    if (config_.contains("attention")) summary["attention"] = config_["attention"];
    summary.update(result.summary);
    summary["best_epoch"] = best_epoch_;
    summary["epochs"] = epoch_;
    summary["steps"] = step_;
    summary["seconds"] = elapsed();
    summary["kept_bytes"] = most_kept;
    summary["kept_bytes_median"] = static_cast<int64_t>(median(kept));
    summary["peak_bytes"] = peak;
    if (memory.contains("attention_residual_bytes")) {
      summary["attention_residual_bytes"] = memory["attention_residual_bytes"];
    }
    summary["step_ms_median"] = median(milliseconds);
    if (gradient_error.has_value()) summary["gradient_error_worst"] = *gradient_error;
    if (added_variance.has_value()) summary["added_variance_worst"] = *added_variance;
    summary["parameters"] = parameters_;
    summary["seed"] = options_.seed;
    summary["threads"] = at::get_num_threads();
    summary["version"] = version();
    summary.update(result.more);
    run_.write_json("summary.json", summary);
    std::cout << result.text << std::flush;
    return summary;
  }

  Task& task_;
  torch::nn::Module& model_;
  TrainingOptions options_;
  RunFolder run_;
  ordered_json config_;
  std::chrono::steady_clock::time_point started_;
  double seconds_before_ = 0;
  int64_t parameters_ = 0;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<EventWriter> events_;
  std::vector<Record> records_;
  int64_t budget_ = 0;                           ///< bytes, or 0 where there is none
  int traces_left_ = 0;                          ///< steps still to be traced
  int64_t step_ = 0, epoch_ = 0, position_ = 0;  ///< position: batches of this epoch already seen
  int64_t best_epoch_ = 0;
  Measures best_;
};

}  // namespace

StepCost accumulate_gradients(const std::vector<Minibatch>& batches, bool bf16, StepTrace* trace) {
  const int64_t terms = terms_of(batches);
  StepCost cost;
  const memory::PeakMeter meter;
  for (const Minibatch& batch : batches) {
    const int64_t before = meter.live_bytes();
    if (trace != nullptr) trace->forward();
    const Tensor loss = batch_loss(batch, terms, bf16);
    cost.kept_bytes = std::max(cost.kept_bytes, meter.live_bytes() - before);
    if (trace != nullptr) {
      trace->backward(loss);
    } else {
      loss.backward();
    }
    cost.loss += loss.item<double>();
  }
  cost.peak_bytes = meter.peak_bytes();
  return cost;
}

Fidelity check_gradients(torch::nn::Module& model, const std::vector<Minibatch>& batches,
                         const std::array<std::vector<Minibatch>, 2>& halves, bool bf16,
                         const Tensor& random_before) {
  const auto examples = [&](const std::vector<Minibatch>& part) {
    return Examples{static_cast<double>(terms_of(part)), [&part, bf16] { accumulate_gradients(part, bf16); }};
  };
  std::optional<std::array<Examples, 2>> split;
  if (!halves[0].empty() && !halves[1].empty()) split = {examples(halves[0]), examples(halves[1])};
  return check_fidelity(model, random_before, examples(batches), split);
}

ordered_json train(Task& task, const TrainingOptions& options, const RunFolder& run,
                   const ordered_json& config) {
  std::unique_ptr<Trainer> trainer;
  try {
    trainer = std::make_unique<Trainer>(task, options, run, config);
  } catch (const Interrupted&) {
    std::cerr << "interrupted before the first step: nothing to save\n";
    throw;
  }
  return trainer->run();
}

std::unique_ptr<Optimizer> Task::make_optimizer() { return std::make_unique<Adam>(model()); }

KeepBuffers::KeepBuffers(const torch::nn::Module& model) : buffers_(model.buffers()) {
  for (const Tensor& buffer : buffers_) values_.push_back(buffer.clone());
}

KeepBuffers::~KeepBuffers() {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < buffers_.size(); ++i) buffers_[i].copy_(values_[i]);
}

void load_best_model(const fs::path& run, torch::nn::Module& model) {
  recover_directory(run / "best");
  fs::path file = run / "best" / "model.safetensors";
  if (!fs::exists(file)) {
    file = run / "checkpoint" / "model.safetensors";
    if (!fs::exists(file)) throw Error(run.string() + " holds no model yet: its training has not saved one");
    std::cerr << "no epoch of this run is complete: taking its latest checkpoint\n";
  }
  copy_tensors(load_tensors(file), tensors_of(model), file);
  model.eval();
}

}  // namespace remnant::app
