"""Token blocks: made once, memory-mapped, and read in an order that depends on (seed, step) alone.

A prepared folder holds, per split, one Arrow IPC file of blocks of `context_length` token ids, beside the
tokenizer and `meta.json`. It is named after everything that its content depends on, so trials, workers and
later runs find it again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raydisp import models
from raydisp.config import TrialConfig
from raydisp.config.data import PythonDocs
from raydisp.config.model import ScratchModel
from raydisp.data import corpus, python_docs
from raydisp.data.corpus import SPLITS, Corpus, CorpusSummary, Split
from raydisp.errors import DataError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key; raised whenever the same settings come to give other blocks."""

END_OF_TEXT = "<|endoftext|>"

TOKENIZER_BYTES = 2**28
"""A tokenizer is trained on at most this much text, the first of the training split; more changes little."""

EXACT_BYTES_PER_TOKEN = 16
"""A split with more bytes than this a token of a block surely fills one; below it, tokenise and see."""

_ABANDONED_S = 24 * 3600
_BATCH_BYTES = 2**20
_BATCH_TOKENS = 2**20


# --- preparing ----------------------------------------------------------------------------------------


def prepare(trial: TrialConfig, cache_dir: str, progress: Callable[[int], Any] | None = None) -> str:
    """Make the token blocks of a trial, or find them made.

    Documents are tokenised one after the other, end-of-text behind each, and cut into blocks of
    `context_length`; what is left behind the last whole block of a split (less than one block) is dropped.
    The spelling of a special token inside a document is text, not that token. The folder is made under a
    temporary name and renamed, so processes may race and a kill leaves nothing that a reader would take.

    Args:
        cache_dir: folder, made if missing, of all prepared data.
        progress: called with the bytes of text tokenised since the last call, such as `tqdm.update`.
    Returns:
        `<cache_dir>/<key>`, holding `train.arrow`, `validation.arrow`, `test.arrow` (one column `input_ids`,
        fixed_size_list<uint16 or int32>[context_length]), `tokenizer/` (save_pretrained) and `meta.json`.
    Raises:
        DataError: the corpus cannot be read, or a split does not fill one block.
        ModelError: the model's tokenizer cannot be loaded.
    """
    found = _open_corpus(trial, cache_dir)
    key = _key(trial, found)
    folder = Path(cache_dir) / key
    if (folder / "meta.json").is_file():
        return str(folder)
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    if isinstance(trial.data, PythonDocs):
        python_docs.keep(cache_dir)
    _remove_abandoned(Path(cache_dir))
    temporary = Path(cache_dir) / f".making-{key[:16]}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        _make(trial, found, temporary, progress)
        # A folder without meta.json was emptied by hand; a whole one was made by another process just now.
        if folder.exists() and not (folder / "meta.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def prepared_folder(trial: TrialConfig, cache_dir: str) -> str:
    """The folder that `prepare` would return, whether or not the token blocks are there already.

    Raises:
        DataError, ModelError: as `prepare`.
    """
    return str(Path(cache_dir) / _key(trial, _open_corpus(trial, cache_dir)))


def find_prepared(trial: TrialConfig, cache_dir: str) -> str | None:
    """The folder that `prepare` would return, if the token blocks are there already; else None.

    Raises:
        DataError, ModelError: as `prepare`.
    """
    folder = prepared_folder(trial, cache_dir)
    return folder if os.path.isfile(os.path.join(folder, "meta.json")) else None


def cache_folder(output: str) -> str:
    """Where the prepared data of studies go whose results go to `output`."""
    if "://" in output:  # token blocks are memory-mapped: each node keeps its own
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "raydisp")
    else:
        folder = os.path.join(output, ".cache")
    return os.path.abspath(os.path.expanduser(folder))


def check_data(trial: TrialConfig, cache_dir: str | None = None) -> CorpusSummary:
    """What the corpus holds, with every mistake of the data that can be told cheaply; writes nothing.

    For a corpus of up to 16 MiB with a split of less than 16 bytes a token of one block, the tokenizer is
    trained or loaded and the tokens are counted, so that "shorter than one block" is exact.

    Args:
        cache_dir: of `prepare`, if it was called there before: sooner then.
    Raises:
        DataError: see `corpus.describe`.
    """
    if cache_dir is not None and isinstance(trial.data, PythonDocs):
        python_docs.recall(cache_dir)
    summary = corpus.describe(trial.data)
    if summary.splits is None or summary.num_bytes is None or summary.num_bytes > 2**24:
        return summary
    context = trial.data.context_length
    short = [s for s in SPLITS if summary.splits[s].num_bytes < EXACT_BYTES_PER_TOKEN * context]
    if short:
        tokenizer = _tokenizer(trial, None)
        num_tokens = dict.fromkeys(SPLITS, 0)
        texts = ((split, text) for split, _, text in corpus.split_documents(trial.data) if split in short)
        for split, batch in _batches(texts):
            num_tokens[split] += sum(len(ids) + 1 for ids in _encode(tokenizer, batch))
        for split in short:
            _check_block(trial, split, num_tokens[split])
    return summary


def read_meta(prepared: str) -> dict[str, Any]:
    """`meta.json` of a folder that `prepare` returned.

    Keys: format, data_sha256, source, python_version, revision, context_length, vocab_size (ids that the
    tokenizer has, at most those of the model), eos_token_id, tokenizer (in words), num_files, files ([path,
    bytes], the first 100) and splits: split -> num_documents, num_bytes (UTF-8 text), num_tokens (end-of-text
    and the dropped remainder included), num_blocks.
    """
    meta: dict[str, Any] = json.loads((Path(prepared) / "meta.json").read_text())
    return meta


def load_prepared_tokenizer(prepared: str) -> Any:
    """The tokenizer (transformers) of a folder that `prepare` returned."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(Path(prepared) / "tokenizer"), local_files_only=True)


def _open_corpus(trial: TrialConfig, cache_dir: str) -> Corpus:
    if not isinstance(trial.data, PythonDocs):
        return corpus.open_corpus(trial.data)
    python_docs.recall(cache_dir)
    found = corpus.open_corpus(trial.data)
    if os.path.isdir(cache_dir):
        python_docs.keep(cache_dir)
    return found


def _key(trial: TrialConfig, found: Corpus) -> str:
    model = trial.tokenizer_model
    if isinstance(model, ScratchModel):
        tokenizer = f"bpe {model.vocab_size} tokenizers {importlib.metadata.version('tokenizers')}"
    else:
        tokenizer = models.tokenizer_identity(model)
    # Which files a corpus came from is left out: `sha256` says what they hold.
    settings = trial.data.model_dump(mode="json", exclude={"paths", "path", "name", "revision"})
    identity = {"format": FORMAT, "data": found.sha256, "tokenizer": tokenizer, "settings": settings}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _make(trial: TrialConfig, found: Corpus, folder: Path, progress: Callable[[int], Any] | None) -> None:
    tokenizer = _tokenizer(trial, found.revision)
    tokenizer.save_pretrained(folder / "tokenizer")
    eos_token_id = int(tokenizer.eos_token_id)
    num_ids = len(tokenizer)
    dtype = np.dtype(np.uint16) if num_ids <= 2**16 else np.dtype(np.int32)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                _BlockWriter(folder / f"{split}.arrow", trial.data.context_length, dtype)
            )
            for split in SPLITS
        }
        texts = ((split, text) for split, _, text in corpus.split_documents(trial.data, found.revision))
        for split, batch in _batches(texts):
            num_bytes = sum(len(text.encode()) for text in batch)
            writers[split].num_documents += len(batch)
            writers[split].num_bytes += num_bytes
            for ids in _encode(tokenizer, batch):
                writers[split].append([*ids, eos_token_id])
            if progress is not None:
                progress(num_bytes)
    corpus.check_splits(trial.data, {split: writer.summary() for split, writer in writers.items()})
    for split, writer in writers.items():
        _check_block(trial, split, writer.num_tokens)
    meta = {
        "format": FORMAT,
        "data_sha256": found.sha256,
        "source": trial.data.source,
        "python_version": found.python,
        "revision": found.revision,
        "context_length": trial.data.context_length,
        "vocab_size": num_ids,
        "eos_token_id": eos_token_id,
        "tokenizer": _tokenizer_words(trial, tokenizer),
        "num_files": found.num_files,
        "files": [list(file) for file in found.files],
        "splits": {
            split: {
                "num_documents": writer.num_documents,
                "num_bytes": writer.num_bytes,
                "num_tokens": writer.num_tokens,
                "num_blocks": writer.num_blocks,
            }
            for split, writer in writers.items()
        },
    }
    with (folder / "meta.json").open("w") as file:
        json.dump(meta, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _check_block(trial: TrialConfig, split: Split, num_tokens: int) -> None:
    context = trial.data.context_length
    if num_tokens < context:
        raise DataError(
            f"data: the {split} split has {num_tokens} tokens, fewer than the {context} of one block "
            "(data.context_length); add text, raise its fraction or lower data.context_length"
        )


def _batches(texts: Iterator[tuple[Split, str]]) -> Iterator[tuple[Split, list[str]]]:
    """Runs of documents of one split, in order within the split, each run of about 1 MiB."""
    waiting: dict[Split, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text in texts:
        waiting[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= _BATCH_BYTES:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    for split, batch in waiting.items():
        if batch:
            yield split, batch


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        # A document that spells <|endoftext|> holds these characters, not an end of text.
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return ids


def _tokenizer(trial: TrialConfig, data_revision: str | None) -> Any:
    model = trial.tokenizer_model
    if not isinstance(model, ScratchModel):
        return models.load_tokenizer(model)
    texts = (text for split, _, text in corpus.split_documents(trial.data, data_revision) if split == "train")
    return train_tokenizer(_first_bytes(texts, TOKENIZER_BYTES), model.vocab_size)


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text
        limit -= len(text.encode())


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE (transformers PreTrainedTokenizerFast) with `<|endoftext|>` as id 0.

    Args:
        vocab_size: at most so many tokens; fewer where the text is too small to make more.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def _tokenizer_words(trial: TrialConfig, tokenizer: Any) -> str:
    model = trial.tokenizer_model
    if isinstance(model, ScratchModel):
        return f"byte-level BPE of {len(tokenizer)} tokens, trained on the training split"
    name = getattr(model, "id", None) or getattr(model, "path", "")
    return f"{type(tokenizer).__name__} of {name}, end of text {tokenizer.eos_token!r}"


class _BlockWriter:
    """Appends tokens to one split's file, a record batch at a time; holds less than a batch in memory."""

    def __init__(self, path: Path, context_length: int, dtype: np.dtype[Any]) -> None:
        import pyarrow as pa

        self.num_documents = self.num_bytes = self.num_tokens = self.num_blocks = 0
        self._context_length = context_length
        self._rows = max(1, _BATCH_TOKENS // context_length)
        self._dtype = dtype
        self._waiting: list[npt.NDArray[Any]] = []
        self._num_waiting = 0
        values = pa.from_numpy_dtype(dtype)
        self._schema = pa.schema([pa.field("input_ids", pa.list_(values, context_length), nullable=False)])
        self._file = path.open("wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def __enter__(self) -> _BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write(self._num_waiting // self._context_length)
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def append(self, ids: Sequence[int]) -> None:
        self._waiting.append(np.asarray(ids, dtype=self._dtype))
        self._num_waiting += len(ids)
        self.num_tokens += len(ids)
        while self._num_waiting >= self._rows * self._context_length:
            self._write(self._rows)

    def summary(self) -> corpus.SplitSummary:
        return corpus.SplitSummary(self.num_documents, self.num_bytes)

    def _write(self, rows: int) -> None:
        import pyarrow as pa

        if rows == 0:
            return
        tokens = np.concatenate(self._waiting)
        used = rows * self._context_length
        self._waiting = [tokens[used:]]
        self._num_waiting -= used
        self.num_blocks += rows
        column = pa.FixedSizeListArray.from_arrays(pa.array(tokens[:used]), self._context_length)
        self._writer.write_batch(pa.record_batch([column], schema=self._schema))


def _remove_abandoned(cache_dir: Path) -> None:
    # What a killed process left. Age alone tells: its process may have run on another machine.
    for folder in cache_dir.glob(".making-*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
            if time.time() - newest > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------------


class TokenBlocks:
    """The blocks of one split, memory-mapped; nothing is copied until rows are taken.

    Pickles as (folder, split) and opens again where it arrives.

    Attributes:
        num_tokens: of the split, end-of-text and the dropped remainder included.
        num_bytes: of the split's text in UTF-8. Bits per byte = nats per token x num_tokens / num_bytes
            / ln 2; unlike the loss it compares across tokenizers.
        context_length: tokens in a block.
    """

    def __init__(self, prepared: str, split: Split) -> None:
        """Args: prepared: what `prepare` returned.

        Raises:
            DataError: the folder is not there or not whole.
        """
        import pyarrow as pa

        self.prepared, self.split = prepared, split
        path = Path(prepared) / f"{split}.arrow"
        try:
            meta = read_meta(prepared)
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as problem:
            raise DataError(
                f"the prepared data in {prepared} cannot be read ({problem}); remove this folder, and it is "
                "made again"
            ) from None
        counts = meta["splits"][split]
        self.context_length: int = meta["context_length"]
        self.num_tokens: int = counts["num_tokens"]
        self.num_bytes: int = counts["num_bytes"]
        # One view per record batch; all but the last have equally many rows.
        self._chunks: list[npt.NDArray[Any]] = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.context_length)
            for chunk in table.column("input_ids").chunks
        ]
        self._rows = len(self._chunks[0])
        self._num_blocks = sum(len(chunk) for chunk in self._chunks)

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        """Copy blocks out: [n] indices in [0, len) -> int64 [n, context_length].

        Raises:
            IndexError: an index is out of range.
        """
        import torch

        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1:
            raise IndexError(f"indices must be one list of block numbers, not {wanted.ndim}-dimensional")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self._num_blocks):
            raise IndexError(f"block numbers must be in [0, {self._num_blocks})")
        taken = np.empty((len(wanted), self.context_length), dtype=np.int64)
        for row, index in enumerate(wanted):
            taken[row] = self._chunks[index // self._rows][index % self._rows]
        return torch.from_numpy(taken)

    def __reduce__(self) -> tuple[type[TokenBlocks], tuple[str, Split]]:
        return TokenBlocks, (self.prepared, self.split)


def batch_indices(num_blocks: int, seed: int, step: int, sequences_per_step: int) -> npt.NDArray[np.int64]:
    """The blocks of a step: a pure function, so resuming needs no state and workers need not talk.

    Every epoch is a permutation of all blocks of its own; a batch may end one epoch and begin the next.

    Args:
        seed: in [0, 2**32).
        step: counted from 0.
    Returns:
        [sequences_per_step] block numbers in [0, num_blocks).
    """
    positions = np.arange(step * sequences_per_step, (step + 1) * sequences_per_step, dtype=np.int64)
    epochs = positions // num_blocks
    taken = np.empty(sequences_per_step, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        taken[here] = _permutation(num_blocks, seed, int(epoch))[positions[here] % num_blocks]
    return taken


@functools.lru_cache(maxsize=4)
def _permutation(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # RandomState rather than Generator: its streams are frozen for good (NEP 19), so the order that a result
    # was made with does not change with numpy.
    return np.random.RandomState([seed, epoch]).permutation(num_blocks)


def load_batch(
    blocks: TokenBlocks,
    seed: int,
    step: int,
    sequences_per_step: int,
    rank: int = 0,
    world_size: int = 1,
) -> torch.Tensor:
    """A worker's share of a step's sequences, the rank-th of `world_size` equal runs.

    Returns:
        int64 [sequences_per_step / world_size, context_length].
    Raises:
        ValueError: the sequences cannot be shared evenly.
    """
    if sequences_per_step % world_size:
        raise ValueError(f"{sequences_per_step} sequences cannot be shared by {world_size} workers evenly")
    share = sequences_per_step // world_size
    indices = batch_indices(len(blocks), seed, step, sequences_per_step)
    return blocks[indices[rank * share : (rank + 1) * share]]


def batch_sha256(blocks: TokenBlocks, seed: int, step: int, sequences_per_step: int) -> str:
    """Hex digest of the token ids of a whole step in order, as little-endian int64."""
    batch = load_batch(blocks, seed, step, sequences_per_step)
    return hashlib.sha256(batch.numpy().astype("<i8", copy=False).tobytes()).hexdigest()


class BatchLoader:
    """A worker's batches of consecutive steps, the next ones read by a thread while this one computes.

    Use it as a context manager, or call `close`. Iterating gives int64 [share, context_length] for
    `first_step`, `first_step` + 1, ..., `num_steps` - 1, once.
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        *,
        seed: int,
        sequences_per_step: int,
        num_steps: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Start reading; `depth` batches, at least 1, are kept ready.

        Args:
            pin_memory: in page-locked memory, from which a copy to a GPU does not wait.
        """
        self._ready: queue.Queue[torch.Tensor | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()

        def read() -> None:
            last: BaseException | None = None
            try:
                for step in range(first_step, num_steps):
                    batch = load_batch(blocks, seed, step, sequences_per_step, rank, world_size)
                    if not self._put(batch.pin_memory() if pin_memory else batch):
                        return
            except BaseException as error:
                last = error
            self._put(last)

        self._thread = threading.Thread(target=read, name="raydisp-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[torch.Tensor]:
        while not self._stop.is_set():
            item = self._ready.get()
            if item is None or isinstance(item, BaseException):
                # Nothing comes after it, so that iterating again must not wait.
                self.close()
                if item is not None:
                    raise item
                return
            yield item

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and wait for the thread; more calls do nothing."""
        self._stop.set()
        self._thread.join()

    def _put(self, item: torch.Tensor | BaseException | None) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False
