"""The ops of a Transformer step give the same on every instruction set and on the device-independent path."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import remnant

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def peak(x):
    return float(x.double().abs().max())


def seeded():
    return torch.Generator().manual_seed(7)


def leaf(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def differentiate(outputs, inputs):
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    grads = [leaf(*y.shape, dtype=y.dtype, seed=9).detach() for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, grads)]


def norm_case(dtype, columns):
    x, residual = leaf(9, columns, dtype=dtype), leaf(9, columns, dtype=dtype, seed=1)
    weight, bias = leaf(columns, dtype=dtype, seed=2), leaf(columns, dtype=dtype, seed=3)
    y = remnant.dropout_add_layer_norm(x, residual, 0.2, weight, bias, generator=seeded())
    return differentiate(y, [x, residual, weight, bias])


def rms_case(dtype, columns):
    x, weight = leaf(9, columns, dtype=dtype), leaf(columns, dtype=dtype, seed=2)
    return differentiate(remnant.rms_norm(x, weight), [x, weight])


def dropout_case(dtype, columns):
    x, residual = leaf(150, columns, dtype=dtype), leaf(150, columns, dtype=dtype, seed=1)
    return differentiate(
        (remnant.dropout(x, 0.3, generator=seeded()), remnant.dropout_add(x, residual, 0.6, generator=seeded())),
        [x, residual],
    )


def activation_case(dtype, columns):
    # On no interval's edge, where the last bit decides.
    x = leaf(150, columns, dtype=dtype)
    y = [remnant.relu(x), remnant.leaky_relu(x, 0.3), remnant.gelu(x), remnant.silu(x), remnant.gelu(x, approximate="tanh")]
    y += [remnant.silu(x, policy=f"fewbit:bits={bits}") for bits in (2, 3, 4)]
    return differentiate(tuple(y), [x])


def codes_case(dtype, columns):
    x = leaf(150, columns, dtype=dtype).detach()
    seed = torch.ops.remnant.draw_seed(x, seeded())
    back = []
    for bits in (8, 4, 2):
        codes, table = torch.ops.remnant.encode(x, seed, bits)
        back += [table, torch.ops.remnant.decode(codes, table, bits, x.shape, x.dtype)]
        if dtype != torch.float64:  # beyond float's digits a level may fall on either side
            back.append(codes)
    return back


def conv_case(dtype, columns):
    channels = min(columns, 7)
    x, w = leaf(2, 3, 6, 5, dtype=dtype), leaf(channels, 3, 3, 3, dtype=dtype)
    residual = leaf(2, channels, 4, 3, dtype=dtype)
    weight, bias = leaf(channels, dtype=dtype, seed=2), leaf(channels, dtype=dtype, seed=3)
    layout = torch.channels_last if columns % 2 else torch.contiguous_format
    results = []
    for r, norm in ((None, "batch"), (residual, "batch"), (residual, "group:groups=1")):
        inputs = [w, weight, bias] if r is None else [w, weight, bias, r]
        y = remnant.conv_norm_act(
            x.contiguous(memory_format=layout), w, norm_weight=weight, norm_bias=bias, residual=r, norm=norm,
            activation="leaky:slope=0.2",
        )  # fmt: skip
        results += differentiate(y, inputs)
    return results


def hidden_case(dtype, columns):
    x, w1, b1, w2 = leaf(9, 5, dtype=dtype), leaf(columns, 5, dtype=dtype), leaf(columns, dtype=dtype), leaf(3, columns, dtype=dtype)
    results = differentiate(remnant.feed_forward(x, w1, b1, w2, None, activation="gelu", dropout=0.2, generator=seeded()), [x, w1, b1, w2])
    with torch.no_grad():
        for activation in ("gelu", "relu"):
            for bits in (8, 4, 2):
                y, seed, codes = torch.ops.remnant.feed_forward_coded(x, w1, b1, w2, None, activation, 0.2, bits, seeded())
                results += [y, codes]
                # Codes that no rounding decides: any bytes, and a step of 1 / 4 for each group.
                codes = torch.randint(0, 255, codes.shape, dtype=torch.uint8, generator=seeded())
                if activation == "relu":
                    steps = torch.full((9, -(-columns // 64)), 0.25, dtype=torch.bfloat16).view(torch.uint8)
                    codes[:, codes.shape[1] - steps.shape[1]:] = steps
                input_codes = torch.ops.remnant.encode(x, seed, bits)
                gradients = torch.ops.remnant.feed_forward_coded_backward(
                    leaf(9, 3, dtype=dtype, seed=4), *input_codes, w1, w2, seed, codes, activation, 0.2, bits, [True] * 5
                )
                results += [torch.nan_to_num(g, nan=7.0) for g in gradients]
    return results


def pool_case(dtype, columns):
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        x = leaf(2, columns, 9, 8, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
        results += differentiate(remnant.max_pool2d(x, (3, 2), (2, 1), 1, (1, 2), ceil_mode=True), [x])
    return results


CASES = [hidden_case, codes_case, conv_case, pool_case, norm_case, rms_case, dropout_case, activation_case]
COLUMNS = [1, 7, 64, 100]


def results():
    return {
        (case.__name__, str(dtype), columns): case(dtype, columns)
        for case in CASES for dtype in DTYPES for columns in COLUMNS
    }  # fmt: skip


def save_results(path):
    torch.set_num_threads(2)
    torch.save(results(), path)


@pytest.fixture(scope="module")
def here():
    return results()


@pytest.mark.parametrize("name", ["composite", "portable", "avx2", "avx512"])
def test_every_path_computes_the_same(name, here, tmp_path):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    flag = {"avx2": r"\bavx2\b", "avx512": r"\bavx512bw\b"}.get(name)
    if flag is not None and not re.search(flag, flags):
        pytest.skip(f"this machine lacks {name}")
    path = tmp_path / "results.pt"
    environment = {**os.environ, "REMNANT_CPU": name, "REMNANT_LIBRARY": str(remnant.library_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(remnant.__file__).resolve().parents[1]), str(HERE)])
    code = f"import test_step_paths; test_step_paths.save_results({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=HERE, check=True, timeout=300)
    there = torch.load(path)
    assert there.keys() == here.keys()
    for case, tensors in here.items():
        for have, want in zip(tensors, there[case], strict=True):
            assert have.dtype == want.dtype and have.shape == want.shape, case
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
            if case[0] == "codes_case":
                # The last bit of (x - minimum) / step may round the other way.
                assert float((have != want).double().mean()) < 1e-3, case
                continue
            if have.dtype == torch.uint8:  # where what is compared with a random number has another last bit
                assert float((have != want).double().mean()) < 1e-2, case
                continue
            allowed = tolerance[have.dtype] * max(1.0, peak(want))
            assert peak(have.double() - want.double()) <= allowed, case
            if case[0] == "dropout_case":
                assert torch.equal(have == 0, want == 0), case
