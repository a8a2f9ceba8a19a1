#include "translate/command.h"

#include "common/command.h"
#include "common/error.h"
#include "translate/train.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <iostream>
#include <memory>
#include <utility>

namespace remnant::app::translate {
namespace {

using nlohmann::ordered_json;

struct TranslateOptions : UseOptions {
  int64_t beam = 1;
};

std::string decoding(int64_t beam) { return beam == 1 ? "greedy" : "beam " + std::to_string(beam); }

void prepare(const TranslateOptions& use) {
  require_at_least("beam", use.beam, 1);
  app::prepare(use);
}

int evaluate_run(const TranslateOptions& use) {
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
            << "perplexity " << format_fixed(scores.perplexity, 3) << "\n"
            << "BLEU " << format_fixed(scores.tokens.score, 2) << "  lower-cased words  "
            << scores.tokens.signature << "\n"
            << "BLEU " << format_fixed(scores.detokenised.score, 2) << "  detokenised text  "
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

int run_text(const TranslateOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  int64_t unknown = 0, truncated = 0;
  // Far ahead, so that batches hold sentences of one length.
  answer_lines(8 * use.batch_size, [&](const std::vector<std::string>& lines) {
    return translate_text(trained, lines, use.beam, use.batch_size, unknown, truncated);
  });
  if (unknown > 0) std::cerr << "warning: " << unknown << " words are not in the model's vocabulary\n";
  if (truncated > 0) {
    std::cerr << "warning: " << truncated << " sentences are longer than the model's "
              << trained.options.max_length << " positions and were cut\n";
  }
  return 0;
}

/// The first sentences of the test split, and what every run makes of them.
void print_examples(const std::vector<TrainOptions>& runs) {
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
    const auto translations = translate_text(trained, sources, 1, run.batch_size, unknown, truncated);
    std::cout << run.attention << "\n";
    for (size_t i = 0; i < translations.size(); ++i) {
      std::cout << "   " << i + 1 << ". " << translations[i] << "\n";
    }
  }
}

void add_flags(CLI::App& command, TranslateOptions& use) {
  add_run_flags(command, use);
  add_batch_flag(command, use, "sentences a batch");
  command.add_option("--beam", use.beam, "hypotheses kept while decoding; 1: greedy")->capture_default_str();
}

}  // namespace

void add_command(CLI::App& program, std::function<int()>& action) {
  struct Fields {
    TranslateOptions evaluate, run;
  };
  const auto fields = std::make_shared<Fields>();
  CLI::App* translate = add_program<TrainOptions>(
      program, action, "Train and use a translation Transformer",
      {checked,
       train,
       {number_column("BLEU", "bleu", 2), number_column("perplexity", "test_perplexity", 3)},
       [](const ordered_json& summary) {
         return "BLEU and perplexity on the test split: lower-cased words, greedy, " +
                summary.at("bleu_signature").get<std::string>();
       },
       print_examples});

  CLI::App* evaluate_command =
      translate->add_subcommand("evaluate", "Perplexity and BLEU of a trained model");
  add_flags(*evaluate_command, fields->evaluate);
  add_split_flags(*evaluate_command, fields->evaluate, "another folder than the run's");
  evaluate_command->callback(
      [fields, &action] { action = [fields] { return evaluate_run(fields->evaluate); }; });

  CLI::App* run_command =
      translate->add_subcommand("run", "Translate standard input, a sentence a line, to standard output");
  add_flags(*run_command, fields->run);
  run_command->callback([fields, &action] { action = [fields] { return run_text(fields->run); }; });
}

}  // namespace remnant::app::translate
