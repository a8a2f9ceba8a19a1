#include "classify/command.h"
#include "common/error.h"
#include "common/run_folder.h"
#include "lm/command.h"
#include "report/command.h"
#include "translate/command.h"
#include "vision/command.h"

#include <c10/util/Exception.h>
#include <CLI/CLI.hpp>

#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace {

using remnant::app::Error;
using remnant::app::Interrupt;
using remnant::app::nearest;
using remnant::app::UsageError;

constexpr int kFailed = 1, kUsage = 2;

int fail(const std::string& message, int code) {
  std::cerr << "remnant: " << message << std::endl;
  return code;
}

/// The sub-command that the command line got to.
const CLI::App* innermost(const CLI::App* app) {
  for (auto chosen = app->get_subcommands(); !chosen.empty(); chosen = app->get_subcommands()) {
    app = chosen.front();
  }
  return app;
}

/// A sentence about the first word that `command` does not know, or "".
std::string unknown_word(const CLI::App& command) {
  const std::vector<std::string> words = command.remaining();
  if (words.empty()) return "";
  // A flag first: its value, left over too, is only a consequence.
  std::string word = words.front();
  for (const std::string& each : words) {
    if (each.starts_with("-")) {
      word = each.substr(0, each.find('='));
      break;
    }
  }
  const bool flag = word.starts_with("-");
  std::vector<std::string> names;
  if (flag) {
    for (const CLI::Option* option : command.get_options()) {
      for (const std::string& name : option->get_lnames()) names.push_back(std::string("--").append(name));
    }
  } else {
    for (const CLI::App* subcommand : command.get_subcommands([](const CLI::App*) { return true; })) {
      names.push_back(subcommand->get_name());
    }
  }
  std::string path;
  for (const CLI::App* app = &command; app != nullptr; app = app->get_parent()) {
    path = app->get_name() + (path.empty() ? "" : " " + path);
  }
  const std::string suggestion = nearest(word, names);
  return path + " has no " + (flag ? "flag " : "command ") + word +
         (suggestion.empty() ? "" : "; did you mean " + suggestion + "?") + " (see " + path + " --help)";
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

int main(int argc, char** argv) {
  CLI::App program{"Trains networks without keeping their activations", "remnant"};
  program.set_version_flag("--version", "remnant " REMNANT_VERSION);
  program.require_subcommand(1);
  std::function<int()> action;
  remnant::app::translate::add_command(program, action);
  remnant::app::lm::add_command(program, action);
  remnant::app::classify::add_command(program, action);
  remnant::app::vision::add_command(program, action);
  remnant::app::report::add_command(program, action);
  try {
    program.parse(argc, argv);
  } catch (const CLI::Success& success) {
    return program.exit(success);
  } catch (const CLI::ParseError& error) {
    // Before the parser's own complaint, which may be a consequence: a misspelt flag that is needed
    // would be reported as missing.
    const std::string unknown = unknown_word(*innermost(&program));
    return fail(unknown.empty() ? first_line(error.what()) : unknown, kUsage);
  }

  try {
    const int code = action();
    if (!std::cout.flush()) return fail("cannot write to standard output", kFailed);
    return code;
  } catch (const remnant::app::Interrupted&) {
    return Interrupt::exit_code();
  } catch (const UsageError& error) {
    return fail(error.what(), kUsage);
  } catch (const Error& error) {
    return fail(error.what(), kFailed);
  } catch (const c10::Error& error) {
    return fail(first_line(error.what_without_backtrace()), kFailed);
  } catch (const std::bad_alloc&) {
    return fail("out of memory", kFailed);
  } catch (const std::exception& error) {
    return fail(first_line(error.what()), kFailed);
  }
}
