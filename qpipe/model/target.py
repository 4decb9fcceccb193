"""What an inference engine quantizes: which operators, which of their values, and which values share a grid.

Light on purpose: dataclasses of plain JSON types, so that a YAML mapping (`conf/target/*.yaml`) builds one.
`qpipe.model.placement` reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OpRule:
    """Which values of an operator have a grid.

    `inputs` are the positions of the data inputs that are quantized, all of them where None; initializers are
    weights or constants and never count. `outputs` says whether the outputs are quantized.
    """

    inputs: tuple[int, ...] | None = None
    outputs: bool = True


@dataclass(frozen=True)
class Target:
    """The table of one inference engine. Operators that it does not name run in float.

    - `quantize`: operator -> rule;
    - `weights`: operators whose weight (an initializer, input 1) has a grid, and whose bias is int32;
    - `fused`: operator -> activations computed in the same kernel, so no quantizer stands between;
    - `share`: operators whose outputs are on the grid of their inputs, since they only move values;
    - `bound`: operators that cut values off; one that alone reads its input puts it on the grid of its
      output, where what would be cut off saturates;
    - `softmax`: fix the grid of a Softmax's output at scale 2^-bitwidth with zero point qmin;
    - `composite`: operators that mark the inside of a function written out (Gelu, RMS norm, …), which runs in
      float between its input and its output;
    - `exclude`: regular expressions, matched against whole names of nodes and values, that stay in float.

    Raises ValueError for an expression that is none.
    """

    name: str
    quantize: dict[str, OpRule] = field(default_factory=dict)
    weights: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    share: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()
    softmax: bool = True
    composite: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for expression in self.exclude:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"exclude: {expression!r} is no regular expression: {error}.") from error
        both = sorted(set(self.share) & set(self.quantize))
        if both:
            raise ValueError(f"{', '.join(both)} cannot stand in both quantize and share.")

    def excludes(self, name: str) -> bool:
        """Whether the node or value called `name` stays in float."""
        return any(re.fullmatch(expression, name) for expression in self.exclude)
