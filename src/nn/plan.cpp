#include <remnant/memory.h>
#include <remnant/plan.h>
#include <remnant/rounding.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/zeros_like.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <sstream>
#include <string_view>

namespace remnant {
namespace {

using at::Tensor;

struct Layer {
  std::string name;
  nn::KeepsByChoice* module;
};

std::vector<Layer> layers_of(torch::nn::Module& model) {
  std::vector<Layer> layers;
  if (auto* module = dynamic_cast<nn::KeepsByChoice*>(&model)) layers.push_back({"", module});
  // Without the model itself, which need not be in a shared_ptr.
  for (const auto& item : model.named_modules("", /*include_self=*/false)) {
    if (auto* module = dynamic_cast<nn::KeepsByChoice*>(item.value().get())) {
      layers.push_back({item.key(), module});
    }
  }
  return layers;
}

bool trains(const Layer& layer) {
  const auto* module = dynamic_cast<const torch::nn::Module*>(layer.module);
  return module == nullptr || module->is_training();
}

/// Without what says nothing to the layer, so that get_memory gives back what set_memory takes.
void give(const Layer& layer, LayerMemory memory) {
  if (!layer.module->attends()) memory.policy.reset();
  layer.module->set_memory(memory);
}

/// Exact gradients, from the fastest to the smallest; then codes, if wanted.
std::vector<LayerMemory> candidates(int64_t bits) {
  LayerMemory fastest;
  fastest.norm_input = false;
  LayerMemory no_hidden = fastest;
  no_hidden.hidden = false;
  LayerMemory output = no_hidden;
  output.attention = AttentionKeep::output;
  LayerMemory input = no_hidden;
  input.attention = AttentionKeep::input;
  LayerMemory checkpoint = input;
  checkpoint.checkpoint = true;
  std::vector<LayerMemory> choices{fastest, no_hidden, output, input, checkpoint};
  if (bits > 0) choices.emplace_back(Memory::unbiased(bits));
  return choices;
}

struct Measurement {
  std::vector<int64_t> kept_by_layer;
  int64_t kept = 0, peak = 0;
  double milliseconds = 0;
};

/// Puts gradients and random state back at the end of the scope; until then gradients are zeros that exist,
/// so that no peak counts them.
class Untouched {
 public:
  explicit Untouched(torch::nn::Module& model)
      : generator_(at::globalContext().defaultGenerator(at::kCPU)), random_(generator_.get_state()) {
    for (Tensor& parameter : model.parameters()) {
      if (!parameter.requires_grad()) continue;
      parameters_.push_back(parameter);
      gradients_.push_back(parameter.grad());
      parameter.mutable_grad() = at::zeros_like(parameter).detach();
    }
  }
  ~Untouched() {
    for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i].mutable_grad() = gradients_[i];
    generator_.set_state(random_);
  }
  Untouched(const Untouched&) = delete;
  Untouched& operator=(const Untouched&) = delete;

  /// What codes add to the gradient's variance, over its square: two steps from one random state that drop
  /// the same and round differently.
  double added_variance(const std::function<Tensor()>& loss) {
    std::array<std::vector<Tensor>, 2> drawn;
    for (size_t i = 0; i < drawn.size(); ++i) {
      generator_.set_state(random_);
      for (Tensor& parameter : parameters_) parameter.mutable_grad().zero_();
      const RoundingSalt salt(static_cast<uint32_t>(i + 1));
      loss().backward();
      if (i == 1) break;
      for (const Tensor& parameter : parameters_) drawn[0].push_back(parameter.grad().clone());
    }
    double difference = 0, product = 0, squares = 0;
    const auto dot = [](const Tensor& a, const Tensor& b) {
      return at::dot(a.reshape(-1), b.reshape(-1)).item<double>();
    };
    for (size_t p = 0; p < parameters_.size(); ++p) {
      const Tensor &a = drawn[0][p], b = parameters_[p].grad();
      const Tensor apart = a - b;
      difference += dot(apart, apart) / 2;
      product += dot(a, b);  // the square of what both have
      squares += (dot(a, a) + dot(b, b)) / 2;
    }
    return squares > 0 ? difference / std::max(product, 0.01 * squares) : 0;
  }

 private:
  at::Generator generator_;
  Tensor random_;
  std::vector<Tensor> parameters_, gradients_;
};

/// Whether `name` is `pattern`, whose * stand for any characters.
bool fits(std::string_view name, std::string_view pattern) {
  if (pattern.empty()) return name.empty();
  if (pattern.front() != '*') {
    return !name.empty() && name.front() == pattern.front() && fits(name.substr(1), pattern.substr(1));
  }
  return fits(name, pattern.substr(1)) || (!name.empty() && fits(name.substr(1), pattern));
}

bool inside(const std::string& layer, const std::string& name) {
  return name.empty() || layer == name || layer.starts_with(name + ".");
}

Measurement measure(torch::nn::Module& model, const std::vector<Layer>& layers,
                    const std::function<Tensor()>& loss, memory::PeakMeter& meter) {
  constexpr int steps = 4;
  Measurement result;
  std::array<double, steps> times{};
  for (int i = 0; i < steps; ++i) {
    meter.reset();
    const auto start = std::chrono::steady_clock::now();
    loss().backward();
    times.at(i) = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    result.peak = meter.peak_bytes();
  }
  std::sort(times.begin(), times.end());
  result.milliseconds = times[1];  // of few: the second fastest

  const memory::Recorder recorder(&model);
  const Tensor output = loss();
  const memory::Report report = recorder.report({output}, {output});
  result.kept = report.kept_bytes;
  result.kept_by_layer.assign(layers.size(), 0);
  for (const memory::SavedRow& row : report.rows) {
    for (size_t l = 0; l < layers.size(); ++l) {
      if (inside(row.layer, layers[l].name)) {
        result.kept_by_layer[l] += row.kept_bytes;
        break;
      }
    }
  }
  return result;
}

StepBytes measure_bytes(torch::nn::Module& model, const std::function<Tensor()>& loss,
                        memory::PeakMeter& meter) {
  StepBytes result;
  // A second step frees what the first allocated under the meter.
  for (int i = 0; i < 2; ++i) {
    meter.reset();
    loss().backward();
    result.peak_bytes = meter.peak_bytes();
  }
  const memory::Recorder recorder(&model);
  const Tensor output = loss();
  result.kept_bytes = recorder.report({output}, {output}).kept_bytes;
  return result;
}

/// `count` sizes from half of `largest` up to it, as far as they differ.
std::vector<int64_t> sizes_up_to(int64_t largest, int64_t count) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t steps = 2 * (count - 1);
    const int64_t size = (largest * (count - 1 + i) + steps - 1) / steps;
    if (sizes.empty() || sizes.back() < size) sizes.push_back(size);
  }
  return sizes;
}

/// The weight of the value at nodes[i] in the polynomial through all nodes, at x.
double lagrange(const std::vector<int64_t>& nodes, size_t i, int64_t x) {
  double weight = 1;
  for (size_t j = 0; j < nodes.size(); ++j) {
    if (j != i) weight *= static_cast<double>(x - nodes[j]) / static_cast<double>(nodes[i] - nodes[j]);
  }
  return weight;
}

/// What each choice did when every layer took it, and what a mixture should do.
class Model {
 public:
  /// variances: of each layer's codes, the last choice; empty without codes.
  Model(std::vector<Measurement> measured, std::vector<double> variances)
      : measured_(std::move(measured)), variances_(std::move(variances)) {
    const Measurement& first = measured_.front();
    int64_t all = 0;
    for (const int64_t kept : first.kept_by_layer) all += kept;
    for (const int64_t kept : first.kept_by_layer) {
      share_.push_back(all > 0 ? static_cast<double>(kept) / static_cast<double>(all) : 0.0);
    }
    outside_ = first.kept - all;
  }

  size_t layers() const { return share_.size(); }
  size_t choices() const { return measured_.size(); }
  int64_t kept(size_t layer, size_t choice) const { return measured_[choice].kept_by_layer[layer]; }
  double added_ms(size_t layer, size_t choice) const {
    return (measured_[choice].milliseconds - measured_[0].milliseconds) * share_[layer];
  }

  double code_variance(size_t layer) const { return variances_.empty() ? 0 : variances_[layer]; }
  bool coded(size_t choice) const { return !variances_.empty() && choice + 1 == choices(); }

  int64_t kept(const std::vector<size_t>& chosen) const {
    int64_t sum = outside_;
    for (size_t l = 0; l < chosen.size(); ++l) sum += kept(l, chosen[l]);
    return sum;
  }
  /// The backward goes from the last layer to the first: at each, what that layer needs comes on top of what
  /// it and the layers below it keep.
  int64_t peak(const std::vector<size_t>& chosen) const {
    int64_t below = outside_, highest = 0;
    for (size_t l = 0; l < chosen.size(); ++l) {
      const Measurement& alike = measured_[chosen[l]];
      below += kept(l, chosen[l]);
      highest = std::max(highest, below + alike.peak - alike.kept);
    }
    return highest;
  }
  double milliseconds(const std::vector<size_t>& chosen) const {
    double sum = measured_[0].milliseconds;
    for (size_t l = 0; l < chosen.size(); ++l) sum += added_ms(l, chosen[l]);
    return sum;
  }

 private:
  std::vector<Measurement> measured_;
  std::vector<double> variances_;
  std::vector<double> share_;  // of a layer in all that a choice costs
  int64_t outside_ = 0;        // kept beside the layers
};

/// From the fastest: the change that saves most of the peak for its time, until `budget` holds; as small as
/// it gets where it never does.
std::vector<size_t> choose(const Model& model, int64_t budget) {
  std::vector<size_t> chosen(model.layers(), 0);
  while (model.peak(chosen) > budget) {
    double best = -1;
    std::vector<size_t> next;
    for (size_t l = 0; l < model.layers(); ++l) {
      for (size_t c = 0; c < model.choices(); ++c) {
        if (model.kept(l, c) >= model.kept(l, chosen[l])) continue;
        std::vector<size_t> changed = chosen;
        changed[l] = c;
        // Bytes of the layer stand in where the peak moves only once other layers follow.
        const auto peak = static_cast<double>(model.peak(chosen) - model.peak(changed));
        const auto own = static_cast<double>(model.kept(l, chosen[l]) - model.kept(l, c));
        const double saved = std::max(peak, 0.5 * own);
        const double cost = std::max(model.added_ms(l, c) - model.added_ms(l, chosen[l]), 1e-3) *
                            (model.coded(c) ? 1 + model.code_variance(l) : 1);
        if (saved / cost > best) {
          best = saved / cost;
          next = std::move(changed);
        }
      }
    }
    if (next.empty()) break;
    chosen = std::move(next);
  }
  return chosen;
}

std::string megabytes(int64_t bytes) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text.data();
}

/// Rounded down, or `up`: a number of bytes that is larger never reads as one that is not.
std::string rounded(int64_t bytes, bool up) {
  const auto in = [&](int64_t unit) { return bytes / unit + (up && bytes % unit > 0 ? 1 : 0); };
  if (bytes < 10'000) return std::to_string(bytes) + " B";
  if (bytes < 10'000'000) return std::to_string(in(1000)) + " kB";
  const int64_t tenths = in(100'000);
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " MB";
}

}  // namespace

int64_t set_memory(torch::nn::Module& model, const LayerMemory& memory) {
  const std::vector<Layer> layers = layers_of(model);
  for (const Layer& layer : layers) give(layer, memory);
  return static_cast<int64_t>(layers.size());
}

std::vector<std::pair<std::string, LayerMemory>> get_memory(torch::nn::Module& model) {
  std::vector<std::pair<std::string, LayerMemory>> found;
  for (const Layer& layer : layers_of(model)) found.emplace_back(layer.name, layer.module->memory());
  return found;
}

void set_memory(torch::nn::Module& model, const std::vector<std::pair<std::string, LayerMemory>>& patterns) {
  const std::vector<Layer> layers = layers_of(model);
  for (const auto& [pattern, memory] : patterns) {
    const bool any = std::any_of(layers.begin(), layers.end(),
                                 [&](const Layer& layer) { return fits(layer.name, pattern); });
    std::string names;
    for (const Layer& layer : layers) names += (names.empty() ? "" : ", ") + layer.name;
    TORCH_CHECK(any, "set_memory: no layer fits the pattern '", pattern, "'; the model's are ", names);
    if (!memory.policy.has_value()) continue;
    const bool attends = std::any_of(layers.begin(), layers.end(), [&](const Layer& layer) {
      return layer.module->attends() && fits(layer.name, pattern);
    });
    TORCH_CHECK(attends, "set_memory: '", memory.policy->str(),
                "' is a policy of attention, which no layer has that fits the pattern '", pattern, "'");
  }
  std::vector<const LayerMemory*> decided(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    for (const auto& [pattern, memory] : patterns) {
      if (fits(layers[l].name, pattern)) decided[l] = &memory;
    }
    if (decided[l] == nullptr) continue;
    const std::string can = layers[l].module->refusal(*decided[l]);
    TORCH_CHECK(can.empty(), "set_memory: the layer ", layers[l].name, " can do ", can, ", got '",
                decided[l]->str(), "'");
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    if (decided[l] != nullptr) give(layers[l], *decided[l]);
  }
}

Plan plan(torch::nn::Module& model, const std::function<Tensor()>& loss, int64_t budget_bytes, int64_t bits) {
  TORCH_CHECK(budget_bytes > 0, "plan: budget_bytes must be positive, got ", budget_bytes);
  const std::vector<Layer> layers = layers_of(model);
  TORCH_CHECK(
      !layers.empty(),
      "plan: no layer of the model knows memory settings; build it of remnant::nn's Transformer layers");
  TORCH_CHECK(std::any_of(layers.begin(), layers.end(), trains),
              "plan: the model is in eval mode, where layers keep nothing by choice; call train() first");
  Untouched untouched(model);
  std::vector<LayerMemory> before;
  before.reserve(layers.size());
  for (const Layer& layer : layers) before.push_back(layer.module->memory());
  memory::PeakMeter meter;
  const std::vector<LayerMemory> choices = candidates(bits);
  const auto apply = [&](const std::vector<size_t>& chosen) {
    for (size_t l = 0; l < layers.size(); ++l) layers[l].module->set_memory(choices[chosen[l]]);
  };
  try {
    std::vector<Measurement> measured;
    for (size_t c = 0; c < choices.size(); ++c) {
      apply(std::vector<size_t>(layers.size(), c));
      measured.push_back(measure(model, layers, loss, meter));
    }
    int64_t smallest = std::numeric_limits<int64_t>::max();
    // Where mixtures turn out larger than their parts said, one choice for all layers may still fit.
    std::vector<size_t> alike;
    double fastest = std::numeric_limits<double>::infinity();
    for (size_t c = 0; c < measured.size(); ++c) {
      smallest = std::min(smallest, measured[c].peak);
      if (measured[c].peak > budget_bytes || measured[c].milliseconds >= fastest) continue;
      fastest = measured[c].milliseconds;
      alike.assign(layers.size(), c);
    }
    std::vector<double> variances;
    for (size_t l = 0; bits > 0 && l < layers.size(); ++l) {
      std::vector<size_t> one(layers.size(), 0);
      one[l] = choices.size() - 1;
      apply(one);
      variances.push_back(untouched.added_variance(loss));
    }
    const Model costs(std::move(measured), std::move(variances));
    // The mixture has the last word: where it needs more than the sum of its parts said, the aim is lowered.
    int64_t aim = budget_bytes;
    constexpr int attempts = 5;
    for (int attempt = 0; attempt < attempts; ++attempt) {
      const bool last = attempt == attempts - 1 && !alike.empty();
      const std::vector<size_t> chosen = last ? alike : choose(costs, aim);
      apply(chosen);
      const Measurement mixture = measure(model, layers, loss, meter);
      smallest = std::min(smallest, mixture.peak);
      if (mixture.peak > budget_bytes) {
        aim -= mixture.peak - budget_bytes;
        continue;
      }
      Plan result;
      for (size_t l = 0; l < layers.size(); ++l) {
        result.layers.push_back({layers[l].name, layers[l].module->memory(), costs.kept(l, chosen[l]),
                                 costs.added_ms(l, chosen[l]), costs.code_variance(l)});
      }
      result.budget_bytes = budget_bytes;
      result.predicted_kept_bytes = costs.kept(chosen);
      result.predicted_peak_bytes = costs.peak(chosen);
      result.predicted_ms = costs.milliseconds(chosen);
      result.measured_kept_bytes = mixture.kept;
      result.measured_peak_bytes = mixture.peak;
      result.measured_ms = mixture.milliseconds;
      return result;
    }
    TORCH_CHECK(false, "plan: no choice of what layers keep fits a budget of ", rounded(budget_bytes, false),
                "; the smallest peak found for these inputs is ", rounded(smallest, true),
                ": raise the budget, or make the batch smaller");
  } catch (...) {
    for (size_t l = 0; l < layers.size(); ++l) layers[l].module->set_memory(before[l]);
    throw;
  }
}

Plan plan(torch::nn::Module& model, const std::function<Tensor(int64_t, int64_t)>& loss, int64_t batch,
          int64_t length, int64_t budget_bytes, int64_t bits) {
  TORCH_CHECK(batch > 0 && length > 0, "plan: batch and length should be positive, got ", batch, " and ",
              length);
  Plan result = plan(model, [&] { return loss(batch, length); }, budget_bytes, bits);
  const Untouched untouched(model);
  memory::PeakMeter meter;
  for (const int64_t b : sizes_up_to(batch, 2)) {
    for (const int64_t l : sizes_up_to(length, 3)) {
      StepBytes bytes = measure_bytes(model, [&] { return loss(b, l); }, meter);
      bytes.batch = b;
      bytes.length = l;
      result.shapes.push_back(bytes);
    }
  }
  return result;
}

StepBytes Plan::predict(int64_t batch, int64_t length) const {
  TORCH_CHECK(!shapes.empty(),
              "Plan::predict: the plan was made for one shape; give remnant::plan a loss of (batch, length)");
  TORCH_CHECK(batch > 0 && length > 0, "Plan::predict: batch and length should be positive, got ", batch,
              " and ", length);
  std::vector<int64_t> batches, lengths;
  for (const StepBytes& shape : shapes) {
    if (std::find(batches.begin(), batches.end(), shape.batch) == batches.end())
      batches.push_back(shape.batch);
    if (std::find(lengths.begin(), lengths.end(), shape.length) == lengths.end()) {
      lengths.push_back(shape.length);
    }
  }
  TORCH_CHECK(batches.size() > 1 || batch == batches[0], "Plan::predict: the plan was made for a batch of ",
              batches[0], " alone, got ", batch, "; plan for a larger one");
  TORCH_CHECK(lengths.size() > 1 || length == lengths[0], "Plan::predict: the plan was made for a length of ",
              lengths[0], " alone, got ", length, "; plan for a larger one");
  double kept = 0, peak = 0;
  for (const StepBytes& shape : shapes) {
    const auto b =
        static_cast<size_t>(std::find(batches.begin(), batches.end(), shape.batch) - batches.begin());
    const auto l =
        static_cast<size_t>(std::find(lengths.begin(), lengths.end(), shape.length) - lengths.begin());
    const double weight = lagrange(batches, b, batch) * lagrange(lengths, l, length);
    kept += weight * static_cast<double>(shape.kept_bytes);
    peak += weight * static_cast<double>(shape.peak_bytes);
  }
  return {batch, length, std::llround(kept), std::llround(peak)};
}

std::string Plan::table() const {
  std::ostringstream text;
  for (size_t first = 0; first < layers.size();) {
    size_t last = first;
    int64_t kept = 0;
    double milliseconds = 0, variance = 0;
    for (; last < layers.size() && layers[last].memory == layers[first].memory; ++last) {
      kept += layers[last].kept_bytes;
      milliseconds += layers[last].milliseconds;
      if (layers[last].memory.bits > 0) variance += layers[last].code_variance;
    }
    text << layers[first].name;
    if (last - first > 1) text << " to " << layers[last - 1].name;
    std::array<char, 80> added{};
    const char* const form = variance > 0 ? "%+.1f ms  variance %.2g of the gradient's square" : "%+.1f ms";
    std::snprintf(added.data(), added.size(), form, milliseconds, variance);
    text << "  " << layers[first].memory.str() << "  " << megabytes(kept) << "  " << added.data() << "\n";
    first = last;
  }
  std::array<char, 256> line{};
  std::snprintf(line.data(), line.size(),
                "kept %s (predicted %s), peak %s (predicted %s) of %s, step %.0f ms (predicted %.0f ms)\n",
                megabytes(measured_kept_bytes).c_str(), megabytes(predicted_kept_bytes).c_str(),
                megabytes(measured_peak_bytes).c_str(), megabytes(predicted_peak_bytes).c_str(),
                megabytes(budget_bytes).c_str(), measured_ms, predicted_ms);
  text << line.data();
  return text.str();
}

}  // namespace remnant
