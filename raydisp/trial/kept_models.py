"""Trained weights that outlive their trial: those of confirm runs, for `python -m raydisp.export`.

A kept model is a Hugging Face folder, `<study>/models/trial-00012/`: config, safetensors and tokenizer, and
last of all `kept.json`, which names every file with its size and SHA-256. Without it the folder is not whole.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydisp import results, storage
from raydisp.errors import OutputError
from raydisp.storage import fingerprint

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

MARKER = "kept.json"


def place_of(study_dir: str, trial: int) -> str:
    """Where the weights of a trial are kept."""
    return storage.join(study_dir, "models", results.trial_name(trial))


def keep(model: nn.Module, place: str, tokenizer: str, *, is_main: bool, about: dict[str, Any]) -> None:
    """Write a trained model as a Hugging Face folder; all workers must call it.

    Args:
        model: wrapped (DDP) or sharded (FSDP2); gathered on the main worker's CPU.
        tokenizer: local folder of the tokenizer's files.
        is_main: whether this worker writes.
        about: what the marker says besides the files.
    Raises:
        OutputError: the place cannot be written.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from raydisp.layers import unwrap

    plain: Any = unwrap(model)
    weights = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not is_main:
        return
    storage.delete_dir(place)
    with tempfile.TemporaryDirectory(prefix="raydisp-") as scratch:
        plain.save_pretrained(scratch, state_dict=weights)
        for file in Path(tokenizer).iterdir():
            if file.is_file() and not (Path(scratch) / file.name).exists():
                shutil.copy(file, scratch)
        files = {}
        for file in sorted(Path(scratch).rglob("*")):
            if file.is_file():
                name = file.relative_to(scratch).as_posix()
                content = file.read_bytes()
                storage.write_bytes(storage.join(place, name), content)
                files[name] = fingerprint.of_content(content)._asdict()
        storage.write_bytes(
            storage.join(place, MARKER), json.dumps({**about, "files": files}, indent=2).encode()
        )


def read_marker(place: str) -> dict[str, Any] | None:
    """What the marker of a kept model says; None: there is none, so that it is not whole."""
    try:
        told = json.loads(storage.read_bytes(storage.join(place, MARKER)))
    except (FileNotFoundError, ValueError):
        return None
    return told if isinstance(told, dict) and isinstance(told.get("files"), dict) else None


def fetch(place: str, folder: Path) -> None:
    """Copy a kept model into a local folder, each file checked.

    Raises:
        OutputError: it is not whole, or a file is not what was written.
    """
    told = read_marker(place)
    if told is None:
        raise OutputError(f"{place} holds no whole model: its run has not come to its end, or it was removed")
    for name, about in told["files"].items():
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{place}: its {MARKER} names {name!r}, which is not inside the folder")
        try:
            content = storage.read_bytes(storage.join(place, name))
        except FileNotFoundError:
            raise OutputError(
                f"{place}: {name} is gone; export another seed, or run the study anew"
            ) from None
        if fingerprint.of_content(content) != fingerprint.Fingerprint.parse(about):
            raise OutputError(f"{place}: {name} is damaged: its content is not what was written")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
