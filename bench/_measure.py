"""Times and bytes the way every benchmark here takes them."""

import argparse
import json
import math
import operator
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


def arguments(description, repeats=7, add_options=None):
    """The options of every benchmark, and those that add_options(parser) adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed repetitions of each row, alternating")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    if add_options:
        add_options(parser)
    parsed = parser.parse_args()
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    return parsed


def kept_bytes(forward, inputs):
    """Unique storages that the graph holds, minus the inputs'; also minus the output's own."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # a node's own output would hold the node, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    for x in (*inputs, output):
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def live_and_peak(run):
    """Live bytes at the end of run(), while its result lives, and the highest; minus what is live before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return live, peak


def live_bytes(forward):
    """What the allocator holds at the end of the forward, its output included."""
    return live_and_peak(forward)[0]


def peak_bytes(step):
    """Highest sum of live allocations during the step, minus what is live before it."""
    return live_and_peak(step)[1]


def alternate(cases, repeats, inputs=None, row_seconds=math.inf):
    """Median forward and backward milliseconds of each {name: (forward, grad)}, taken in turns.

    A grad of None times the forward alone. With inputs, the backward computes their gradients and leaves no
    .grad behind. A row retires once it has had row_seconds, but not before its third timed turn.
    """
    times = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, (forward, grad) in cases.items():
            if len(times[name]) >= 3 and sum(map(sum, times[name])) > row_seconds * 1e3:
                continue
            start = time.perf_counter()
            output = forward()
            middle = end = time.perf_counter()
            if grad is not None:
                gradients = torch.autograd.grad(output, inputs, grad) if inputs else output.backward(grad)
                end = time.perf_counter()
                del gradients
            del output
            if repeat > 0:  # the first warms up
                times[name].append(((middle - start) * 1e3, (end - middle) * 1e3))
    return {
        name: {
            "fwd_ms": statistics.median(f for f, _ in each),
            "bwd_ms": statistics.median(b for _, b in each) if cases[name][1] is not None else None,
            "step_ms": statistics.median(f + b for f, b in each),
        }
        for name, each in times.items()
    }


def write(name, rows, figures, targets=None, missing=None):
    """Writes build/bench/NAME.json and prints it.

    rows: dicts; one with a "skipped" reason is printed below the table. figures: {name: number}. targets:
    {name: (relation, bound)}, relation "<=" or ">=". missing: {name: why this run has no such figure}.
    """
    relations = {"<=": operator.le, ">=": operator.ge}
    goals = {key: {"target": f"{relation} {bound:.2f}", "met": relations[relation](figures[key], bound)}
             for key, (relation, bound) in (targets or {}).items() if key in figures}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "rows": rows, "figures": figures}
    if targets:
        result["targets"] = goals
    if missing:
        result["missing"] = missing
    (OUTPUT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    def text(value):
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 100 else f"{value:.1f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    def show(table, left):
        if not table:
            return
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        for line in table:
            print("  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                            for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip())
        print()

    done = [row for row in rows if not row.get("skipped")]
    columns = [column for column in dict.fromkeys(key for row in done for key in row) if column != "skipped"]
    show([columns, *([text(row.get(column)) for column in columns] for row in done)], 2)
    show([[row["case"], row["impl"], f"skipped: {row['skipped']}"] for row in rows if row.get("skipped")], 3)
    show([[key, text(value), goals[key]["target"] if key in goals else "",
           "" if key not in goals else "met" if goals[key]["met"] else "MISSED"]
          for key, value in figures.items()], 1)
    show([[key, f"not measured: {reason}"] for key, reason in (missing or {}).items()], 2)
