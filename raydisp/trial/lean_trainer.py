"""Ray Train's trainer without what a trial of ours has no use for. Imports Ray Train: do so late."""

from __future__ import annotations

import os

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback


class LeanTrainer(TorchTrainer):
    """One process less for each trial, and none of them mistakes another Ray for its own.

    Ray Train starts an actor that hands out Ray datasets, also where there are none; the workers wait for it,
    about 3 s on two cores. Its placement-group cleaner asks for the state of actors at RAY_ADDRESS, or else
    at the only Ray of the machine; where there are two it finds none, and the place of a killed attempt stays
    taken.

    There are no public ways for either; the versions of Ray that this was tested with are pinned.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]

    def fit(self) -> ray.train.Result:
        """Run the workers to their end."""
        constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        return super().fit()
