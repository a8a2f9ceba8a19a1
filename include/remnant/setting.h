#pragma once

#include <remnant/export.h>
#include <remnant/policy.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace remnant {

/// What a whole model keeps for backward; written `eager`, `exact`, `unbiased:bits=4`,
/// `budget=60MB`, `budget=60MB,bits=4` (programs' `--memory`, Python's `memory=`).
struct REMNANT_API Memory {
  enum class Kind {
    eager,     ///< what PyTorch keeps: the "off" switch.
    exact,     ///< gradients equal eager's up to rounding; what can be made again from little is.
    unbiased,  ///< codes at `bits` by stochastic rounding; docs/numerics.md has what little bias is left.
    budget,    ///< `plan` chooses layer by layer so that a step's peak fits `bytes`: gradients are exact, or
               ///< unbiased where `bits` lets it choose codes too.
  };
  Kind kind = Kind::exact;
  int64_t bytes = 0;  ///< budget: peak of a step beyond parameters, gradients and optimizer state
  int64_t bits = 0;   ///< unbiased: 8, 4 or 2 an element; budget: the same, or 0 for exact choices alone

  static Memory eager();
  static Memory exact();
  /// Throws c10::Error unless bits is 8, 4 or 2.
  static Memory unbiased(int64_t bits);
  /// Throws c10::Error unless bytes is positive and bits is 0, 8, 4 or 2.
  static Memory budget(int64_t bytes, int64_t bits = 0);

  /// Reads the written form; a budget takes B, kB, MB, GB (powers of 1000) or KiB, MiB, GiB. Throws
  /// c10::Error with one sentence that names the nearest setting when `text` does not parse.
  static Memory parse(std::string_view text);
  /// The written form; parse(str()) gives the same setting.
  std::string str() const;

  bool operator==(const Memory&) const = default;
};

/// What the attention of a Transformer layer keeps.
enum class AttentionKeep {
  eager,        ///< PyTorch's separate operations: q, k, v, softmax output, dropout's noise and result.
  projections,  ///< q, k, v and what the attention policy says.
  output,       ///< its input, and the attention's output with a log-sum-exp a row; projects again.
  input,        ///< its input alone; projects and attends again.
  automatic,    ///< `output` where attending again would cost more than projecting again, else `input`.
};

/// "eager", "projections", "output", "input" or "automatic".
REMNANT_API std::string_view name(AttentionKeep keep);

/// What one Transformer layer keeps, op by op. The default is what PyTorch keeps but for attention, which
/// follows its policy, and dropout, which keeps nothing.
struct REMNANT_API LayerMemory {
  LayerMemory() = default;
  /// The setting's choice for a layer. Throws c10::Error for a budget, which needs `plan`.
  LayerMemory(const Memory& memory);  // NOLINT(google-explicit-constructor): options take either

  AttentionKeep attention = AttentionKeep::projections;
  /// The feed-forward block's hidden layer, kept as PyTorch does or made again.
  bool hidden = true;
  /// Dropout with PyTorch's noise kept, or regenerated.
  bool noise = false;
  /// Normalisations keep their input and statistics as PyTorch does, or their output, which the next op holds
  /// anyway; dropout and the residual sum go with them.
  bool norm_input = true;
  /// Keeps the layer's input alone and runs the layer again in backward.
  bool checkpoint = false;
  /// 0, or 8, 4 or 2: in training everything that the above keep is codes of so many bits by stochastic
  /// rounding, queries and keys of 8; no product but attention's is computed again. Needs
  /// attention=projections, hidden=keep, dropout=seed and norm=output.
  int64_t bits = 0;
  /// Of the layer's attention, in place of the layer's own; layers without attention have no use for it.
  /// Other policies than recompute keep attention's projections (`output`, `input` and `automatic` do not
  /// act).
  std::optional<Policy> policy;

  /// Reads the written form, any of attention=eager|projections|output|input|automatic,
  /// hidden=keep|recompute, dropout=noise|seed, norm=input|output, bits=0|2|4|8 and, last, policy=POLICY
  /// behind commas; or by itself `checkpoint`, a Memory setting, or a policy (but `exact`, which is the
  /// setting): the exact setting with that policy. Throws c10::Error with one sentence.
  static LayerMemory parse(std::string_view text);
  /// The written form; parse(str()) gives the same.
  std::string str() const;
  bool operator==(const LayerMemory&) const = default;
};

}  // namespace remnant
