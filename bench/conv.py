"""Convolutions that rebuild their input: one layer, a deep plain chain, chains of coupling blocks; and ResNets.

resnet: ResNet-20 and ResNet-110, see bench/_resnet.py; the gradient's noise after --steps SGD steps.
invert: conv3x3 of He weights, zero padding, 16 channels, 32x32, batch 16.
plain chain: 32 layers conv3x3 32->32, BatchNorm, leaky_relu 0.5, 32x32, batch 64, dirac-orthogonal weights, after 200
SGD steps on CIFAR-10 (REMNANT_DATA; without it on images drawn at random) between a small stem and head; as a second
case with maxmin in the place of leaky_relu. Eager runs out of place, contiguous and channels-last.
coupling: 32 channels, 32x32, batch 64, depths 8 and 64 (bench/conv_program.cpp).
    kept_bytes      held for backward at the end of the forward, beyond parameters and inputs
    peak_bytes      highest live bytes of a step, beyond parameters and inputs
    gradient_error  of all parameters together, relative to float64
"""

import gzip
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import _resnet
import numpy
import torch
from _measure import OUTPUT, arguments, kept_bytes, peak_bytes, write
from torch import nn
from torch.nn import functional

import remnant

LAYERS, WIDTH, BATCH, SLOPE = 32, 32, 64, 0.5
TARGETS = {
    "invert_conv3x3_input_error": ("<=", 1e-4),
    "invert_conv3x3_kept_vs_input": ("<=", 0.2),
    "chain_kept_depth64_over_depth8": ("<=", 1.05),
    "chain_peak_depth64_over_depth8": ("<=", 1.10),
    "plain_chain_depth32_kept_vs_eager": ("<=", 0.10),
    "plain_chain_depth32_gradient_error": ("<=", 1e-3),
    "plain_chain_depth32_step_vs_eager": ("<=", 2.0),
    **_resnet.TARGETS,
}


# --- one layer -------------------------------------------------------------------------------------


def invert():
    torch.manual_seed(0)
    x, weight = torch.randn(16, 16, 32, 32), torch.empty(16, 16, 3, 3)
    nn.init.kaiming_normal_(weight)
    error, kept = remnant.conv2d_inversion_error(x, weight, None, 1, 1)
    row = {"case": "conv3x3 16->16, 32x32", "impl": "remnant invert", "input_error": error, "kept_vs_input": kept}
    return [row], {"invert_conv3x3_input_error": error, "invert_conv3x3_kept_vs_input": kept}


# --- the plain chain -------------------------------------------------------------------------------


def images():
    """Normalised CIFAR-10 images and labels, or random ones, and which."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("REMNANT_DATA", root.parent / "shared" / "data")) / "cifar10" / "train.bin.gz"
    if not path.is_file():
        return torch.randn(4096, 3, 32, 32), torch.randint(0, 10, (4096,)), "random images"
    raw = numpy.frombuffer(gzip.open(path).read(), numpy.uint8).reshape(-1, 3073)
    pixels = torch.from_numpy(raw[:, 1:].copy()).view(-1, 3, 32, 32).float() / 255
    return (pixels - 0.47) / 0.25, torch.from_numpy(raw[:, 0].copy()).long(), "CIFAR-10"


def activate(x, activation):
    if activation == "leaky":
        return functional.leaky_relu(x, SLOPE)
    a, b = x.chunk(2, 1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


class Chain(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(LAYERS))
        self.activation, self.plan = activation, None
        with torch.no_grad():
            for conv in self.convs:  # remnant::nn::init::dirac_orthogonal_
                conv.weight.normal_(0, 0.02)
                conv.weight[:, :, 1, 1] += torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0].float()

    def forward(self, x):
        if self.plan is None:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = activate(norm(conv(x)), self.activation)
            return x
        lists = ([conv.weight for conv in self.convs], [n.weight for n in self.norms], [n.bias for n in self.norms],
                 [n.running_mean for n in self.norms], [n.running_var for n in self.norms])  # fmt: skip
        anchors, residues = self.plan
        return remnant.reversible_chain(
            x, *lists, activation=self.activation, slope=SLOPE, anchors=anchors, residues=residues
        )

    def make_plan(self, x):
        lists = ([conv.weight for conv in self.convs], [n.weight for n in self.norms], [n.bias for n in self.norms])
        return remnant.reversible_chain_plan(x[:4], *lists, activation=self.activation, slope=SLOPE)


def train(activation, steps):
    """A trained chain, its head, an input that it has not seen, and its labels."""
    torch.manual_seed(0)
    data, labels, source = images()
    stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(SLOPE))
    chain, head = Chain(activation), nn.Linear(WIDTH, 10)
    modules = nn.ModuleList([stem, chain, head]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    data = data.contiguous(memory_format=torch.channels_last)
    first, losses = data[:-BATCH], []
    for step in range(steps):
        start = step * BATCH % (len(first) // BATCH * BATCH)
        x, y = first[start : start + BATCH], labels[start : start + BATCH]
        loss = functional.cross_entropy(head(chain(stem(x)).mean((2, 3))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"{activation}: step {step + 1}, loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    with torch.no_grad():
        x = stem(data[-BATCH:]).contiguous()
    return chain, head, x, labels[-BATCH:], source


def gradients(chain, head, x, labels, dtype=torch.float32):
    chain.to(dtype)
    head.to(dtype)
    parameters = list(chain.parameters())
    loss = functional.cross_entropy(head(chain(x.to(dtype)).mean((2, 3))), labels)
    found = [g.double() for g in torch.autograd.grad(loss, parameters)]
    chain.to(torch.float32)
    head.to(torch.float32)
    return found


def error(have, want):
    far = sum(float((a - b).square().sum()) for a, b in zip(have, want, strict=True))
    return (far / sum(float(b.square().sum()) for b in want)) ** 0.5


def plain_chain(activation, steps, repeats):
    chain, head, x, labels, source = train(activation, steps)
    plan = chain.make_plan(x)
    weights = [parameter.detach().clone() for parameter in chain.parameters()]
    want = gradients(chain, head, x, labels, torch.float64)

    def restore():  # float64 there and back changes no float32 weight; running statistics do not matter here
        with torch.no_grad():
            for parameter, value in zip(chain.parameters(), weights, strict=True):
                parameter.copy_(value)

    restore()
    layouts = {"eager": (None, torch.contiguous_format), "eager channels-last": (None, torch.channels_last),
               "remnant reversible chain": (plan, torch.channels_last)}  # fmt: skip
    inputs = {name: x.to(memory_format=layout).requires_grad_() for name, (_, layout) in layouts.items()}
    case = f"{LAYERS} layers, {activation}, {steps} steps on {source}"
    rows, times = {}, {name: [] for name in layouts}

    def step(name):
        chain.plan, layout = layouts[name]
        chain.to(memory_format=layout)
        start = time.perf_counter()
        loss = functional.cross_entropy(head(chain(inputs[name]).mean((2, 3))), labels)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        return 1e3 * (middle - start), 1e3 * (end - middle)

    for name in layouts:
        remnant.reset_inversion_counters()
        step(name)  # makes the gradients
        peak = peak_bytes(lambda name=name: step(name))
        known = [inputs[name], *chain.parameters(), *chain.buffers()]
        kept = kept_bytes(lambda name=name: chain(inputs[name]), known)
        if chain.plan is not None:
            kept += inputs[name].numel() * 4  # its own output, which kept_bytes leaves out
        rows[name] = {"case": case, "impl": name, "kept_bytes": kept, "peak_bytes": peak,
                      "gradient_error": error(gradients(chain, head, inputs[name].detach(), labels), want)}  # fmt: skip
    counters = remnant.inversion_counters()
    rows["remnant reversible chain"].update(
        {"anchors": len(plan[0]), "residues": len(plan[1]), "failed": counters["failed"]}
    )
    for repeat in range(repeats + 1):
        for name in layouts:
            taken = step(name)
            if repeat > 0:  # the first warms up
                times[name].append(taken)
    for name, each in times.items():
        rows[name]["fwd_ms"] = statistics.median(f for f, _ in each)
        rows[name]["bwd_ms"] = statistics.median(b for _, b in each)
        rows[name]["step_ms"] = statistics.median(f + b for f, b in each)

    def ratio(other):
        """The median of ratios of neighbours in time, which share the machine's load."""
        ours = times["remnant reversible chain"]
        return statistics.median(sum(a) / sum(b) for a, b in zip(ours, times[other], strict=True))

    prefix = "plain_chain_depth32" if activation == "leaky" else "maxmin_chain_depth32"
    ours, eager = rows["remnant reversible chain"], rows["eager"]
    return list(rows.values()), {
        f"{prefix}_kept_vs_eager": ours["kept_bytes"] / eager["kept_bytes"],
        f"{prefix}_peak_vs_eager": ours["peak_bytes"] / eager["peak_bytes"],
        f"{prefix}_gradient_error": ours["gradient_error"],
        f"{prefix}_eager_gradient_error": eager["gradient_error"],
        f"{prefix}_step_vs_eager": ratio("eager"),
        f"{prefix}_step_vs_eager_channels_last": ratio("eager channels-last"),
    }


# --- coupling blocks -------------------------------------------------------------------------------


def couplings():
    rows = []
    for depth in (8, 64):
        words = [str(OUTPUT / "bench_conv"), str(depth), str(torch.get_num_threads())]
        made = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({"case": f"{depth} additive couplings", "impl": "remnant reversible sequence", **made})
    shallow, deep = rows
    return rows, {
        "chain_kept_depth64_over_depth8": deep["kept_bytes"] / shallow["kept_bytes"],
        "chain_peak_depth64_over_depth8": deep["peak_bytes"] / shallow["peak_bytes"],
    }


def main():
    def add(parser):
        parser.add_argument("--only", choices=["invert", "resnet", "chain", "maxmin", "coupling"], help="this family alone")
        parser.add_argument("--steps", type=int, default=200, help="training steps before a network is measured")
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")

    options = arguments(__doc__, repeats=5, add_options=add)
    families = {
        "invert": invert,
        "coupling": couplings,
        "resnet": lambda: _resnet.rows_and_figures(*images(), options),
        "chain": lambda: plain_chain("leaky", options.steps, options.repeats),
        "maxmin": lambda: plain_chain("maxmin", options.steps, options.repeats),
    }
    rows, figures = [], {}
    for name, family in families.items():
        if options.only in (None, name):
            more, found = family()
            rows.extend(more)
            figures.update(found)
    write("conv", rows, figures, TARGETS)


if __name__ == "__main__":
    main()
