#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
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

// Whether an argument is a tensor, or a vector, optional or tuple with tensors in it.
template <typename T>
struct HoldsTensors : std::is_same<T, at::Tensor> {};
template <typename T>
struct HoldsTensors<std::vector<T>> : HoldsTensors<T> {};
template <typename T>
struct HoldsTensors<std::optional<T>> : HoldsTensors<T> {};
template <typename... Ts>
struct HoldsTensors<std::tuple<Ts...>> : std::disjunction<HoldsTensors<Ts>...> {};

template <typename T, typename Visit>
void each_tensor(T& argument, const Visit& visit) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    visit(argument);
  } else if constexpr (!HoldsTensors<T>::value) {
    return;
  } else if constexpr (requires { argument.has_value(); }) {
    if (argument) each_tensor(*argument, visit);
  } else if constexpr (requires { argument.begin(); }) {
    for (auto& each : argument) each_tensor(each, visit);
  } else {
    std::apply([&](auto&... each) { (each_tensor(each, visit), ...); }, argument);
  }
}

}  // namespace detail

/// function(arguments...) whose inner activations are not kept: the backward runs it once more.
///
/// Arguments are passed by value: tensors (undefined ones too), a std::vector, std::optional or std::tuple of
/// them, and anything else that can be copied; each run gets its own copy of the function and of what is no
/// tensor. The result is a tensor, a std::vector or a std::tuple of tensors, undefined ones too. Gradients
/// flow to tensor arguments and to whatever parameters the function captures. The second run sees the random
/// state (default generators of the CPU and of the devices of the arguments) and the autocast state (of the
/// same) of the first, so that dropout drops the same; the states of afterwards are put back. Checkpoints
/// nest.
///
/// Saves for backward: the tensor arguments, and a random state (5 kB for the CPU, some bytes for a device).
/// Nothing without grad mode; with it, results need a gradient whether or not anything does that they come
/// from. An argument or a captured tensor that the function returns, or a view of one, comes back as a view
/// that raises an error when it is changed in place.
///
/// Captured parameters get theirs in `.grad`, as `backward()` does: torch::autograd::grad() does not see
/// them, so pass those it is asked for as arguments. A captured tensor that was itself computed from what
/// needs a gradient raises an error in the backward: pass it as an argument. The function must not depend on
/// anything else that changes between forward and backward. What it changes, it changes in both runs: the
/// running statistics of a BatchNorm move twice a step, as under torch.utils.checkpoint. Double backward
/// raises an error.
template <typename Function, typename... Arguments>
auto checkpoint(Function function, Arguments... arguments) {
  using Result = std::decay_t<std::invoke_result_t<Function&, Arguments&...>>;
  std::tuple<Arguments...> all{std::move(arguments)...};
  // Tensors travel through the graph alone: a copy in the closure would keep them twice over.
  std::vector<at::Tensor> inputs;
  detail::each_tensor(all, [&](at::Tensor& x) { inputs.push_back(std::exchange(x, at::Tensor())); });
  auto run = [function = std::move(function), all = std::move(all)](const std::vector<at::Tensor>& tensors) {
    // Copies, since the other run must not see what this one changes in them.
    auto own_function = function;
    auto own = all;
    size_t next = 0;
    detail::each_tensor(own, [&](at::Tensor& x) { x = tensors[next++]; });
    return detail::pack(std::apply(own_function, own));
  };
  return detail::Unpack<Result>::from(detail::checkpoint(std::move(run), std::move(inputs)));
}

}  // namespace remnant
