"""Lightning: a callback that says what training steps keep.

    import remnant
    trainer = Trainer(callbacks=[remnant.lightning.memory_callback(every=50)])

lightning is imported only where it is used; models are converted by `remnant.convert` as any others.
"""

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from remnant._report import _address, end_host_peak, start_host_peak


class _Held:
    """What a node holds in the place of a tensor that it saves; gone when the node lets go."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x.detach()  # a node's own output would hold the node, for ever


class _Meter:
    """Kept and peak bytes of what runs between begin and end, forwards and backwards as they come."""

    def __init__(self) -> None:
        self._hooks: saved_tensors_hooks | None = None

    def begin(self, model: nn.Module, batch: Any) -> None:
        self.end()
        inputs = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
        self._left_out = {_address(x) for x in (*model.parameters(), *model.buffers(), *inputs)}
        self._saved: list[tuple[weakref.ref[_Held], StorageWeakRef, int]] = []
        self._kept, self._more = 0, False
        self._device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._live = torch.cuda.memory_allocated(self._device)
            self._profiled = False
        else:
            self._profiled = not torch.autograd._profiler_enabled()  # somebody else's profile goes on
            if self._profiled:
                start_host_peak()
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def end(self) -> dict[str, int] | None:
        """The numbers since begin, None without one; no peak where a profiler was running already."""
        if self._hooks is None:
            return None
        self._hooks.__exit__(None, None, None)
        self._hooks = None
        self._saved.clear()
        found = {"kept_bytes": self._kept}
        if self._profiled:
            found["peak_bytes"] = end_host_peak()
        elif self._device is not None:
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self._device) - self._live
        return found

    def _pack(self, x: Tensor) -> _Held:
        held, address = _Held(x), _address(x)
        leaf = x.is_leaf and x.requires_grad
        if self._hooks is not None and address is not None and address not in self._left_out and not leaf:
            storage = x.untyped_storage()
            self._saved.append((weakref.ref(held), StorageWeakRef(storage), storage.nbytes()))
            self._more = True
        return held

    def _unpack(self, held: _Held) -> Tensor:
        if self._more:  # a backward begins: what the graph holds now is what its forward kept
            self._more = False
            kept = {storage.cdata: size for alive, storage, size in self._saved if alive() is not None}
            self._kept = max(self._kept, sum(kept.values()))
        return held.tensor


def _callback_class() -> type:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    return object


def memory_callback(every: int = 100, log: Callable[[dict[str, int], int], None] | None = None) -> Any:
    """A Lightning Callback that says what training steps need: kept_bytes and peak_bytes.

    On every `every`-th step batches are measured while they train, until the optimizer steps; nothing runs twice, and
    gradients stay the same bit for bit. The numbers go to the module's log_dict, and to `log`. Kept bytes are those of
    `remnant.memory_report`; peak bytes lie above what lives when the batch begins, and are left out while another
    profiler runs. Where neither lightning nor pytorch_lightning is installed, the object has the same hooks.

    Args:
        every: steps between two measurements; the first step is measured.
        log: called with {"kept_bytes", "peak_bytes"} and the step.

    Raises:
        ValueError: every below 1.
    """
    if every < 1:
        raise ValueError(f"memory_callback: every must be at least 1, got {every}")

    class MemoryCallback(_callback_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.meter = _Meter()
            self.found: dict[str, int] | None = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.found = None
            if trainer.global_step % every == 0:
                self.meter.begin(pl_module, batch)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.found = self.meter.end() or self.found

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found = self.meter.end() or self.found
            self.found = None
            if found is not None:
                pl_module.log_dict({name: float(value) for name, value in found.items()})
                if log is not None:
                    log(found, trainer.global_step)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self.meter.end()

    return MemoryCallback()
