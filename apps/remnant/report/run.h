#pragma once

#include "common/error.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace remnant::app::report {

/// Bytes that a layer keeps, and of that what its ops with a closed form keep, are predicted to, and would
/// keep in eager PyTorch.
struct LayerMemory {
  std::string layer;
  int64_t kept = 0;
  std::optional<int64_t> described_kept, predicted, eager;
};

struct LayerTime {
  std::string layer;
  double forward_ms = 0, backward_ms = 0;
};

/// timeline.json: one step.
struct Timeline {
  struct Phase {
    std::string name;
    double begin = 0, end = 0;
  };
  int64_t step = 0, kept_bytes = 0, peak_bytes = 0;
  double seconds = 0;
  std::vector<Phase> phases;
  std::vector<std::pair<double, int64_t>> samples;  ///< seconds, live bytes
  std::vector<LayerTime> layers;
};

/// What a run's folder says of it, so far.
struct Run {
  std::filesystem::path path;
  std::string name;  ///< unlike that of any other run of the report
  std::string program;
  nlohmann::ordered_json config;
  std::vector<nlohmann::ordered_json> lines;  ///< of metrics.jsonl
  std::optional<nlohmann::ordered_json> memory, summary, plan;
  std::optional<Timeline> timeline;
  std::vector<std::string> notes;  ///< sentences about what is missing
};

/// Throws Error, one sentence, on a folder that is no run, a damaged file, and runs of different programs.
std::vector<Run> load_runs(const std::vector<std::string>& paths);

/// The value of `key`. Throws Error where `object` has none or another kind: `file` is not what a trainer
/// writes.
template <typename T>
T field(const nlohmann::ordered_json& object, const char* key, const std::filesystem::path& file) {
  try {
    return object.at(key).get<T>();
  } catch (const nlohmann::json::exception&) {
    throw Error(file.string() + " is damaged: the field " + key + " is missing or malformed");
  }
}

/// A number of `object`; nothing where it is missing or, as what is not finite is written, null.
std::optional<double> number(const nlohmann::ordered_json& object, const std::string& key);

/// The values of `key` over the lines that have it: steps and values.
std::vector<std::pair<double, double>> series(const Run& run, const std::string& key);

/// In the order of the forward. Throws Error where `memory` is not what a trainer writes to `file`.
std::vector<LayerMemory> memory_by_layer(const nlohmann::ordered_json& memory,
                                         const std::filesystem::path& file);

std::optional<double> median(std::vector<double> values);

}  // namespace remnant::app::report
