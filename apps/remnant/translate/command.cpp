#include "translate/command.h"

#include "common/error.h"
#include "translate/train.h"

#include <ATen/Parallel.h>
#include <CLI/CLI.hpp>

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <utility>

namespace remnant::app::translate {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

struct UseOptions {
  std::string run, split = "test", data;
  int64_t beam = 1, batch_size = 128, threads = 0;
};

std::string decimal(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string decoding(int64_t beam) { return beam == 1 ? "greedy" : "beam " + std::to_string(beam); }

void prepare(const UseOptions& use) {
  if (use.beam < 1) throw UsageError("--beam should be at least 1, got " + std::to_string(use.beam));
  if (use.batch_size < 1)
    throw UsageError("--batch-size should be at least 1, got " + std::to_string(use.batch_size));
  if (use.threads < 0) throw UsageError("--threads should be at least 0, got " + std::to_string(use.threads));
  if (use.threads > 0) at::set_num_threads(static_cast<int>(use.threads));
}

int evaluate_run(const UseOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  const Pairs pairs = load_pairs(trained, use.data, use.split);
  if (pairs.truncated > 0) {
    std::cerr << "warning: " << pairs.truncated << " sentences are longer than the model's "
              << trained.options.max_length << " positions and are cut\n";
  }
  const Scores scores = evaluate(*trained.model, pairs, trained.target_vocabulary, use.beam, use.batch_size);
  std::cout << use.split << "  " << pairs.size() << " pairs, " << trained.options.source << " to "
            << trained.options.target << ", " << decoding(use.beam) << "\n"
            << "perplexity " << decimal(scores.perplexity, 3) << "\n"
            << "BLEU " << decimal(scores.tokens.score, 2) << "  lower-cased words  "
            << scores.tokens.signature << "\n"
            << "BLEU " << decimal(scores.detokenised.score, 2) << "  detokenised text  "
            << scores.detokenised.signature << "\n";
  return 0;
}

/// Translates lines of text; an empty line gives an empty line. Adds to the counts.
std::vector<std::string> translate_text(TrainedModel& trained, const std::vector<std::string>& lines,
                                        int64_t beam, int64_t batch_size, int64_t& unknown,
                                        int64_t& truncated) {
  std::vector<std::vector<std::string>> words;
  std::vector<size_t> places;
  for (size_t i = 0; i < lines.size(); ++i) {
    std::vector<std::string> tokens = tokenize(lines[i], trained.options.source);
    if (tokens.empty()) continue;
    words.push_back(std::move(tokens));
    places.push_back(i);
  }
  const Encoded encoded = encode_all(words, trained.source_vocabulary, trained.options.max_length);
  unknown += encoded.unknown;
  truncated += encoded.truncated;
  const auto translations =
      translate(*trained.model, encoded.sentences, trained.target_vocabulary, beam, batch_size);
  std::vector<std::string> text(lines.size());
  for (size_t i = 0; i < places.size(); ++i) text[places[i]] = detokenize(translations[i]);
  return text;
}

int run_text(const UseOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  // Somebody who types waits for each answer; a file is read ahead, so that batches hold sentences
  // of one length.
  const size_t ahead = isatty(STDIN_FILENO) ? 1 : static_cast<size_t>(8 * use.batch_size);
  int64_t unknown = 0, truncated = 0, line_number = 0;
  std::vector<std::string> lines;
  const auto flush = [&] {
    for (const std::string& line :
         translate_text(trained, lines, use.beam, use.batch_size, unknown, truncated)) {
      std::cout << line << '\n';
    }
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
    if (lines.size() == ahead) flush();
  }
  flush();
  if (unknown > 0) std::cerr << "warning: " << unknown << " words are not in the model's vocabulary\n";
  if (truncated > 0) {
    std::cerr << "warning: " << truncated << " sentences are longer than the model's "
              << trained.options.max_length << " positions and were cut\n";
  }
  return 0;
}

/// A policy as a folder's name.
std::string folder_name(std::string policy) {
  std::replace_if(policy.begin(), policy.end(), [](char c) { return c == ':' || c == '=' || c == ','; }, '-');
  return policy;
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

int compare(const TrainOptions& options, const std::vector<std::string>& policies) {
  if (options.out.empty()) throw UsageError("--out is needed: the folder of the runs");
  std::vector<TrainOptions> runs;
  for (const std::string& policy : policies) {
    TrainOptions each = options;
    each.attention = policy;
    each = checked(each);
    each.out = (fs::path(options.out) / folder_name(each.attention)).string();
    for (const TrainOptions& other : runs) {
      if (other.attention == each.attention) throw UsageError("--attention " + policy + " is given twice");
    }
    // Hours of training may lie between this and the folder's turn.
    if (!options.resume && fs::exists(fs::path(each.out) / "config.json")) {
      throw Error(each.out + " already holds a run: choose another --out, or go on with it by --resume");
    }
    runs.push_back(std::move(each));
  }

  ordered_json results = ordered_json::array();
  std::vector<std::vector<std::string>> table{
      {"attention", "BLEU", "perplexity", "kept", "attention keeps", "peak", "step ms"}};
  for (const TrainOptions& run : runs) {
    std::cout << "== " << run.attention << std::endl;
    const ordered_json summary = train(run);
    results.push_back(summary);
    const auto bytes = [&](const char* key) { return format_bytes(summary.at(key).get<int64_t>()); };
    table.push_back({run.attention, decimal(summary.at("bleu").get<double>(), 2),
                     decimal(summary.at("test_perplexity").get<double>(), 3), bytes("kept_bytes"),
                     bytes("attention_residual_bytes"), bytes("peak_bytes"),
                     decimal(summary.at("step_ms_median").get<double>(), 1)});
  }
  write_file_atomically(fs::path(options.out) / "compare.json", results.dump(2) + "\n");

  std::cout << "\n";
  print_table(table);
  std::cout << "\nBLEU and perplexity on the test split: lower-cased words, greedy, "
            << results.front().at("bleu_signature").get<std::string>()
            << "\nkept and peak: the largest step of the run, whole model; attention keeps: what the policy "
               "adds to\n"
               "q, k, v and the output, all layers, on the batch of memory.json\n";

  std::vector<std::string> sources, references;
  for (const TrainOptions& run : runs) {
    TrainedModel trained = load_model(run.out);
    if (sources.empty()) {
      const Pairs test = load_pairs(trained, "", "test");
      const auto few = static_cast<size_t>(std::min<int64_t>(3, test.size()));
      sources.assign(test.source_text.begin(), test.source_text.begin() + static_cast<int64_t>(few));
      references.assign(test.target_text.begin(), test.target_text.begin() + static_cast<int64_t>(few));
      std::cout << "\n";
      for (size_t i = 0; i < few; ++i) {
        std::cout << i + 1 << ". source     " << sources[i] << "\n   reference  " << references[i] << "\n";
      }
    }
    int64_t unknown = 0, truncated = 0;
    const auto translations = translate_text(trained, sources, 1, options.batch_size, unknown, truncated);
    std::cout << run.attention << "\n";
    for (size_t i = 0; i < translations.size(); ++i) {
      std::cout << "   " << i + 1 << ". " << translations[i] << "\n";
    }
  }
  return 0;
}

void add_train_flags(CLI::App& command, TrainOptions& options) {
  visit_options(options, [&](const char* flag, auto& field, Resume, const char* help) {
    command.add_option(std::string("--") + flag, field, help)->capture_default_str();
  });
  command.get_option("--data")->required();
  command.add_option("--out", options.out, "folder of the run; made")->required();
  command.add_flag("--resume", options.resume, "go on with the run in --out");
  command.add_flag("--quiet", options.quiet, "results only, no progress");
}

void add_use_flags(CLI::App& command, UseOptions& use) {
  command.add_option("--run", use.run, "folder of a trained run")->required();
  command.add_option("--beam", use.beam, "hypotheses kept while decoding; 1: greedy")->capture_default_str();
  command.add_option("--batch-size", use.batch_size, "sentences a batch")->capture_default_str();
  command.add_option("--threads", use.threads, "0: all cores")->capture_default_str();
}

constexpr const char* kPolicies =
    "what attention keeps: exact, recompute, curve:m=4, quantized:bits=4, sampled:m=128, top:m=32";

}  // namespace

void add_command(CLI::App& program, std::function<int()>& action) {
  struct Fields {
    TrainOptions train, compare;
    std::vector<std::string> policies;
    UseOptions evaluate, run;
  };
  const auto fields = std::make_shared<Fields>();
  CLI::App* translate = program.add_subcommand("translate", "Train and use a translation Transformer");
  translate->require_subcommand(1);
  // A flag given again replaces the first: scripts add to a common start of the command line.
  translate->option_defaults()->take_last();

  CLI::App* train_command = translate->add_subcommand("train", "Train a model");
  train_command->add_option("--attention", fields->train.attention, kPolicies)->capture_default_str();
  add_train_flags(*train_command, fields->train);
  train_command->callback([fields, &action] {
    action = [fields] {
      train(fields->train);
      return 0;
    };
  });

  CLI::App* evaluate_command =
      translate->add_subcommand("evaluate", "Perplexity and BLEU of a trained model");
  add_use_flags(*evaluate_command, fields->evaluate);
  evaluate_command->add_option("--split", fields->evaluate.split, "train, val or test")
      ->capture_default_str();
  evaluate_command->add_option("--data", fields->evaluate.data, "another folder than the run's");
  evaluate_command->callback(
      [fields, &action] { action = [fields] { return evaluate_run(fields->evaluate); }; });

  CLI::App* run_command =
      translate->add_subcommand("run", "Translate standard input, a sentence a line, to standard output");
  add_use_flags(*run_command, fields->run);
  run_command->callback([fields, &action] { action = [fields] { return run_text(fields->run); }; });

  CLI::App* compare_command =
      translate->add_subcommand("compare", "Train once with each policy, same seed, and print one table");
  compare_command->add_option("--attention", fields->policies, std::string(kPolicies) + "; once for each")
      ->required()
      ->take_all()
      ->allow_extra_args(false);
  add_train_flags(*compare_command, fields->compare);
  compare_command->callback(
      [fields, &action] { action = [fields] { return compare(fields->compare, fields->policies); }; });
}

}  // namespace remnant::app::translate
