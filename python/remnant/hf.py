"""Hugging Face Transformers: attention for `attn_implementation="remnant"`, and twins of its own layers.

    import remnant
    remnant.hf.register()
    model = AutoModel.from_pretrained(name, attn_implementation="remnant")

`remnant.convert(model)` does this by itself, and more. transformers is imported only where it is used.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from remnant import _ops
from remnant._policy import Policy
from remnant._weights import with_gradient
from remnant.nn import Converted, _alike, _as_laid_out, _fits, _plain, _takes_part

NAME = "remnant"
_POLICY, _BEFORE = "_remnant_attention", "_remnant_attention_before"
# Arguments that change what attention computes and that it does not know.
_REFUSED = ("softcap", "s_aux", "cache")


class _Twin(Converted, nn.Module):
    """A twin of classes that transformers defines: `_class_of` makes a subclass of both, which `isinstance` knows."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        twin, found = type(self).__bases__[0], self.torch_class
        if type(self) is not _class_of(twin, found):  # what FSDP or a parametrization made of it
            return super().__reduce_ex__(protocol)
        return _empty, (twin, found), self.__getstate__()  # type: ignore[attr-defined]


@functools.cache
def _class_of(twin: type, found: type) -> type:
    names = {"__module__": __name__, "__doc__": twin.__doc__, "torch_class": found}
    return type(found.__name__, (twin, found), names)


def _empty(twin: type, found: type) -> nn.Module:
    """What pickle fills: classes made by `_class_of` have no name that it could look up."""
    kind = _class_of(twin, found)
    return kind.__new__(kind)


class Gelu(_Twin):
    """GELUActivation, GELUTanh and NewGELUActivation, which PyTorch's autograd keeps up to six tensors for."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_part(self) or not _fits(input):
            return super().forward(input)
        form, policy = "none" if self.torch_class.__name__ == "GELUActivation" else "tanh", self.memory.codes
        return _as_laid_out(lambda x: _ops.gelu(x, approximate=form, policy=policy), input)


class Silu(_Twin):
    """SiLUActivation."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_part(self) or not _fits(input):
            return super().forward(input)
        return _as_laid_out(lambda x: _ops.silu(x, policy=self.memory.codes), input)


class Conv1D(_Twin):
    """GPT-2's linear layer, whose weight is [inputs, outputs]."""

    __repr__ = nn.Module.__repr__  # transformers' has no place for the setting

    def extra_repr(self) -> str:
        inputs, outputs = self.weight.shape
        return f"nf={outputs}, nx={inputs}, memory={self.memory}"

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not _takes_part(self) or not _alike(x, weight, bias) or not (self.memory.bits or _plain(x, weight)):
            return super().forward(x)
        return _ops.linear(x, weight.t(), bias, policy=self.memory.codes)


class RmsNorm(_Twin):
    """Llama's normalisation and those that are written like it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, eps, policy = self.weight, self.variance_epsilon, self.memory.codes
        if _takes_part(self) and _fits(hidden_states, weight):
            if _alike(hidden_states, weight):
                return _ops.rms_norm(hidden_states, weight, eps=eps, policy=policy)
            if self.torch_class.__name__ == "T5LayerNorm" and hidden_states.dtype == torch.float32:
                # T5 in half precision, whose residual stream is not: its norms give their weight's type.
                return _ops.rms_norm(hidden_states, weight.float(), eps=eps, policy=policy).to(weight.dtype)
        return super().forward(hidden_states)


_TWINS = {
    "GELUActivation": Gelu, "GELUTanh": Gelu, "NewGELUActivation": Gelu, "SiLUActivation": Silu, "Conv1D": Conv1D,
    "LlamaRMSNorm": RmsNorm, "MistralRMSNorm": RmsNorm, "MixtralRMSNorm": RmsNorm, "Qwen2RMSNorm": RmsNorm,
    "Qwen3RMSNorm": RmsNorm, "T5LayerNorm": RmsNorm,
}


def twin_of(module: nn.Module) -> type | None:
    """The twin of a layer that transformers defines, or None."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    if kind.__name__ in ("GELUActivation", "GELUTanh") and getattr(module.act, "__self__", None) is module:
        return None  # spelled out in Python, on request
    twin = _TWINS.get(kind.__name__)
    return None if twin is None else _class_of(twin, kind)


_recorder: Any = None  # what transformers collects a model's outputs in


def _recorded() -> bool:
    """Whether a model was asked for its attentions. Not all hand `output_attentions` on to their layers (GPT-2)."""
    if _recorder is None or (torch.compiler.is_compiling() and not _recorder.compiling):
        return False  # dynamo cannot read a ContextVar
    return any("attentions" in key for key in _recorder.get() or ())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attention interface of transformers calls: query [B, H, N, D], key and value [B, Hkv, M, D].

    Under the policy that `convert` or `register` chose. Returns ([B, N, H, D], weights or None): the weights before
    dropout, with a gradient.

    Saves for backward: what `remnant.attention` saves.

    Raises:
        ValueError: a soft cap, attention sinks or a paged cache, which remnant.attention does not have.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation 'remnant' has no {name!r}: choose another attn_implementation for "
                             f"{type(module).__name__}")
    policy = getattr(module, _POLICY, None) or _registered
    need_weights = bool(kwargs.get("output_attentions")) or _recorded()
    if policy.eager and not need_weights:  # SDPA has none
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, position_bias=position_bias, **kwargs)
    length, keys = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and length > 1 and attention_mask is None
    if causal and keys > length:  # an empty static cache behind the prompt
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = position_bias[..., :length] if position_bias is not None else None
    mask = attention_mask
    if mask is not None and mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = position_bias.masked_fill(~mask, float("-inf"))
        else:
            mask = position_bias + mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    result = _ops.attention(query, key, value, mask=mask, causal=causal, dropout=dropout, scale=scaling,
                            policy=policy.attention, need_weights=need_weights, bits=0 if need_weights else policy.bits)
    output, weights = result if need_weights else (result, None)
    if need_weights:
        weights = with_gradient(weights, query, key, mask, causal, scaling)
    return output.transpose(1, 2).contiguous(), weights


_registered = Policy()


def register(policy: str | Policy = "exact") -> None:
    """Makes `attn_implementation="remnant"` known to transformers.

    Args:
        policy: "exact", "unbiased:bits=4", or a `remnant.Policy` such as Policy(attention="curve:m=5"), of every
            model that `remnant.convert` did not give its own.

    Raises:
        ImportError: transformers is not installed, or has no attention interface (before 4.48).
        ValueError: an unknown policy.
    """
    global _registered, _recorder
    chosen = Policy.parse(policy)
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError("remnant.hf needs transformers with its attention interface: pip install transformers"
                          ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # before 5: attention is told
        _active_collector = None
    _registered, _recorder = chosen, _active_collector


def _models(model: nn.Module) -> list[nn.Module]:
    """The outermost Hugging Face models in `model`."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return []
    found: list[nn.Module] = []
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, library.PreTrainedModel) and id(module) not in seen:
            found.append(module)
            seen.update(id(each) for each in module.modules())
    return found


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, each) for name, each in model.named_modules()
            if type(each).__module__.startswith("transformers.") and "Attention" in type(each).__name__
            and (hasattr(each, "scaling") or hasattr(each, "is_causal"))]


def prepare(model: nn.Module, chosen: dict[str, Policy]) -> Callable[[], None]:
    """What gives a model's attention its policies, to be called once nothing can fail any more."""
    models = _models(model)
    if not models or all(policy.eager for policy in chosen.values()):
        return lambda: None
    register(_registered)  # may be refused

    def apply() -> None:
        for each in models:
            before = each.config._attn_implementation
            try:
                each.set_attn_implementation(NAME)
            except ValueError:
                continue  # a model that goes by no interface keeps its own attention
            if each.config._attn_implementation == NAME:
                each.__dict__[_BEFORE] = before
        for name, attention in _attentions(model):
            attention.__dict__[_POLICY] = chosen[name]

    return apply


def restore(model: nn.Module) -> None:
    for each in _models(model):
        before = each.__dict__.pop(_BEFORE, None)
        if before is not None:
            each.set_attn_implementation(before)
    for _, attention in _attentions(model):
        attention.__dict__.pop(_POLICY, None)


def converted(model: nn.Module) -> dict[str, tuple[str, str]]:
    """name: (type, setting) of a model's attention layers."""
    if not any(_BEFORE in each.__dict__ for each in _models(model)):
        return {}
    return {name: (type(each).__name__, f"attention under {each.__dict__[_POLICY]}")
            for name, each in _attentions(model) if _POLICY in each.__dict__}


def memory_callback(every: int = 100, log: Callable[[dict[str, int], int], None] | None = None) -> Any:
    """A transformers.TrainerCallback that says what training steps need: kept_bytes and peak_bytes.

    On every `every`-th step, once it is done, `remnant.memory_report` runs the batch that the model saw again (two
    forwards and a backward; gradients, buffers and random state stay). The numbers go to the Trainer's log_history, with
    the step, into what the Trainer logs next for the callbacks behind this one, and to `log`.

        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[remnant.hf.memory_callback(every=50)])

    TensorBoard, W&B and what else `report_to` names come before it, and get the numbers by the Trainer itself:

        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.add_callback(remnant.hf.memory_callback(every=50, log=lambda numbers, step: trainer.log(numbers)))

    Args:
        every: steps between two measurements; the first step is measured.
        log: called with {"kept_bytes", "peak_bytes"} and the step, such as wandb.log or a function of add_scalar.

    Raises:
        ImportError: without transformers.
        ValueError: every below 1.
    """
    if every < 1:
        raise ValueError(f"memory_callback: every must be at least 1, got {every}")
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("remnant.hf.memory_callback needs transformers: pip install transformers") from error
    from remnant._report import memory_report

    class MemoryCallback(TrainerCallback):
        def __init__(self) -> None:
            self.handle: Any = None
            self.batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
            self.numbers: dict[str, int] = {}  # that no log has yet

        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None,
                          **kwargs: Any) -> None:
            self._let_go()
            if model is None or state.global_step % every:
                return

            def remember(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                self.batch = (inputs, named)

            self.handle = model.register_forward_pre_hook(remember, with_kwargs=True)

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None,
                        **kwargs: Any) -> None:
            batch = self.batch
            self._let_go()
            if model is None or batch is None or torch.autograd._profiler_enabled():
                return  # two profilers end each other
            found = memory_report(model, *batch[0], **batch[1])
            numbers = {"kept_bytes": found.kept_bytes, "peak_bytes": found.peak_bytes}
            self.numbers, lines = numbers, len(state.log_history)
            if log is not None:
                wanted = control.should_log
                log(dict(numbers), state.global_step)
                control.should_log = wanted  # Trainer.log takes the step's own log for done
            if not any("kept_bytes" in line for line in state.log_history[lines:]):
                state.log_history.append({**numbers, "step": state.global_step})

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None,
                   **kwargs: Any) -> None:
            if logs is not None:
                logs.update(self.numbers)
                self.numbers = {}

        def _let_go(self) -> None:
            if self.handle is not None:
                self.handle.remove()
            self.handle = self.batch = None

    return MemoryCallback()
