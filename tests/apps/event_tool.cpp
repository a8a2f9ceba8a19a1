// Writes the scalars given on standard input, "step<TAB>value<TAB>tag" a line, as TensorBoard events
// into the folder argv[1], for tests in Python that decode them.
#include <cstdlib>
#include <iostream>
#include <string>

#include "common/error.h"
#include "common/run_folder.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: event_tool FOLDER < scalars\n";
    return 2;
  }
  try {
    remnant::app::EventWriter writer(argv[1]);
    for (std::string line; std::getline(std::cin, line);) {
      const size_t first = line.find('\t'), second = line.find('\t', first + 1);
      if (first == std::string::npos || second == std::string::npos) {
        std::cerr << "not step, value and tag: " << line << "\n";
        return 2;
      }
      writer.scalar(line.substr(second + 1), std::strtod(line.c_str() + first, nullptr),
                    std::strtoll(line.c_str(), nullptr, 10));
    }
    writer.flush();
  } catch (const remnant::app::Error& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
