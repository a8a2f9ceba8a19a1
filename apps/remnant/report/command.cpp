#include "report/command.h"

#include "common/error.h"
#include "common/run_folder.h"
#include "report/page.h"
#include "report/run.h"

#include <CLI/CLI.hpp>

#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

namespace remnant::app::report {
namespace {

namespace fs = std::filesystem;

struct ReportOptions {
  std::vector<std::string> runs;
  std::string out;
};

/// Only what this command wrote may be lost.
void check_out(const fs::path& out) {
  std::error_code code;
  if (!fs::exists(out, code)) return;
  if (fs::is_directory(out, code)) {
    throw Error(out.string() + " is a folder: choose a file's name for --out");
  }
  if (!read_file(out).starts_with(kPageMark)) {
    throw Error(out.string() + " is there already and is no report: choose another --out");
  }
}

int write_report(const ReportOptions& options) {
  const std::vector<Run> runs = load_runs(options.runs);
  const fs::path out =
      options.out.empty() ? fs::path(options.runs.front()) / "report.html" : fs::path(options.out);
  check_out(out);
  for (const Run& run : runs) {
    for (const std::string& note : run.notes) std::cerr << run.path.string() << ": " << note << "\n";
  }
  write_file_atomically(out, page(runs));
  std::cout << out.string() << "\n";
  return 0;
}

}  // namespace

void add_command(CLI::App& program, std::function<int()>& action) {
  const auto options = std::make_shared<ReportOptions>();
  CLI::App* command = program.add_subcommand("report", "Draw one or more runs as one HTML page");
  command->option_defaults()->take_last();
  command->add_option("RUN", options->runs, "folders of runs of one program")->required()->take_all();
  command->add_option("--out", options->out, "the page; report.html in the first run's folder without it");
  command->callback([options, &action] { action = [options] { return write_report(*options); }; });
}

}  // namespace remnant::app::report
