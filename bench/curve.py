"""Gradient error of the policies that approximate, against float64, on rows from flat to peaked."""

import torch
from _measure import arguments, write

import remnant

POLICIES = ["recompute", "curve:m=1", "curve:m=5", "curve:m=5,paper_text", "curve:m=16", "quantized:bits=8",
            "quantized:bits=4", "quantized:bits=2"]
STATES = {"flat": 0.5, "medium": 2.0, "peaked": 6.0}


def main():
    arguments(__doc__)
    torch.manual_seed(0)
    rows, figures = [], {}
    for state, spread in STATES.items():
        q = (torch.randn(2, 4, 512, 32) * spread).requires_grad_()
        k, v = (torch.randn(2, 4, 512, 32).requires_grad_() for _ in range(2))
        grad = torch.randn(2, 4, 512, 32)
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact = torch.autograd.grad(remnant.attention(*wide, policy="exact"), wide, grad.double())
        weights = remnant.attention(q, k, v, need_weights=True)[1]
        highest = weights.amax(-1).mean().item()
        for policy in POLICIES:
            have = torch.autograd.grad(remnant.attention(q, k, v, policy=policy), (q, k, v), grad)
            error = [((h - e).norm() / e.norm()).item() for h, e in zip(have, exact, strict=True)]
            rows.append({"case": f"n=512 {state}", "impl": policy, "mean_highest_p": highest,
                         "error_dq": error[0], "error_dk": error[1], "error_dv": error[2]})
            if policy == "curve:m=5":
                figures[f"curve5_gradient_error_{state}"] = max(error)
    write("curve", rows, figures)


if __name__ == "__main__":
    main()
