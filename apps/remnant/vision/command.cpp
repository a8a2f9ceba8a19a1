#include "vision/command.h"

#include "common/command.h"
#include "vision/train.h"

#include <CLI/CLI.hpp>

#include <iostream>
#include <memory>

namespace remnant::app::vision {
namespace {

using nlohmann::ordered_json;

/// The confusion matrix, and behind each class the share of its images that are labelled right.
std::vector<std::vector<std::string>> class_table(const std::vector<std::string>& names,
                                                  const Scores& scores) {
  auto table = confusion_table(names, scores);
  table.front().emplace_back("right");
  for (size_t i = 0; i < names.size(); ++i) {
    int64_t all = 0;
    for (const int64_t count : scores.confusion[i]) all += count;
    const auto right = static_cast<double>(scores.confusion[i][i]);
    table[i + 1].push_back(all == 0 ? "-" : format_fixed(right / static_cast<double>(all), 3));
  }
  return table;
}

int evaluate_run(const UseOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  const LabelledImages images = load_split(trained, use.data, use.split);
  const Scores scores = answer(trained, images, use.batch_size)
                            .scores(images.labels, static_cast<int64_t>(trained.names.size()));
  std::cout << use.split << "  " << images.size() << " images, " << trained.names.size() << " classes\n"
            << "accuracy " << format_fixed(scores.accuracy(), 4) << "\n"
            << "loss " << format_fixed(scores.loss, 4) << "\n\n";
  print_table(class_table(trained.names, scores));
  return 0;
}

int run_images(const UseOptions& use) {
  prepare(use);
  TrainedModel trained = load_model(use.run);
  const Answers answers = answer(trained, load_split(trained, use.data, use.split), use.batch_size);
  for (size_t i = 0; i < answers.labels.size(); ++i) {
    std::cout << trained.names[answers.labels[i]] << "\t" << format_fixed(answers.probabilities[i], 4)
              << "\n";
  }
  return 0;
}

void add_flags(CLI::App& command, UseOptions& use) {
  add_run_flags(command, use);
  add_batch_flag(command, use, "images a batch");
  add_split_flags(command, use, "another folder than the run's, or a file, all of it");
}

}  // namespace

void add_command(CLI::App& program, std::function<int()>& action) {
  struct Fields {
    UseOptions evaluate, run;
  };
  const auto fields = std::make_shared<Fields>();
  CLI::App* vision = add_program<TrainOptions>(
      program, action, "Train and use an image classifier",
      {checked,
       train,
       {number_column("accuracy", "accuracy", 4), number_column("loss", "test_loss", 3)},
       [](const ordered_json&) { return std::string("accuracy and loss an image on the test split"); },
       {}});

  CLI::App* evaluate_command =
      vision->add_subcommand("evaluate", "Accuracy, by class too, and confusion matrix of a trained model");
  add_flags(*evaluate_command, fields->evaluate);
  evaluate_command->callback(
      [fields, &action] { action = [fields] { return evaluate_run(fields->evaluate); }; });

  CLI::App* run_command = vision->add_subcommand(
      "run", "Label images: a line an image with its class and the class's probability");
  add_flags(*run_command, fields->run);
  run_command->callback([fields, &action] { action = [fields] { return run_images(fields->run); }; });
}

}  // namespace remnant::app::vision
