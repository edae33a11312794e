"""Checkpoints of one trial: written by all of its workers in the background, whole or not at all.

<folder>/step-00000050/__0_0.distcp, ...   tensors, each worker's share, by torch.distributed.checkpoint
                       .metadata           which tensor lies where
                       state.json          everything else
                       COMPLETE            written last: size and SHA-256 of all other files

The last one and the best one are kept. Nothing that is read runs code (`distcp`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.fs as pafs
import torch.distributed as dist
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from raydisp import storage
from raydisp.checkpoint.distcp import ArrowReader, ArrowWriter, TensorsOnly, load_metadata, tensor_entries
from raydisp.errors import CheckpointError, OutputError
from raydisp.parallel import Layout
from raydisp.storage import fingerprint

logger = logging.getLogger(__name__)

ABANDON_TIMEOUT_S = 30.0
"""How long a process that ends in an error lets a checkpoint that it is writing come to its end."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, whole and of this trial."""

    step: int
    """Number of steps done."""
    state: dict[str, Any]
    """What JSON can hold."""
    names: frozenset[str]
    """Of its tensors."""


class CheckpointFolder:
    """The checkpoints of one trial, in a local folder or an object store.

    All workers of the layout call `save`, `wait`, `find` and `load`, in the same order.
    """

    def __init__(
        self, location: str, identity: str, layout: Layout | None = None, *, timeout_s: float | None = None
    ) -> None:
        """What is there is looked at later.

        Args:
            identity: of the trial, its data and its model; checkpoints of another are left out.
            timeout_s: how long one worker waits for the others; None: as long as torch does.
        """
        self.location = location
        self._identity = identity
        self._layout = layout or Layout()
        self._timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self._newest: int | None = None  # whole, and of this trial
        self._writing: _Writing | None = None

    # --- saving ----------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        value: float | None = None,
        wait: bool = False,
    ) -> None:
        """Copy the tensors and write them in the background, once the save before is done.

        A step that is the newest whole checkpoint already is not written again: it would have to be deleted
        first.

        Args:
            tensors: name -> tensor, plain (the same on all workers) or sharded (DTensor).
            state: what JSON can hold.
            value: validation loss at this very step, by which the best is kept; None: not evaluated.
            wait: return only when it is written.
        Raises:
            OutputError: this save (with wait) or the one before could not be written; on all workers alike.
        """
        self._make_group()
        self.wait()
        if step == self._newest:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            staged = _copy_state_dict(dict(tensors), _create_cpu_state_dict(dict(tensors)), type_check=False)
        self._writing = _Writing(step, lambda: self._write(step, staged, dict(state), value))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is written.

        Raises:
            OutputError: it could not be; on all workers alike.
        """
        if self._writing is None:
            return
        writing, self._writing, self._newest = self._writing, None, None
        writing.thread.join()
        error = writing.error
        mine = None if error is None else _sentence(self.location, error)
        # The worker whose file system refused knows the reason; the others know that it failed.
        told = self._all_gather((isinstance(error, OSError | OutputError), mine))
        sentences = [sentence for _, sentence in sorted(told, key=lambda pair: not pair[0]) if sentence]
        if sentences:
            raise OutputError(sentences[0])
        self._newest = writing.step

    def abandon(self) -> None:
        """After an error elsewhere: start nothing, raise nothing, let one process finish what it writes."""
        writing, self._writing = self._writing, None
        if writing is not None and self._layout.world_size == 1:
            writing.thread.join(ABANDON_TIMEOUT_S)

    def _write(self, step: int, staged: dict[str, Any], state: dict[str, Any], value: float | None) -> None:
        main = self._layout.is_main
        folder = self._folder(step)
        writer = ArrowWriter(folder)
        try:
            if main:
                storage.delete_dir(folder)  # what a process that died here has left
            self._barrier()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save_distributed(
                    staged,
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=self._layout.world_size == 1,
                )
            shares = self._all_gather(writer.fs.written)  # type: ignore[attr-defined]
            if main:
                marks = {name: mark for share in shares for name, mark in share.items()}
                about = {"trial": self._identity, "value": _finite(value), "state": state}
                content = json.dumps(about).encode()
                storage.write_bytes(storage.join(folder, "state.json"), content)
                marks["state.json"] = fingerprint.of_content(content)
                told = {name: mark._asdict() for name, mark in marks.items()}
                storage.write_bytes(storage.join(folder, "COMPLETE"), json.dumps(told).encode())
                self._drop_all_but_last_and_best(step)
        except BaseException as error:
            if main:
                with contextlib.suppress(Exception):  # what went wrong first is told
                    if not storage.exists(storage.join(folder, "COMPLETE")):
                        storage.delete_dir(folder)
            cause: OSError | None = writer.fs.error  # type: ignore[attr-defined]
            raise cause or error from None

    def _drop_all_but_last_and_best(self, last: int) -> None:
        values: dict[int, float] = {}
        for step in self._steps():
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                storage.read_bytes(storage.join(self._folder(step), "COMPLETE"))
                about = json.loads(storage.read_bytes(storage.join(self._folder(step), "state.json")))
                if about["trial"] == self._identity and about["value"] is not None:
                    values[step] = float(about["value"])
        best = min(values, key=lambda step: (values[step], -step), default=last)
        for step in self._steps():
            if step not in (last, best):
                storage.delete_dir(self._folder(step))

    # --- loading ---------------------------------------------------------------------------------------

    def find(self) -> Saved | None:
        """The newest checkpoint of this trial that is whole, the same on all workers; None if there is none.

        Those that are left out are named in a warning.
        """
        self._make_group()
        self._newest = None
        for step in self._all_gather(sorted(self._steps(), reverse=True))[0]:
            problem, saved = self._examine(step)
            # Files are shared out between the workers: only all of them together know.
            problems = [told for told in self._all_gather(problem) if told is not None]
            if not problems:
                self._newest = step
                return saved
            if self._layout.is_main:
                logger.warning("%s is left out: %s", self._folder(step), problems[0])
        return None

    def _examine(self, step: int) -> tuple[str | None, Saved | None]:
        """What is wrong with a checkpoint, as far as this worker looks; and the checkpoint."""
        folder = self._folder(step)
        try:
            marker = json.loads(storage.read_bytes(storage.join(folder, "COMPLETE")))
            names = sorted(marker)
            marks = {name: fingerprint.Fingerprint.parse(marker[name]) for name in names}
            if not {"state.json", ".metadata"} <= set(names) or any("/" in name for name in names):
                raise ValueError
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return "it was not written to its end", None
        small = {"state.json", ".metadata"}  # every worker reads these, and no other worker's file
        mine = small | set(names[self._layout.rank :: self._layout.world_size])
        damaged = [name for name in sorted(mine) if fingerprint.of_file(f"{folder}/{name}") != marks[name]]
        if damaged:
            return f"{', '.join(damaged)} is not what was written", None
        try:
            about = json.loads(storage.read_bytes(storage.join(folder, "state.json")))
            if about["trial"] != self._identity:
                return "it is of a trial with other settings", None
            place = storage.join(folder, ".metadata")
            metadata = load_metadata(storage.read_bytes(place), place)
            if any(info.relative_path not in marks for info in (metadata.storage_data or {}).values()):
                return "its metadata names files that are not its own", None
            return None, Saved(step, dict(about["state"]), frozenset(metadata.state_dict_metadata))
        except CheckpointError as error:
            return str(error), None
        except (ValueError, TypeError, KeyError):
            return "state.json is not what we write", None

    def load(self, saved: Saved, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, in place, with what was saved under their names.

        Raises:
            CheckpointError: names, shapes or types differ from what was saved: it is of another model.
        """
        folder = self._folder(saved.step)
        place = storage.join(folder, ".metadata")
        found = tensor_entries(load_metadata(storage.read_bytes(place), place))
        for name in sorted({*tensors, *found}):
            there, wanted = found.get(name), tensors.get(name)
            if there is None or wanted is None:
                lacks = folder if there is None else "this model"
                raise CheckpointError(f"{folder} is of another model: {lacks} has no {name}; delete it")
            theirs, ours = (there.size, there.properties.dtype), (wanted.shape, wanted.dtype)
            if theirs != ours:
                raise CheckpointError(
                    f"{folder} is of another model: {name} is {list(theirs[0])} {theirs[1]} there and "
                    f"{list(ours[0])} {ours[1]} here; delete it"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_distributed(
                    dict(tensors),
                    storage_reader=ArrowReader(folder),
                    planner=TensorsOnly(),
                    process_group=self._group,
                    no_dist=self._layout.world_size == 1,
                )
            except (Exception, CheckpointException) as error:
                reason = " ".join(str(_first_cause(error)).split())[:300]  # as the sentence of a save
                raise CheckpointError(f"{folder} cannot be read: {reason}; delete it") from None

    # --- between the workers ---------------------------------------------------------------------------

    def gather(self, told: Any) -> list[Any]:
        """What each worker of the layout tells, in the order of their ranks; all must call it."""
        self._make_group()
        return self._all_gather(told)

    def _make_group(self) -> None:
        # Of its own, and on the CPU: the training's collectives go on while a checkpoint is written.
        if self._layout.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def _all_gather(self, told: Any) -> list[Any]:
        if self._layout.world_size == 1:
            return [told]
        gathered: list[Any] = [None] * self._layout.world_size
        dist.all_gather_object(gathered, told, group=self._group)
        return gathered

    def _barrier(self) -> None:
        if self._layout.world_size > 1:
            dist.barrier(group=self._group)

    # --- places ----------------------------------------------------------------------------------------

    def _folder(self, step: int) -> str:
        return storage.join(self.location, f"step-{step:08d}")

    def _steps(self) -> list[int]:
        filesystem, path = storage.resolve(self.location)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        matches = [re.fullmatch(r"step-(\d+)", info.base_name) for info in infos]
        return [int(match[1]) for match in matches if match]


class _Writing:
    """One save in the background. A daemon: a process that must end does not wait for the others' answers."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        self.step = step
        self.error: BaseException | None = None

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="raydisp-checkpoint", daemon=True)
        self.thread.start()


def _sentence(location: str, error: BaseException) -> str:
    cause = _first_cause(error)
    if isinstance(cause, OutputError):
        return str(cause)
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
    return (
        f"{location}: a checkpoint cannot be written: {' '.join(str(reason).split())[:300]}; make the folder "
        "writable, free some space, or choose another one with --output"
    )


def _first_cause(error: BaseException) -> BaseException:
    """The exception of the first worker that failed, out of what DCP wraps around it."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
