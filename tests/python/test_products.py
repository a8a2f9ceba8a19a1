"""Products over packed panels, which a machine takes only where they are much faster than ATen's: forced here."""

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import itertools
import torch
import torch.nn.functional as F
import remnant
torch.manual_seed(0)

def close(a, b, what):
    a, b = a.detach(), b.detach()
    error = float((a - b).abs().max() / b.abs().max())
    assert error < 2e-5, (what, error)

def compare(ours, theirs, inputs, what):
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = []
    for f in (ours, theirs):
        y = f(*inputs)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results.append((y, *torch.autograd.grad(y, inputs, g)))
    for i, (a, b) in enumerate(zip(*results)):
        close(a, b, (what, i))
"""


def run(body, products="panels"):
    code = PRELUDE + textwrap.dedent(body)
    env = {**os.environ, "REMNANT_PRODUCTS": products}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_linear_of_any_size(threads):
    run(f"""
    torch.set_num_threads({threads})
    sizes = [(8, 300, 200), (129, 65, 70), (700, 64, 513), (33, 1100, 17), (2000, 256, 256), (1, 999, 999), (70, 5943, 64)]
    for (m, n, k), bias in itertools.product(sizes, (True, False)):
        inputs = [torch.randn(m, k), torch.randn(n, k)] + ([torch.randn(n)] if bias else [])
        compare(remnant.linear, F.linear, inputs, (m, n, k, bias))
    """)


def test_linear_with_strides_and_dimensions():
    run("""
    x, w = torch.randn(64, 200).t(), torch.randn(64, 300).t()
    compare(remnant.linear, F.linear, [x, w], "transposed")
    wide = torch.randn(200, 400)
    compare(remnant.linear, F.linear, [wide[:, 7:107], torch.randn(90, 100)], "narrowed")
    compare(remnant.linear, F.linear, [wide[:, ::4], torch.randn(90, 100)], "strided")
    compare(remnant.linear, F.linear, [torch.randn(3, 50, 96), torch.randn(80, 96), torch.randn(80)], "3-D")
    x, w = torch.randn(64, 100, requires_grad=True), torch.randn(90, 100, requires_grad=True)
    loss = remnant.linear(x, w).sum(0).expand(4, 64, 90).square().sum()
    loss.backward()
    y = x.detach() @ w.detach().t()
    close(x.grad, (512 * y.sum(0)).expand(64, 90) @ w.detach(), "expanded gradient")
    assert remnant.linear(torch.randn(0, 100), w).shape == (0, 90)
    """)


def test_linear_has_a_second_derivative():
    run("""
    inputs = [torch.randn(64, 70, requires_grad=True), torch.randn(80, 70, requires_grad=True)]
    inputs.append(torch.randn(80, requires_grad=True))
    results = []
    for f in (remnant.linear, F.linear):
        grads = torch.autograd.grad(f(*inputs).pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    for a, b in zip(*results):
        close(a, b, "second derivative")
    """)


def test_numbers_that_are_none():
    run("""
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    x[3, 5], w[7, 1] = float("nan"), float("inf")
    y = remnant.linear(x, w)
    assert y[3].isnan().all() and not y[4].isfinite()[7] and y[4].isfinite().sum() == 95
    """)


def test_the_ops_that_multiply():
    run("""
    x, w1, w2 = torch.randn(300, 64), torch.randn(256, 64), torch.randn(64, 256)
    def ffn(x, w1, b1, w2, b2):
        return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
    compare(lambda *a: remnant.feed_forward(*a, activation="relu"), ffn,
            [x, w1, torch.randn(256), w2, torch.randn(64)], "feed_forward")
    target = torch.randint(0, 500, (300,))
    def loss(x, w, b):
        return F.cross_entropy(F.linear(x, w, b), target)
    compare(lambda x, w, b: remnant.linear_cross_entropy(x, w, b, target), loss,
            [x, torch.randn(500, 64), torch.randn(500)], "linear_cross_entropy")
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    def attend(x, *p):
        return F.multi_head_attention_forward(
            x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), 64, 4, p[0], p[1], None, None, False, 0.0,
            p[2], p[3], need_weights=False)[0].transpose(0, 1)
    def ours(x, *p):
        return remnant.multihead_attention(x, None, *p, heads=4)
    compare(ours, attend, [torch.randn(5, 40, 64), torch.randn(192, 64) / 8, torch.randn(192),
                           torch.randn(64, 64) / 8, torch.randn(64)], "multihead_attention")
    """)


@pytest.mark.parametrize("products", ["aten", "", "nonsense"])
def test_without_panels_or_by_measurement(products):
    run("compare(remnant.linear, F.linear, [torch.randn(300, 200), torch.randn(100, 200), torch.randn(100)], 'x')", products)
