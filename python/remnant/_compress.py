"""remnant.compress: saved tensors of torch's own ops at a few bits, where that leaves gradients unbiased."""

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_ops = torch.ops.remnant

_BITS = (8, 4, 2)
_SMALLEST = 1024  # elements; below, tables and Python objects cost what codes save
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Ops that are linear in each of their factors: a factor enters the gradients of the others alone, and there
# linearly. The value is the position of the first of two factors; None where there may be more of them.
_PRODUCTS: dict[Any, int | None] = {
    F.linear: 0,
    F.bilinear: None,
    torch.bilinear: None,
    torch.einsum: None,
    torch.tensordot: 0,
    torch.addcmul: 1,
    torch.Tensor.addcmul: 1,
    torch.Tensor.__matmul__: 0,
    torch.Tensor.__rmatmul__: 0,
    torch.Tensor.__mul__: 0,
    torch.Tensor.__rmul__: 0,
    **{
        getattr(owner, name): first
        for owner in (torch, torch.Tensor)
        for name, first in (
            ("matmul", 0), ("mm", 0), ("bmm", 0), ("mv", 0), ("inner", 0), ("mul", 0), ("multiply", 0),
            ("addmm", 1), ("addbmm", 1), ("baddbmm", 1), ("addmv", 1),
        )
    },
    **{
        function: 0
        for function in (
            F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
        )
    },
}  # fmt: skip

# What these keep tells one of two cases an element: a bit says as much, and the gradient is torch's.
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.dropout_}
_RELUS = {F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}
_LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}

# Written in Python over ops of the list above.
_COMPOSITES = {F.multi_head_attention_forward}

_GATHER = 0x0102040810204080
_COPIES = 0x0101010101010101
_BIT_OF_EACH = 0x8040201008040201 - 2**64  # as a signed number

_VIEWS = (
    "Alias", "AsStrided", "Clone", "Expand", "Narrow", "Permute", "ReshapeAlias", "Select", "Slice", "Split",
    "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "Unsqueeze", "UnsafeView", "View",
)  # fmt: skip
_VIEW_NODES = frozenset(f"{name}Backward{k}" for name in _VIEWS for k in range(4))


def _is_parameter(x: Tensor) -> bool:
    """Whether x is a leaf that wants a gradient, or a view or a cast of one."""
    if not x.requires_grad or x.is_leaf:
        return x.requires_grad
    node = x.grad_fn
    while node is not None and node.name() in _VIEW_NODES:
        node = node.next_functions[0][0]
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _is_kept_anyway(x: Tensor) -> bool:
    """Whether the op that made x keeps it for its own gradient, as a softmax does."""
    made = x if x._base is None else x._base
    node = made.grad_fn
    if node is None:
        return False
    name = node.name()
    if name.startswith("Relu"):  # a bit an element of it is kept
        return False
    if "remnant::" in name:
        return any(kind in name for kind in ("::AttentionFunction", "::NormFunction"))
    return any(hasattr(type(node), kept) for kept in ("_saved_result", "_saved_output", "_saved_out"))


class _Code:
    """A tensor at a few bits an element, rounded stochastically."""

    __slots__ = ("__weakref__", "bits", "dtype", "parts")

    def __init__(self, x: Tensor, bits: int, generator: torch.Generator | None) -> None:
        plain = x.detach()
        self.parts: tuple[Any, ...] = tuple(_ops.encode(plain, _ops.draw_seed(plain, generator), bits))
        self.bits, self.dtype = bits, x.dtype

    def restore(self, parts: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        return _ops.decode(*parts, self.bits, shape, self.dtype)


class _Bits:
    """A tensor of two values, at a bit an element."""

    __slots__ = ("dtype", "high", "low", "parts")

    def __init__(self, flags: Tensor, dtype: torch.dtype, low: float, high: Tensor | float) -> None:
        flat = flags.detach().flatten().view(torch.uint8)
        if flat.numel() % 8:
            flat = F.pad(flat, (0, -flat.numel() % 8))
        # Eight bytes of 0 or 1 as one number: the product gathers them in its highest byte.
        self.parts: tuple[Any, ...] = (((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8),)
        self.dtype, self.low, self.high = dtype, low, high

    def restore(self, parts: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        # Eight copies of a byte, each with the mask of its own bit.
        spread = (parts[0].to(torch.int64) * _COPIES).bitwise_and_(_BIT_OF_EACH)
        flags = spread.view(torch.uint8)[: shape.numel()].view(shape)
        return flags.ne(0).to(self.dtype).mul_(self.high - self.low).add_(self.low)


class _Shared:
    """Codes that several readers of one tensor hold together, for as long as one of them lives."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # an entry may end by garbage collection inside of find or add
        self._entries: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Code]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def code(self, x: Tensor, bits: int, generator: torch.Generator | None) -> _Code:
        # A weak reference keeps the storage's address from another's use while the entry is there.
        storage = StorageWeakRef(x.untyped_storage())
        place = (x.numel(),) if x.is_contiguous() else (*x.shape, *x.stride())
        key = (storage.cdata, x.storage_offset(), place, x.dtype, x._version, bits)
        with self._lock:
            entry = self._entries.get(key)
            found = entry[1]() if entry else None
        if found is not None:
            return found
        made = _Code(x, bits, generator)
        with self._lock:
            self._entries[key] = (storage, weakref.ref(made, functools.partial(self._end, key)))
        return made

    def _end(self, key: tuple[Any, ...], reference: "weakref.ref[_Code]") -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry and entry[1] is reference:
                del self._entries[key]


_shared = _Shared()


class _Packed:
    """What a graph holds in the place of a tensor: its code, or what the hooks around made of the code."""

    __slots__ = ("code", "parts", "shape", "unpack")

    def __init__(self, code: _Code | _Bits, shape: torch.Size, outer: tuple[Callable, Callable] | None) -> None:
        self.code, self.shape, self.parts, self.unpack = code, shape, None, None
        if outer is None:
            return
        pack, self.unpack = outer
        self.parts = tuple(pack(part) for part in code.parts)
        if not all(
            isinstance(held, Tensor) and held.data_ptr() == part.data_ptr()
            for held, part in zip(self.parts, code.parts, strict=True)
        ):  # put elsewhere by the hooks around: the code itself must not stay
            self.code = _without_parts(code)

    def restore(self) -> Tensor:
        parts = self.code.parts
        if self.unpack is not None:
            parts = tuple(self.unpack(part) for part in self.parts)
        return self.code.restore(parts, self.shape)


def _without_parts(code: _Code | _Bits) -> _Code | _Bits:
    bare = object.__new__(type(code))
    for name in code.__slots__:
        if name not in ("__weakref__", "parts"):
            setattr(bare, name, getattr(code, name))
    bare.parts = ()
    return bare


class _Left:
    """A tensor as it was saved, refused if it has been changed since."""

    __slots__ = ("held", "unpack", "version")

    def __init__(self, x: Tensor, outer: tuple[Callable, Callable] | None) -> None:
        self.version: int | None = None
        if outer is None:
            # Detached, or a node that saved its own output would hold itself for ever.
            self.held, self.unpack = x.detach(), None
            self.version = None if x.is_inference() else x._version
        else:
            self.held, self.unpack = outer[0](x), outer[1]

    def restore(self) -> Tensor:
        if self.unpack is not None:
            return self.unpack(self.held)
        if self.version is not None and self.held._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(self.held.shape)} is at version {self.held._version}; expected version "
                f"{self.version} instead. remnant.compress had left it as it was."
            )
        return self.held


def _unpack(packed: _Packed | _Left) -> Tensor:
    return packed.restore()


class _Pack:
    """The pack hook around one call of one op."""

    def __init__(
        self, choose: Callable[[Tensor], _Code | _Bits | None], outer: tuple[Callable, Callable] | None
    ) -> None:
        self.choose, self.outer = choose, outer

    def __call__(self, x: Tensor) -> _Packed | _Left:
        code = None
        if type(x) in (Tensor, torch.nn.Parameter) and x.dtype in _FLOATING and not x.is_meta:
            if x.layout == torch.strided and x.numel() >= _SMALLEST:
                code = self.choose(x)
        return _Left(x, self.outer) if code is None else _Packed(code, x.shape, self.outer)


@functools.cache
def _opened(function: types.FunctionType) -> types.FunctionType:
    """A function of torch.nn.functional that does not ask for overrides as a whole, so that its calls do."""
    inner = dict(function.__globals__)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        inner[name] = lambda *_: False
    copy = types.FunctionType(function.__code__, inner, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _outer_hooks() -> tuple[Callable, Callable] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class _Eager:
    """Makes compiled code run eagerly while any thread is in a context: what is compiled keeps what its compiler
    chose, and there is nothing left to code. The stance is the process's, so the first sets it and the last ends it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._stance is None and "torch._dynamo" in sys.modules:
                stance = torch.compiler.set_stance("force_eager")
                stance.__enter__()
                self._stance = stance
            self._inside += 1

    def exit(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_eager = _Eager()


class compress(TorchFunctionMode):
    """with remnant.compress(bits=4): keeps what ops save for backward at a few bits, in any model.

        with remnant.compress(bits=4):
            loss = model(input)
        loss.backward()

        >>> layer, x = torch.nn.Linear(64, 64), torch.randn(128, 64)
        >>> with remnant.compress(bits=4):
        ...     loss = layer(x).square().mean()
        >>> loss.backward()

    Only forwards belong inside. Coded are the factors of products: linear, matmul, mm, bmm, mv, inner,
    tensordot, einsum, addmm, addbmm, baddbmm, addmv, bilinear, convolutions and transposed ones, mul and
    addcmul of tensors, and those inside of torch.nn.MultiheadAttention. A factor enters the gradients of the
    others alone, linearly, so stochastic rounding leaves gradients unbiased: each code is a draw of its own,
    except that readers whose codes meet nothing but parameters' gradients share one. ReLU, leaky ReLU and
    dropout keep one bit an element, and their gradients are torch's to the bit. Every other op keeps what it
    keeps, exactly: softmax, norms, GELU, losses, remnant's own ops (which have policies).

    Left alone: parameters with their views and casts, tensors that no gradient goes through (inputs, buffers,
    integers), fewer than 1024 elements, what its maker keeps anyway (a softmax's output), and expanded views
    that are smaller than their codes. Under torch.utils.checkpoint nothing inside a checkpointed region is
    coded; it keeps nothing. Other saved-tensor hooks (torch.autograd.graph.save_on_cpu) get the codes. Of
    nested contexts the innermost decides. What torch.compile has made runs eagerly meanwhile; entering the context
    inside of a compiled function is an error.

    Changing a tensor in place after it was saved fails in backward as in torch where it was left alone; a code
    is a copy, and gives the gradient of the values that were saved. NaN and Inf reach the gradient: the 64
    neighbours that share a group of codes become NaN. A double backward works through the codes; a nonlinear
    function of gradients that are noisy has a bias.

    Args:
        bits: 8, 4 or 2 an element, and 4 bytes for every 64 elements.
        generator: source of the rounding's seeds; the device's default generator when None. Give one of its own to a
            reentrant checkpoint whose backward runs inside: its second run would else draw other dropout.

    Raises:
        ValueError: other bits.
    """

    def __init__(self, bits: int = 4, *, generator: torch.Generator | None = None) -> None:
        if isinstance(bits, bool) or bits not in _BITS:
            raise ValueError(f"compress: bits must be 8, 4 or 2, got {bits!r}")
        super().__init__()
        self.bits = int(bits)
        self.generator = generator

    def __repr__(self) -> str:
        return f"remnant.compress(bits={self.bits})"

    def __enter__(self) -> "compress":
        traced = ("compress: torch.compile cannot trace this context; enter it outside of the compiled function, "
                  "which then runs eagerly inside")
        if torch.compiler.is_compiling():
            raise RuntimeError(traced)
        try:
            _eager.enter()
        except RuntimeError as error:  # compiled code that fell back to Python for this frame
            raise RuntimeError(traced) from error
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _eager.exit()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _COMPOSITES:
            with self._again():
                return _opened(func)(*args, **kwargs)
        choose = self._choice(func, args)
        if choose is None:
            return func(*args, **kwargs)
        outer = _outer_hooks()
        if outer is not None:
            inside_another = isinstance(outer[0], _Pack)
            # A checkpoint counts what is saved, now and when it runs again, perhaps outside of this context.
            checkpointed = getattr(outer[0], "__module__", "") == "torch.utils.checkpoint"
            if inside_another or checkpointed:
                return func(*args, **kwargs)
        with saved_tensors_hooks(_Pack(choose, outer), _unpack):
            return func(*args, **kwargs)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Its own ops' turn, inside of a composite."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def _choice(self, func: Callable, args: tuple[Any, ...]) -> Callable[[Tensor], _Code | _Bits | None] | None:
        """What to make of a tensor that func saves; None for a func that is not on the lists."""
        if func in _PRODUCTS:
            first = _PRODUCTS[func]
            arguments = tree_leaves(args) if first is None else args[first : first + 2]
            factors = [x for x in arguments if isinstance(x, Tensor)]
            # Noise of a factor goes into the others' gradients. If those are parameters', it ends there, and
            # codes may be shared; if it goes on, products of two uses of one code would be biased.
            ends = len(factors) > 1 and sum(not _is_parameter(x) for x in factors) <= 1
            return functools.partial(self._factor, ends)
        if func in _DROPOUTS:
            return _dropout_bits
        if func in _RELUS:
            return lambda x: _Bits(torch.le(x.detach(), 0).logical_not_(), x.dtype, 0.0, 1.0)
        if func in _LEAKY_RELUS:
            return lambda x: _Bits(x.detach() > 0, x.dtype, -1.0, 1.0)
        return None

    def _factor(self, ends: bool, x: Tensor) -> _Code | None:
        if not x.requires_grad or _is_parameter(x) or _is_kept_anyway(x):
            return None
        if _ops.linear_code_bytes(x.numel(), self.bits) >= x.untyped_storage().nbytes():
            return None
        return _shared.code(x, self.bits, self.generator) if ends else _Code(x, self.bits, self.generator)


def _dropout_bits(x: Tensor) -> _Bits | None:
    """Dropout's factors, 0 or 1 / (1 - p); the input itself, which no gradient of dropout's needs, stays."""
    if x.requires_grad:
        return None
    return _Bits(x != 0, x.dtype, 0.0, x.amax())
