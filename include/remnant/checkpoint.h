#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace remnant {

namespace detail {

using CheckpointFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

REMNANT_API std::vector<at::Tensor> checkpoint(CheckpointFunction function, std::vector<at::Tensor> inputs);

template <typename T>
constexpr bool is_tensor = std::is_same_v<std::decay_t<T>, at::Tensor>;

// A checkpointed function's result as a list, and back.
inline std::vector<at::Tensor> pack(at::Tensor x) { return {std::move(x)}; }
inline std::vector<at::Tensor> pack(std::vector<at::Tensor> x) { return x; }
template <typename... Ts>
std::vector<at::Tensor> pack(const std::tuple<Ts...>& x) {
  static_assert((is_tensor<Ts> && ...), "a checkpointed function returns tensors");
  return std::apply([](const auto&... each) { return std::vector<at::Tensor>{each...}; }, x);
}

template <typename Result>
struct Unpack;
template <>
struct Unpack<at::Tensor> {
  static at::Tensor from(std::vector<at::Tensor> list) { return std::move(list[0]); }
};
template <>
struct Unpack<std::vector<at::Tensor>> {
  static std::vector<at::Tensor> from(std::vector<at::Tensor> list) { return list; }
};
template <typename... Ts>
struct Unpack<std::tuple<Ts...>> {
  template <size_t... I>
  static std::tuple<Ts...> make(std::vector<at::Tensor>& list, std::index_sequence<I...>) {
    return {std::move(list[I])...};
  }
  static std::tuple<Ts...> from(std::vector<at::Tensor> list) {
    return make(list, std::index_sequence_for<Ts...>{});
  }
};

// The argument itself, or for a tensor the next of those that the graph hands over.
template <typename T>
decltype(auto) next_argument(T& argument, const std::vector<at::Tensor>& tensors, size_t& next) {
  if constexpr (is_tensor<T>) {
    return static_cast<const at::Tensor&>(tensors[next++]);
  } else {
    return static_cast<T&>(argument);
  }
}

}  // namespace detail

/// function(arguments...) whose inner activations are not kept: the backward runs it once more.
///
/// Arguments are passed by value: tensors (undefined ones too) and anything else that can be copied; the
/// result is a tensor, a std::vector or a std::tuple of tensors. Gradients flow to tensor arguments and to
/// whatever parameters the function captures. The second run sees the random state (default generators of the
/// CPU and of the devices of the arguments) and the CPU autocast state of the first, so that dropout drops
/// the same; the states of afterwards are put back. Checkpoints nest.
///
/// Saves for backward: the tensor arguments, and a random state (5 kB for the CPU, some bytes for a device).
/// Nothing without grad mode; with it, results need a gradient whether or not anything does that they come
/// from.
///
/// Captured parameters get theirs in `.grad`, as `backward()` does: torch::autograd::grad() does not see
/// them, so pass those it is asked for as arguments. The function must not depend on anything else that
/// changes between forward and backward. Double backward raises an error.
template <typename Function, typename... Arguments>
auto checkpoint(Function function, Arguments... arguments) {
  using Result = std::decay_t<std::invoke_result_t<Function&, Arguments&...>>;
  std::vector<at::Tensor> inputs;
  (
      [&] {
        if constexpr (detail::is_tensor<Arguments>) inputs.push_back(arguments);
      }(),
      ...);
  // Tensors travel through the graph alone: a copy in the closure would keep them twice over.
  const auto let_go = [](auto& argument) {
    if constexpr (detail::is_tensor<decltype(argument)>) argument = at::Tensor();
  };
  (let_go(arguments), ...);
  auto run = [function = std::move(function), others = std::make_tuple(std::move(arguments)...)](
                 const std::vector<at::Tensor>& tensors) mutable {
    return std::apply(
        [&](auto&... each) {
          size_t next = 0;
          // Braces evaluate from left to right.
          std::tuple<decltype(detail::next_argument(each, tensors, next))...> all{
              detail::next_argument(each, tensors, next)...};
          return detail::pack(std::apply(function, all));
        },
        others);
  };
  return detail::Unpack<Result>::from(detail::checkpoint(std::move(run), std::move(inputs)));
}

}  // namespace remnant
