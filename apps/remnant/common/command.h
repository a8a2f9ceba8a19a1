#pragma once

#include "common/error.h"
#include "common/options.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace remnant::app {

/// What the commands that use a trained run share.
struct UseOptions {
  std::string run, split = "test", data;
  int64_t batch_size = 128, threads = 0;
};

void add_run_flags(CLI::App& command, UseOptions& use);
void add_batch_flag(CLI::App& command, UseOptions& use, const char* help);
void add_split_flags(CLI::App& command, UseOptions& use, const char* data_help);
/// Checks the shared flags and sets the threads.
void prepare(const UseOptions& use);

/// Prints what `answer` makes of the lines of standard input, a line for a line, in groups of `ahead` lines;
/// of one where somebody types and waits. Throws Error on a line that is not UTF-8, after the answers to
/// those before it.
using Answer = std::function<std::vector<std::string>(const std::vector<std::string>& lines)>;
void answer_lines(int64_t ahead, const Answer& answer);

/// All of a training's flags. Where there are `several`, the flag that compare takes several of fills them.
template <typename Options>
void add_train_flags(CLI::App& command, Options& options, std::vector<std::string>* several = nullptr) {
  visit_options(options, [&](const char* flag, auto& field, Resume, const char* help) {
    if (several != nullptr && flag == std::string_view(Options::kCompared)) {
      command.add_option(std::string("--") + flag, *several, std::string(help) + "; once for each")
          ->required()
          ->take_all()
          ->allow_extra_args(false);
      return;
    }
    command.add_option(std::string("--") + flag, field, help)->capture_default_str();
  });
  command.get_option("--data")->required();
  command.add_option("--out", options.out, "folder of the run; made")->required();
  command.add_flag("--resume", options.resume, "go on with the run in --out");
  command.add_flag("--quiet", options.quiet, "results only, no progress");
}

/// A setting as a folder's name.
std::string folder_name(std::string setting);

/// Columns as wide as they need to be, the first to the left, the others to the right.
void print_table(const std::vector<std::vector<std::string>>& rows);

/// A column of compare's table.
struct Column {
  std::string title;
  std::function<std::string(const nlohmann::ordered_json& summary)> text;
};

/// A number of summary.json.
Column number_column(std::string title, const std::string& key, int digits);

/// What compare needs to know of a program. The columns of memory and time are added to `measures`.
template <typename Options>
struct Comparison {
  std::function<Options(Options)> checked;
  std::function<nlohmann::ordered_json(const Options&)> train;
  std::vector<Column> measures;
  /// A line about the measures, below the table.
  std::function<std::string(const nlohmann::ordered_json& summary)> note;
  /// Prints what the trained models do on a few examples; may be empty.
  std::function<void(const std::vector<Options>& runs)> examples;
};

void print_comparison(const std::filesystem::path& out, const std::string& compared,
                      const std::vector<nlohmann::ordered_json>& summaries,
                      const std::vector<Column>& measures, const std::string& note);

/// Trains once with each of several settings, same seed, and prints one table.
template <typename Options>
int compare(const Options& options, const std::vector<std::string>& settings,
            const Comparison<Options>& program) {
  namespace fs = std::filesystem;
  if (options.out.empty()) throw UsageError("--out is needed: the folder of the runs");
  std::vector<Options> runs;
  for (const std::string& setting : settings) {
    Options each = options;
    each.compared() = setting;
    each = program.checked(std::move(each));
    each.out = (fs::path(options.out) / folder_name(each.compared())).string();
    for (const Options& other : runs) {
      if (other.out == each.out) {
        throw UsageError(std::string("--") + Options::kCompared + " " + setting + " is given twice");
      }
    }
    // Hours of training may lie between this and the folder's turn.
    if (!options.resume && RunFolder::is_taken(each.out)) {
      throw Error(each.out + " already holds a run: choose another --out, or go on with it by --resume");
    }
    runs.push_back(std::move(each));
  }
  std::vector<nlohmann::ordered_json> summaries;
  for (Options& run : runs) {
    std::cout << "== " << run.compared() << std::endl;
    summaries.push_back(program.train(run));
  }
  print_comparison(options.out, Options::kCompared, summaries, program.measures,
                   program.note(summaries.front()));
  if (program.examples) program.examples(runs);
  return 0;
}

/// The command of a program: its name and help, and its train and compare. Parsing sets `action`.
template <typename Options>
CLI::App* add_program(CLI::App& parent, std::function<int()>& action, const char* help,
                      const Comparison<Options>& program) {
  struct Fields {
    Options train, compare;
    std::vector<std::string> settings;
  };
  const auto fields = std::make_shared<Fields>();
  CLI::App* command = parent.add_subcommand(Options::kProgram, help);
  command->require_subcommand(1);
  // A flag given again replaces the first: scripts add to a common start of the command line.
  command->option_defaults()->take_last();

  CLI::App* train_command = command->add_subcommand("train", "Train a model");
  add_train_flags(*train_command, fields->train);
  train_command->callback([fields, program, &action] {
    action = [fields, program] {
      program.train(fields->train);
      return 0;
    };
  });

  CLI::App* compare_command =
      command->add_subcommand("compare", std::string("Train once with each --") + Options::kCompared +
                                             ", same seed, and print one table");
  add_train_flags(*compare_command, fields->compare, &fields->settings);
  compare_command->callback([fields, program, &action] {
    action = [fields, program] { return compare(fields->compare, fields->settings, program); };
  });
  return command;
}

}  // namespace remnant::app
