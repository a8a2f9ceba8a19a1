#include "common/command.h"

#include "common/run_folder.h"
#include "common/text.h"

#include <ATen/Parallel.h>

#include <unistd.h>

#include <algorithm>

namespace remnant::app {

using nlohmann::ordered_json;

void add_run_flags(CLI::App& command, UseOptions& use) {
  command.add_option("--run", use.run, "folder of a trained run")->required();
  command.add_option("--threads", use.threads, "0: all cores")->capture_default_str();
}

void add_batch_flag(CLI::App& command, UseOptions& use, const char* help) {
  command.add_option("--batch-size", use.batch_size, help)->capture_default_str();
}

void add_split_flags(CLI::App& command, UseOptions& use, const char* data_help) {
  command.add_option("--split", use.split, "train, val or test")->capture_default_str();
  command.add_option("--data", use.data, data_help);
}

void prepare(const UseOptions& use) {
  require_at_least("batch-size", use.batch_size, 1);
  require_at_least("threads", use.threads, 0);
  if (use.threads > 0) at::set_num_threads(static_cast<int>(use.threads));
}

void answer_lines(int64_t ahead, const Answer& answer) {
  const size_t group = isatty(STDIN_FILENO) ? 1 : static_cast<size_t>(ahead);
  int64_t line_number = 0;
  std::vector<std::string> lines;
  const auto flush = [&] {
    for (const std::string& line : answer(lines)) std::cout << line << '\n';
    std::cout.flush();
    lines.clear();
  };
  for (std::string line; std::getline(std::cin, line);) {
    ++line_number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (!is_utf8(line)) {
      flush();
      throw Error("standard input, line " + std::to_string(line_number) + ": not valid UTF-8");
    }
    lines.push_back(std::move(line));
    if (lines.size() == group) flush();
  }
  flush();
}

Column number_column(std::string title, const std::string& key, int digits) {
  return {std::move(title), [key, digits](const ordered_json& summary) {
            return format_fixed(summary.at(key).get<double>(), digits);
          }};
}

std::string folder_name(std::string setting) {
  // A file by its name alone.
  if (setting.ends_with(".json")) setting = std::filesystem::path(setting).filename().string();
  const auto joins = [](char c) { return c == ':' || c == '=' || c == ',' || c == '/'; };
  std::replace_if(setting.begin(), setting.end(), joins, '-');
  return setting;
}

void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      std::cout << (i == 0 ? row[i] + space : "  " + space + row[i]);
    }
    std::cout << "\n";
  }
}

void print_comparison(const std::filesystem::path& out, const std::string& compared,
                      const std::vector<ordered_json>& summaries, const std::vector<Column>& measures,
                      const std::string& note) {
  const auto bytes_column = [](const char* title, const char* key) {
    return Column{
        title, [key](const ordered_json& summary) { return format_bytes(summary.at(key).get<int64_t>()); }};
  };
  const bool attention = summaries.front().contains("attention_residual_bytes");
  std::vector<Column> columns = measures;
  columns.push_back(bytes_column("kept", "kept_bytes"));
  if (attention) columns.push_back(bytes_column("attention keeps", "attention_residual_bytes"));
  columns.push_back(bytes_column("peak", "peak_bytes"));
  columns.push_back(number_column("step ms", "step_ms_median", 1));
  std::vector<std::vector<std::string>> table{{compared}};
  for (const Column& column : columns) table.front().push_back(column.title);
  for (const ordered_json& summary : summaries) {
    table.push_back({summary.at(compared).get<std::string>()});
    for (const Column& column : columns) table.back().push_back(column.text(summary));
  }
  write_file_atomically(out / "compare.json", ordered_json(summaries).dump(2) + "\n");
  std::cout << "\n";
  print_table(table);
  std::cout << "\n"
            << note << "\n"
            << "kept and peak: the largest step of the run, whole model"
            << (attention ? "; attention keeps: what the policy adds to\n"
                            "q, k, v and the output, all layers, on the batch of memory.json\n"
                          : "\n");
}

}  // namespace remnant::app
