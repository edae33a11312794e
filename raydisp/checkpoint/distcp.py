"""`torch.distributed.checkpoint` on any file system of `pyarrow.fs`, and without trust in what is read.

DCP keeps its metadata in a pickle. Here it is read by an unpickler that knows the classes of such metadata
and no other, entries that are not tensors are refused, and tensors are read with weights_only.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Generator
from typing import Any, cast

import pyarrow.fs as pafs
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from raydisp import storage
from raydisp.errors import CheckpointError
from raydisp.storage.fingerprint import Fingerprint, Fingerprinter

ALLOWED_GLOBALS = {
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
"""What pickled metadata may name, besides torch's dtypes: found in real files, those of DTensors included."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in ALLOWED_GLOBALS or isinstance(dtype, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Name -> shape and type of the tensors of a checkpoint."""
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def load_metadata(content: bytes, where: str) -> Metadata:
    """Metadata of a checkpoint of tensors.

    Raises:
        CheckpointError: it is anything else, or not whole.
    """
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        tensors = metadata.state_dict_metadata
        strange = [name for name, entry in tensors.items() if not isinstance(entry, TensorStorageMetadata)]
    except Exception as error:  # whatever bytes can make an unpickler do
        reason = f"{type(error).__name__}: {error}"
    else:
        if not strange:
            return cast(Metadata, metadata)
        reason = f"{strange[0]} is no tensor"
    raise CheckpointError(
        f"{where} is not the metadata of one of our checkpoints ({reason}), and nothing in it was run; "
        "delete this checkpoint"
    )


class _HashingStream(io.RawIOBase):
    """Passes bytes on and computes their SHA-256 on the way."""

    def __init__(self, raw: Any, on_error: Callable[[OSError], None]) -> None:
        self._raw = raw
        self._on_error = on_error
        self._pieces = Fingerprinter()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self._on_error(error)  # torch raises one of its own over it
            raise
        self._pieces.add(view)
        return len(view)

    def tell(self) -> int:
        return self._pieces.num_bytes

    def fingerprint(self) -> Fingerprint:
        return self._pieces.result()


class ArrowFileSystem(FileSystemBase):
    """What DCP asks of a file system. Paths are whole locations: local paths or URIs.

    Attributes:
        written: file name -> size and SHA-256 of the files written here.
        error: the first error that the file system gave to a write.
    """

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.written: dict[str, Fingerprint] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """A file to read, or to write and flush to the disk."""
        filesystem, place = storage.resolve(str(path))
        local = isinstance(filesystem, pafs.LocalFileSystem)
        if mode == "rb":
            with filesystem.open_input_file(place) as file:
                yield cast(io.IOBase, file)
            return
        with open(place, "wb") if local else filesystem.open_output_stream(place) as file:
            stream = _HashingStream(file, self._keep_error)
            yield stream
            file.flush()
            if local:
                os.fsync(file.fileno())
        self.written[str(path).rsplit("/", 1)[1]] = stream.fingerprint()

    def _keep_error(self, error: OSError) -> None:
        self.error = self.error or error

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        filesystem, old = storage.resolve(str(path))
        filesystem.move(old, storage.resolve(str(new_path))[1])
        old_name, new_name = (str(place).rsplit("/", 1)[1] for place in (path, new_path))
        self.written[new_name] = self.written.pop(old_name)

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        filesystem, place = storage.resolve(str(path))
        filesystem.create_dir(place, recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        filesystem, place = storage.resolve(str(path))
        filesystem.delete_file(place)


class ArrowWriter(FileSystemWriter):
    """Writes this worker's share of a checkpoint to a location."""

    def __init__(self, location: str) -> None:
        super().__init__(location, sync_files=False)  # our streams do
        self.fs = ArrowFileSystem()  # type: ignore[assignment]
        self.path = location

    def storage_meta(self) -> StorageMeta:
        """Without the path: pickled, it would be a class of its own."""
        return StorageMeta(save_id=self.save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class ArrowReader(FileSystemReader):
    """Reads a checkpoint from a location."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.fs = ArrowFileSystem()  # type: ignore[assignment]
        self.path = location

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, by `load_metadata`."""
        place = storage.join(str(self.path), ".metadata")
        metadata = load_metadata(storage.read_bytes(place), place)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class TensorsOnly(DefaultLoadPlanner):
    """A load planner that takes no entry but tensors: others would be unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse it."""
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor; nothing in it was run")
