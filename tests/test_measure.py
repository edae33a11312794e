"""Measuring models: the numbers against slow references, the command, its tables and its page."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from test_models import tokenizer as byte_tokenizer
from test_report import EVIL, Page

from raydisp import condensation, measure
from raydisp.__main__ import main as raydisp_main
from raydisp.figures.interactive import draw
from raydisp.measure import Measured, measure_condensation
from raydisp.measure import command as measure_command
from raydisp.measure import page as measure_page
from raydisp.measure import tables as measure_tables
from raydisp.measure.command import main

pytestmark = pytest.mark.usefixtures("one_thread")


GOLDEN = np.load(Path(__file__).parent / "golden" / "condensation.npz")
SENTENCE = "the cat sat on the mat and then ran to the river under the house "
TEXTS = [SENTENCE[k:] + SENTENCE[::-1][k : k + 7 * k] for k in (0, 3, 5, 9)] + [
    SENTENCE[10:40],
    SENTENCE[20:50],
]
POSITIONS = 48
SCALARS = ("spearman", "kendall", "last_half_mean", "last_half_stderr")
LAYERED = (
    "cosine_mean",
    "cosine_stderr",
    "cosine_centred_mean",
    "cosine_centred_stderr",
    "cosine_without_first_mean",
    "cosine_without_first_stderr",
    "effective_rank",
    "effective_rank_stderr",
)


def build(family: str, *, layers: int = 3, width: int = 16) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=300,
            n_positions=POSITIONS,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            initializer_range=0.3,
        )
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            max_position_embeddings=1024,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small GPT-2 and a larger Llama, each with a tokenizer."""
    root = tmp_path_factory.mktemp("measured")
    for name, sizes in (("gpt2", {}), ("llama", {"layers": 4, "width": 32})):
        build(name, **sizes).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in ("gpt2", "llama")}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> tuple[str, str]:
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def hidden_states(model: Any, text: str, max_tokens: int) -> list[torch.Tensor]:
    """[1, n, F] per hidden state, by the whole model and one text alone."""
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"][:max_tokens]])
    with torch.no_grad():
        return list(model.eval()(input_ids=ids, output_hidden_states=True).hidden_states)


# --- the numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_measures_are_those_of_condensation(family: str) -> None:
    model = build(family)
    found = measure_condensation(model, byte_tokenizer(), TEXTS, max_tokens=40)
    per_text = [hidden_states(model, text, 40) for text in TEXTS]
    for column, function in (
        ("cosine_mean", condensation.layer_cosine),
        ("cosine_centred_mean", condensation.layer_cosine_centred),
        ("cosine_without_first_mean", condensation.layer_cosine_without_first),
        ("effective_rank", condensation.effective_rank),
    ):
        values = torch.stack([function(states) for states in per_text])
        # Float32 products of a batch and of one text round differently.
        assert getattr(found, column) == pytest.approx(values.mean(0).tolist(), rel=1e-5)
        stderr = getattr(found, column.replace("_mean", "") + "_stderr")
        expected = stats.sem(values.numpy(), axis=0)
        assert stderr == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    assert found.num_tokens == sum(states[0].shape[1] for states in per_text)
    assert (found.num_texts, found.num_left_out) == (len(TEXTS), 0)
    assert (found.spearman, found.kendall) == condensation.depth_trend(found.cosine_mean)


def slow_reference(per_text: list[list[np.ndarray]]) -> dict[str, Any]:
    """Written from the method's definition: loops over pairs in float64. per_text[t][l] is [n, F]."""
    num_states, num_texts = len(per_text[0]), len(per_text)
    out: dict[str, Any] = {
        name: np.zeros((num_texts, num_states)) for name in ("mean", "centred", "rest", "rank")
    }
    out["histogram"] = np.zeros((num_states, 128), dtype=int)
    averaged = []
    for layer in range(num_states):
        matrices = []
        for t, states in enumerate(per_text):
            rows = states[layer]

            def cosines(vectors: np.ndarray) -> np.ndarray:
                unit = [vector / max(math.sqrt(sum(vector**2)), 1e-3) for vector in vectors]
                return np.array([[min(1.0, max(-1.0, float(sum(a * b)))) for b in unit] for a in unit])

            matrix = cosines(rows)
            matrices.append(matrix)
            out["mean"][t, layer] = matrix.mean()
            out["centred"][t, layer] = cosines(rows - rows.mean(0)).mean()
            out["rest"][t, layer] = cosines(rows[1:]).mean()
            shares = np.linalg.svd(rows, compute_uv=False)
            shares = shares / shares.sum()
            out["rank"][t, layer] = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
            out["histogram"][layer] += np.histogram(matrix, bins=128, range=(-1, 1))[0]
        averaged.append(np.histogram(np.mean(matrices, axis=0), bins=128, range=(-1, 1))[0])
    out["averaged"] = np.array(averaged)
    return out


def test_a_slow_reference_agrees() -> None:
    model, texts = build("llama").double(), [text[:12] for text in TEXTS]
    found = measure_condensation(model, byte_tokenizer(), texts, max_tokens=12)
    expected = slow_reference(
        [[state[0].numpy() for state in hidden_states(model, text, 12)] for text in texts]
    )
    for name, column in (
        ("mean", "cosine"),
        ("centred", "cosine_centred"),
        ("rest", "cosine_without_first"),
        ("rank", "effective_rank"),
    ):
        values = expected[name]
        mean = getattr(found, column if name == "rank" else f"{column}_mean")
        # The rank's Gram matrix costs half of float64's digits in the smallest singular values.
        assert mean == pytest.approx(
            values.mean(0).tolist(), rel=1e-6 if name == "rank" else 1e-10, abs=1e-12
        )
        spread = values.std(0, ddof=1) / math.sqrt(len(texts))
        assert getattr(found, f"{column}_stderr") == pytest.approx(spread.tolist(), rel=1e-5, abs=1e-9)
    assert found.histogram == expected["histogram"].tolist()
    assert found.averaged_histogram == expected["averaged"].tolist()
    means = expected["mean"].mean(0)
    assert found.spearman == pytest.approx(stats.spearmanr(range(len(means)), means).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(range(len(means)), means).statistic)
    assert found.last_means == pytest.approx([*(means[-n:].mean() for n in range(1, 5)), None])  # 4 states
    assert found.last_half_mean == pytest.approx(means[-3:].mean())  # floor(4 / 2) + 1
    halves = expected["mean"][:, -3:].mean(1)
    assert found.last_half_stderr == pytest.approx(halves.std(ddof=1) / math.sqrt(len(texts)))


class Recorded(torch.nn.Module):
    """A model whose hidden states are given: [layers, B, L, F], text b begins with token b."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.hidden = hidden
        self.config = SimpleNamespace(hidden_size=hidden.shape[-1], num_hidden_layers=len(hidden) - 1)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=tuple(self.hidden[:, input_ids[:, 0], : input_ids.shape[1]]))


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("batch", [1, None])
def test_golden(case: int, batch: int | None) -> None:
    hidden = torch.from_numpy(GOLDEN[f"hidden_{case}"])
    _, num_texts, length, _ = hidden.shape

    def encode(text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(text)] * length}

    texts = [str(number) for number in range(num_texts)]
    found = measure_condensation(Recorded(hidden), encode, texts, max_tokens=length, batch_sequences=batch)
    # As golden/README.md states.
    assert found.cosine_mean == pytest.approx(GOLDEN[f"layer_cosine_{case}"].tolist(), rel=1e-10)
    assert found.spearman == pytest.approx(float(GOLDEN[f"spearman_{case}"]), rel=1e-10)
    assert found.kendall == pytest.approx(float(GOLDEN[f"kendall_{case}"]), rel=1e-10)
    averaged = condensation.cosine_histogram(hidden, kind="averaged")
    assert found.averaged_histogram == averaged.tolist()
    assert found.histogram == condensation.cosine_histogram(hidden).tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neither_batch_size_nor_order_matters(family: str) -> None:
    model = build(family)
    texts = [*TEXTS, *[text[::-1] for text in TEXTS]]
    whole = measure_condensation(model, byte_tokenizer(), texts, max_tokens=40)
    for order, batch in ((1, 1), (1, 3), (1, 100), (-1, 2)):
        other = measure_condensation(
            model, byte_tokenizer(), texts[::order], max_tokens=40, batch_sequences=batch
        )
        for column in LAYERED:
            assert getattr(other, column) == pytest.approx(getattr(whole, column), rel=1e-6, abs=1e-6), column
        for column in SCALARS:
            assert getattr(other, column) == pytest.approx(getattr(whole, column), rel=1e-6, abs=1e-6), column
        assert (other.num_texts, other.num_tokens) == (whole.num_texts, whole.num_tokens)
        # A cosine at the edge of two bins may change sides by rounding.
        moved = np.abs(np.array(other.histogram) - np.array(whole.histogram)).sum()
        assert moved <= 1e-3 * np.array(whole.histogram).sum()
        assert np.array(other.histogram).sum() == np.array(whole.histogram).sum()


def test_one_text_has_no_standard_error() -> None:
    found = measure_condensation(build("gpt2"), byte_tokenizer(), TEXTS[:1], max_tokens=40)
    assert (found.num_texts, found.num_tokens) == (1, 40)
    assert all(map(math.isfinite, found.cosine_mean))
    assert all(map(math.isnan, [*found.cosine_stderr, found.last_half_stderr]))


def test_texts_too_short_are_left_out_and_counted() -> None:
    model = build("gpt2")
    with_short = measure_condensation(model, byte_tokenizer(), ["a", *TEXTS, "", "bc"], max_tokens=40)
    assert (with_short.num_texts, with_short.num_left_out) == (len(TEXTS) + 1, 2)
    without = measure_condensation(model, byte_tokenizer(), [*TEXTS, "bc"], max_tokens=40)
    assert with_short.cosine_mean == without.cosine_mean
    with pytest.raises(ValueError, match="None of 2 texts has two tokens"):
        measure_condensation(model, byte_tokenizer(), ["a", ""], max_tokens=40)


@pytest.mark.parametrize(
    ("options", "message"), [({"max_tokens": 1}, "at least 2"), ({"batch_sequences": 0}, "at least 1")]
)
def test_bad_arguments_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_condensation(build("gpt2"), byte_tokenizer(), TEXTS, **{"max_tokens": 40, **options})


def test_tokens_of_another_tokenizer_are_refused() -> None:
    def encode(text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 300]}

    with pytest.raises(ValueError, match="Token 300 has no embedding, the model has 300"):
        measure_condensation(build("gpt2"), encode, TEXTS)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, sizes = build("gpt2"), measure._hidden_states, []
    expected = measure_condensation(model, byte_tokenizer(), TEXTS, max_tokens=20)

    def small_memory(model: Any, input_ids: torch.Tensor) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, input_ids)

    monkeypatch.setattr(measure, "_hidden_states", small_memory)
    found = measure_condensation(model, byte_tokenizer(), TEXTS, max_tokens=20, batch_sequences=6)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert found.cosine_mean == pytest.approx(expected.cosine_mean, rel=1e-6)


def test_the_mode_of_the_model_is_restored_and_dropout_off() -> None:
    model = build("gpt2").train()
    first = measure_condensation(model, byte_tokenizer(), TEXTS, max_tokens=40)
    assert model.training
    assert measure_condensation(model, byte_tokenizer(), TEXTS, max_tokens=40) == first


def test_a_long_text_is_not_tokenised_to_its_end() -> None:
    lengths = []

    def encode(text: str, verbose: bool = True) -> dict[str, list[int]]:
        lengths.append(len(text))
        return {"input_ids": list(text.encode())}

    assert measure.encode(encode, "x" * 10**6, 50) == [ord("x")] * 50
    assert lengths == [1600]

    def few(text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * (len(text) // 40)}

    assert len(measure.encode(few, "x" * 10**4, 50)) == 50  # the head alone has 40


def test_the_averaged_histogram_is_left_out_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "AVERAGED_BYTES", 1000)
    assert (
        measure_condensation(build("gpt2"), byte_tokenizer(), TEXTS, max_tokens=40).averaged_histogram is None
    )


# --- the command ---------------------------------------------------------------------------------------


def test_two_models_become_tables_and_a_page(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    printed, told = run(capsys, *folders.values(), "--texts", text_file, "--out", out, "--max-tokens", 40)
    assert str(out / "condensation.html") in printed
    assert "gpt2: Spearman" in told
    found = measure_tables.read_models(str(out))
    assert [row["name"] for row, _ in found] == ["gpt2", "llama"]  # smallest first
    for row, layers in found:
        model = build(row["name"], **({} if row["name"] == "gpt2" else {"layers": 4, "width": 32}))
        expected = measure_condensation(model, byte_tokenizer(), TEXTS, max_tokens=40)
        assert [layer["layer"] for layer in layers] == list(range(row["num_layers"] + 1))
        for column in LAYERED:
            assert [layer[column] for layer in layers] == pytest.approx(getattr(expected, column), rel=1e-6)
        assert [layer["histogram"] for layer in layers] == expected.histogram
        assert [layer["averaged_histogram"] for layer in layers] == expected.averaged_histogram
        assert row["spearman"] == expected.spearman
        assert row["last_half_mean"] == pytest.approx(expected.last_half_mean, rel=1e-6)
        assert row["last_5_mean"] == (
            None if row["num_layers"] == 3 else pytest.approx(expected.last_means[4])
        )
        assert row["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert (row["num_texts"], row["num_left_out"], row["max_tokens"]) == (len(TEXTS), 0, 40)
        assert (row["dtype"], row["device"], row["source"]) == ("float32", "cpu", "path")
        assert "ray" in json.loads(row["packages_json"])
        assert row["ended_at"] >= row["started_at"]
    assert len({row["texts_sha256"] for row, _ in found}) == 1
    file = next((out / "condensation").glob("gpt2-*.parquet"))
    assert pq.read_schema(file).metadata[b"raydisp.schema_version"] == b"1"
    query = f"select count(*), sum(layer) from '{out}/condensation/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(4 + 5, 6 + 10)]


def test_a_family_is_drawn_over_its_sizes(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three saved models of one family, the largest named first: the page has what `read_models` has."""
    for width in (16, 24, 48):
        build("gpt2", width=width).save_pretrained(tmp_path / f"gpt2-{width}")
        byte_tokenizer().save_pretrained(tmp_path / f"gpt2-{width}")
    places = [tmp_path / f"gpt2-{width}" for width in (48, 16, 24)]
    out = tmp_path / "out"
    run(capsys, *places, "--texts", text_file, "--out", out, "--max-tokens", 40, "--quiet")
    rows = [row for row, _ in measure_tables.read_models(str(out))]
    assert [row["name"] for row in rows] == ["gpt2-16", "gpt2-24", "gpt2-48"]
    sizes = [row["num_parameters"] for row in rows]
    assert sizes == sorted(sizes)
    page = Page((out / "condensation.html").read_text())
    for name, column in (("size-spearman", "spearman"), ("size-last-half", "last_half_mean")):
        line, *marks = page.figures[name]["data"]
        assert line["x"] == sizes
        assert line["y"] == pytest.approx([row[column] for row in rows])
        points = [mark for mark in marks if mark["mode"] == "markers"]
        assert [(point["name"], point["x"]) for point in points] == [
            (row["name"], [size]) for row, size in zip(rows, sizes, strict=True)
        ]
        if column == "last_half_mean":
            errors = [point["error_y"]["array"][0] for point in points]
            assert errors == pytest.approx([row["last_half_stderr"] for row in rows])
    ticks = page.figures["size-spearman"]["layout"]["xaxis"]["ticktext"]
    assert len(ticks) > 1
    assert f"From gpt2-16 ({measure_page.parameters(sizes[0])}) to gpt2-48" in page.text


def test_measuring_again_replaces_a_models_rows(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(capsys, *folders.values(), "--texts", text_file, "--out", out, "--quiet")
    _, told = run(capsys, folders["gpt2"], "--texts", text_file, "--out", out, "--num-texts", 2, "--quiet")
    assert told == "raydisp.measure: gpt2: it has 48 positions, so texts count with 48 tokens and not 512\n"
    (small, layers), (large, _) = measure_tables.read_models(str(out))
    assert (small["num_texts"], len(layers), large["num_texts"]) == (2, 4, len(TEXTS))
    page = (out / "condensation.html").read_text()
    assert "different texts" in page
    assert "different numbers of tokens" in page


def test_a_broken_model_beside_a_good_one(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(folders["gpt2"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    out = tmp_path / "out"
    arguments = (broken, folders["llama"], "--texts", text_file, "--out", out, "--quiet")
    _, told = run(capsys, *arguments, status=1)
    assert told.startswith("raydisp.measure: broken is not measured: ")
    assert told.count("\n") == 1
    assert [row["name"] for row, _ in measure_tables.read_models(str(out))] == ["llama"]
    assert (out / "condensation.html").exists()
    _, told = run(capsys, broken, "--texts", text_file, "--out", tmp_path / "none", "--quiet", status=1)
    assert not (tmp_path / "none" / "condensation.html").exists()


def test_whatever_a_model_raises_is_one_sentence(
    folders: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Measured:
        raise RuntimeError("a kernel is missing.\nand much more")

    monkeypatch.setattr(measure_command, "measure_condensation", fail)
    arguments = (folders["gpt2"], "--texts", text_file, "--out", tmp_path, "--max-tokens", 8, "--quiet")
    _, told = run(capsys, *arguments, status=1)
    assert told == "raydisp.measure: gpt2 is not measured: RuntimeError: a kernel is missing\n"


def test_an_interruption_leaves_the_rows_of_models_that_are_done(
    folders: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Measured:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return measure_condensation(*arguments, **options)

    monkeypatch.setattr(measure_command, "measure_condensation", interrupted)
    out = tmp_path / "out"
    _, told = run(capsys, *folders.values(), "--texts", text_file, "--out", out, "--quiet", status=130)
    assert told.splitlines()[-1].startswith(
        "raydisp.measure: interrupted; models that were done have their rows"
    )
    assert [row["name"] for row, _ in measure_tables.read_models(str(out))] == ["gpt2"]
    assert "gpt2" in Page((out / "condensation.html").read_text()).text
    assert not list(out.rglob("_tmp-*"))


MISTAKES = {
    "no such text": ("MODEL --texts none.txt", 'none.txt" does not exist'),
    "no such model": ("none/of/these --texts one.txt", "none/of/these does not exist (looked for"),
    "no such GGUF file": ("none.gguf --texts one.txt", "MODEL none.gguf does not exist"),
    "no text": ("MODEL --texts empty.txt", "there is no text in it"),
    "unknown field": ("MODEL --texts rows.jsonl", '"text" (--text-field); there are: body'),
    "one token": ("MODEL --texts one.txt --max-tokens 1", "--max-tokens 1 is too few: a cosine takes two"),
    "no texts": ("MODEL --texts one.txt --num-texts 0", "--num-texts 0 must be at least 1"),
    "no batch": ("MODEL --texts one.txt --batch-texts 0", "--batch-texts 0 must be at least 1"),
    "an empty model": ("'' --texts one.txt", 'MODEL "" is empty'),
    "an empty text": ("MODEL --texts ''", '--texts "" is empty'),
    "an empty folder": ("MODEL --texts one.txt --out ''", '--out "" is empty'),
    "no folder": ("MODEL --texts one.txt --out one.txt", "one.txt is a file"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_of_the_user_is_one_sentence(
    name: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("one.txt").write_text("x")
    Path("rows.jsonl").write_text('{"body": "some text"}\n')
    command, message = MISTAKES[name]
    arguments = [str(folders["gpt2"]) if word == "MODEL" else word for word in shlex.split(command)]
    printed, told = run(capsys, *arguments, *([] if "--out" in arguments else ["--out", "out"]), status=2)
    assert printed == ""
    assert told.startswith("raydisp.measure: ")
    assert told.count("\n") == 1
    assert message in told
    assert "data." not in told
    assert not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folders["gpt2"], "--texts", text_file, "--out", tmp_path, "--device", "cuda")
    assert "no CUDA device here" in run(capsys, *arguments, status=2)[1]


def test_texts_too_short_are_told(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(["x", SENTENCE]):
        (tmp_path / f"{number}.txt").write_text(text)
    arguments = (folders["llama"], "--texts", tmp_path / "*.txt", "--out", tmp_path / "out")
    assert "llama: 1 text of fewer than two tokens left out" in run(capsys, *arguments)[1]
    (tmp_path / "1.txt").unlink()
    _, told = run(capsys, *arguments, "--quiet", status=1)
    assert told == "raydisp.measure: llama is not measured: None of 1 texts has two tokens or more\n"


def test_without_texts_it_is_the_prose_of_python(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folders["llama"], "--out", tmp_path, "--num-texts", 3, "--max-tokens", 30)
    _, told = run(capsys, *arguments)
    assert "3 texts from the English prose that ships with CPython" in told
    ((row, _),) = measure_tables.read_models(str(tmp_path))
    assert (row["num_texts"], row["num_tokens"]) == (3, 90)
    assert "CPython" in Page((tmp_path / "condensation.html").read_text()).text


def test_half_precision_is_near(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folders["llama"], "--texts", text_file, "--quiet", "--out")
    run(capsys, *arguments, tmp_path / "wide")
    run(capsys, *arguments, tmp_path / "half", "--dtype", "bfloat16")
    ((wide, _),), ((half, _),) = (
        measure_tables.read_models(str(tmp_path / name)) for name in ("wide", "half")
    )
    assert (wide["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["last_half_mean"] == pytest.approx(wide["last_half_mean"], abs=0.01)  # 8 bits of mantissa


def test_names_of_models(folders: dict[str, Path], tmp_path: Path) -> None:
    assert measure_command.parse_model("gpt2").spec.source == "hub"
    pinned = measure_command.parse_model("owner/name@refs/pr/1")
    assert (pinned.spec.id, pinned.spec.revision) == ("owner/name", "refs/pr/1")  # type: ignore[union-attr]
    gguf = tmp_path / "some.Q4.gguf"
    gguf.write_bytes(b"GGUF")
    named = measure_command.parse_model(str(gguf))
    assert (named.name, named.model, named.spec.source) == ("some.Q4", str(gguf), "gguf")
    kept = shutil.copytree(folders["gpt2"], tmp_path / "trial-00012")
    about = {"study": "verdict", "trial": 12, "arm": "best", "seed": 3, "files": {}}
    (kept / "kept.json").write_text(json.dumps(about))
    assert measure_command.parse_model(str(kept)).name == "verdict: best, seed 3"


def test_file_names_do_not_collide() -> None:
    told = [
        ("gpt2", "gpt2", "hub"),
        ("gpt2", "/a/gpt2", "path"),
        ("gpt2", "/b/gpt2", "path"),
        ("a/b", "a/b", "hub"),
        ("a--b", "a--b@x", "hub"),
        ("a/b@x", "a/b@x", "hub"),
        ("../../etc", "/x", "path"),
        ("漢字", "/y", "path"),
        ("_hidden", "/z", "path"),
    ]
    files = [measure_tables.file_name(*one) for one in told]
    assert len(set(files)) == len(files)
    assert files[0] == "gpt2.parquet"
    assert files[3] == "a--b.parquet"
    assert all("/" not in file and file[0] not in "._" for file in files)


def test_it_is_a_command_of_raydisp(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raydisp_main(["measure", "--help"])
    assert ended.value.code == 0
    assert "MODEL" in capsys.readouterr().out


def test_neither_ray_nor_torch_is_loaded_without_need() -> None:
    code = (
        "import sys, raydisp.measure.command\n"
        "print(sorted({'ray', 'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --- the page and the pictures -------------------------------------------------------------------------


def sample(
    name: str = "some model", *, parameters: int = 10**8, layers: int = 4, **fields: Any
) -> measure_page.Model:
    """A model's rows as they are read."""
    generator = torch.Generator().manual_seed(parameters % 1000)
    hidden = (
        torch.randn(layers + 1, 3, 20, 8, generator=generator)
        + torch.arange(layers + 1)[:, None, None, None] / 2
    )
    found = measure_condensation(
        Recorded(hidden), lambda text, verbose: {"input_ids": [int(text)] * 20}, ["0", "1", "2"]
    )
    moment = measure_command.results.now()
    about = {
        "name": name,
        "model": f"/models/{name}",
        "source": "path",
        "model_revision": "0" * 64,
        "num_parameters": parameters,
        "num_layers": layers,
        "hidden_size": 8,
        "max_tokens": 512,
        "texts": "texts/*.txt",
        "texts_sha256": "1" * 64,
        "dtype": "float32",
        "device": "cpu",
        "load_s": 1.0,
        "measure_s": 2.0,
        "code_version": "0.1.0",
        "packages_json": "{}",
        "started_at": moment,
        "ended_at": moment,
        **fields,
    }
    row = measure_tables.model_row(about, found)
    return {**row, **fields}, measure_tables.condensation_rows(row["name"], row["model"], found)


def drawn(panel: Any) -> dict[str, list[dict[str, Any]]]:
    return {plot.name: draw(plot.chart).to_plotly_json()["data"] for plot in panel.plots}


def test_the_figures_draw_the_rows() -> None:
    models = [sample("small", parameters=10**7), sample("large", parameters=10**9, layers=6)]
    heat, averaged, depth, size = map(drawn, measure_page.build_panels(models))
    assert list(heat) == ["heat-map-0", "heat-map-1"]
    for (_, layers), picture in zip(models, heat.values(), strict=True):
        density = np.array(picture[0]["z"])
        assert density.shape == (128, len(layers))
        assert density.sum(0) * 2 / 128 == pytest.approx(np.ones(len(layers)))
        counts = np.array([row["histogram"] for row in layers]).T
        np.testing.assert_allclose(density, counts / counts.sum(0) * 64)
        assert list(picture[1]["y"]) == [row["cosine_mean"] for row in layers]
    assert len({picture[0]["zmax"] for picture in heat.values()}) == 1
    assert list(averaged) == ["averaged-heat-map-0", "averaged-heat-map-1"]
    for (_, _, column, _), lines in zip(measure_page.BY_DEPTH, depth.values(), strict=True):
        assert [line["name"] for line in lines] == ["small", "large"]
        for (_, layers), line in zip(models, lines, strict=True):
            assert list(line["y"]) == [row[column] for row in layers]
            assert list(line["x"]) == [row["layer"] / (len(layers) - 1) for row in layers]
    assert list(size) == ["size-spearman", "size-last-half"]
    for column, points in zip(("spearman", "last_half_mean"), size.values(), strict=True):
        assert list(points[0]["x"]) == [10**7, 10**9]
        assert list(points[0]["y"]) == [row[column] for row, _ in models]
    error = size["size-last-half"][1]["error_y"]
    assert list(error["array"]) == pytest.approx([models[0][0]["last_half_stderr"]])
    assert list(error["arrayminus"]) == pytest.approx([models[0][0]["last_half_stderr"]])


def test_one_model_has_no_plot_over_size_and_the_page_says_so() -> None:
    panel = measure_page.build_panels([sample()])[3]
    assert panel.plots == []
    assert "two models of different size" in panel.sentence
    page = Page(measure_page.render_page([sample("alone")]))
    assert "alone condenses with depth" in page.text
    assert "two models of different size" in page.text


def test_every_trend_has_its_words() -> None:
    for spearman, words in ((0.9, "condenses"), (-0.6, "disperses"), (0.1, "no clear trend")):
        assert words in measure_page.sentences([sample(spearman=spearman)])[0]
    assert "no trend over depth" in measure_page.sentences([sample(spearman=None)])[0]
    several = [sample("a", parameters=10), sample("b", parameters=20)]
    assert measure_page.sentences(several)[0].startswith("From a (10) to b (20)")
    assert "No model" in measure_page.sentences([])[0]
    measure_page.render_page([])


def test_nothing_breaks_out_of_the_page() -> None:
    evil = EVIL + "</script><script>alert(2)</script>"
    models = [
        sample(evil, texts=evil, device=evil, code_version=evil, parameters=10**6),
        sample("x", parameters=10**7),
    ]
    for some in (models, models[:1]):
        text = measure_page.render_page(some)
        page = Page(text)
        assert "img" not in {tag for tag, _ in page.tags}
        assert len(page.scripts) == 4
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert evil in page.text
        for figure in page.figures.values():
            for trace in figure["data"]:
                shown = [trace.get("name"), trace.get("hovertext")]
                texts = itertools.chain.from_iterable(x if isinstance(x, list) else [x] for x in shown)
                assert not any("<img" in t or "<script" in t for t in texts if t)


def test_missing_measures_are_drawn_as_gaps() -> None:
    row, layers = sample()
    for one in layers[2:]:
        one.update(cosine_mean=None, cosine_stderr=None, averaged_histogram=None, histogram=[0] * 128)
    row.update(spearman=None, kendall=None, last_half_mean=None, num_parameters=None)
    page = Page(measure_page.render_page([(row, layers)]))
    assert "NaN" not in page.scripts[0]
    assert "unknown size" in page.text


def test_models_of_one_name_are_told_apart() -> None:
    models = [sample("same", parameters=1, model="/a/same"), sample("same", parameters=2, model="/b/same")]
    assert measure_page.names(models) == ["/a/same", "/b/same"]


def test_pictures(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*folders.values(), "--texts", text_file, "--out", tmp_path, "--figures", "--quiet")
    run(capsys, *arguments, "--max-tokens", 40)
    files = sorted((tmp_path / "figures").iterdir())
    panels = measure_page.build_panels(measure_tables.read_models(str(tmp_path)))
    wanted = [plot.name for panel in panels for plot in panel.plots]
    assert {"heat-map-0", "heat-map-1", "size-spearman"} < set(wanted)
    assert [file.name for file in files] == sorted(
        f"{name}.{end}" for name in wanted for end in ("png", "svg")
    )
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")


def test_pictures_without_matplotlib(
    folders: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = (folders["gpt2"], "--texts", text_file, "--out", tmp_path / "out", "--figures")
    assert "--figures needs the package matplotlib" in run(capsys, *arguments, status=2)[1]


def test_the_script_of_the_families_gives_the_command_what_it_knows(tmp_path: Path) -> None:
    """`studies/condensation_families.sh`, with a `python` that writes down what it is asked."""
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >> '{asked}'\n")
    python.chmod(0o755)
    script = Path(__file__).resolve().parent.parent / "studies" / "condensation_families.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TEXTS": "a.txt b.txt"}
    subprocess.run(["sh", str(script), str(tmp_path / "out")], env=environment, check=True)
    calls = [line.split() for line in asked.read_text().splitlines()]
    assert [call[:2] for call in calls] == [["-m", "raydisp.measure"]] * 4
    arguments = [measure_command._parser().parse_args(call[2:]) for call in calls]
    assert [Path(one.out).name for one in arguments] == ["gpt2", "qwen2.5", "qwen3", "bloom"]
    for one in arguments:
        assert one.texts == ["a.txt", "b.txt"]
        assert {measure_command.parse_model(name).spec.source for name in one.models} == {"hub"}
