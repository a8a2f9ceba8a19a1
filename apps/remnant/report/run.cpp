#include "report/run.h"

#include "common/error.h"
#include "common/run_folder.h"
#include "common/text.h"

#include <algorithm>
#include <set>

namespace remnant::app::report {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

std::optional<ordered_json> optional_json(const RunFolder& folder, const std::string& name) {
  std::error_code ignored;
  if (!fs::exists(folder.path() / name, ignored)) return std::nullopt;
  ordered_json value = folder.read_json(name);
  if (!value.is_object()) {
    throw Error((folder.path() / name).string() + " is damaged: it should hold a JSON object");
  }
  return value;
}

/// A line that a crash, or a training that goes on, cut short is the last one.
void read_metrics(Run& run) {
  const fs::path file = run.path / "metrics.jsonl";
  std::error_code ignored;
  if (!fs::exists(file, ignored)) {
    run.notes.emplace_back("it holds no metrics.jsonl: no step is done yet");
    return;
  }
  const std::string content = read_file(file);
  int64_t line_number = 0;
  for (size_t begin = 0; begin < content.size();) {
    const size_t end = std::min(content.find('\n', begin), content.size());
    const std::string line = content.substr(begin, end - begin);
    begin = end + 1;
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    ordered_json value = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (value.is_object() && number(value, "step").has_value()) {
      run.lines.push_back(std::move(value));
      continue;
    }
    if (begin < content.size()) {
      throw Error(file.string() + ", line " + std::to_string(line_number) +
                  ", is not a JSON object with a step: remove that line");
    }
    run.notes.push_back("the last line of metrics.jsonl, line " + std::to_string(line_number) +
                        ", is cut short and left out");
  }
  if (run.lines.empty()) run.notes.emplace_back("its metrics.jsonl holds no complete line yet");
}

Timeline timeline_of(const ordered_json& json, const fs::path& file) {
  Timeline timeline;
  timeline.step = field<int64_t>(json, "step", file);
  timeline.seconds = field<double>(json, "seconds", file);
  timeline.kept_bytes = field<int64_t>(json, "kept_bytes", file);
  timeline.peak_bytes = field<int64_t>(json, "peak_bytes", file);
  for (const ordered_json& phase : field<std::vector<ordered_json>>(json, "phases", file)) {
    timeline.phases.push_back({field<std::string>(phase, "phase", file), field<double>(phase, "begin", file),
                               field<double>(phase, "end", file)});
  }
  for (const ordered_json& layer : field<std::vector<ordered_json>>(json, "layers", file)) {
    timeline.layers.push_back({field<std::string>(layer, "layer", file),
                               field<double>(layer, "forward_ms", file),
                               field<double>(layer, "backward_ms", file)});
  }
  const auto seconds = field<std::vector<double>>(json, "sample_seconds", file);
  const auto bytes = field<std::vector<int64_t>>(json, "sample_bytes", file);
  if (seconds.size() != bytes.size() || seconds.empty()) {
    throw Error(file.string() + " is damaged: sample_seconds holds " + std::to_string(seconds.size()) +
                " numbers and sample_bytes " + std::to_string(bytes.size()) +
                ", which should be as many and at least one");
  }
  for (size_t i = 0; i < seconds.size(); ++i) timeline.samples.emplace_back(seconds[i], bytes[i]);
  return timeline;
}

Run load_run(const fs::path& path) {
  const RunFolder folder = RunFolder::open(path);
  Run run;
  run.path = path;
  run.config = folder.read_json("config.json");
  run.program = field<std::string>(run.config, "program", path / "config.json");
  read_metrics(run);
  run.memory = optional_json(folder, "memory.json");
  if (!run.memory.has_value())
    run.notes.emplace_back("it holds no memory.json: what layers keep is not known");
  run.plan = optional_json(folder, "plan.json");
  run.summary = optional_json(folder, "summary.json");
  if (!run.summary.has_value()) {
    const double step = run.lines.empty() ? 0 : *number(run.lines.back(), "step");
    run.notes.push_back("its training is not finished: " + format_fixed(step, 0) + " steps so far");
  }
  if (const auto json = optional_json(folder, "timeline.json")) {
    run.timeline = timeline_of(*json, path / "timeline.json");
  } else {
    run.notes.emplace_back("it holds no timeline.json: no step of it was recorded");
  }
  return run;
}

std::string last_name(const fs::path& path) {
  const fs::path whole = fs::absolute(path).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

void name_runs(std::vector<Run>& runs) {
  for (Run& run : runs) run.name = last_name(run.path);
  std::multiset<std::string> names;
  for (const Run& run : runs) names.insert(run.name);
  for (Run& run : runs) {
    if (names.count(run.name) > 1) run.name = run.path.string();
  }
  for (Run& run : runs) run.name = printable_utf8(run.name);
}

}  // namespace

std::vector<Run> load_runs(const std::vector<std::string>& paths) {
  std::vector<Run> runs;
  std::set<fs::path> seen;
  for (const std::string& path : paths) {
    Run run = load_run(path);
    if (!seen.insert(fs::canonical(path)).second) throw UsageError("the run " + path + " is given twice");
    if (!runs.empty() && run.program != runs.front().program) {
      throw Error("runs of one program can be compared: " + runs.front().path.string() + " is of " +
                  runs.front().program + ", " + path + " of " + run.program);
    }
    runs.push_back(std::move(run));
  }
  name_runs(runs);
  return runs;
}

std::optional<double> number(const ordered_json& object, const std::string& key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number()) return std::nullopt;
  return found->get<double>();
}

std::vector<std::pair<double, double>> series(const Run& run, const std::string& key) {
  std::vector<std::pair<double, double>> points;
  for (const ordered_json& line : run.lines) {
    if (const auto value = number(line, key)) points.emplace_back(*number(line, "step"), *value);
  }
  return points;
}

std::vector<LayerMemory> memory_by_layer(const ordered_json& memory, const fs::path& file) {
  std::vector<LayerMemory> layers;
  if (memory.contains("layers")) {
    for (const ordered_json& row : field<std::vector<ordered_json>>(memory, "layers", file)) {
      const auto kept = field<int64_t>(row, "kept_bytes", file);
      layers.push_back({field<std::string>(row, "layer", file), kept, kept,
                        field<int64_t>(row, "predicted_bytes", file),
                        field<int64_t>(row, "eager_bytes", file)});
    }
    return layers;
  }
  for (const ordered_json& row : field<std::vector<ordered_json>>(memory, "rows", file)) {
    const auto name = field<std::string>(row, "layer", file);
    const auto kept = field<int64_t>(row, "kept_bytes", file);
    const auto known = [&](const char* key) -> std::optional<int64_t> {
      if (!row.contains(key) || row[key].is_null()) return std::nullopt;
      return field<int64_t>(row, key, file);
    };
    auto found = std::find_if(layers.begin(), layers.end(),
                              [&](const LayerMemory& layer) { return layer.layer == name; });
    if (found == layers.end()) found = layers.insert(found, LayerMemory{name, 0, {}, {}, {}});
    const auto add = [](std::optional<int64_t>& sum, const std::optional<int64_t>& bytes) {
      if (bytes.has_value()) sum = sum.value_or(0) + *bytes;
    };
    found->kept += kept;
    const auto predicted = known("predicted_bytes"), eager = known("eager_bytes");
    add(found->predicted, predicted);
    add(found->eager, eager);
    if (predicted.has_value() || eager.has_value()) add(found->described_kept, kept);
  }
  return layers;
}

std::optional<double> median(std::vector<double> values) {
  if (values.empty()) return std::nullopt;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

}  // namespace remnant::app::report
