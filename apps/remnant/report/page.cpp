#include "report/page.h"

#include "common/options.h"
#include "common/run_folder.h"
#include "common/text.h"
#include "report/svg.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <utility>

namespace remnant::app::report {
namespace {

using nlohmann::ordered_json;

constexpr const char* kDash = "\u2013";

// Colours that stay apart in the common kinds of colour blindness, with a contrast of 3 to 1 and more to
// their ground.
constexpr const char* kStyle = R"css(
:root{color-scheme:light dark;--ground:#fff;--panel:#f6f7f9;--text:#1b1f24;--soft:#57606a;--line:#d4d9df;
--k0:#0068a6;--k1:#c04a00;--k2:#00775a;--k3:#a3397f;--k4:#7d6200;--k5:#5b52c4;--k6:#5f6670;
--shade:#e9ecf0}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1c2026;--text:#e4e8ec;--soft:#a0a9b4;--line:#363d46;
--k0:#5cb3ea;--k1:#ff9152;--k2:#3cc79d;--k3:#ea93c9;--k4:#e0b83f;--k5:#a9a2ff;--k6:#b4bcc6;
--shade:#282e36}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.2rem 0 0}h2{font-size:1.2rem;margin:2rem 0 .4rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .3rem}p{margin:.3rem 0 .7rem;max-width:75ch}.soft,figcaption{color:var(--soft);font-size:.875rem}
h1,h2,h3,p,li,td,th,label{overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:1rem;align-items:start;margin:.6rem 0 1rem}
figure{margin:0;padding:.8rem;background:var(--panel);border:1px solid var(--line);border-radius:8px;min-width:0}
svg{display:block;width:100%;max-width:640px;height:auto}
svg text{font-size:12px;fill:var(--text)}svg .small{font-size:11px;fill:var(--soft)}svg .strong{font-weight:600}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}
.axes path{stroke:var(--line);fill:none}.axes text{fill:var(--soft)}
.c0{--c:var(--k0)}.c1{--c:var(--k1)}.c2{--c:var(--k2)}.c3{--c:var(--k3)}.c4{--c:var(--k4)}.c5{--c:var(--k5)}.c6{--c:var(--k6)}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.thin{stroke-width:1.2}.dashed .line{stroke-dasharray:5 3}
.band{fill:var(--c);opacity:.2}g>circle,g>rect,g>path:not(.line):not(.band){fill:var(--c)}
.axes path:not(.line):not(.band){fill:none}
i.kept,i.forward{background:var(--k0)}i.predicted,i.backward{background:var(--k1)}i.optimizer{background:var(--k2)}
i.eager{background:var(--k4)}i.rest{background:var(--k6)}
g>rect.kept,g>rect.forward{fill:var(--k0)}g>rect.predicted,g>rect.backward{fill:var(--k1)}g>rect.optimizer{fill:var(--k2)}
g>rect.eager{fill:var(--k4)}g>rect.rest{fill:var(--k6)}g>rect.shade{fill:var(--shade)}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0;padding:0}
.legend svg{display:inline-block;width:26px;height:12px;vertical-align:middle;margin-right:.4rem}
.legend i{display:inline-block;width:14px;height:10px;border-radius:2px;margin-right:.4rem}
.legend input{margin:0 .4rem 0 0}
.scroll{overflow-x:auto;max-width:100%;margin:0 0 .8rem}table[id$="-rows"] td{white-space:nowrap}.scroll:focus-visible,summary:focus-visible,input:focus-visible{outline:2px solid var(--k0);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.2rem 0}
th,td{padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,.text{text-align:left}thead th{vertical-align:bottom}tbody th{font-weight:400}
thead th,tbody th{min-width:5.5rem}tbody th{min-width:8rem}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--soft);font-size:.875rem}
@media(max-width:480px){main{padding:.7rem}figure{padding:.6rem}svg text{font-size:14px}svg .small{font-size:13px}}
@media print{.legend input{display:none}}
)css";

// Without it the page is whole, only that runs cannot be hidden.
constexpr const char* kScript = R"js(
document.querySelectorAll("input[data-toggle]").forEach(box=>{
 box.hidden=false;box.checked=true;
 box.addEventListener("change",()=>document.querySelectorAll(`[data-run="${box.dataset.toggle}"]`)
  .forEach(part=>part.style.display=box.checked?"":"none"))})
)js";

/// A cell of a table; empty numbers are a dash.
struct Cell {
  std::string html;
  bool text = false;
};

Cell words(const std::string& text) { return {escape(text), true}; }

Cell dash() { return {std::string("<span title=\"not known\">") + kDash + "</span>"}; }

/// The number as it was read in `value`, for programs; for people as `shown`.
Cell figure(const std::optional<double>& value, const Format& shown) {
  if (!value.has_value()) return dash();
  const bool whole = *value == std::floor(*value) && std::abs(*value) < 9e15;
  const std::string exact =
      whole ? std::to_string(static_cast<int64_t>(*value)) : ordered_json(*value).dump();
  return {"<data value=\"" + exact + "\">" + escape(shown(*value)) + "</data>"};
}

std::string show_bytes(double value) { return format_bytes(std::llround(value)); }
std::string show_count(double value) { return format_fixed(value, 0); }
std::string show_ms(double value) { return format_step_time(value / 1e3); }
Format fixed(int digits) {
  return [digits](double value) { return format_fixed(value, digits); };
}

Cell bytes_cell(const std::optional<int64_t>& value) {
  return figure(value.has_value() ? std::optional<double>(static_cast<double>(*value)) : std::nullopt,
                show_bytes);
}

/// A table that scrolls by itself, so that the page does not.
class Table {
 public:
  /// The first `text_columns` columns hold text, the others numbers.
  Table(std::string id, const std::string& caption, const std::vector<std::string>& head,
        size_t text_columns = 1) {
    const std::string label = escape(caption);
    html_ = "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"" + label + "\"><table id=\"" +
            std::move(id) + "\"><caption>" + label + "</caption><thead><tr>";
    for (size_t i = 0; i < head.size(); ++i) {
      html_ += std::string("<th scope=\"col\"") + (i < text_columns ? " class=\"text\">" : ">") +
               escape(head[i]) + "</th>";
    }
    html_ += "</tr></thead><tbody>\n";
  }

  void row(const std::string& name, const std::vector<Cell>& cells) {
    html_ += "<tr><th scope=\"row\">" + escape(name) + "</th>";
    for (const Cell& cell : cells) {
      html_ += std::string("<td") + (cell.text ? " class=\"text\">" : ">") + cell.html + "</td>";
    }
    html_ += "</tr>\n";
    ++rows_;
  }

  bool empty() const { return rows_ == 0; }
  std::string html() const { return html_ + "</tbody></table></div>\n"; }

 private:
  std::string html_;
  int rows_ = 0;
};

std::string details(const std::string& summary, const std::string& content) {
  return "<details><summary>" + escape(summary) + "</summary>" + content + "</details>\n";
}

/// "validation_bleu_detokenised" -> "validation BLEU detokenised"
std::string words_of(const std::string& key) {
  std::string text, word;
  for (const char c : key + "_") {
    if (c != '_') {
      word += c;
      continue;
    }
    text += (text.empty() ? "" : " ") + (word == "bleu" ? "BLEU" : word);
    word.clear();
  }
  return text;
}

/// The same with a capital in front.
std::string title_of(const std::string& key) {
  std::string title = words_of(key);
  if (!title.empty() && title[0] >= 'a' && title[0] <= 'z')
    title[0] = static_cast<char>(title[0] - 'a' + 'A');
  return title;
}

Format format_of(const std::string& key) {
  if (key.find("bleu") != std::string::npos) return fixed(2);
  if (key.find("perplexity") != std::string::npos || key.find("loss") != std::string::npos) return fixed(3);
  if (key.find("accuracy") != std::string::npos || key.find("bits_per") != std::string::npos) return fixed(4);
  return [](double value) { return short_number(value, 4); };
}

std::vector<std::string> names_of(const std::vector<Run>& runs, const std::string& first) {
  std::vector<std::string> names{first};
  for (const Run& run : runs) names.push_back(run.name);
  return names;
}

/// With boxes to hide runs where `boxes`.
std::string legend(const std::vector<Run>& runs, bool boxes = false) {
  std::string html = "<ul class=\"legend\">";
  for (size_t i = 0; i < runs.size(); ++i) {
    const std::string number = std::to_string(i), colour = std::to_string(i % 7);
    const std::string dashes = i / 7 % 2 == 1 ? " dashed" : "";
    static constexpr std::array<const char*, 4> marks{
        "<circle cx=\"13\" cy=\"6\" r=\"3.4\"/>", "<rect x=\"10\" y=\"3\" width=\"6\" height=\"6\"/>",
        "<path d=\"M13 2l4 7h-8z\"/>", "<path d=\"M13 1.6l4.4 4.4l-4.4 4.4l-4.4-4.4z\"/>"};
    html += "<li><label>";
    if (boxes) html += "<input type=\"checkbox\" checked hidden data-toggle=\"" + number + "\">";
    html += "<svg viewBox=\"0 0 26 12\" aria-hidden=\"true\"><g class=\"c" + colour + dashes +
            "\"><path class=\"line\" d=\"M0 6H26\"/>" + marks[i % 4] + "</g></svg>" + escape(runs[i].name) +
            "</label></li>";
  }
  return html + "</ul>\n";
}

std::string swatches(const std::vector<std::pair<std::string, std::string>>& styles) {
  std::string html = "<ul class=\"legend soft\">";
  for (const auto& [style, name] : styles) {
    html += "<li><i class=\"" + style + "\"></i>" + escape(name) + "</li>";
  }
  return html + "</ul>\n";
}

// ---- results and settings

std::optional<double> summary_number(const Run& run, const std::string& key) {
  return run.summary.has_value() ? number(*run.summary, key) : std::nullopt;
}

std::vector<double> values_of(const Run& run, const std::string& key) {
  std::vector<double> values;
  for (const auto& [step, value] : series(run, key)) values.push_back(value);
  return values;
}

std::optional<double> largest(const std::vector<double>& values) {
  return values.empty() ? std::nullopt
                        : std::optional<double>(*std::max_element(values.begin(), values.end()));
}

std::optional<double> last(const std::vector<double>& values) {
  return values.empty() ? std::nullopt : std::optional<double>(values.back());
}

/// Keys of all runs in the order of their first appearance.
template <typename KeysOf>
std::vector<std::string> keys_of(const std::vector<Run>& runs, const KeysOf& keys_of_run) {
  std::vector<std::string> keys;
  std::set<std::string> seen;
  for (const Run& run : runs) {
    keys_of_run(run, [&](const std::string& key) {
      if (seen.insert(key).second) keys.push_back(key);
    });
  }
  return keys;
}

std::vector<std::string> validation_keys(const std::vector<Run>& runs) {
  return keys_of(runs, [](const Run& run, const auto& add) {
    for (const ordered_json& line : run.lines) {
      for (const auto& [key, value] : line.items()) {
        if (key.starts_with("validation_") && value.is_number()) add(key);
      }
    }
  });
}

using Measure = std::function<std::optional<double>(const Run&)>;

std::string results(const std::vector<Run>& runs) {
  Table table("results", "Test and validation of the best epoch; memory and time of all steps",
              names_of(runs, "measure"));
  const auto add = [&](const std::string& name, const Measure& measure, const Format& shown) {
    std::vector<Cell> cells;
    bool any = false;
    for (const Run& run : runs) {
      const std::optional<double> value = measure(run);
      any = any || value.has_value();
      cells.push_back(figure(value, shown));
    }
    if (any) table.row(name, cells);
  };
  const std::set<std::string> elsewhere{
      "kept_bytes", "kept_bytes_median", "peak_bytes", "step_ms_median", "steps",
      "seconds",    "parameters",        "epochs",     "seed",           "threads",
      "labels",     "confusion",         "version",    "attention",      "attention_residual_bytes"};
  const std::vector<std::string> keys = keys_of(runs, [&](const Run& run, const auto& add_key) {
    if (!run.summary.has_value()) return;
    for (const auto& [key, value] : run.summary->items()) {
      if (value.is_number() && !elsewhere.contains(key)) add_key(key);
    }
  });
  // What the test found has no prefix where it is what the run is about.
  const std::set<std::string> of_the_test{"bleu", "bleu_detokenised", "accuracy", "bits_per_character",
                                          "bits_per_byte"};
  for (const std::string& key : keys) {
    add(
        of_the_test.contains(key) ? "Test " + words_of(key) : title_of(key),
        [&](const Run& run) { return summary_number(run, key); }, format_of(key));
  }
  const bool unfinished =
      std::any_of(runs.begin(), runs.end(), [](const Run& run) { return !run.summary.has_value(); });
  if (unfinished) {
    for (const std::string& key : validation_keys(runs)) {
      add(
          title_of(key) + ", last", [&](const Run& run) { return last(values_of(run, key)); },
          format_of(key));
    }
    add(
        "Training loss, last step", [](const Run& run) { return last(values_of(run, "loss")); },
        format_of("loss"));
  }
  add("Steps", [](const Run& run) { return last(values_of(run, "step")); }, show_count);
  add("Duration", [](const Run& run) { return largest(values_of(run, "seconds")); }, format_duration);
  add("Step time, median", [](const Run& run) { return median(values_of(run, "step_ms")); }, show_ms);
  for (const char* unit : {"tokens", "images"}) {
    const std::string key = std::string(unit) + "_per_second";
    add(
        title_of(unit) + " a second, median", [&](const Run& run) { return median(values_of(run, key)); },
        show_count);
  }
  add(
      "Kept for backward, largest step", [](const Run& run) { return largest(values_of(run, "kept_bytes")); },
      show_bytes);
  add(
      "Kept for backward, median step", [](const Run& run) { return median(values_of(run, "kept_bytes")); },
      show_bytes);
  add(
      "Peak of a step, largest", [](const Run& run) { return largest(values_of(run, "peak_bytes")); },
      show_bytes);
  for (const char* key :
       {"predicted_kept_bytes", "measured_kept_bytes", "predicted_peak_bytes", "measured_peak_bytes"}) {
    add(
        "Plan, " + words_of(key),
        [&](const Run& run) { return run.plan ? number(*run.plan, key) : std::nullopt; }, show_bytes);
  }
  add("Parameters", [](const Run& run) { return summary_number(run, "parameters"); }, show_count);
  return table.html();
}

Cell setting(const Run& run, const std::string& key) {
  if (!run.config.contains(key)) return dash();
  const ordered_json& value = run.config[key];
  if (value.is_number()) {
    return figure(value.get<double>(), [&](double) { return value.dump(); });
  }
  return {escape(value.is_string() ? value.get<std::string>() : value.dump())};
}

std::string settings(const std::vector<Run>& runs) {
  const std::vector<std::string> keys = keys_of(runs, [](const Run& run, const auto& add) {
    for (const auto& item : run.config.items()) add(item.key());
  });
  Table different("differences", "Settings that differ", names_of(runs, "setting"));
  Table all("settings", "All settings", names_of(runs, "setting"));
  for (const std::string& key : keys) {
    std::vector<Cell> cells;
    bool same = true;
    for (const Run& run : runs) {
      cells.push_back(setting(run, key));
      same = same && run.config.value(key, ordered_json()) == runs.front().config.value(key, ordered_json());
    }
    all.row(key, cells);
    if (!same) different.row(key, cells);
  }
  std::string html;
  if (runs.size() > 1) {
    html += different.empty() ? "<p>All settings are the same.</p>\n" : different.html();
  }
  return html + details("All settings", all.html());
}

// ---- curves

/// About `most` of the points, the first and the last among them.
std::vector<std::pair<double, double>> some_of(const std::vector<std::pair<double, double>>& points,
                                               size_t most) {
  if (points.size() <= most) return points;
  std::vector<std::pair<double, double>> some;
  for (size_t i = 0; i < most; ++i) some.push_back(points[i * (points.size() - 1) / (most - 1)]);
  return some;
}

/// Of which twice as much says the same wherever it starts.
bool is_a_ratio(const std::string& key) {
  return key.ends_with("perplexity") || key.ends_with("_error") || key.ends_with("_variance");
}

std::string curve_figure(const std::vector<Run>& runs, const std::string& id, const std::string& key,
                         const std::string& title) {
  constexpr size_t most_rows = 25;
  std::vector<Curve> curves;
  std::string description;
  Table table(id + "-table", title + " by step", {"step", "run", "value"}, 2);
  size_t longest = 0;
  bool all_rows = true;
  for (size_t i = 0; i < runs.size(); ++i) {
    Curve curve{i, runs[i].name, series(runs[i], key)};
    if (curve.points.empty()) continue;
    longest = std::max(longest, curve.points.size());
    all_rows = all_rows && curve.points.size() <= most_rows;
    const auto& [first_step, first] = curve.points.front();
    const auto& [last_step, last_value] = curve.points.back();
    description += runs[i].name + ": " + short_number(first, 5) + " at step " + short_number(first_step, 12) +
                   ", " + short_number(last_value, 5) + " at step " + short_number(last_step, 12) + ". ";
    for (const auto& [step, value] : some_of(curve.points, most_rows)) {
      table.row(short_number(step, 12), {words(runs[i].name), figure(value, format_of(key))});
    }
    curves.push_back(std::move(curve));
  }
  if (curves.empty()) return "";
  const bool logarithmic = is_a_ratio(key) && far_apart(curves);
  std::string html = "<figure><h3>" + escape(title) + "</h3>" +
                     line_chart({id, title + " by step", description}, curves, logarithmic);
  std::string caption;
  if (longest > kMostStretches) {
    const size_t length = (longest + kMostStretches - 1) / kMostStretches;
    caption = "Means of up to " + std::to_string(length) + " steps; the band is their range. ";
  }
  if (logarithmic) caption += "The scale is logarithmic. ";
  if (!caption.empty()) html += "<figcaption>" + caption + "</figcaption>";
  return html + details(all_rows ? "Table" : "Table of some steps", table.html()) + "</figure>\n";
}

std::string curves(const std::vector<Run>& runs) {
  std::string figures = curve_figure(runs, "loss", "loss", "Training loss");
  int count = 0;
  for (const std::string& key : validation_keys(runs)) {
    figures += curve_figure(runs, "validation" + std::to_string(count++), key, title_of(key));
  }
  figures += curve_figure(runs, "fidelity", "gradient_error", "Gradient error against the exact gradient");
  figures += curve_figure(runs, "variance", "added_variance", "Variance added to the minibatch's");
  if (figures.empty()) return "<p>No step is done yet.</p>\n";
  return (runs.size() > 1 ? legend(runs) : "") + "<div class=\"grid\">\n" + figures + "</div>\n";
}

// ---- memory

std::string layer_name(const std::string& layer) { return layer.empty() ? "outside of layers" : layer; }

std::string data_run(size_t run) { return " data-run=\"" + std::to_string(run) + "\""; }

std::string memory_rows(const Run& run, const std::string& id) {
  Table table(id, "What each op keeps, " + run.name,
              {"layer", "op", "policy", "shape", "dtype", "count", "kept", "predicted", "eager"}, 5);
  const auto rows = field<std::vector<ordered_json>>(*run.memory, "rows", run.path / "memory.json");
  for (const ordered_json& row : rows) {
    const auto text = [&](const char* key) {
      return row.contains(key) && row[key].is_string() ? row[key].get<std::string>() : "";
    };
    std::string shape;
    if (row.contains("shape") && row["shape"].is_array()) {
      for (const ordered_json& size : row["shape"]) shape += (shape.empty() ? "" : " x ") + size.dump();
    }
    table.row(
        layer_name(text("layer")),
        {words(text("op")), words(text("policy")), words(shape), words(text("dtype")),
         figure(number(row, "count"), show_count), figure(number(row, "kept_bytes"), show_bytes),
         figure(number(row, "predicted_bytes"), show_bytes), figure(number(row, "eager_bytes"), show_bytes)});
  }
  return table.html();
}

std::string batch_text(const Run& run) {
  std::string text;
  const ordered_json batch = run.memory->value("batch", ordered_json::object());
  for (const auto& [key, value] : batch.items()) {
    std::string name = key;
    std::replace(name.begin(), name.end(), '_', ' ');
    text += (text.empty() ? "" : ", ") + name + " " + value.dump();
  }
  return text;
}

std::string memory_figure(const Run& run, size_t place) {
  const std::vector<LayerMemory> layers = memory_by_layer(*run.memory, run.path / "memory.json");
  const std::string id = "memory" + std::to_string(place);
  std::vector<BarGroup> groups;
  const bool whole = run.memory->contains("layers");  // layers, not single ops, are foretold
  std::vector<std::string> columns{"layer", "kept", "kept by ops with a prediction", "predicted", "eager"};
  if (whole) columns.erase(columns.begin() + 2);
  Table table(id + "-table", "Kept by layer, " + run.name, columns);
  const bool described = std::any_of(layers.begin(), layers.end(), [](const LayerMemory& layer) {
    return layer.described_kept.has_value();
  });
  double predicted = 0, eager = 0;
  for (const LayerMemory& layer : layers) {
    const auto part = static_cast<double>(layer.described_kept.value_or(0));
    const auto value = [](const std::optional<int64_t>& bytes) {
      return static_cast<double>(bytes.value_or(0));
    };
    BarGroup group{layer_name(layer.layer),
                   {{{{"kept", part}, {described ? "rest" : "kept", static_cast<double>(layer.kept) - part}},
                     "kept",
                     format_bytes(layer.kept),
                     ""}}};
    if (layer.predicted.has_value()) {
      group.bars.push_back(
          {{{"predicted", value(layer.predicted)}}, "predicted", format_bytes(*layer.predicted), ""});
    }
    if (layer.eager.has_value()) {
      group.bars.push_back({{{"eager", value(layer.eager)}}, "eager", format_bytes(*layer.eager), ""});
    }
    groups.push_back(std::move(group));
    std::vector<Cell> cells{bytes_cell(layer.kept), bytes_cell(layer.described_kept),
                            bytes_cell(layer.predicted), bytes_cell(layer.eager)};
    if (whole) cells.erase(cells.begin() + 1);
    table.row(layer_name(layer.layer), cells);
    predicted += value(layer.predicted);
    eager += value(layer.eager);
  }
  const std::optional<double> total = number(*run.memory, "kept_bytes");
  if (whole) {
    table.row("total", {figure(total, show_bytes), figure(predicted, show_bytes), figure(eager, show_bytes)});
  } else {
    table.row("total", {figure(total, show_bytes), dash(), dash(), dash()});
  }
  const std::string title = "Kept by layer, " + run.name;
  std::string html = "<figure" + data_run(place) + "><h3>" + escape(run.name) + "</h3>";
  std::vector<std::pair<std::string, std::string>> styles{{"kept", "kept"}};
  if (whole) {
    styles = {
        {"kept", "kept"}, {"predicted", "predicted from smaller batches"}, {"eager", "under --memory eager"}};
  } else if (described) {
    styles = {{"kept", "kept by ops with a prediction"},
              {"rest", "kept by other ops"},
              {"predicted", "predicted for the former"},
              {"eager", "eager PyTorch\u2019s for the former"}};
  }
  html += swatches(styles);
  html += bar_chart({id, title,
                     std::to_string(layers.size()) + " layers keep " + show_bytes(total.value_or(0)) +
                         " together; the table below has each."},
                    groups);
  const std::string batch = batch_text(run);
  html += "<figcaption>One forward pass" + (batch.empty() ? "" : " of a batch: " + escape(batch)) + ". " +
          (described ? "" : "No op of it has a prediction. ");
  if (const double unreadable = number(*run.memory, "unreadable").value_or(0); unreadable > 0) {
    html += "Not counted: what " + show_count(unreadable) + " nodes keep that would not show it. ";
  }
  return html + "</figcaption>" + details("Table", table.html()) +
         details("Table of ops", memory_rows(run, id + "-rows")) + "</figure>\n";
}

/// The same layers of all runs side by side.
std::string memory_comparison(const std::vector<Run>& runs) {
  std::vector<std::string> names;
  std::vector<std::vector<LayerMemory>> layers(runs.size());
  std::vector<std::string> head{"layer"};
  std::vector<size_t> with_memory;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!runs[i].memory.has_value()) continue;
    with_memory.push_back(i);
    head.push_back(runs[i].name);
    layers[i] = memory_by_layer(*runs[i].memory, runs[i].path / "memory.json");
    for (const LayerMemory& layer : layers[i]) {
      if (std::find(names.begin(), names.end(), layer.layer) == names.end()) names.push_back(layer.layer);
    }
  }
  if (with_memory.size() < 2) return "";
  std::vector<BarGroup> groups;
  Table table("memory-table", "Kept by layer", head);
  for (const std::string& name : names) {
    BarGroup group{layer_name(name), {}};
    std::vector<Cell> cells;
    for (const size_t i : with_memory) {
      const auto found = std::find_if(layers[i].begin(), layers[i].end(),
                                      [&](const LayerMemory& layer) { return layer.layer == name; });
      // A layer without a row keeps nothing, or nothing of its own.
      const int64_t kept = found == layers[i].end() ? 0 : found->kept;
      cells.push_back(bytes_cell(kept));
      group.bars.push_back({{{"own", static_cast<double>(kept)}},
                            runs[i].name,
                            format_bytes(kept),
                            " class=\"c" + std::to_string(i % 7) + "\"" + data_run(i)});
    }
    table.row(layer_name(name), cells);
    groups.push_back(std::move(group));
  }
  std::vector<Cell> totals;
  std::string description;
  for (const size_t i : with_memory) {
    const std::optional<double> total = number(*runs[i].memory, "kept_bytes");
    totals.push_back(figure(total, show_bytes));
    description += runs[i].name + " keeps " + show_bytes(total.value_or(0)) + ". ";
  }
  table.row("total", totals);
  return legend(runs) + "<div class=\"grid\"><figure><h3>Kept by layer, all runs</h3>" +
         bar_chart({"memory", "Kept by layer, all runs", description}, groups) +
         details("Table", table.html()) + "</figure></div>\n";
}

std::string memory(const std::vector<Run>& runs) {
  std::string figures;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].memory.has_value()) figures += memory_figure(runs[i], i);
  }
  if (figures.empty()) return "<p>No run has written its memory.json yet.</p>\n";
  std::string html =
      "<p class=\"soft\">Storages that the graph holds for backward at the end of a forward "
      "pass, each once. Predicted: from forward passes of smaller batches, in the table of ops an op\u2019s "
      "closed "
      "form. Eager: what the same layer would keep under --memory eager. A dash says that there is "
      "none.</p>\n";
  html += memory_comparison(runs);
  return html + "<div class=\"grid\">\n" + figures + "</div>\n";
}

// ---- one step

std::string timelines(const std::vector<Run>& runs) {
  double seconds = 0, bytes = 0;
  for (const Run& run : runs) {
    if (!run.timeline.has_value()) continue;
    seconds = std::max(seconds, run.timeline->seconds);
    bytes = std::max(bytes, static_cast<double>(peak_of(*run.timeline).second));
  }
  std::string figures;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!runs[i].timeline.has_value()) continue;
    const Timeline& timeline = *runs[i].timeline;
    const std::string id = "timeline" + std::to_string(i), step = std::to_string(timeline.step);
    const auto [time, peak] = peak_of(timeline);
    // One scale, so that runs compare; but a small run must not be a dot in the corner.
    constexpr double most = 8;
    const bool own = timeline.seconds * most < seconds || static_cast<double>(peak) * most < bytes;
    const std::string phase = phase_at(timeline, time);
    const std::string sentence = "Step " + step + ": peak of " + format_bytes(peak) + " after " +
                                 format_step_time(time) + (phase.empty() ? "" : ", in " + phase) +
                                 "; the forward leaves " + format_bytes(timeline.kept_bytes) + " kept";
    Table table(id + "-table", "Phases of step " + step + ", " + runs[i].name,
                {"phase", "begins", "lasts", "highest"});
    for (const Timeline::Phase& each : timeline.phases) {
      std::optional<double> highest;
      for (const auto& [moment, live] : timeline.samples) {
        if (moment < each.begin || moment > each.end) continue;
        highest = std::max(highest.value_or(static_cast<double>(live)), static_cast<double>(live));
      }
      table.row(each.name, {figure(each.begin, format_step_time),
                            figure(each.end - each.begin, format_step_time), figure(highest, show_bytes)});
    }
    table.row("step", {figure(0, format_step_time), figure(timeline.seconds, format_step_time),
                       bytes_cell(timeline.peak_bytes)});
    figures += "<figure" + data_run(i) + "><h3>" + escape(runs[i].name) + "</h3>" +
               timeline_chart({id, "Live bytes over step " + step + ", " + runs[i].name, sentence}, timeline,
                              i, own ? timeline.seconds : seconds, own ? static_cast<double>(peak) : bytes) +
               "<figcaption>" + escape(sentence) + (own ? ". On a scale of its own" : "") + ".</figcaption>" +
               details("Table", table.html()) + "</figure>\n";
  }
  if (figures.empty()) return "<p>No run has recorded a step.</p>\n";
  return "<p class=\"soft\">What the allocator has handed out and not got back, beyond "
         "parameters, gradients and optimizer state, during one step. Where allocations are "
         "many, the low and the high of equal spans of time are drawn; the peak is always "
         "among them.</p>\n" +
         swatches(
             {{"forward", "forward"}, {"backward", "backward"}, {"optimizer", "clipping and optimizer"}}) +
         "<div class=\"grid\">\n" + figures + "</div>\n";
}

std::string times(const std::vector<Run>& runs) {
  std::string figures;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!runs[i].timeline.has_value() || runs[i].timeline->layers.empty()) continue;
    const Timeline& timeline = *runs[i].timeline;
    const std::string id = "time" + std::to_string(i), step = std::to_string(timeline.step);
    const std::string title = "Time by layer in step " + step + ", " + runs[i].name;
    Table table(id + "-table", title, {"layer", "forward", "backward", "both"});
    std::vector<BarGroup> groups;
    double forward = 0, backward = 0;
    for (const LayerTime& layer : timeline.layers) {
      const double both = layer.forward_ms + layer.backward_ms;
      forward += layer.forward_ms;
      backward += layer.backward_ms;
      groups.push_back(
          {layer_name(layer.layer),
           {{{{"forward", layer.forward_ms}, {"backward", layer.backward_ms}},
             "forward " + show_ms(layer.forward_ms) + ", backward " + show_ms(layer.backward_ms) + ", both",
             show_ms(both),
             ""}}});
      table.row(layer_name(layer.layer), {figure(layer.forward_ms, show_ms),
                                          figure(layer.backward_ms, show_ms), figure(both, show_ms)});
    }
    table.row("total",
              {figure(forward, show_ms), figure(backward, show_ms), figure(forward + backward, show_ms)});
    figures += "<figure" + data_run(i) + "><h3>" + escape(runs[i].name) + "</h3>" +
               swatches({{"forward", "forward"}, {"backward", "backward"}}) +
               bar_chart({id, title,
                          "Forward " + show_ms(forward) + ", backward " + show_ms(backward) +
                              "; the table below has each layer."},
                         groups) +
               details("Table", table.html()) + "</figure>\n";
  }
  if (figures.empty()) return "<p>No run has recorded a step.</p>\n";
  return "<p class=\"soft\">One step, by the clock on the wall, so one sample and not a "
         "mean. Forward: inside of the layer, less the layers inside it. Backward: from the "
         "start of each of the layer\u2019s autograd nodes to that of the next node, so that "
         "adding up the gradients of parameters, and what a checkpoint runs again, is the "
         "node\u2019s that caused it. Outside of layers: the rest of the pass. Clipping and "
         "the optimizer are not in it.</p>\n<div class=\"grid\">\n" +
         figures + "</div>\n";
}

std::string section(const char* id, const char* title, const std::string& content) {
  return std::string("<section id=\"") + id + "\"><h2>" + title + "</h2>\n" + content + "</section>\n";
}

}  // namespace

const char* const kPageMark = "<!DOCTYPE html>\n<!-- remnant report -->\n";

std::string page(const std::vector<Run>& runs) {
  const std::string title = runs.size() == 1 ? runs.front().name : std::to_string(runs.size()) + " runs";
  std::string html = kPageMark;
  html +=
      "<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
      "<meta name=\"generator\" content=\"remnant " +
      escape(version()) + "\"><title>" + escape(title) + " \u2013 remnant " + escape(runs.front().program) +
      "</title>\n<style>" + kStyle + "</style></head>\n<body><main>\n<h1>" + escape(title) +
      "</h1>\n<p class=\"soft\">remnant " + escape(runs.front().program) + "</p>\n";
  if (runs.size() > 1) html += legend(runs, /*boxes=*/true);
  std::string notes;
  for (const Run& run : runs) {
    for (const std::string& note : run.notes) {
      notes += "<li><strong>" + escape(run.name) + "</strong>: " + escape(note) + "</li>\n";
    }
  }
  if (!notes.empty()) html += "<ul id=\"notes\">" + notes + "</ul>\n";
  html += section("comparison", runs.size() > 1 ? "Comparison" : "Results", results(runs) + settings(runs));
  html += section("curves", "Training", curves(runs));
  html += section("memory", "Memory by layer", memory(runs));
  html += section("timeline", "Memory over a step", timelines(runs));
  html += section("time", "Time by layer", times(runs));
  html += std::string("</main>\n<script>") + kScript + "</script></body></html>\n";
  return printable_utf8(html);
}

}  // namespace remnant::app::report
