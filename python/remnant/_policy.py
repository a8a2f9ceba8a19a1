"""What converted layers keep for the backward pass: the memory settings as Python spells them."""

import dataclasses
import difflib
import re

_FORMS = "'eager', 'exact', 'unbiased:bits=4' or a remnant.Policy"


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
        ValueError: other bits, or an attention policy beside bits.
    """

    attention: str = "recompute"
    bits: int = 0
    recompute: bool = True
    eager: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (0, 8, 4, 2):
            raise ValueError(f"Policy: bits must be 0, 8, 4 or 2, got {self.bits!r}")
        if self.bits and self.attention != "recompute":
            raise ValueError(f"Policy: bits needs attention 'recompute', got {self.attention!r}")

    @staticmethod
    def parse(text: "str | Policy") -> "Policy":
        """The policy of a memory setting: "eager", "exact" or "unbiased:bits=b".

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
        near = difflib.get_close_matches(text, ["eager", "exact", "unbiased:bits=4"], n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown memory setting {text!r}{hint} Settings are {_FORMS}")

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
