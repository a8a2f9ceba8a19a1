#include "common/options.h"

#include <remnant/ops/attention.h>
#include <remnant/policy.h>
#include <remnant/setting.h>

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace remnant::app {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

void require_at_least(const char* flag, int64_t value, int64_t least) {
  if (value >= least) return;
  throw UsageError(std::string("--") + flag + " should be at least " + std::to_string(least) + ", got " +
                   std::to_string(value));
}

void require_finite(const char* flag, double value) {
  if (std::isfinite(value)) return;
  throw UsageError(std::string("--") + flag + " should be a finite number, got " + std::to_string(value));
}

namespace {

/// A setting in its usual spelling; a file by its absolute path, and read, before a folder is made.
void check_memory(TrainingOptions& options, const char* alone) {
  if (alone != nullptr && options.memory == alone) return;
  if (options.memory.ends_with(".json")) {
    options.memory = fs::absolute(options.memory).lexically_normal().string();
    const fs::path file = memory_file(options);
    try {
      layer_choices(read_json_file(file), file);
    } catch (const Error& error) {
      throw UsageError(std::string("--memory: ") + error.what());
    }
    return;
  }
  try {
    options.memory = Memory::parse(options.memory).str();
  } catch (const c10::Error& error) {
    const std::string own = alone == nullptr ? "" : std::string(alone) + ", or ";
    throw UsageError(error.what_without_backtrace() + std::string("; or ") + own + "a file named .json");
  }
}

}  // namespace

fs::path memory_file(const TrainingOptions& options) {
  const fs::path kept = fs::path(options.out) / kMemoryCopy;
  const bool gone = options.resume && !fs::exists(options.memory) && fs::exists(kept);
  return gone ? kept : fs::path(options.memory);
}

std::vector<std::pair<std::string, LayerMemory>> layer_choices(const ordered_json& layers,
                                                               const fs::path& file) {
  if (!layers.is_object()) throw Error(file.string() + " should be an object {layer pattern: choices}");
  std::vector<std::pair<std::string, LayerMemory>> patterns;
  for (const auto& [name, choices] : layers.items()) {
    if (!choices.is_string()) {
      throw Error(file.string() + ": the choices of " + name +
                  " should be a string, such as \"exact\" or \"curve:m=4\"");
    }
    try {
      patterns.emplace_back(name, LayerMemory::parse(choices.get<std::string>()));
    } catch (const c10::Error& error) {
      throw Error(file.string() + ": " + error.what_without_backtrace());
    }
  }
  return patterns;
}

void require_one_of(const char* flag, const std::string& value, const std::vector<std::string>& choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string list;
  for (size_t i = 0; i < choices.size(); ++i) {
    list += (i == 0 ? "" : i + 1 == choices.size() ? " or " : ", ") + choices[i];
  }
  throw UsageError(std::string("--") + flag + " should be " + list + ", got '" + value + "'");
}

void check_shared(TrainingOptions& options, const char* alone) {
  require_at_least("batch-size", options.batch_size, 1);
  require_at_least("accumulate", options.accumulate, 1);
  require_at_least("seed", options.seed, 0);
  require_at_least("epochs", options.epochs, 1);
  require_at_least("max-steps", options.max_steps, 0);
  require_at_least("checkpoint-every", options.checkpoint_every, 0);
  require_at_least("fidelity-every", options.fidelity_every, 0);
  require_at_least("threads", options.threads, 0);
  if (!(options.learning_rate > 0)) throw UsageError("--lr should be above 0");
  if (!(options.clip >= 0)) throw UsageError("--clip should be at least 0");
  require_finite("lr", options.learning_rate);
  require_finite("clip", options.clip);
  require_one_of("precision", options.precision, {"fp32", "bf16"});
  check_memory(options, alone);
}

void check_transformer(TransformerOptions& options) {
  require_at_least("hidden", options.hidden, 1);
  require_at_least("layers", options.layers, 1);
  require_at_least("heads", options.heads, 1);
  require_at_least("feed-forward", options.feed_forward, 1);
  if (options.hidden % options.heads != 0) {
    throw UsageError("--heads should divide --hidden, got " + std::to_string(options.heads) + " and " +
                     std::to_string(options.hidden));
  }
  if (!(options.dropout >= 0 && options.dropout < 1)) throw UsageError("--dropout should be in [0, 1)");
  try {
    options.attention = Policy::parse(options.attention).str();
  } catch (const c10::Error& error) {
    // The library's own words; the policy came from the command line.
    throw UsageError(error.what_without_backtrace());
  }
  check_shared(options, kAttentionAlone);
  if (options.memory != kAttentionAlone && !options.memory.ends_with(".json") &&
      options.attention != Policy::recompute().str()) {
    throw UsageError("--memory " + options.memory + " chooses for attention too; leave --attention " +
                     options.attention + " out, or use --memory attention");
  }
}

std::string absolute_data(const std::string& data, const std::string& generated) {
  return data == generated ? data : fs::absolute(data).lexically_normal().string();
}

int64_t attention_bytes(const TransformerOptions& options, int64_t examples, int64_t queries, int64_t keys) {
  const int64_t element = options.precision == "bf16" ? 2 : 4;
  return options.layers * attention_residual_bytes(Policy::parse(options.attention), examples * options.heads,
                                                   queries, keys, element, options.dropout > 0);
}

std::string json_key(std::string flag) {
  std::replace(flag.begin(), flag.end(), '-', '_');
  return flag;
}

std::string version() { return REMNANT_VERSION; }

RunFolder prepare_run(const TrainingOptions& options, const ordered_json& config,
                      const std::vector<std::string>& fixed) {
  if (options.out.empty()) throw UsageError("--out is needed: the folder of the run");
  RunFolder run = RunFolder::create(options.out, options.resume);
  if (!options.resume || !fs::exists(run.path() / "config.json")) return run;
  const ordered_json before = run.read_json("config.json");
  for (const std::string& key : fixed) {
    if (before.contains(key) && before[key] == config[key]) continue;
    const std::string old_value = before.contains(key) ? before[key].dump() : "nothing";
    throw Error("cannot resume " + run.path().string() + ": its " + key + " is " + old_value +
                ", this command says " + config[key].dump());
  }
  return run;
}

void require_same_data(const RunFolder& run, const TrainingOptions& options, const std::string& fingerprint) {
  if (!options.resume || !fs::exists(run.path() / "config.json")) return;
  const ordered_json before = run.read_json("config.json");
  const ordered_json found = before.value("data_fingerprint", ordered_json());
  if (found == fingerprint) return;
  if (found.is_null()) {
    throw Error(
        "cannot resume " + run.path().string() +
        ": its config.json has no data_fingerprint, so it does not say which data it was started with");
  }
  throw Error("cannot resume " + run.path().string() + ": the content of " + options.data +
              " is not the one that it was started with");
}

void write_config(const RunFolder& run, const ordered_json& config, const ordered_json& more) {
  ordered_json whole = config;
  whole["threads"] = at::get_num_threads();
  whole.update(more);
  run.write_json("config.json", whole);
}

void require_program(const fs::path& path, const ordered_json& config, const std::string& program) {
  const ordered_json found = config.is_object() ? config.value("program", ordered_json()) : ordered_json();
  if (found == program) return;
  throw Error(path.string() + " is not a run of remnant " + program + ": its config.json says program " +
              (found.is_null() ? "nothing" : found.dump()));
}

}  // namespace remnant::app
