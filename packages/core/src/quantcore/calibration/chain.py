"""What goes from block to block: the inputs of a step for every forward pass, and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from quantcore.calibration.activations import ActivationStore, Sample, Samples
from quantcore.calibration.data import ModelInputs, padding_mask
from quantcore.calibration.replay import Invocation, Replay
from quantcore.calibration.steps import Step
from quantcore.calibration.trees import leaves, to_device
from quantcore.calibration.weights import ModelWeights


class Chain:
    """The activations of a model in some forward passes, as far as its blocks are finished.

    new_store: makes room for activations. weights: of the model. device: where blocks are run, None leaves them where
    they are.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[ModelInputs],
        new_store: Callable[[], ActivationStore],
        weights: ModelWeights,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._passes, self._new_store, self._device = model, passes, new_store, device
        self._weights = weights
        self._replay = Replay(model)
        self._masks = [padding_mask(inputs) for inputs in passes]
        self._held: dict[str, ActivationStore] = {}  # list of blocks -> outputs of its last finished one

    def samples(self, step: Step, targets: ActivationStore | None = None) -> Samples:
        """The inputs of a step. The outputs of the block before it are let go, pass by pass."""
        samples = Samples(self._new_store(), self._masks, targets)
        if step.trunk is None:
            for inputs in self._passes:
                samples.add(Invocation((), dict(inputs)))
            return samples
        spent = self._held.pop(step.trunk, None)
        with self._weights.passing(), self._replay.shortcuts():
            for number, inputs in enumerate(self._passes):
                samples.add(self._replay.catch(step.name, inputs, number))
                if spent is not None:
                    spent.drop(number)
        return samples

    def run(self, step: Step, sample: Sample) -> Any:
        """What a step as it is now gives for a sample."""
        if step.trunk is None:
            with self._replay.shortcuts():
                return self._replay.run(sample.kwargs, sample.number)
        args, kwargs = to_device((sample.args, sample.kwargs), self._device)
        return self._model.get_submodule(step.name)(*args, **kwargs)

    def outputs(
        self, step: Step, samples: Samples, *, run: Callable[[Sample], Any] | None = None, drop_inputs: bool = False
    ) -> ActivationStore:
        """What a step as it is now gives for every sample, on the devices of its inputs.

        run: gives the same as `self.run`, with less work.
        """
        store = self._new_store()
        for sample in samples:
            home = next(leaves((sample.args, sample.kwargs))).device
            output = self.run(step, sample) if run is None else run(sample)
            store.put(sample.number, to_device(output, home if self._device else None))
            if drop_inputs:
                samples.drop(sample.number)
        return store

    def finish(self, step: Step, outputs: ActivationStore) -> None:
        """Go on from these outputs: the step is not computed again."""
        assert step.trunk is not None
        self._held[step.trunk] = outputs
        self._replay.finish(step.name, step.trunk, outputs)
