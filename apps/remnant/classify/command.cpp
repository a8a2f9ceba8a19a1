#include "classify/command.h"

#include "classify/train.h"
#include "common/command.h"
#include "common/error.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <utility>

namespace remnant::app::classify {
namespace {

using nlohmann::ordered_json;

struct RunOptions : UseOptions {
  bool scores = false;
};

void warn(const Examples& examples, const TrainedModel& trained) {
  if (examples.truncated == 0) return;
  std::cerr << "warning: " << examples.truncated << " texts are longer than the model's "
            << trained.options.max_length << " positions and are cut\n";
}

int evaluate_run(const UseOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  const Examples examples = encode_for(trained, load_split(trained, use.data, use.split), true);
  warn(examples, trained);
  const Scores scores =
      evaluate(*trained.model, examples, static_cast<int64_t>(trained.labels.size()), use.batch_size);
  // A file is evaluated as a whole.
  const bool file = !use.data.empty() && !std::filesystem::is_directory(use.data);
  std::cout << (file ? use.data : use.split) << "  " << examples.size() << " texts, " << trained.labels.size()
            << " labels\n"
            << "accuracy " << format_fixed(scores.accuracy(), 4) << "\n"
            << "loss " << format_fixed(scores.loss, 4) << "\n\n";
  print_table(confusion_table(trained.labels, scores));
  return 0;
}

/// The labels of lines of text, with their probabilities where `scores` is set; a line without a word has
/// none. Adds to the counts.
std::vector<std::string> label_text(TrainedModel& trained, const std::vector<std::string>& lines,
                                    int64_t batch_size, bool scores, Examples& counts) {
  LabelledTexts texts;
  std::vector<size_t> places;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (!has_word(lines[i])) continue;
    texts.texts.push_back(lines[i]);
    places.push_back(i);
  }
  std::vector<std::string> labels(lines.size());
  if (places.empty()) return labels;
  const Examples examples = encode_for(trained, texts, false);
  counts.unknown += examples.unknown;
  counts.truncated += examples.truncated;
  const Answers answers = answer(*trained.model, examples, batch_size);
  for (size_t i = 0; i < places.size(); ++i) {
    labels[places[i]] = trained.labels[answers.labels[i]];
    if (scores) labels[places[i]] += "\t" + format_fixed(answers.probabilities[i], 4);
  }
  return labels;
}

int run_text(const RunOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  Examples counts;
  // Far ahead, so that batches hold texts of one length.
  answer_lines(8 * use.batch_size, [&](const std::vector<std::string>& lines) {
    return label_text(trained, lines, use.batch_size, use.scores, counts);
  });
  if (counts.unknown > 0) {
    std::cerr << "warning: " << counts.unknown << " words are not in the model's vocabulary\n";
  }
  warn(counts, trained);
  return 0;
}

/// The first texts of the test split, and how every run labels them.
void print_examples(const std::vector<TrainOptions>& runs) {
  constexpr int64_t kFew = 3;
  std::vector<std::string> texts;
  for (const TrainOptions& run : runs) {
    TrainedModel trained = load_model(run.out);
    if (texts.empty()) {
      const LabelledTexts test = load_split(trained, "", "test");
      std::cout << "\n";
      for (int64_t i = 0; i < std::min(kFew, test.size()); ++i) {
        texts.push_back(test.texts[i]);
        std::cout << i + 1 << ". " << test.labels[i] << "  " << test.texts[i] << "\n";
      }
    }
    Examples counts;
    std::cout << run.attention << "\n";
    const auto labels = label_text(trained, texts, run.batch_size, false, counts);
    for (size_t i = 0; i < labels.size(); ++i) std::cout << "   " << i + 1 << ". " << labels[i] << "\n";
  }
}

}  // namespace

void add_command(CLI::App& program, std::function<int()>& action) {
  struct Fields {
    UseOptions evaluate;
    RunOptions run;
  };
  const auto fields = std::make_shared<Fields>();
  CLI::App* classify = add_program<TrainOptions>(
      program, action, "Train and use a text classifier",
      {checked,
       train,
       {number_column("accuracy", "accuracy", 4), number_column("loss", "test_loss", 3)},
       [](const ordered_json&) { return std::string("accuracy and loss a text on the test split"); },
       print_examples});

  CLI::App* evaluate_command =
      classify->add_subcommand("evaluate", "Accuracy and confusion matrix of a trained model");
  add_run_flags(*evaluate_command, fields->evaluate);
  add_batch_flag(*evaluate_command, fields->evaluate, "texts a batch");
  add_split_flags(*evaluate_command, fields->evaluate, "another folder than the run's, or a file, all of it");
  evaluate_command->callback(
      [fields, &action] { action = [fields] { return evaluate_run(fields->evaluate); }; });

  CLI::App* run_command =
      classify->add_subcommand("run", "Label standard input, a text a line, to standard output");
  add_run_flags(*run_command, fields->run);
  add_batch_flag(*run_command, fields->run, "texts a batch");
  run_command->add_flag("--scores", fields->run.scores, "the label's probability too, behind a tab");
  run_command->callback([fields, &action] { action = [fields] { return run_text(fields->run); }; });
}

}  // namespace remnant::app::classify
