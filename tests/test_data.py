"""Blocks hold exactly the documents, in an order of (seed, step) that workers and resumes cannot change."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydisp import data
from raydisp.config import TrialConfig
from raydisp.data import corpus
from raydisp.errors import DataError

CONTEXT = 16
ODD = "an odd one: <|endoftext|> is how a text ends, ünïcode \U0001f600 too"


def words(n: int) -> list[str]:
    return [f"document {i} speaks of the number {i * i} and of nothing else" for i in range(n)]


def trial_on(model: dict[str, Any] | None = None, **fields: Any) -> TrialConfig:
    context = fields.setdefault("context_length", CONTEXT)
    return TrialConfig.model_validate(
        {
            "model": model or {"source": "scratch", "vocab_size": 320},
            "data": {"validation_frac": 0.1, "test_frac": 0.1, **fields},
            "train": {
                "budget_tokens": 10 * context,
                "global_batch_tokens": context,
                "learning_rate": 1e-3,
            },
            "evaluate": {"max_tokens": None},
        }
    )


def write_corpus(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def files_trial(path: Path, **fields: Any) -> TrialConfig:
    return trial_on(source="files", paths=[str(path)], **fields)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    # The first spells the special token, which must stay text.
    return [ODD, *words(600)]


@pytest.fixture(scope="module")
def trial(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> TrialConfig:
    return files_trial(write_corpus(tmp_path_factory.mktemp("data") / "in", texts))


@pytest.fixture(scope="module")
def prepared(trial: TrialConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    return data.prepare(trial, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def blocks(prepared: str) -> data.TokenBlocks:
    return data.TokenBlocks(prepared, "train")


GOLDEN_ORDER = [80, 1, 65, 35, 55, 71, 98, 53]


# --- what is in the blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", corpus.SPLITS)
def test_blocks_are_the_documents_with_end_of_text_between(
    split: corpus.Split, prepared: str, texts: list[str]
) -> None:
    blocks, meta = data.TokenBlocks(prepared, split), data.read_meta(prepared)
    tokenizer = data.load_prepared_tokenizer(prepared)
    mine = [text for text in texts if corpus.split_of(text, 0.1, 0.1) == split]
    ids = blocks[range(len(blocks))].flatten().tolist()
    found, document = [], []
    for token in ids:
        if token == meta["eos_token_id"]:
            found.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert found == mine[: len(found)]
    assert (ODD in found) == (ODD in mine)
    assert len(found) > 0.8 * len(mine), "no more than the remainder of a block is missing"
    counts = meta["splits"][split]
    assert counts["num_documents"] == len(mine)
    assert counts["num_bytes"] == blocks.num_bytes == sum(len(text.encode()) for text in mine)
    assert counts["num_blocks"] == len(blocks) == blocks.num_tokens // CONTEXT
    assert blocks.num_tokens - len(ids) < CONTEXT


def test_ids_fit_the_vocabulary_and_their_type(prepared: str, blocks: data.TokenBlocks) -> None:
    import pyarrow as pa

    with pa.memory_map(f"{prepared}/train.arrow") as file:
        assert (
            str(pa.ipc.open_file(file).schema.field("input_ids").type)
            == f"fixed_size_list<item: uint16>[{CONTEXT}]"
        )
    ids = blocks[range(len(blocks))]
    assert ids.dtype == torch.int64
    assert int(ids.min()) >= 0
    assert int(ids.max()) < data.read_meta(prepared)["vocab_size"] <= 320


def test_a_model_brings_its_own_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, PreTrainedTokenizerFast

    # More than 65,536 words, so that ids need the wider type.
    known = {"[end]": 0, "[unknown]": 1} | {f"w{n}": n for n in range(2, 70_000)}
    tokenizer = Tokenizer(WordLevel(known, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[end]", unk_token="[unknown]"
    ).save_pretrained(folder)
    GPT2Config(vocab_size=70_000).save_pretrained(folder)
    path = write_corpus(tmp_path / "in", [f"w{n} w{n + 1} w69999" for n in range(2, 400)])
    model = {"source": "path", "path": str(folder)}
    prepared = data.prepare(files_trial(path, model=model), str(tmp_path / "cache"))
    ids = data.TokenBlocks(prepared, "train")[[0]][0].tolist()
    first = [n for n in range(2, 400) if corpus.split_of(f"w{n} w{n + 1} w69999", 0.1, 0.1) == "train"]
    expected = [token for n in first for token in (n, n + 1, 69_999, 0)]
    assert ids == expected[:CONTEXT]
    assert "[end]" in data.read_meta(prepared)["tokenizer"]
    # Another word list is another tokenizer, and other blocks.
    (folder / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace("[end]", "w2")
    )
    assert data.prepare(files_trial(path, model=model), str(tmp_path / "cache")) != prepared


def test_record_batches_do_not_show(
    trial: TrialConfig, blocks: data.TokenBlocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough that documents, runs of documents and record batches end at different places.
    monkeypatch.setattr(data, "_BATCH_TOKENS", 7 * CONTEXT)
    monkeypatch.setattr(data, "_BATCH_BYTES", 1000)
    other = data.TokenBlocks(data.prepare(trial, str(tmp_path)), "train")
    assert len(other._chunks) > 10
    assert torch.equal(other[range(len(other))], blocks[range(len(blocks))])


# --- prepared once ------------------------------------------------------------------------------------


def snapshot(folder: str) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in Path(folder).rglob("*")}


def test_prepared_data_are_found_again(trial: TrialConfig, prepared: str) -> None:
    before, seen = snapshot(prepared), []
    assert data.prepare(trial, str(Path(prepared).parent), seen.append) == prepared
    assert snapshot(prepared) == before
    assert seen == [], "nothing was tokenised again"


def test_the_same_key_has_the_same_content(trial: TrialConfig, prepared: str, tmp_path: Path) -> None:
    seen: list[int] = []
    again = data.prepare(trial, str(tmp_path), seen.append)
    assert Path(again).name == Path(prepared).name
    for name in ("train.arrow", "validation.arrow", "test.arrow", "tokenizer/tokenizer.json", "meta.json"):
        assert (Path(again) / name).read_bytes() == (Path(prepared) / name).read_bytes()
    splits = data.read_meta(again)["splits"]
    assert sum(seen) == sum(split["num_bytes"] for split in splits.values())


def test_the_key_follows_what_matters(trial: TrialConfig, prepared: str, tmp_path: Path) -> None:
    texts = [ODD, *words(600)]
    path, cache = write_corpus(tmp_path / "moved", texts), str(tmp_path / "cache")
    keys = {
        Path(data.prepare(changed, cache)).name
        for changed in (
            files_trial(path),
            files_trial(path, context_length=CONTEXT * 2),
            files_trial(path, test_frac=0.2),
            files_trial(path, model={"source": "scratch", "vocab_size": 310}),
            files_trial(write_corpus(tmp_path / "longer", [*texts, "one more"])),
        )
    }
    assert len(keys) == 5
    assert Path(prepared).name in keys, "the same texts elsewhere are the same data"
    # Sizes of the model and everything about training leave the tokens as they are.
    wider = trial_on(
        {"source": "scratch", "vocab_size": 320, "hidden_size": 64}, source="files", paths=[str(path)]
    )
    assert Path(data.prepare(wider, cache)).name == Path(prepared).name


def test_a_large_vocabulary_of_a_small_corpus(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "in", words(600))
    trial = files_trial(path, model={"source": "scratch", "vocab_size": 100_000})
    meta = data.read_meta(data.prepare(trial, str(tmp_path / "cache")))
    assert 257 < meta["vocab_size"] < 5000


def test_several_may_prepare_at_once(trial: TrialConfig, tmp_path: Path) -> None:
    # Threads stand in for processes: what can go wrong is in the folders that they share.
    gate = threading.Barrier(3)

    def act(_: int) -> str:
        gate.wait()
        return data.prepare(trial, str(tmp_path))

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(act, range(3)))
    assert len(folders) == 1
    assert [str(path) for path in tmp_path.iterdir()] == list(folders), "no half-made folder stays"


def test_a_failure_leaves_nothing_behind(trial: TrialConfig, tmp_path: Path) -> None:
    def fail(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare(trial, str(tmp_path), fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_killed_process_is_not_taken(trial: TrialConfig, prepared: str, tmp_path: Path) -> None:
    key = Path(prepared).name
    (tmp_path / key).mkdir()
    (tmp_path / key / "train.arrow").write_bytes(b"half")
    old, young = tmp_path / ".making-old", tmp_path / ".making-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "train.arrow").write_bytes(b"half")
    long_ago = time.time() - 3 * 24 * 3600
    for path in (old / "train.arrow", old):
        os.utime(path, (long_ago, long_ago))
    made = data.prepare(trial, str(tmp_path))
    assert len(data.TokenBlocks(made, "train")) > 100
    assert not old.exists()
    assert young.exists(), "its process may still be at work"


def test_python_docs_of_another_process_are_the_same(tmp_path: Path) -> None:
    trial = trial_on({"source": "scratch"}, source="python_docs", context_length=128)
    prepared = data.prepare(trial, str(tmp_path / "here"))
    code = (
        "import sys; from raydisp import data; from raydisp.config import TrialConfig;"
        "print(data.prepare(TrialConfig.model_validate_json(sys.argv[1]), sys.argv[2]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, trial.model_dump_json(), str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "3", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(other).name == Path(prepared).name
    for name in ("train.arrow", "validation.arrow", "test.arrow", "tokenizer/tokenizer.json"):
        assert (Path(other) / name).read_bytes() == (Path(prepared) / name).read_bytes()
    meta = data.read_meta(prepared)
    assert meta["vocab_size"] == 4096
    assert meta["splits"]["train"]["num_tokens"] > 400_000
    assert meta["python_version"] == ".".join(map(str, sys.version_info[:3]))


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [lambda t, c: data.prepare(t, c), lambda t, c: data.check_data(t)])
def test_a_split_without_one_whole_block(act: Callable[[TrialConfig, str], Any], tmp_path: Path) -> None:
    # About 6,000 bytes a held-out split: enough bytes for 1,800 tokens, not enough tokens.
    trial = files_trial(write_corpus(tmp_path / "in", words(1000)), context_length=1800)
    with pytest.raises(DataError) as raised:
        act(trial, str(tmp_path / "cache"))
    message = str(raised.value)
    assert "split has" in message
    assert "fewer than the 1800 of one block" in message
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_good_corpus_passes_the_early_check(trial: TrialConfig) -> None:
    summary = data.check_data(trial)
    assert summary == corpus.describe(trial.data)


def test_prepared_data_that_were_spoiled(prepared: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read .* remove this folder"):
        data.TokenBlocks(str(tmp_path), "train")
    (tmp_path / "meta.json").write_text((Path(prepared) / "meta.json").read_text())
    (tmp_path / "train.arrow").write_bytes((Path(prepared) / "train.arrow").read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        data.TokenBlocks(str(tmp_path), "train")


# --- taking rows --------------------------------------------------------------------------------------


def test_rows_are_copies_of_a_map(blocks: data.TokenBlocks) -> None:
    first = blocks[[3, 1, 3]]
    assert first.shape == (3, CONTEXT)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], blocks[[1]][0])
    first.fill_(-1)
    assert int(blocks[[3]].min()) >= 0
    for wrong in ([len(blocks)], [-1], [[0, 1]]):
        with pytest.raises(IndexError):
            blocks[wrong]
    assert blocks[[]].shape == (0, CONTEXT)


def test_blocks_travel_as_a_path(blocks: data.TokenBlocks) -> None:
    packed = pickle.dumps(blocks)
    assert len(packed) < 1000
    other = pickle.loads(packed)
    assert torch.equal(other[[0, 5]], blocks[[0, 5]])
    assert (other.num_tokens, other.num_bytes) == (blocks.num_tokens, blocks.num_bytes)


# --- the order ----------------------------------------------------------------------------------------


def test_the_order_is_frozen() -> None:
    # Written down once: another order would make old results irreproducible.
    assert data.batch_indices(100, 7, 3, 8).tolist() == GOLDEN_ORDER


@pytest.mark.parametrize(("num_blocks", "per_step"), [(10, 3), (7, 7), (5, 16), (1, 4)])
def test_every_epoch_sees_every_block_once(num_blocks: int, per_step: int) -> None:
    steps = 12
    stream = np.concatenate([data.batch_indices(num_blocks, 1, step, per_step) for step in range(steps)])
    whole = len(stream) // num_blocks
    epochs = stream[: whole * num_blocks].reshape(whole, num_blocks)
    assert (np.sort(epochs, axis=1) == np.arange(num_blocks)).all()
    if num_blocks > 4:
        assert (epochs[0] != epochs[1]).any(), "each epoch has an order of its own"
        other = data.batch_indices(num_blocks, 2, 0, num_blocks)
        assert (other != epochs[0]).any(), "and so has each seed"


def test_the_stream_does_not_depend_on_the_batch_or_the_way_there() -> None:
    one = np.concatenate([data.batch_indices(50, 4, step, 6) for step in range(20)])
    other = np.concatenate([data.batch_indices(50, 4, step, 12) for step in range(10)])
    assert (one == other).all()
    assert (data.batch_indices(50, 4, 17, 6) == one[17 * 6 : 18 * 6]).all()
    taken = data.batch_indices(50, 4, 17, 6)
    taken[:] = 0
    assert (data.batch_indices(50, 4, 17, 6) == one[17 * 6 : 18 * 6]).all(), "callers get a copy"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_share_the_same_batch(blocks: data.TokenBlocks, world_size: int) -> None:
    whole = data.load_batch(blocks, 3, 11, 8)
    shares = [data.load_batch(blocks, 3, 11, 8, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(shares), whole)
    with pytest.raises(ValueError, match="8 sequences cannot be shared by 3 workers"):
        data.load_batch(blocks, 3, 11, 8, 0, 3)


def test_the_digest_of_a_batch_is_that_of_its_ids(blocks: data.TokenBlocks) -> None:
    ids = data.load_batch(blocks, 3, 11, 8).flatten().tolist()
    expected = hashlib.sha256(b"".join(token.to_bytes(8, "little") for token in ids)).hexdigest()
    assert data.batch_sha256(blocks, 3, 11, 8) == expected
    assert data.batch_sha256(blocks, 3, 12, 8) != expected


# --- reading ahead ------------------------------------------------------------------------------------


def loader(blocks: data.TokenBlocks, **options: Any) -> data.BatchLoader:
    return data.BatchLoader(blocks, **{"seed": 3, "sequences_per_step": 8, "num_steps": 9, **options})


def num_readers() -> int:
    return sum(thread.name == "raydisp-batches" for thread in threading.enumerate())


def test_batches_come_in_order_from_the_resumed_step(blocks: data.TokenBlocks) -> None:
    with loader(blocks, first_step=4, rank=1, world_size=2) as batches:
        found = list(batches)
    expected = [data.load_batch(blocks, 3, step, 8, 1, 2) for step in range(4, 9)]
    assert len(found) == 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert num_readers() == 0


def test_leaving_early_stops_the_reader(blocks: data.TokenBlocks) -> None:
    with loader(blocks, num_steps=10**9) as batches:
        next(iter(batches))
        assert num_readers() == 1
    assert num_readers() == 0
    assert list(batches) == []


def test_a_fault_while_reading_arrives_where_batches_are_taken(blocks: data.TokenBlocks) -> None:
    with (
        loader(blocks, world_size=3) as batches,
        pytest.raises(ValueError, match="cannot be shared"),
    ):
        list(batches)
    assert num_readers() == 0
