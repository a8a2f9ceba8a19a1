"""remnant.lightning.memory_callback under a trainer that calls hooks as Lightning does."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import remnant


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.1), nn.Linear(64, 4))
        self.logged = []

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def log_dict(self, values):
        self.logged.append(values)


class Trainer:
    """The order of Lightning's automatic optimisation."""

    def __init__(self, *callbacks, accumulate=1):
        self.callbacks, self.accumulate, self.global_step = callbacks, accumulate, 0

    def tell(self, name, *arguments):
        for callback in self.callbacks:
            getattr(callback, name)(self, *arguments)

    def fit(self, module, batches):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        try:
            for i, batch in enumerate(batches):
                self.tell("on_train_batch_start", module, batch, i)
                loss = module.training_step(batch)
                if i % self.accumulate == 0:
                    optimizer.zero_grad()
                loss.backward()
                if (i + 1) % self.accumulate == 0:
                    self.tell("on_before_optimizer_step", module, optimizer)
                    optimizer.step()
                    self.global_step += 1
                self.tell("on_train_batch_end", module, loss, batch, i)
        except RuntimeError as error:
            self.tell("on_exception", module, error)
            raise


def batches(count):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 32, 16, generator=generator)
    return list(zip(inputs, torch.randint(4, (count, 32), generator=generator), strict=True))


@pytest.mark.parametrize("memory", ["eager", "exact", "unbiased:bits=4"])
def test_numbers_are_those_of_the_report(memory):
    module, seen = remnant.convert(Module(), memory), []
    x, labels = batches(1)[0]
    report = remnant.memory_report(module, x, loss=lambda output: F.cross_entropy(output, labels.clone()))
    Trainer(remnant.lightning.memory_callback(1, lambda found, step: seen.append(found))).fit(module, [(x, labels)] * 3)
    # The report counts the labels, which the loss brings in and the callback knows as part of the batch.
    assert [found["kept_bytes"] for found in seen] == [report.kept_bytes - 32 * 8] * 3
    gradients = sum(p.numel() * 4 for p in module.parameters())
    assert all(found["kept_bytes"] < found["peak_bytes"] <= report.peak_bytes + gradients for found in seen)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_are_measured_change_nothing(accumulate):
    weights, seen = [], []
    for every in (0, 2):
        torch.manual_seed(0)
        module = remnant.convert(Module())
        callbacks = [remnant.lightning.memory_callback(every, lambda found, step: seen.append(step))] if every else []
        Trainer(*callbacks, accumulate=accumulate).fit(module, batches(6))
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    # Of accumulated steps every batch is measured, those of steps 0 and 2.
    assert seen == ([1, 3, 5] if accumulate == 1 else [0, 1, 2, 3])
    assert len(module.logged) == len(seen)
    assert all(set(line) == {"kept_bytes", "peak_bytes"} and line["kept_bytes"] > 0 for line in module.logged)


def test_a_failure_ends_the_measurement():
    module, callback = Module(), remnant.lightning.memory_callback(1)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Trainer(callback).fit(module, [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))])
    assert not torch.autograd._profiler_enabled()
    x = torch.randn(4, requires_grad=True)
    held = (x * x).grad_fn._saved_self
    assert held is x and module.logged == []


def test_another_profiler_goes_on():
    module = Module()
    with torch.autograd.profiler.profile() as profile:
        Trainer(remnant.lightning.memory_callback(1)).fit(module, batches(1))
    assert set(module.logged[0]) == {"kept_bytes"}
    assert any("addmm" in event.key for event in profile.key_averages())


def test_it_is_lightning_s_where_that_is_installed(monkeypatch):
    outer, inner = ModuleType("lightning"), ModuleType("lightning.pytorch")
    inner.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", outer)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", inner)
    assert isinstance(remnant.lightning.memory_callback(), inner.Callback)


def test_every_is_checked():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        remnant.lightning.memory_callback(0)
