"""Size and SHA-256 of what is written, and of what is found later."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from raydisp import storage

_CHUNK_BYTES = 2**24


class Fingerprint(NamedTuple):
    """Of the content of a file."""

    num_bytes: int
    sha256: str

    @classmethod
    def parse(cls, told: Any) -> Fingerprint:
        """Out of the object that JSON has made of `_asdict()`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(int(told["num_bytes"]), str(told["sha256"]))


class Fingerprinter:
    """The fingerprint of bytes that come in pieces."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece."""
        self._sha256.update(piece)
        self.num_bytes += len(piece)

    def result(self) -> Fingerprint:
        """Of all pieces so far."""
        return Fingerprint(self.num_bytes, self._sha256.hexdigest())


def of_content(content: bytes) -> Fingerprint:
    """Of bytes in memory."""
    pieces = Fingerprinter()
    pieces.add(content)
    return pieces.result()


def of_file(location: str) -> Fingerprint | None:
    """Of a file; None if it is not there, or cannot be read."""
    pieces = Fingerprinter()
    try:
        filesystem, path = storage.resolve(location)
        with filesystem.open_input_stream(path, compression=None) as stream:
            while piece := stream.read(_CHUNK_BYTES):
                pieces.add(piece)
    except OSError:
        return None
    return pieces.result()
