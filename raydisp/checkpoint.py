"""Checkpoints of one trial: saved whole or not at all, the latest one kept.

<folder>/step-00000050/tensors.pt    model and optimizer; read with weights_only, so it runs no code
                       state.json    everything else
                       COMPLETE      written last: size and SHA-256 of the two files
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import re
from typing import Any

import pyarrow.fs as pafs
import torch

from raydisp import storage

logger = logging.getLogger(__name__)

_FILES = ("tensors.pt", "state.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a trial goes on from."""

    step: int
    """Number of steps done."""
    tensors: dict[str, Any]
    """Nested dictionaries and lists of tensors, on the CPU, and plain numbers."""
    state: dict[str, Any]
    """What JSON can hold."""


class CheckpointFolder:
    """The checkpoints of one trial, in a local folder or an object store."""

    def __init__(self, location: str, identity: str) -> None:
        """Args: identity: of the trial, its data and its model; checkpoints of another are left out."""
        self.location = location
        self._identity = identity

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one checkpoint, then delete the others. One worker calls it."""
        step = checkpoint.step
        buffer = io.BytesIO()
        torch.save(checkpoint.tensors, buffer)
        state = {"trial": self._identity, "state": checkpoint.state}
        contents = {"tensors.pt": buffer.getvalue(), "state.json": json.dumps(state).encode()}
        folder = storage.join(self.location, f"step-{step:08d}")
        storage.delete_dir(folder)  # what a process that died here has left
        for name, content in contents.items():
            storage.write_bytes(storage.join(folder, name), content)
        marker = {name: _fingerprint(content) for name, content in contents.items()}
        storage.write_bytes(storage.join(folder, "COMPLETE"), json.dumps(marker).encode())
        for older in self._steps():
            if older != step:
                storage.delete_dir(storage.join(self.location, f"step-{older:08d}"))

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint of this trial that is whole; None if there is none."""
        for step in sorted(self._steps(), reverse=True):
            folder = storage.join(self.location, f"step-{step:08d}")
            try:
                marker = json.loads(storage.read_bytes(storage.join(folder, "COMPLETE")))
                contents = {name: storage.read_bytes(storage.join(folder, name)) for name in _FILES}
            except (FileNotFoundError, json.JSONDecodeError):
                logger.warning("%s is left out: it was not written to its end", folder)
                continue
            damaged = [name for name in _FILES if marker.get(name) != _fingerprint(contents[name])]
            if damaged:
                logger.warning("%s is left out: %s is not what was written", folder, ", ".join(damaged))
                continue
            state = json.loads(contents["state.json"])
            if state["trial"] != self._identity:
                logger.warning("%s is left out: it is of a trial with other settings", folder)
                continue
            tensors = torch.load(io.BytesIO(contents["tensors.pt"]), map_location="cpu", weights_only=True)
            return Checkpoint(step, tensors, state["state"])
        return None

    def delete(self) -> None:
        """Remove all checkpoints of the trial."""
        storage.delete_dir(self.location)

    def _steps(self) -> list[int]:
        filesystem, path = storage.resolve(self.location)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        matches = [re.fullmatch(r"step-(\d+)", info.base_name) for info in infos]
        return [int(match[1]) for match in matches if match]


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
