"""English prose that comes with CPython: the language topics and the docstrings of the standard library.

Parsing the whole library takes 2.6 s, so the documents are kept in a file beside the token blocks made of
them, for as long as no source file changes.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import platform
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

from raydisp.errors import DataError

Documents = tuple[tuple[str, str], ...]

FORMAT = 1
"""Counts up when the same library gives other documents."""

# Tests, bundled wheels, what is not the standard library, and the code pages, whose docstrings are one
# sentence generated a hundred times.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
    | {"encodings", "pydoc_data"}
)


_known: dict[str, Documents] = {}
"""Documents of the library with this key, of this process."""


def documents() -> Documents:
    """(identifier, text): the language topics, and the docstrings of each module of the standard library.

    A module is one document because its docstrings repeat one another (a method and its twin on a sibling
    class): split one by one, they would put near-copies on both sides. Exact copies are dropped everywhere.
    The sources are parsed, never imported, so nothing runs, and what is compiled in makes no
    difference.

    Raises:
        DataError: this Python comes without the sources.
    """
    root = _library()
    key = _key(root)
    if key not in _known:
        _known[key] = _parse(root)
    return _known[key]


def recall(cache_dir: str) -> None:
    """Let `documents` take what `keep` has left in a folder, if the library is still the same."""
    key = _key(_library())
    if key in _known:
        return
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or not whole
        content = json.loads(_place(cache_dir, key).read_text())
        _known[key] = tuple((str(identifier), str(text)) for identifier, text in content)


def keep(cache_dir: str) -> None:
    """Leave the documents in a folder for later processes; where that fails they parse again."""
    place = _place(cache_dir, _key(_library()))
    if place.exists():
        return
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(OSError):
        try:
            temporary.write_text(json.dumps(documents()))
            temporary.rename(place)
        finally:
            temporary.unlink(missing_ok=True)


def _place(cache_dir: str, key: str) -> Path:
    return Path(cache_dir) / f"python-docs-{key}.json"


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _key(root: Path) -> str:
    """Changes with Python's version and with every source file's size and time."""
    digest = hashlib.sha256(f"{FORMAT} {platform.python_version()} {root}".encode())
    for path in _sources(root):
        with contextlib.suppress(OSError):
            status = path.stat()
            digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def _parse(root: Path) -> Documents:
    from pydoc_data.topics import topics

    result = [(f"topic/{name}", text.strip()) for name, text in sorted(topics.items()) if text.strip()]
    seen: set[str] = set()
    for path in _sources(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            # Templates of code (lib2to3, packagers' additions) need not parse; prose is not in them.
            continue
        fresh = [text for text in dict.fromkeys(_docstrings(tree)) if text not in seen]
        seen.update(fresh)
        if fresh:
            result.append((f"docstrings/{path.relative_to(root).as_posix()}", "\n\n".join(fresh)))
    if not seen:
        raise DataError(
            f'data.source = "python_docs" needs the sources of the standard library, and {root} has none; '
            "use another Python, or data.source = files"
        )
    return tuple(result)


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        # A lone surrogate in an escape is no text.
        if text and text.strip() and _encodable(text):
            yield text.strip()
    for child in ast.iter_child_nodes(node):
        # Definitions stand in statements only; expressions are most of a tree.
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings(child)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
