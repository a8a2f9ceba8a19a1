"""Converted models in two processes: DDP and FSDP2 over Gloo."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")

PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
import remnant

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

def build(dropout=0.0):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout, "gelu", batch_first=True)
    model = nn.Sequential(nn.Linear(16, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 3))
    return remnant.convert(model, "exact")

def steps(model, inputs, count=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in inputs[:count]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

inputs = torch.randn(3, 8, 5, 16, generator=torch.Generator().manual_seed(1))
alone = build()
steps(alone, inputs)
shares = inputs.chunk(ranks, 1)[rank]
"""


def torchrun(body):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-"]
    # Without PyTorch's own clean-up, in which a thread of Gloo's may still run.
    path = f"{textwrap.dedent(PROGRAM)}{textwrap.dedent(body)}\ndist.barrier()\nsys.stdout.flush()\nos._exit(0)\n"
    command[-1] = os.environ["REMNANT_TEST_SCRIPT"]
    with open(command[-1], "w") as file:
        file.write(path)
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("REMNANT_TEST_SCRIPT", str(tmp_path / "ranks.py"))


def test_ddp_equals_one_process():
    torchrun("""
    model = nn.parallel.DistributedDataParallel(build())
    steps(model, shares)
    for (name, a), b in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    """)


def test_fsdp2_equals_one_process():
    torchrun("""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (ranks,))
    model = build()
    for layer in model[1].layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(model, shares)
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a.full_tensor(), b, atol=1e-5), name
    """)


def test_ranks_draw_dropout_and_codes_of_their_own():
    torchrun("""
    model = build()
    remnant.revert(model)
    remnant.convert(model, "unbiased:bits=4")
    torch.manual_seed(rank)
    layer = remnant.convert(nn.Sequential(nn.Dropout(0.5)))
    masks = [torch.empty(1000) for _ in range(ranks)]
    dist.all_gather(masks, layer(torch.ones(1000, requires_grad=True)).detach())
    assert not torch.equal(masks[0], masks[1])
    assert 0.2 < float((masks[0] != masks[1]).float().mean()) < 0.8
    parallel = nn.parallel.DistributedDataParallel(model)
    steps(parallel, shares)
    gathered = [torch.empty(3) for _ in range(ranks)]
    dist.all_gather(gathered, model[2].bias.detach())
    assert torch.equal(gathered[0], gathered[1]) and gathered[0].isfinite().all()
    """)


def test_convolution_units_equal_one_process():
    torchrun("""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (ranks,))

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.GroupNorm(2, channels), nn.ReLU(),
                                      nn.Conv2d(channels, channels, 3, 1, 1, bias=False))
            self.norm, self.relu = nn.GroupNorm(2, channels), nn.ReLU()

        def forward(self, x):
            return self.relu(self.norm(self.body(x)) + x)

    def network(memory="exact"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(4, 8), nn.ReLU(), Block(8), Block(8), nn.Flatten(), nn.Linear(8 * 36, 3))
        return remnant.convert(model, memory)

    images = torch.randn(3, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    alone, parts = network("eager"), images.chunk(ranks, 1)[rank]
    steps(alone, images)
    parallel = nn.parallel.DistributedDataParallel(network())
    steps(parallel, parts)
    for (name, a), b in zip(parallel.module.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    for wrap in ("blocks", "every layer"):
        model = network()
        for module in list(model.modules()):
            if isinstance(module, Block) if wrap == "blocks" else not list(module.children()) and list(module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        steps(model, parts)
        for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(a.full_tensor(), b, atol=1e-5), (wrap, name)
    """)
