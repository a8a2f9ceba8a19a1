#include "common/error.h"
#include "lm/sentencepiece.h"

namespace remnant::app::lm {
namespace {

[[noreturn]] void refuse() {
  throw Error(
      "this program was built without SentencePiece: install libsentencepiece-dev and build it again, or "
      "use --tokens bytes");
}

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece(int64_t, std::string_view) { refuse(); }
std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path&) { refuse(); }

}  // namespace remnant::app::lm
