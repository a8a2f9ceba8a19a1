#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace remnant::app {

struct Bleu {
  double score = 0;  ///< 0..100
  std::array<double, 4> precisions{};
  double brevity_penalty = 1;
  int64_t hypothesis_length = 0, reference_length = 0;
  /// e.g. "BLEU|nrefs:1|case:lc|eff:no|tok:13a|smooth:exp", as sacreBLEU writes it.
  std::string signature;
};

enum class BleuTokenizer { none, mteval_13a };

/// Corpus BLEU with one reference, equal to sacreBLEU's (exponential smoothing of zero counts,
/// no effective order). `none` splits at white space; `mteval_13a` is sacreBLEU's default "13a".
/// Throws Error when the two sizes differ.
Bleu corpus_bleu(const std::vector<std::string>& hypotheses, const std::vector<std::string>& references,
                 BleuTokenizer tokenizer, bool lowercase);

}  // namespace remnant::app
