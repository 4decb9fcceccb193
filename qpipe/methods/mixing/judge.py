"""Scores of one model under many encodings, on the same samples, none of them taken twice.

Every score is a sub-result under the content of the float model, the samples and the grids: whoever asks for the
same again, in another run, under another budget, gets it without a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from qpipe.methods.mixing.fingerprint import float_fingerprint, grids_fingerprint
from qpipe.model.simulation.run import run
from qpipe.numerics.metrics import LABELLED, counting, refuse_missing, score_by_function, score_outputs

if TYPE_CHECKING:
    from qpipe.model.network.network import Network
    from qpipe.numerics.grid import Encoding

Array = npt.NDArray[Any]
Memo = Callable[..., Any]


class Judge:
    """Scores of `model` on `arrays`, by a metric of `qpipe.numerics.metrics` or by a `function` of the user's."""

    def __init__(
        self,
        model: Network,
        arrays: Mapping[str, Array],
        labels: Array | None,
        metric: str,
        memo: Memo,
        *,
        name: str = "score",
        function: Callable[..., Any] | None = None,
        outputs: Sequence[str] = (),
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        """`name` is that of the sub-results; `outputs` are those that count, by default all of floats. Raises
        InputError where the metric's labels are missing."""
        if function is None and metric in LABELLED:
            refuse_missing(metric, labels, None)
        self.metric, self._name = metric, name
        self._model, self._arrays, self._labels = model, dict(arrays), labels
        self._memo, self._function, self._outputs = memo, function, tuple(outputs)
        self._batch_size, self._device = batch_size, device

    def score(self, encodings: Mapping[str, Encoding]) -> float:
        """The score with exactly these encodings, simulated; higher is better."""
        model = self._model.with_encodings(encodings)
        key = [self._content, grids_fingerprint(encodings), self._batch_size]
        if self._function is not None:  # the outputs, since a function may change under its name
            outputs = self._memo(f"outputs of {self._name}", lambda *_: self._run(model, True), *key)
            given = counting(outputs, self._outputs) if self._outputs else outputs
            return score_by_function(self._function, self.metric, given, self._labels)

        def scored(*_: Any) -> float:
            reference = None if self.metric in LABELLED else self._reference
            return score_outputs(self.metric, self._run(model, True), self._labels, reference, self._outputs)

        return float(self._memo(self._name, scored, *key, self.metric, *self._outputs))

    def float_score(self) -> float:
        """The score of the float model."""
        return self.score({})

    @cached_property
    def _content(self) -> str:
        return float_fingerprint(self._model, self._arrays, self._labels)

    @cached_property
    def _reference(self) -> dict[str, Array]:
        return self._run(self._model, False)

    def _run(self, model: Network, quantized: bool) -> dict[str, Array]:
        return run(
            model, self._arrays, batch_size=self._batch_size, quantized=quantized, device=self._device
        )
