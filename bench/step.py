"""A whole training step of two models: eager PyTorch, its own ways to save memory, and Remnant's settings.

mt: the paper's translation Transformer, 128 pairs of 28 tokens. lm: a pre-norm character language model, 4 layers,
d = 256, 4 sequences of 1024. float32, dropout 0.1. A step is forward, backward, clipping and Adam. Remnant's rows run
in programs of their own (bench/step_program.cpp), which take turns with the others.
    kept_bytes   held for backward at the end of the forward, beyond parameters and inputs
    peak_bytes   highest live bytes of a step, beyond parameters, gradients and optimizer state
The figures recomputed_flops_over_forward are counted: what a forward and backward of Remnant multiply, run on ATen's
products (REMNANT_CPU=composite), less three times what eager's forward does, which is what a step needs.
"""

import json
import math
import os
import statistics
import subprocess
import time

import _linear
import torch
from _measure import OUTPUT, arguments, kept_bytes, peak_bytes, write
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

WIDTH, DROPOUT = 256, 0.1
SHAPES = {"mt": (128, 28), "lm": (4, 1024)}
SETTINGS = ["eager", "exact", "unbiased:bits=4"]
# The planner: budgets in peaks of `exact`, and shapes that it has not run.
BUDGETS = (1.0, 1.5, 2.0)
OTHER_SHAPES = {"mt": ((112, 28), (80, 17), (100, 26)), "lm": ((3, 1024), (4, 640), (3, 900))}
BASELINES = {"mt": 616e6, "lm": 1184e6}  # what eager must keep, within 2 %
TARGETS = {
    "mt_exact_kept_vs_eager": ("<=", 0.16),
    "mt_exact_step_vs_eager": ("<=", 0.65),
    "lm1024_exact_kept_vs_eager": ("<=", 0.05),
    "lm1024_exact_step_vs_eager": ("<=", 0.40),
    "mt_unbiased_kept_vs_eager": ("<=", 0.10),
    "mt_unbiased_step_vs_eager": ("<=", 0.65),
    "mt_unbiased_recomputed_flops_over_forward": ("<=", 0.3),
    "lm1024_unbiased_kept_vs_eager": ("<=", 0.03),
    "lm1024_unbiased_step_vs_eager": ("<=", 0.40),
    "lm1024_unbiased_recomputed_flops_over_forward": ("<=", 0.3),
    "mt_exact_peak_vs_eager": ("<=", 0.20),
    "lm1024_exact_peak_vs_eager": ("<=", 0.08),
    "lm1024_budget_step_vs_checkpoint": ("<=", 0.5),
    "lm8192_b1_peak_over_lm1024_b8_peak": ("<=", 1.1),
    "planner_worst_prediction_error": ("<=", 0.03),
    "linear_vs_at_linear": ("<=", 1.0),
}


# --- PyTorch's models ------------------------------------------------------------------------------


class Attention(nn.Module):
    """Separate operations, or scaled_dot_product_attention."""

    def __init__(self, heads, fused):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.heads, self.fused = heads, fused

    def forward(self, x, memory, mask):
        q, k, v = (
            project(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, source in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        if self.fused:
            o = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=DROPOUT)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // self.heads)
            if mask is not None:
                scores = scores.masked_fill(~mask, -1e10)
            o = functional.dropout(scores.softmax(-1), DROPOUT) @ v
        return self.out(o.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, heads, hidden, activation, cross, norm_first, fused):
        super().__init__()
        self.attention = Attention(heads, fused)
        self.cross = Attention(heads, fused) if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3 if cross else 2))
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.activation, self.norm_first = activation, norm_first

    def forward(self, x, mask, memory=None, memory_mask=None):
        blocks = [lambda y: self.attention(y, y, mask)]
        if self.cross is not None:
            blocks.append(lambda y: self.cross(y, memory, memory_mask))
        blocks.append(lambda y: self.down(functional.dropout(self.activation(self.up(y)), DROPOUT)))
        for block, norm in zip(blocks, self.norms, strict=True):
            if self.norm_first:
                x = x + functional.dropout(block(norm(x)), DROPOUT)
            else:
                x = norm(x + functional.dropout(block(x), DROPOUT))
        return x


def call(layer, checkpointed, *inputs):
    return checkpoint(layer, *inputs, use_reentrant=False) if checkpointed else layer(*inputs)


class Translation(nn.Module):
    def __init__(self, batch, length, fused=False, checkpointed=False):
        super().__init__()
        self.tokens = nn.ModuleList(nn.Embedding(n, WIDTH) for n in (7853, 5893))
        self.positions = nn.ModuleList(nn.Embedding(100, WIDTH) for _ in range(2))
        make = (8, 512, functional.relu)
        self.encoder = nn.ModuleList(Layer(*make, False, False, fused) for _ in range(3))
        self.decoder = nn.ModuleList(Layer(*make, True, False, fused) for _ in range(3))
        self.out = nn.Linear(WIDTH, 5893)
        self.checkpointed = checkpointed
        self.source, self.target, self.following = (torch.randint(1, 5000, (batch, length)) for _ in range(3))

    def loss(self):
        def embed(i, ids):
            x = self.tokens[i](ids) * math.sqrt(WIDTH) + self.positions[i](torch.arange(ids.shape[1]))
            return functional.dropout(x, DROPOUT)

        length = self.target.shape[1]
        seen = (self.source != 0)[:, None, None]
        before = torch.ones(length, length, dtype=torch.bool).tril() & (self.target != 0)[:, None, None]
        x, y = embed(0, self.source), embed(1, self.target)
        for layer in self.encoder:
            x = call(layer, self.checkpointed, x, seen)
        for layer in self.decoder:
            y = call(layer, self.checkpointed, y, before, x, seen)
        return functional.cross_entropy(self.out(y).flatten(0, 1), self.following.flatten(), ignore_index=0)


class Language(nn.Module):
    def __init__(self, batch, length, fused=False, checkpointed=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(65, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(Layer(4, 1024, functional.gelu, False, True, fused) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 65)
        self.checkpointed = checkpointed
        self.ids, self.following = (torch.randint(0, 65, (batch, length)) for _ in range(2))

    def loss(self):
        length = self.ids.shape[1]
        before = torch.ones(length, length, dtype=torch.bool).tril()
        x = functional.dropout(self.tokens(self.ids) + self.positions(torch.arange(length)), DROPOUT)
        for layer in self.layers:
            x = call(layer, self.checkpointed, x, before)
        return functional.cross_entropy(self.out(self.norm(x)).flatten(0, 1), self.following.flatten())


MODELS = {"mt": Translation, "lm": Language}


class PackedTo8Bits:
    """Saved floating-point tensors of some size as 8-bit codes: what saved-tensor hooks can do for any model."""

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self.hooks.__enter__()

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @staticmethod
    def pack(x):
        if isinstance(x, nn.Parameter) or x.dtype != torch.float32 or x.numel() < 4096 or x._base is not None:
            return x
        low, high = x.amin(), x.amax()
        scale = (high - low).clamp_min(1e-12) / 255
        return ((x - low) / scale).round_().to(torch.uint8), low, scale

    @staticmethod
    def unpack(packed):
        return packed if torch.is_tensor(packed) else packed[0].float() * packed[2] + packed[1]


# --- rows ------------------------------------------------------------------------------------------


class Eager:
    def __init__(self, model, context=None, compiled=False):
        torch.manual_seed(0)
        self.model, self.context, self.compiled = model, context, compiled
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=5e-4, fused=True)
        self.loss = torch.compile(model.loss) if compiled else model.loss

    def forward(self):
        if self.context is None:
            return self.loss()
        with self.context():
            return self.loss()

    def step(self):
        start = time.perf_counter()
        loss = self.forward()
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        done = time.perf_counter()
        return {"fwd_ms": 1e3 * (middle - start), "bwd_ms": 1e3 * (end - middle), "step_ms": 1e3 * (done - start)}

    def bytes(self):
        self.step()
        kept = None if self.context or self.compiled else kept_bytes(self.loss, self.parameters)
        return {"kept_bytes": kept, "peak_bytes": peak_bytes(self.step)}

    def close(self):
        pass


class Remnant:
    def __init__(self, name, setting, shape, **environment):
        program = OUTPUT / "bench_step"
        words = [str(program), name, setting, *map(str, shape), str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or "null")

    def step(self):
        return {key: value for key, value in self.ask("step").items() if key.endswith("_ms")}

    def bytes(self):
        return self.ask("bytes")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def recomputed_share(name, setting, shape):
    """What a step multiplies beyond a forward's products and their two gradients each, over the forward."""
    with FlopCounterMode(display=False) as counter:
        MODELS[name](*shape).loss()
    forward = counter.get_total_flops() / 2
    runner = Remnant(name, setting, shape, REMNANT_CPU="composite")
    step = runner.ask("products")["step"]
    runner.close()
    return (step - 3 * forward) / forward


def cases(name, shape, settings, compile_too):
    """One row after the other, each made, measured for bytes, and left ready for its turns."""
    make = MODELS[name]
    yield "eager", lambda: Eager(make(*shape))
    yield "sdpa", lambda: Eager(make(*shape, fused=True))
    yield "checkpoint a layer", lambda: Eager(make(*shape, checkpointed=True))
    yield "hooks, 8 bits", lambda: Eager(make(*shape), PackedTo8Bits)
    if compile_too:
        yield "torch.compile", lambda: Eager(make(*shape), compiled=True)
    for setting in settings:
        yield f"remnant {setting}", lambda setting=setting: Remnant(name, setting, shape)


def measure(name, shape, settings, repeats, compile_too):
    runners, rows = {}, {}
    for impl, make in cases(name, shape, settings, compile_too):
        runners[impl] = make()
        rows[impl] = {"case": f"{name} {shape[0]} x {shape[1]}", "impl": impl, **runners[impl].bytes()}
        print(f"{name}, {impl}: bytes measured", flush=True)
    times = {impl: [] for impl in runners}
    for repeat in range(repeats + 1):
        for impl, runner in runners.items():
            taken = runner.step()
            if repeat > 0:  # the first warms up
                times[impl].append(taken)
    for impl, runner in runners.items():
        runner.close()
        for key in ("fwd_ms", "bwd_ms", "step_ms"):
            rows[impl][key] = statistics.median(each[key] for each in times[impl])
    return rows


def predictions(name, shape, exact_peak):
    """A row for each budget and shape: what a plan predicts and what then is."""
    for share in BUDGETS:
        runner = Remnant(name, f"budget={int(share * exact_peak)}B", shape)
        for other in OTHER_SHAPES[name]:
            predicted = runner.ask("shape {} {}".format(*other))
            measured = runner.bytes()
            yield {
                "case": f"{name} {other[0]} x {other[1]}, planned at {shape[0]} x {shape[1]}",
                "impl": f"remnant budget={share:g} peaks of exact",
                **measured,
                **{f"predicted_{key}": value for key, value in predicted.items()},
                "prediction_error": max(abs(predicted[key] / measured[key] - 1) for key in predicted),
            }
        runner.close()


def main():
    def add(parser):
        parser.add_argument("--only", choices=[*SHAPES, "linear"], help="this model, or linear layers, alone")
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")

    options = arguments(__doc__, repeats=5, add_options=add)
    rows, figures = [], {}
    if options.only in (None, "linear"):
        rows, figures = _linear.rows_and_figures(5 * options.repeats)
    for name in SHAPES if options.only is None else set(SHAPES) & {options.only}:
        shape, prefix = SHAPES[name], {"mt": "mt", "lm": "lm1024"}[name]
        settings = list(SETTINGS)
        if name == "lm":
            probe = Eager(Language(*shape, checkpointed=True))
            half = probe.bytes()["peak_bytes"] // 2
            del probe
            settings.append(f"budget={half}B")
        found = measure(name, shape, settings, options.repeats, not options.no_compile)
        eager, exact = found["eager"], found["remnant exact"]
        off = eager["kept_bytes"] / BASELINES[name]
        if not 0.98 <= off <= 1.02:
            print(f"eager keeps {off:.3f} of what it is known to keep for {name}: the ratios below are not comparable")
        unbiased = found["remnant unbiased:bits=4"]
        for quantity in ("kept_bytes", "step_ms", "peak_bytes"):
            for setting, row in (("exact", exact), ("unbiased", unbiased)):
                figures[f"{prefix}_{setting}_{quantity.split('_')[0]}_vs_eager"] = row[quantity] / eager[quantity]
        for setting in SETTINGS[1:]:
            figure = f"{prefix}_{setting.partition(':')[0]}_recomputed_flops_over_forward"
            figures[figure] = recomputed_share(name, setting, shape)
        if name == "lm":
            figures["lm1024_budget_step_vs_checkpoint"] = (
                found[f"remnant {settings[-1]}"]["step_ms"] / found["checkpoint a layer"]["step_ms"]
            )
            peaks = {}
            for other in ((1, 8192), (8, 1024)):
                runner = Remnant("lm", "exact", other)
                peaks[other] = runner.bytes()["peak_bytes"]
                runner.close()
            figures["lm8192_b1_peak_over_lm1024_b8_peak"] = peaks[1, 8192] / peaks[8, 1024]
        rows.extend(found.values())
        planned = list(predictions(name, shape, exact["peak_bytes"]))
        worst = max(row["prediction_error"] for row in planned)
        figure = "planner_worst_prediction_error"
        figures[figure] = max(worst, figures.get(figure, 0))
        rows.extend(planned)
    write("step", rows, figures, TARGETS)


if __name__ == "__main__":
    main()
