"""Rows of a linear layer: at::linear beside remnant.linear, and beside the product path that this process did not choose.

Run as a program it measures under the path that REMNANT_PRODUCTS names and prints rows as JSON.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time

import torch
from torch.nn import functional

import remnant

# Rows, outputs, inputs: the products of both models' steps.
SHAPES = [
    (3584, 256, 256),
    (3584, 768, 256),
    (3584, 512, 256),
    (3584, 256, 512),
    (1024, 5893, 256),
    (4096, 256, 256),
    (4096, 768, 256),
    (4096, 1024, 256),
    (4096, 256, 1024),
]


def measure(repeats):
    """Forward and backward of both, taking turns; milliseconds."""
    for rows, outputs, inputs in SHAPES:
        leaves = [torch.randn(size, requires_grad=True) for size in ((rows, inputs), (outputs, inputs), (outputs,))]
        grad = torch.randn(rows, outputs)
        times = {functional.linear: [], remnant.linear: []}
        for repeat in range(repeats + 2):
            for function, taken in times.items():
                start = time.perf_counter()
                y = function(*leaves)
                middle = time.perf_counter()
                torch.autograd.grad(y, leaves, grad)
                end = time.perf_counter()
                if repeat > 1:  # the first warm up
                    taken.append((middle - start, end - middle, end - start))
        case = f"linear {rows} x {inputs} to {outputs}"
        for function, impl in ((functional.linear, "at::linear"), (remnant.linear, "remnant.linear")):
            forward, backward, step = (1e3 * statistics.median(column) for column in zip(*times[function], strict=True))
            yield {"case": case, "impl": impl, "fwd_ms": forward, "bwd_ms": backward, "step_ms": step}


def geometric_mean(rows):
    ratios = [ours["step_ms"] / theirs["step_ms"] for theirs, ours in zip(rows[::2], rows[1::2], strict=True)]
    return math.exp(statistics.fmean(map(math.log, ratios)))


def rows_and_figures(repeats):
    rows = list(measure(repeats))
    figures = {"linear_vs_at_linear": geometric_mean(rows)}
    for path in ("panels", "aten"):
        command = [sys.executable, __file__, str(repeats), str(torch.get_num_threads())]
        done = subprocess.run(command, env={**os.environ, "REMNANT_PRODUCTS": path}, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        for row in found:
            row["impl"] += f", {path} forced" if row["impl"].startswith("remnant") else f", beside {path}"
        rows.extend(found)
        figures[f"linear_{path}_vs_at_linear"] = geometric_mean(found)
    return rows, figures


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    json.dump(list(measure(int(sys.argv[1]))), sys.stdout)
