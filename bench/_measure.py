"""Times and bytes the way every benchmark here takes them."""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

OUTPUT = Path(__file__).resolve().parent.parent / "build" / "bench"


def machine():
    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def arguments(description, repeats=7, **flags):
    """The options of every benchmark; `flags` are more, {name: help}, each off unless given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed repetitions of each row, alternating")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parsed = parser.parse_args()
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    return parsed


def kept_bytes(forward, inputs):
    """Unique storages that the graph holds, minus the inputs'; also minus the output's own."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    for x in (*inputs, output):
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(step):
    """Highest sum of live allocations during the step, minus what is live before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def alternate(cases, repeats):
    """Median forward and backward milliseconds of each {name: (forward, grad)}, taken in turns."""
    times = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, (forward, grad) in cases.items():
            start = time.perf_counter()
            output = forward()
            middle = time.perf_counter()
            output.backward(grad)
            end = time.perf_counter()
            if repeat > 0:  # the first warms up
                times[name].append(((middle - start) * 1e3, (end - middle) * 1e3))
    return {
        name: {
            "fwd_ms": statistics.median(f for f, _ in each),
            "bwd_ms": statistics.median(b for _, b in each),
            "step_ms": statistics.median(f + b for f, b in each),
        }
        for name, each in times.items()
    }


def write(name, rows, figures):
    OUTPUT.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "rows": rows, "figures": figures}
    (OUTPUT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value):
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 100 else f"{value:.1f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    table = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))))
    print()
    for key, value in figures.items():
        print(f"{key}  {value:.4g}")
