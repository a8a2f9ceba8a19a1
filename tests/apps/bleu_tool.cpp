// bleu_tool HYPOTHESES REFERENCES none|13a lc|mixed: prints the score and the signature, for the
// comparison with sacreBLEU. The files hold one sentence a line, every line ended by "\n".

#include "common/bleu.h"

#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> sentences(const char* file) {
  std::ifstream stream(file, std::ios::binary);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: bleu_tool HYPOTHESES REFERENCES none|13a lc|mixed\n");
    return 2;
  }
  try {
    using remnant::app::BleuTokenizer;
    const auto tokenizer = std::string(argv[3]) == "13a" ? BleuTokenizer::mteval_13a : BleuTokenizer::none;
    const auto bleu = remnant::app::corpus_bleu(sentences(argv[1]), sentences(argv[2]), tokenizer,
                                                std::string(argv[4]) == "lc");
    std::printf("%.6f %s\n", bleu.score, bleu.signature.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
