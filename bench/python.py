"""Models of Python users, converted in one line, beside what they have without: eager, SDPA, checkpointing, packing hooks.

MiniLM (BERT, 6 layers of 384, 12 heads) with 8 texts of 512 tokens and dropout 0.1; and the language model of
./dev bench step written with torch.nn.TransformerEncoderLayer, converted, beside the same model in C++. Two processes of
DistributedDataParallel beside one process with half of the batch. float32; a step is forward, backward, clipping and Adam.
    kept_bytes   held for backward at the end of the forward, beyond parameters and inputs
    peak_bytes   highest live bytes of a step, beyond parameters, gradients and optimizer state
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from _measure import arguments, write
from step import DROPOUT, SHAPES, WIDTH, Eager, PackedTo8Bits, Remnant
from torch import nn

import remnant

BATCH, LENGTH = 8, 512
TARGETS = {
    "convert_overhead_vs_cpp_step": ("<=", 1.05),
    "minilm_imdb512_unbiased_kept_vs_eager": ("<=", 0.10),
    "minilm_imdb512_exact_kept_vs_eager": ("<=", 0.25),
    "minilm_imdb512_exact_step_vs_eager": ("<=", 0.80),
}


class MiniLM(nn.Module):
    def __init__(self, attention="eager", checkpointed=False):
        super().__init__()
        import transformers

        config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                         intermediate_size=1536, attn_implementation=attention)
        self.model = transformers.BertForSequenceClassification(config).train()
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.ids = torch.randint(5, 30000, (BATCH, LENGTH))
        self.mask = (torch.arange(LENGTH) < torch.randint(100, LENGTH + 1, (BATCH, 1))).long()
        self.labels = torch.randint(0, 2, (BATCH,))

    def loss(self):
        return self.model(input_ids=self.ids, attention_mask=self.mask, labels=self.labels).loss


class Language(nn.Module):
    """The language model of bench/step.py in torch.nn's own layers."""

    def __init__(self, batch, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(65, WIDTH), nn.Embedding(length, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 1024, DROPOUT, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.drop, self.out = nn.Dropout(DROPOUT), nn.Linear(WIDTH, 65)
        self.ids, self.following = (torch.randint(0, 65, (batch, length)) for _ in range(2))
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def loss(self):
        x = self.drop(self.tokens(self.ids) + self.positions(torch.arange(self.ids.shape[1])))
        x = self.layers(x, self.mask, is_causal=True)
        return remnant.linear_cross_entropy(x.flatten(0, 1), self.out.weight, self.out.bias, self.following.flatten())


def converted(model, memory):
    remnant.convert(model, memory)
    return Eager(model)


def minilm_cases():
    yield "eager", lambda: Eager(MiniLM())
    yield "sdpa", lambda: Eager(MiniLM("sdpa"))
    yield "checkpoint a layer", lambda: Eager(MiniLM(checkpointed=True))
    yield "hooks, 8 bits", lambda: Eager(MiniLM(), PackedTo8Bits)
    yield "remnant attention", lambda: attention_alone()
    yield "remnant exact", lambda: converted(MiniLM(), "exact")
    yield "remnant unbiased:bits=4", lambda: converted(MiniLM(), "unbiased:bits=4")


def attention_alone():
    remnant.hf.register()
    return Eager(MiniLM("remnant"))


def language_cases():
    shape = SHAPES["lm"]
    yield "torch.nn", lambda: Eager(Language(*shape))
    yield "remnant exact", lambda: converted(Language(*shape), "exact")
    yield "remnant unbiased:bits=4", lambda: converted(Language(*shape), "unbiased:bits=4")
    yield "C++, exact", lambda: Remnant("lm", "exact", shape)


def measure(case, cases, repeats):
    """Rows by name; one warm-up, then all in turns."""
    runners = {name: make() for name, make in cases}
    rows = {name: {"case": case, "impl": name, **runner.bytes()} for name, runner in runners.items()}
    times = {name: [] for name in runners}
    for repeat in range(repeats + 1):
        for name, runner in runners.items():
            taken = runner.step()
            if repeat > 0:
                times[name].append(taken)
    for name, runner in runners.items():
        runner.close()
        rows[name].update({key: statistics.median(each[key] for each in times[name])
                           for key in ("fwd_ms", "bwd_ms", "step_ms")})
    return rows


RANK = """
import json, os, sys, time
sys.path.insert(0, {bench!r})
import torch
import torch.distributed as dist
from torch import nn
import remnant
from python import Language
ranks = int(os.environ.get("WORLD_SIZE", 1))
torch.set_num_threads(1)
torch.manual_seed(0)
model = remnant.convert(Language(2, 1024), "exact")
class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self):
        return self.model.loss()
step = Step()
if ranks > 1:
    dist.init_process_group("gloo")
    step = nn.parallel.DistributedDataParallel(step)
optimizer = torch.optim.Adam(model.parameters(), fused=True)
times = []
for _ in range({repeats} + 2):
    start = time.perf_counter()
    optimizer.zero_grad()
    step().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    times.append(1e3 * (time.perf_counter() - start))
if int(os.environ.get("RANK", 0)) == 0:
    print(json.dumps(sorted(times[2:])[len(times[2:]) // 2]))
if ranks > 1:
    dist.destroy_process_group()
"""


def data_parallel(repeats):
    """A step of two processes with a thread each, over that of two that do not speak with each other."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(RANK.format(bench=os.path.dirname(os.path.abspath(__file__)), repeats=repeats))
        file.flush()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", file.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        together = json.loads(subprocess.run(torchrun, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        pair = [subprocess.Popen([sys.executable, file.name], env=environment, stdout=subprocess.PIPE)
                for _ in range(2)]
        alone = [json.loads(process.communicate()[0]) for process in pair]
    return together, statistics.fmean(alone)


def main():
    options = arguments(__doc__, repeats=3)
    figures = {}
    minilm = measure(f"MiniLM {BATCH} x {LENGTH}", minilm_cases(), options.repeats)
    for name, setting in (("exact", "remnant exact"), ("unbiased", "remnant unbiased:bits=4")):
        for figure, key in (("kept", "kept_bytes"), ("step", "step_ms")):
            figures[f"minilm_imdb512_{name}_{figure}_vs_eager"] = minilm[setting][key] / minilm["eager"][key]
    language = measure("lm {} x {}".format(*SHAPES["lm"]), language_cases(), options.repeats)
    figures["convert_overhead_vs_cpp_step"] = language["remnant exact"]["step_ms"] / language["C++, exact"]["step_ms"]
    together, alone = data_parallel(options.repeats)
    figures["ddp2_step_vs_two_single"] = together / alone
    rows = [*minilm.values(), *language.values()]
    rows.append({"case": "lm 2 x 1024, one thread each", "impl": "two processes of DDP, exact", "step_ms": together})
    rows.append({"case": "lm 2 x 1024, one thread each", "impl": "two single processes, exact", "step_ms": alone})
    write("python", rows, figures, TARGETS)


if __name__ == "__main__":
    main()
