"""PyTorch's layers as `remnant.convert` leaves them: the same parameters, state dicts and outputs, less kept.

Each class is a subclass of the torch.nn layer that it stands for and holds a `Policy` in `memory`. Without gradients
(torch.no_grad) each runs PyTorch's own forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from remnant import _ops
from remnant._policy import Policy
from remnant._units import Call, Pending, Unit, padding_of, seeded
from remnant._weights import with_gradient


class Converted:
    """What every converted layer has: its setting, and the class that `remnant.revert` gives back.

    One that is constructed rather than converted has the setting "exact".
    """

    memory: Policy = Policy()
    torch_class: type  # of every twin's class, see TWINS

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        return f"{text}, memory={self.memory}" if text else f"memory={self.memory}"


def _takes_part(module: nn.Module) -> bool:
    # In training also without gradients: a reentrant checkpoint's first run must drop what its second does.
    if not torch.is_grad_enabled() and not module.training:
        return False
    # torch.func's transforms, torch.jit.trace and forward-mode gradients know PyTorch's operations alone.
    return torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fits(*tensors: Tensor | None) -> bool:
    """Whether this library's ops take these tensors; PyTorch's layers take more: complex and whole numbers, nested and
    distributed tensors, and whatever else has operations of its own."""
    for x in tensors:
        if x is None:
            continue
        if x.dtype not in _DTYPES or x.is_nested:
            return False
        own = not torch.compiler.is_compiling() and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if own and not isinstance(x, FakeTensor):
            return False
    return True


def _alike(*tensors: Tensor | None) -> bool:
    """_fits, and of one dtype, or autocast makes it one. PyTorch's products refuse others, and say so themselves."""
    given = [x for x in tensors if x is not None]
    if not _fits(*given):
        return False
    if all(x.dtype == given[0].dtype for x in given):
        return True
    return torch.is_autocast_enabled(given[0].device.type) and all(x.dtype != torch.float64 for x in given)


def _as_laid_out(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`op`, which goes by element and gives rows, over elements as they lie: PyTorch's keep the order of dimensions."""
    if x.is_contiguous():
        return op(x)
    order: list[int] = []  # by stride; torch.compile cannot sort where shapes vary
    for d in range(x.dim()):
        at = d
        while at > 0 and 0 < x.stride(order[at - 1]) < x.stride(d):
            at -= 1
        order.insert(at, d)
    back = [order.index(d) for d in range(x.dim())]
    return op(x.permute(order)).permute(back)


def _plain(*tensors: Tensor) -> bool:
    """Whether an op of this library may stand for PyTorch's of the same result: nobody looks at which op runs."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack():
        return False
    return all(type(x) in (Tensor, nn.Parameter) and not x.is_nested for x in tensors)


class Linear(Converted, nn.Linear):
    """torch.nn.Linear that keeps its input at the policy's bits. Exact: all of it, and the faster of two products."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_part(self):
            return super().forward(input)
        weight, bias = self.weight, self.bias  # read once: a parametrization makes them
        if not _alike(input, weight, bias) or not (self.memory.bits or _plain(input, weight)):
            return nn.functional.linear(input, weight, bias)
        return _ops.linear(input, weight, bias, policy=self.memory.codes)


class LayerNorm(Converted, nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension that keeps its output, which the next layer holds anyway."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_part(self) or len(self.normalized_shape) != 1:
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if not _fits(input, weight, bias):
            return nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return _ops.layer_norm(input, weight, bias, eps=self.eps, policy=self.memory.codes)


class RMSNorm(Converted, nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension that keeps its output."""

    def forward(self, x: Tensor) -> Tensor:
        if not _takes_part(self) or len(self.normalized_shape) != 1:
            return super().forward(x)
        weight = self.weight
        if not _fits(x, weight):
            return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        return _ops.rms_norm(x, weight, eps=self.eps, policy=self.memory.codes)


class Dropout(Converted, nn.Dropout):
    """torch.nn.Dropout that keeps a seed of 16 bytes. Draws other masks than PyTorch from the same random state."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.inplace or not _takes_part(self) or not 0 < self.p < 1 or not _fits(input):
            return super().forward(input)
        return _as_laid_out(lambda x: _ops.dropout(x, self.p), input)


class ReLU(Converted, nn.ReLU):
    """torch.nn.ReLU that keeps a bit an element where the next layer keeps codes of its output. Exact: PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        if (not self.memory.bits or self.inplace or isinstance(input, Pending) or not _takes_part(self)
                or not _fits(input)):
            return super().forward(input)
        return _as_laid_out(_ops.relu, input)


class LeakyReLU(Converted, nn.LeakyReLU):
    """torch.nn.LeakyReLU that keeps a bit an element where the next layer keeps codes of its output. Exact: PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        if (not self.memory.bits or self.inplace or isinstance(input, Pending) or not _takes_part(self)
                or not _fits(input)):
            return super().forward(input)
        return _as_laid_out(lambda x: _ops.leaky_relu(x, self.negative_slope), input)


class GELU(Converted, nn.GELU):
    """torch.nn.GELU that keeps codes of its derivative at the policy's bits. Exact: its input."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_part(self) or not _fits(input):
            return super().forward(input)
        form, policy = self.approximate, self.memory.codes
        return _as_laid_out(lambda x: _ops.gelu(x, approximate=form, policy=policy), input)


class SiLU(Converted, nn.SiLU):
    """torch.nn.SiLU that keeps codes of its derivative at the policy's bits. Exact: its input."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_part(self) or self.inplace or isinstance(input, Pending) or not _fits(input):
            return super().forward(input)
        return _as_laid_out(lambda x: _ops.silu(x, policy=self.memory.codes), input)


def _alone(module: Any) -> bool:
    """Whether somebody wants a layer's own output, as compiled code does, or its parameters may be gone after the
    forward."""
    if torch.compiler.is_compiling():
        return True
    modules = torch.nn.modules.module
    if modules._global_forward_hooks or modules._global_backward_hooks or modules._global_backward_pre_hooks:
        return True
    return any(
        each._backward_hooks or each._backward_pre_hooks or each._compiled_call_impl is not None
        or any(not getattr(hook, "looks_at_nothing", False) for hook in each._forward_hooks.values())
        for each in (module, *module.around))


class _Convolution(Converted):
    """A convolution that its norm and activation may join in one conv_norm_act, which keeps one tensor or its codes.

    `then`: "norm" or "activation" where tracing found that one follows and nothing else reads the output. Else, and
    under torch.compile or with a forward hook: PyTorch's convolution, or codes of its input at the policy's bits.
    """

    then = ""
    around: tuple[nn.Module, ...] = ()  # modules whose forward begins or ends before the unit is whole

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Pending):
            input = input.value()
        batched = input.dim() == self.weight.dim()  # type: ignore[attr-defined]
        if not _takes_part(self) or not batched or not input.is_floating_point():  # type: ignore[arg-type]
            return super().forward(input)  # type: ignore[misc]
        memory = f"unbiased:bits={self.memory.bits}" if self.memory.bits else "exact"
        # Without gradients maybe in an autograd.Function's forward, which gives back tensors alone.
        if self.then and not _alone(self) and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            call = Call.of(self, input, memory)
            if call.sound:
                return Pending.of(Unit(call, self.then))
        if not self.memory.bits:
            return super().forward(input)  # type: ignore[misc]
        conv: Any = self
        return _ops.conv_norm_act(
            input, conv.weight, conv.bias, stride=conv.stride, padding=padding_of(conv), dilation=conv.dilation,
            groups=conv.groups, norm="none", activation="identity", memory=memory, generator=seeded(input))


class _Norm(Converted):
    """A norm that joins the convolution before it; by itself PyTorch's.

    `then`: "activation", "add" or "add activation" where one follows and nothing else reads the output.
    `shortcut`: the convolution is cheap and its output goes into a sum, so that exact runs it again in backward.
    """

    then = ""
    shortcut = False
    around: tuple[nn.Module, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Pending):
            return super().forward(input)  # type: ignore[misc]
        if torch.compiler.is_compiling() or input.unit.then != "norm" or not input.open:
            return super().forward(input.value())  # type: ignore[misc]
        call = input.unit.call.normed(self, self.shortcut and self.memory.recompute and not self.memory.bits)
        return Pending.of(Unit(call, self.then)) if self.then and not _alone(self) else call.run(None, "identity")


class Conv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d that takes its norm and activation into one unit."""


class Conv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d that takes its norm and activation into one unit."""


class Conv3d(_Convolution, nn.Conv3d):
    """torch.nn.Conv3d that takes its norm and activation into one unit."""


class BatchNorm1d(_Norm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d behind a convolution."""


class BatchNorm2d(_Norm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d behind a convolution."""


class BatchNorm3d(_Norm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d behind a convolution."""


class GroupNorm(_Norm, nn.GroupNorm):
    """torch.nn.GroupNorm behind a convolution."""


class MaxPool2d(Converted, nn.MaxPool2d):
    """torch.nn.MaxPool2d that keeps a byte an output. Windows above 256 elements and return_indices: PyTorch's."""

    def forward(self, input: Tensor) -> Any:
        if isinstance(input, Pending):
            input = input.value()
        kernel = self.kernel_size if isinstance(self.kernel_size, (tuple, list)) else (self.kernel_size,) * 2
        wanted = torch.is_grad_enabled() and _takes_part(self) and not self.return_indices
        if not wanted or input.dim() != 4 or kernel[0] * kernel[-1] > 256 or not _fits(input):
            return super().forward(input)
        return _ops.max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


def _attend_mask(mask: Tensor | None) -> Tensor | None:
    """PyTorch's module masks say where not to attend, remnant.attention's where to."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Both masks at once, boolean (True = attend) or added."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        a, b = b, a
    return a.masked_fill(~b, float("-inf")) if b.dtype == torch.bool else a + b


class MultiheadAttention(Converted, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention under an attention policy.

    Differs from PyTorch in two points: a query with every key masked attends nothing (its output is out_proj.bias)
    where PyTorch gives NaN, and returned weights are those before dropout. The weights' gradient is exact under every
    policy: backward makes them again from query and key.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if not _takes_part(self) or reason_against(self):
            return super().forward(*given)
        # Read once, as PyTorch does: a parametrization makes them. It does not call out_proj either.
        in_weight, in_bias = self.in_proj_weight, self.in_proj_bias
        out_weight, out_bias = self.out_proj.weight, self.out_proj.bias
        if not _alike(query, key, value, in_weight, in_bias, out_weight, out_bias):
            return super().forward(*given)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: is_causal is a hint about attn_mask; give attn_mask too")
        batched = query.dim() == 3
        itself = key is query and value is query
        one = value is key
        if not batched:
            query = query.unsqueeze(0)
            key = query if itself else key.unsqueeze(0)
            value = key if one else value.unsqueeze(0)
            key_padding_mask = key_padding_mask.unsqueeze(0) if key_padding_mask is not None else None
        elif not self.batch_first:
            query = query.transpose(0, 1)
            key = query if itself else key.transpose(0, 1)
            value = key if one else value.transpose(0, 1)
        batch, length, width = query.shape
        heads = self.num_heads
        # The hint says that attn_mask is the causal mask, which needs no tensor.
        mask = None if is_causal else _attend_mask(attn_mask)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(batch, heads, length, -1)
        if key_padding_mask is not None:
            mask = _join(mask, _attend_mask(key_padding_mask)[:, None, None, :])
        p = self.dropout if self.training else 0.0
        policy = self.memory
        weights = None
        if (policy.recompute and not policy.bits and policy.attention == "recompute" and not need_weights and one
                and not (mask is not None and mask.requires_grad)):
            output = _ops.multihead_attention(
                query, None if itself else key, in_weight, in_bias, out_weight, out_bias, heads, mask=mask,
                causal=is_causal, dropout=p, keep_output=2 * key.shape[1] > 3 * width)
        else:
            projected = self._project(query, key, value, itself, one, in_weight, in_bias)
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected)
            o = _ops.attention(q, k, v, mask=mask, causal=is_causal, dropout=p, policy=policy.attention,
                               need_weights=need_weights, bits=0 if need_weights else policy.bits)
            if need_weights:
                o, weights = o
                weights = with_gradient(weights, q, k, mask, is_causal)
                if average_attn_weights:
                    weights = weights.mean(1)
                weights = weights if batched else weights.squeeze(0)
            o = o.transpose(1, 2).flatten(2)
            output = _ops.linear(o, out_weight, out_bias, policy=policy.codes)
        if not batched:
            return output.squeeze(0), weights
        # As PyTorch's, whose callers may view it.
        return (output if self.batch_first else output.transpose(0, 1).contiguous()), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, itself: bool, one: bool, weight: Tensor,
                 bias: Tensor | None) -> tuple[Tensor, ...]:
        codes, width = self.memory.codes, self.embed_dim
        if itself:
            return _ops.linear(query, weight, bias, policy=codes).chunk(3, -1)

        def part(x: Tensor, first: int, last: int) -> Tensor:
            rows = slice(first * width, last * width)
            return _ops.linear(x, weight[rows], None if bias is None else bias[rows], policy=codes)

        q = part(query, 0, 1)
        return (q, *part(key, 1, 3).chunk(2, -1)) if one else (q, part(key, 1, 2), part(value, 2, 3))


def _watched(module: nn.Module) -> bool:
    """Whether calling a layer does more than its class's forward: hooks, or a forward of the object's own."""
    modules = torch.nn.modules.module
    if (modules._global_forward_hooks or modules._global_forward_pre_hooks or modules._global_backward_hooks
            or modules._global_backward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return True
    if "forward" in module.__dict__:
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not getattr(getattr(hook, "func", hook), "looks_at_nothing", False) for hook in hooks)


_ACTIVATIONS = {torch.relu: "relu", nn.functional.relu: "relu", nn.functional.gelu: "gelu"}


class _FeedForward(Converted):
    """The feed-forward block of PyTorch's Transformer layers."""

    def _hidden(self, x: Tensor) -> Tensor | None:
        """What linear2 gives, or None where PyTorch's own block should run, which calls each layer."""
        activation = _ACTIVATIONS.get(self.activation)  # type: ignore[attr-defined]
        if activation is None or not self.training or not _takes_part(self):  # type: ignore[attr-defined,arg-type]
            return None
        first, second, drop = self.linear1, self.linear2, self.dropout  # type: ignore[attr-defined]
        policy = self.memory
        if not policy.bits and not policy.recompute:
            return None
        # Adapters, parametrizations, FSDP and settings of a layer's own count only where the layer is called.
        if any(type(layer) is not Linear or layer.memory != policy or _watched(layer) for layer in (first, second)):
            return None
        if type(drop) not in (nn.Dropout, Dropout) or _watched(drop) or not 0 <= drop.p < 1:
            return None
        tensors = first.weight, first.bias, second.weight, second.bias
        if not _alike(x, *tensors):
            return None
        return _ops.feed_forward(x, *tensors, activation=activation, dropout=drop.p if drop.training else 0.0,
                                 policy=policy.codes)


class TransformerEncoderLayer(_FeedForward, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer whose feed-forward block makes its hidden layer again, or keeps codes of it."""

    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = self._hidden(x)
        return super()._ff_block(x) if hidden is None else self.dropout2(hidden)


class TransformerDecoderLayer(_FeedForward, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, in the same way."""

    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = self._hidden(x)
        return super()._ff_block(x) if hidden is None else self.dropout3(hidden)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reason_against(module: nn.Module) -> str | None:
    """Why a layer whose type has a twin cannot be converted, or None."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return f"normalises over {len(module.normalized_shape)} dimensions; only the last one can be"
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.add_zero_attn:
            return "has add_bias_kv or add_zero_attn"
        if not module._qkv_same_embed_dim:
            return "has kdim or vdim of its own"
    if isinstance(module, _CONVOLUTIONS):
        if module.padding_mode != "zeros":
            return f"pads with other numbers than zeros ({module.padding_mode})"
        if padding_of(module) is None:
            return "pads one side more than the other"
    return None


TWINS: dict[type, type] = {
    twin.__mro__[twin.__mro__.index(Converted) + 1]: twin  # the torch.nn class behind Converted
    for twin in (Linear, LayerNorm, RMSNorm, Dropout, ReLU, LeakyReLU, GELU, SiLU, MultiheadAttention,
                 TransformerEncoderLayer, TransformerDecoderLayer, Conv1d, Conv2d, Conv3d, BatchNorm1d, BatchNorm2d,
                 BatchNorm3d, GroupNorm, MaxPool2d)
}
for _torch_class, _twin in TWINS.items():
    _twin.torch_class = _torch_class
# Twins that need a convolution before them.
NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm)


def convert_one(module: nn.Module, twin: type, policy: Policy, unit: dict[str, Any]) -> None:
    """Gives `module` its twin's class: parameters, buffers, hooks and identity stay.

    unit: `then`, `shortcut` and `around` of convolutions and norms.
    """
    module.__dict__.update(torch_class=type(module), memory=policy, **unit)
    module.__dict__["__module__"] = "torch.nn.remnant"  # by which torch.fx's tracers know layers that are one node
    module.__class__ = twin


def class_before(module: nn.Module) -> type:
    """The class that `revert_one` should give back: the twin's, under what parametrizations and FSDP made of it since.

    Raises:
        TypeError: a class over the twin that cannot be made anew over another.
    """
    kind = type(module)
    return _over(kind, next(each for each in kind.__mro__ if "torch_class" in each.__dict__))


def _over(kind: type, twin: Any) -> type:
    """`kind` with `twin` replaced by the class that it stands for."""
    if kind is twin:
        return twin.torch_class
    if not issubclass(kind, twin):
        return kind
    own = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    for value in own.values():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if "__class__" in getattr(getattr(function, "__code__", None), "co_freevars", ()):  # super() of this very class
            raise TypeError(f"revert: {kind.__name__} is a subclass of remnant.nn.{twin.__name__} with methods of its "
                            "own, which has no class to go back to: take such layers out of the model first")
    return type(kind)(kind.__name__, tuple(_over(base, twin) for base in kind.__bases__), own)


def revert_one(module: nn.Module, kind: type) -> None:
    """Gives `module` the class `kind`, which `class_before` found."""
    module.__class__ = kind
    for name in ("torch_class", "memory", "then", "shortcut", "around", "__module__"):
        module.__dict__.pop(name, None)
