#pragma once

#include "common/error.h"
#include "common/run_folder.h"

#include <remnant/setting.h>

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace remnant::app {

/// What every program's training takes. A program derives its own, with its defaults, a kProgram with its
/// name, a kCompared with the flag that compare takes several of, that option by reference from compared(),
/// and a visit_options.
struct TrainingOptions {
  std::string data, memory, precision = "fp32", out;
  double learning_rate = 5e-4, clip = 1;
  int64_t batch_size = 128, accumulate = 1, seed = 1;
  int64_t epochs = 10, max_steps = 0, checkpoint_every = 500, fidelity_every = 0, threads = 0;
  bool resume = false, quiet = false;
};

/// The same for programs whose model is a Transformer.
struct TransformerOptions : TrainingOptions {
  static constexpr const char* kCompared = "attention";
  TransformerOptions() { memory = "attention"; }
  std::string& compared() { return attention; }
  std::string attention = "recompute";
  int64_t hidden = 256, layers = 3, heads = 8, feed_forward = 512;
  double dropout = 0.1;
};

/// --memory: attention keeps what its policy says, the rest what PyTorch keeps but for dropout.
inline constexpr const char* kAttentionAlone = "attention";

/// The run's copy of a --memory that is a file.
inline constexpr const char* kMemoryCopy = "layers.json";

/// Whether a run may go on with another value of an option than it was started with.
enum class Resume { same, any };

inline constexpr const char* kPolicies =
    "what attention keeps: exact, recompute, curve:m=4, quantized:bits=4, sampled:m=128, top:m=32";

/// Calls visit(flag name, field, Resume, help) for the options of a Transformer.
template <typename Options, typename Visit>
void visit_model_options(Options& o, const Visit& visit, const char* layers_help) {
  visit("attention", o.attention, Resume::same, kPolicies);
  visit("hidden", o.hidden, Resume::same, "width of the model");
  visit("layers", o.layers, Resume::same, layers_help);
  visit("heads", o.heads, Resume::same, "attention heads");
  visit("feed-forward", o.feed_forward, Resume::same, "width of the feed-forward layers");
  visit("dropout", o.dropout, Resume::same, "dropout probability");
}

/// The same for those of the training that all programs share.
template <typename Options, typename Visit>
void visit_shared_options(Options& o, const Visit& visit, const char* batch_help, const char* memory_help) {
  visit("lr", o.learning_rate, Resume::same, "learning rate");
  visit("clip", o.clip, Resume::same, "largest gradient norm, 0: any");
  visit("batch-size", o.batch_size, Resume::same, batch_help);
  visit("accumulate", o.accumulate, Resume::same, "batches a step: as one batch that many times larger");
  visit("memory", o.memory, Resume::any, memory_help);
  visit("precision", o.precision, Resume::same, "fp32 or bf16 (autocast; parameters stay fp32)");
  visit("seed", o.seed, Resume::same, "of all that is random: initial weights, batches, dropout");
  visit("epochs", o.epochs, Resume::any, "passes over the training data");
  visit("max-steps", o.max_steps, Resume::any, "stop after this many steps, 0: no limit");
  visit("checkpoint-every", o.checkpoint_every, Resume::any,
        "steps between checkpoints beside each epoch's, 0: none");
  visit("threads", o.threads, Resume::any, "0: all cores");
}

/// The same for the training of a Transformer.
template <typename Options, typename Visit>
void visit_training_options(Options& o, const Visit& visit, const char* batch_help) {
  visit_shared_options(
      o, visit, batch_help,
      "what layers keep: attention (its policy alone), eager, exact, unbiased:bits=4, budget=60MB (of a "
      "step's peak; budget=60MB,bits=4: codes too), or a JSON file of {layer pattern: choices}, which may be "
      "attention policies");
  visit("fidelity-every", o.fidelity_every, Resume::any,
        "steps between comparisons with the exact gradient, 0: none");
}

/// Throws UsageError where `value` is below `least`.
void require_at_least(const char* flag, int64_t value, int64_t least);

/// Throws UsageError where `value` is infinite or NaN.
void require_finite(const char* flag, double value);

/// Throws UsageError on values that cannot be; puts the memory setting in its usual spelling. `alone`: the
/// program's own word for --memory, if it has one.
void check_shared(TrainingOptions& options, const char* alone = nullptr);

/// Of a --memory that is a file: the file, or the copy of it in the run that is resumed where the file is
/// gone.
std::filesystem::path memory_file(const TrainingOptions& options);

/// What {layer pattern: choices} says. Throws Error, naming `file`, on anything else.
std::vector<std::pair<std::string, LayerMemory>> layer_choices(const nlohmann::ordered_json& layers,
                                                               const std::filesystem::path& file);

/// The same for a Transformer's options, with the policy.
void check_transformer(TransformerOptions& options);

/// Throws UsageError where `value` is none of `choices`.
void require_one_of(const char* flag, const std::string& value, const std::vector<std::string>& choices);

/// The path made absolute, so that the run can be evaluated from any folder; `generated`, the name of the
/// program's own data, stays as it is.
std::string absolute_data(const std::string& data, const std::string& generated);

/// What the policy adds to q, k, v and the output: attention of one kind in all layers, on `examples`
/// sequences.
int64_t attention_bytes(const TransformerOptions& options, int64_t examples, int64_t queries, int64_t keys);

/// A flag's name in config.json.
std::string json_key(std::string flag);

/// The program's version.
std::string version();

/// What config.json says of the options. Throws UsageError on a number that JSON has no word for.
template <typename Options>
nlohmann::ordered_json config_of(const Options& options) {
  nlohmann::ordered_json config;
  config["program"] = Options::kProgram;
  config["version"] = version();
  visit_options(options, [&](const char* flag, const auto& field, Resume, const char*) {
    if constexpr (std::is_same_v<decltype(field), const double&>) require_finite(flag, field);
    config[json_key(flag)] = field;
  });
  return config;
}

/// A run as config.json describes it. Throws Error naming a field that is missing or malformed; one that
/// may change on resume may also be missing.
template <typename Options>
Options read_options(const nlohmann::ordered_json& config) {
  Options options;
  const auto read = [&](const std::string& key, auto& field) {
    try {
      field = config.at(key).get<std::decay_t<decltype(field)>>();
    } catch (const nlohmann::json::exception&) {
      throw Error("config.json: the field " + key + " is missing or malformed");
    }
  };
  visit_options(options, [&](const char* flag, auto& field, Resume resume, const char*) {
    const std::string key = json_key(flag);
    // What does not shape the model may be younger than the run.
    if (resume == Resume::same || config.contains(key)) read(key, field);
  });
  return options;
}

/// The keys of config.json that decide whether a run may go on.
template <typename Options>
std::vector<std::string> fixed_keys(const Options& options) {
  std::vector<std::string> keys{"program"};
  visit_options(options, [&](const char* flag, const auto&, Resume resume, const char*) {
    if (resume == Resume::same) keys.push_back(json_key(flag));
  });
  return keys;
}

/// Makes the folder of the run, or opens it to go on. Throws Error when it holds another run than `config`
/// by one of the keys `fixed`.
RunFolder prepare_run(const TrainingOptions& options, const nlohmann::ordered_json& config,
                      const std::vector<std::string>& fixed);

/// Throws Error when the run was started with other data: with another `fingerprint` in its config.json, or
/// with none.
void require_same_data(const RunFolder& run, const TrainingOptions& options, const std::string& fingerprint);

/// Writes config.json: `config`, the threads in use, and what the program adds.
void write_config(const RunFolder& run, const nlohmann::ordered_json& config,
                  const nlohmann::ordered_json& more);

/// Throws Error when the config.json of the run in `path` is not one of `program`.
void require_program(const std::filesystem::path& path, const nlohmann::ordered_json& config,
                     const std::string& program);

/// A run's options; throws Error when another program has written it.
template <typename Options>
Options options_of_run(const std::filesystem::path& path) {
  const nlohmann::ordered_json config = RunFolder::open(path).read_json("config.json");
  require_program(path, config, Options::kProgram);
  return read_options<Options>(config);
}

}  // namespace remnant::app
