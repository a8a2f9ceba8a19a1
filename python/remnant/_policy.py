"""What converted layers keep for the backward pass: the memory settings as Python spells them."""

import dataclasses
import difflib
import re

import torch

from remnant import _ops

_FORMS = "'eager', 'exact', 'unbiased:bits=4' or a remnant.Policy, for a whole model also 'budget=60MB' or a .json file"


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a layer keeps, op by op.

    Args:
        attention: policy of `remnant.attention`, such as "recompute" (exact) or "curve:m=5" (approximate).
        bits: 0, or 8, 4 or 2: inputs of linear layers and convolutions, outputs of normalisations, derivatives of
            activations, attention's values and outputs are kept at so many bits by stochastic rounding (queries
            and keys at 8); the gradient is unbiased. Needs attention "recompute" where there is any.
        recompute: multi-head attention and feed-forward blocks of PyTorch's Transformer layers keep their
            inputs and make projections and hidden layers again. Without bits only.
        eager: what PyTorch keeps; the other fields do not matter.

    Raises:
        ValueError: other bits, an unknown attention policy (with the nearest name), or one beside bits.
    """

    attention: str = "recompute"
    bits: int = 0
    recompute: bool = True
    eager: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (0, 8, 4, 2):
            raise ValueError(f"Policy: bits must be 0, 8, 4 or 2, got {self.bits!r}")
        if self.attention == "recompute":
            return
        if self.bits:
            raise ValueError(f"Policy: bits needs attention 'recompute', got {self.attention!r}")
        if not isinstance(self.attention, str):
            raise ValueError(f"Policy: attention must be a text such as 'recompute', got {self.attention!r}")
        try:  # the library reads policies; the number does not matter
            _ops.attention_residual_bytes(self.attention, 1, 1, 1, 4)
        except RuntimeError as error:
            raise ValueError(f"Policy: {str(error).splitlines()[0]}") from None

    @staticmethod
    def parse(text: "str | Policy") -> "Policy":
        """The policy of a memory setting: "eager", "exact" or "unbiased:bits=b", or what str() of a policy gives.

        Raises:
            ValueError: another text, with the nearest setting's name.
            TypeError: neither a text nor a policy.
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            raise TypeError(f"memory should be {_FORMS}, got {type(text).__name__}")
        if text == "eager":
            return Policy(eager=True)
        if text == "exact":
            return Policy()
        if found := re.fullmatch(r"unbiased:bits=([842])", text):
            return Policy(bits=int(found[1]))
        if text and (found := re.fullmatch(r"(?:attention=(\w.*?))?(?:(?:^|,)(recompute=False))?", text)):
            return Policy(found[1] or "recompute", recompute=found[2] is None)
        if text.startswith("budget=") or text.endswith(".json"):
            raise ValueError(f"{text!r} is a setting of a whole model, for remnant.convert alone, not of a layer: "
                             "write 'eager', 'exact' or 'unbiased:bits=4'")
        near = difflib.get_close_matches(text, ["eager", "exact", "unbiased:bits=4", "budget=60MB"], n=1, cutoff=0.3)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown memory setting {text!r}{hint}; settings are {_FORMS}")

    @property
    def codes(self) -> str:
        """The policy of ops that keep codes."""
        return f"quantized:bits={self.bits}" if self.bits else "exact"

    def __str__(self) -> str:
        if self.eager:
            return "eager"
        if self.bits:
            return f"unbiased:bits={self.bits}"
        parts = [] if self.attention == "recompute" else [f"attention={self.attention}"]
        parts += [] if self.recompute else ["recompute=False"]
        return ",".join(parts) or "exact"


def setting_of(module: torch.nn.Module) -> Policy | None:
    """The setting of a layer that `remnant.convert` gave one: its own, or of a Hugging Face model's attention."""
    found = (module.__dict__.get(name) for name in ("memory", "_remnant_attention"))
    return next((each for each in found if isinstance(each, Policy)), None)
