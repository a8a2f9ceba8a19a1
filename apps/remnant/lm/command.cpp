#include "lm/command.h"

#include "common/command.h"
#include "common/error.h"
#include "common/text.h"
#include "lm/generate.h"
#include "lm/train.h"

#include <CLI/CLI.hpp>

#include <unistd.h>

#include <cmath>
#include <iostream>
#include <memory>

namespace remnant::app::lm {
namespace {

using nlohmann::ordered_json;

struct EvaluateOptions : UseOptions {
  EvaluateOptions() { batch_size = 16; }
  int64_t context = 0;
};

struct GenerateOptions : UseOptions {
  std::string prompt = "\n";
  Sampling sampling;
  int64_t seed = 1;
};

int evaluate_run(const EvaluateOptions& use) {
  prepare(use);
  require_at_least("context", use.context, 0);
  TrainedModel trained = load_model(use.run);
  if (use.context > trained.options.context) {
    throw UsageError("--context " + std::to_string(use.context) + " is longer than the model's " +
                     std::to_string(trained.options.context) + " positions");
  }
  const int64_t context = use.context > 0 ? use.context : trained.options.context;
  const TokenText text = use.data.empty() ? load_split(trained, use.split)
                                          : tokenize_text(load_text({use.data}), *trained.tokenizer);
  const TextScores scores = evaluate(*trained.model, text, context, use.batch_size);
  std::cout << (use.data.empty() ? use.split : use.data) << "  " << scores.bytes << " bytes, "
            << scores.characters << " characters, context " << context << "\n"
            << "bits per character " << format_fixed(scores.bits_per_character(), 4) << "\n"
            << "bits per byte " << format_fixed(scores.bits_per_byte(), 4) << "\n"
            << "perplexity " << format_fixed(scores.perplexity(), 3) << " a " << trained.tokenizer->name()
            << "\n";
  return 0;
}

/// Prints the continuation as its characters become complete; what is not UTF-8 as U+FFFD.
void print_continuation(TrainedModel& trained, const std::string& prompt, const Sampling& sampling,
                        bool at_once) {
  const std::vector<int32_t> tokens = trained.tokenizer->encode(prompt);
  constexpr size_t kLongestCharacter = 4;
  std::string pending;
  const auto print = [&] {
    std::cout << printable_utf8(pending);
    pending.clear();
    if (at_once) std::cout.flush();
  };
  generate(*trained.model, {tokens.begin(), tokens.end()}, sampling, [&](int64_t token) {
    pending += trained.tokenizer->decode(token);
    if (is_utf8(pending) || pending.size() >= kLongestCharacter) print();
  });
  print();
  std::cout << "\n";
}

int generate_text(const GenerateOptions& use) {
  prepare(use);
  Sampling sampling = use.sampling;
  require_at_least("length", sampling.length, 1);
  require_at_least("top-k", sampling.top_k, 0);
  require_at_least("seed", use.seed, 0);
  sampling.seed = static_cast<uint64_t>(use.seed);
  if (!(sampling.temperature >= 0) || std::isinf(sampling.temperature)) {
    throw UsageError("--temperature should be a number of at least 0");
  }
  if (use.prompt.empty()) throw UsageError("--prompt should hold at least one character");
  if (!is_utf8(use.prompt)) throw UsageError("--prompt is not valid UTF-8");
  TrainedModel trained = load_model(use.run);
  const auto length = static_cast<int64_t>(trained.tokenizer->encode(use.prompt).size());
  if (length > trained.options.context) {
    throw UsageError("--prompt has " + std::to_string(length) + " " + trained.tokenizer->name() +
                     "s, more than the model's context of " + std::to_string(trained.options.context));
  }
  std::cout << use.prompt;
  print_continuation(trained, use.prompt, sampling, isatty(STDOUT_FILENO) != 0);
  return 0;
}

void print_examples(const std::vector<TrainOptions>& runs) {
  const Sampling sampling{.length = 200, .temperature = 0.8};
  for (const TrainOptions& run : runs) {
    TrainedModel trained = load_model(run.out);
    std::cout << "\n" << run.attention << " writes, at temperature 0.8\n";
    print_continuation(trained, "\n", sampling, false);
  }
}

}  // namespace

void add_command(CLI::App& program, std::function<int()>& action) {
  struct Fields {
    EvaluateOptions evaluate;
    GenerateOptions generate;
  };
  const auto fields = std::make_shared<Fields>();
  CLI::App* lm = add_program<TrainOptions>(
      program, action, "Train and use a language model",
      {checked,
       train,
       {number_column("bits per character", "bits_per_character", 4),
        number_column("perplexity", "test_perplexity", 3)},
       [](const ordered_json&) {
         return std::string("bits per character and perplexity a token on the test split");
       },
       print_examples});

  CLI::App* evaluate_command = lm->add_subcommand("evaluate", "Bits per character of a trained model");
  add_run_flags(*evaluate_command, fields->evaluate);
  add_batch_flag(*evaluate_command, fields->evaluate, "sequences a batch");
  add_split_flags(*evaluate_command, fields->evaluate, "another file than the run's, all of it");
  evaluate_command->get_option("--data")->excludes(evaluate_command->get_option("--split"));
  evaluate_command
      ->add_option("--context", fields->evaluate.context, "tokens seen at once, 0: as many as in training")
      ->capture_default_str();
  evaluate_command->callback(
      [fields, &action] { action = [fields] { return evaluate_run(fields->evaluate); }; });

  CLI::App* generate_command = lm->add_subcommand("generate", "Continue a text");
  add_run_flags(*generate_command, fields->generate);
  GenerateOptions& generate = fields->generate;
  generate_command->add_option("--prompt", generate.prompt, "text to continue; a line break by itself");
  generate_command->add_option("--length", generate.sampling.length, "tokens to add")->capture_default_str();
  generate_command
      ->add_option("--temperature", generate.sampling.temperature, "0: always the most likely token")
      ->capture_default_str();
  generate_command
      ->add_option("--top-k", generate.sampling.top_k, "draw from that many most likely tokens, 0: from all")
      ->capture_default_str();
  generate_command->add_option("--seed", generate.seed, "of the draws")->capture_default_str();
  generate_command->callback(
      [fields, &action] { action = [fields] { return generate_text(fields->generate); }; });
}

}  // namespace remnant::app::lm
