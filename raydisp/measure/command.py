"""The command of `raydisp.measure`: models and texts in, tables and one page out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from raydisp import models, results, storage
from raydisp.boundary import run_command
from raydisp.config.data import Files
from raydisp.config.model import GgufModel, HubModel, PathModel
from raydisp.data import corpus, python_docs
from raydisp.errors import EXIT_DONE, EXIT_FAILED_TRIALS, DataError, ModelError
from raydisp.figures.paper import check_matplotlib, write_figures
from raydisp.measure import DEFAULT_MAX_TOKENS, DEFAULT_NUM_TEXTS, Measured, measure_condensation
from raydisp.measure import tables as measure_tables
from raydisp.measure.page import build_panels, render_page
from raydisp.results.trial_list import format_table
from raydisp.trial import kept_models
from raydisp.versions import code_version, package_versions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PAGE_NAME = "condensation.html"
LINE_EVERY_S = 20.0
"""Without a terminal, a line of progress this often."""

# A name or owner/name of the hub, and a branch, tag or commit.
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A model as the command was told it.

    Attributes:
        name: for people; short.
        model: what identifies it: the hub's name, with the revision if one was given, or an absolute path.
        spec: where it is read from.
    """

    name: str
    model: str
    spec: HubModel | PathModel | GgufModel


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a measurement.

    Attributes:
        source: where they are from, in words.
        sha256: of the texts, before any is cut.
    """

    texts: list[str]
    source: str
    sha256: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done, 1 a model could not be measured, 2 a mistake of the user, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return run_command(
        "raydisp.measure",
        lambda: _run(arguments),
        interrupted="interrupted; models that were done have their rows, the same command measures all anew",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.measure",
        description="Measure embedding condensation: how far the token vectors of each layer of a causal "
        "language model point the same way. Writes the tables models and condensation (Parquet) and "
        f"{PAGE_NAME} into a folder; several models make a plot over model size.",
        epilog="Exit status: 0 done, 1 a model could not be measured, 2 user error, 130 interrupted.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a model of the Hugging Face hub (owner/name, or owner/name@revision), a local folder (a kept "
        "or an exported model of a study too), or a GGUF file",
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="FILE",
        help="text files (one text each), JSON lines or Parquet (one text a row); globs too. Without it: the "
        "English prose that ships with CPython",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field of a JSON line or column of a Parquet file",
    )
    parser.add_argument(
        "--num-texts",
        type=int,
        default=DEFAULT_NUM_TEXTS,
        metavar="N",
        help="the first N texts (default: 100)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="a text counts with its first N tokens (default: 512)",
    )
    parser.add_argument(
        "--out",
        default="results/condensation",
        metavar="DIR",
        help="folder for tables and page (default: %(default)s)",
    )
    parser.add_argument(
        "--figures",
        action="store_true",
        help="PNG files of the figures too, in DIR/figures (needs matplotlib)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the model; auto: float32, or bfloat16 on a GPU of which float32 weights would fill half",
    )
    parser.add_argument(
        "--batch-texts",
        type=int,
        metavar="N",
        help="texts of one length in a forward pass; by memory if not given",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a model: read it first",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    _check_arguments(arguments)
    if arguments.figures:
        check_matplotlib()
    told = list(dict.fromkeys(arguments.models))
    named = [parse_model(one, trust_remote_code=arguments.trust_remote_code) for one in told]
    out = storage.local_absolute(arguments.out)
    storage.check_writable(out)
    texts = read_texts(arguments)
    device = _device(arguments.device)
    if not _shows_bars(arguments):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if not arguments.quiet:
        _tell(f"{_counted(len(texts.texts), 'text')} from {texts.source}")
    done: list[measure_tables.Row] = []
    failed = 0
    try:
        for model in named:
            try:
                done.append(_measure_one(model, texts, arguments, device, out))
            except ModelError as error:
                failed += 1
                _tell(f"{model.name} is not measured: {_in_our_words(str(error))}")
    finally:
        # Of the models that are done, whatever ended the others; a second Ctrl-C ends this too.
        if done:
            place = write_page(out, figures=arguments.figures)
    if done:
        print(_table(done))
        print(place)
    return EXIT_FAILED_TRIALS if failed else EXIT_DONE


def _shows_bars(arguments: argparse.Namespace) -> bool:
    return not arguments.quiet and sys.stderr.isatty()


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name, values in (
        ("MODEL", arguments.models),
        ("--texts", arguments.texts or ()),
        ("--out", [arguments.out]),
    ):
        if "" in values:
            raise DataError(f'{name} "" is empty: name a place')
    if arguments.max_tokens < 2:
        raise DataError(f"--max-tokens {arguments.max_tokens} is too few: a cosine takes two tokens")
    for name in ("num_texts", "batch_texts"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _device(told: str) -> torch.device:
    import torch

    if told == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device here; use --device cpu, or auto")
    return torch.device("cuda" if told != "cpu" and torch.cuda.is_available() else "cpu")


# --- what is measured ------------------------------------------------------------------------------------


def parse_model(told: str, *, trust_remote_code: bool = False) -> NamedModel:
    """What a MODEL of the command line means: a file is a GGUF file, a folder a folder, the rest the hub.

    Raises:
        ModelError: it looks like a place on this machine where nothing is, or like nothing that the hub has.
    """
    path = Path(told).expanduser()
    if path.is_file():
        place = str(path.absolute())
        return NamedModel(path.name.removesuffix(".gguf"), place, GgufModel(source="gguf", path=place))
    if path.is_dir():
        place = str(path.absolute())
        spec = PathModel(source="path", path=place, trust_remote_code=trust_remote_code)
        return NamedModel(_folder_name(path), place, spec)
    match = _HUB_NAME.fullmatch(told)
    if match is None or told.startswith((".", "/", "~")) or told.endswith(".gguf"):
        raise ModelError(
            f"MODEL {told} does not exist (looked for {path.absolute()}), and is no name of the hub; give a "
            "folder, a GGUF file, or owner/name"
        )
    hub_model = HubModel(source="hub", id=match[1], revision=match[2], trust_remote_code=trust_remote_code)
    return NamedModel(told, told, hub_model)


def _folder_name(path: Path) -> str:
    about = kept_models.read_marker(str(path.absolute()))  # a run's model that a study kept
    if about is not None and {"study", "arm", "seed"} <= set(about):
        return f"{about['study']}: {about['arm']}, seed {about['seed']}"
    return path.absolute().name


def read_texts(arguments: argparse.Namespace) -> Texts:
    """The first texts of the files, or of CPython's prose.

    Raises:
        DataError: a file is not there or cannot be read, or there is no text in any.
    """
    number = arguments.num_texts
    if arguments.texts is None:
        texts, source = _prose(number, arguments.max_tokens)
    else:
        files = Files(source="files", paths=arguments.texts, text_field=arguments.text_field or "text")
        texts = []
        try:
            for _, text in corpus.documents(files):
                texts.append(text)
                if len(texts) == number:
                    break
        except DataError as error:
            raise DataError(_in_our_words(str(error))) from None
        source = ", ".join(arguments.texts)
        if not texts:
            raise DataError(f"--texts {source}: there is no text in it; name files with text in them")
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return Texts(texts, source, digest.hexdigest())


def _prose(number: int, max_tokens: int) -> tuple[list[str], str]:
    """Of CPython's prose the documents that fill the tokens, in an order that mixes topics and modules."""
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        texts = [text for _, text in python_docs.documents()]
    except DataError:
        raise DataError(
            "this Python comes without the sources of its library, whose prose is the default; name files "
            "with --texts"
        ) from None
    # English prose has four to five characters a token; documents that are much too long do no harm.
    long = [text for text in texts if len(text) >= 5 * max_tokens] or sorted(texts, key=len)[-number:]
    long.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    return long[:number], f"the English prose that ships with CPython {version} (no --texts given)"


def _in_our_words(message: str) -> str:
    """A message about a study file's field as one about this command's arguments."""
    for pattern, ours in (
        (r"data\.paths\[\d+\] = ", "--texts "),
        (r"data\.paths = \S+: ", ""),
        (r"data\.paths", "--texts"),
        (r"data\.text_field", "--text-field"),
        (r'model\.(?:id|path) = "([^"]*)"', r"\1"),
        (r"model\.trust_remote_code = true", "--trust-remote-code"),
        (r"use model\.source = path for the folder", "give its path as ./NAME"),
        (r"for a folder written by save_pretrained use model\.source = path", "give a GGUF file or a folder"),
    ):
        message = re.sub(pattern, ours, message)
    return message


# --- one model -------------------------------------------------------------------------------------------


def _measure_one(
    named: NamedModel, texts: Texts, arguments: argparse.Namespace, device: torch.device, out: str
) -> measure_tables.Row:
    """Read a model, measure it, write its rows; returns the one of `models`."""
    started_at, started = results.now(), time.monotonic()
    if not arguments.quiet:
        _tell(f"{named.name}: loading")
    model, tokenizer, revision, dtype = _load(
        named.spec, arguments.dtype, device, show_progress=_shows_bars(arguments)
    )
    config = model.config.get_text_config()
    max_tokens = _cut_to_positions(named.name, arguments.max_tokens, config)
    loaded = time.monotonic()
    try:
        with _Bar(named.name, len(texts.texts), quiet=arguments.quiet) as bar:
            measured = measure_condensation(
                model,
                tokenizer,
                texts.texts,
                max_tokens=max_tokens,
                batch_sequences=arguments.batch_texts,
                progress=bar.advance,
            )
    except ModelError:
        raise
    # Models raise whatever they like (out of memory, a kernel that is missing): the next one's turn.
    except Exception as error:
        logger.debug("%s failed", named.name, exc_info=True)
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no message"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"{kind}{reason}") from error
    if measured.num_left_out and not arguments.quiet:
        _tell(f"{named.name}: {_counted(measured.num_left_out, 'text')} of fewer than two tokens left out")
    about = {
        "name": named.name,
        "model": named.model,
        "source": named.spec.source,
        "model_revision": revision,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_layers": len(measured.cosine_mean) - 1,
        "hidden_size": config.hidden_size,
        "max_tokens": max_tokens,
        "texts": texts.source,
        "texts_sha256": texts.sha256,
        "dtype": dtype,
        "device": _device_name(device),
        "load_s": loaded - started,
        "measure_s": time.monotonic() - loaded,
        "code_version": code_version(),
        "packages_json": json.dumps(package_versions(), sort_keys=True),
        "started_at": started_at,
        "ended_at": results.now(),
    }
    row = measure_tables.model_row(about, measured)
    measure_tables.write_model(out, row, measure_tables.condensation_rows(named.name, named.model, measured))
    if not arguments.quiet:
        _tell(f"{named.name}: {_told(measured)}; {about['measure_s']:.0f} s")
    return row


def _load(
    spec: HubModel | PathModel | GgufModel, told_dtype: str, device: torch.device, *, show_progress: bool
) -> tuple[Any, Any, str | None, str]:
    """The model on its device, its tokenizer, what pins it, and the name of its dtype."""
    import torch

    revision = models.resolve_revision(spec)
    commit = revision if isinstance(spec, HubModel) else None
    tokenizer = models.load_tokenizer(spec, commit)
    dtype = told_dtype
    if dtype == "auto":
        dtype = "float32"
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if 4 * models.model_summary(spec, 2).num_parameters > free / 2:
                dtype = "bfloat16"
    # transformers draws its bar of a GGUF file's tensors whatever its settings are and whoever looks.
    hush = contextlib.nullcontext() if show_progress else contextlib.redirect_stderr(io.StringIO())
    with hush:
        model: Any = models.build_model(
            spec,
            context_length=2,  # as few as can be measured; what the model has is looked up later
            eos_token_id=tokenizer.eos_token_id,
            seed=0,
            revision=commit,
            dtype=getattr(torch, dtype),
        )
    try:
        return model.to(device).eval(), tokenizer, revision, dtype
    except torch.OutOfMemoryError:
        raise ModelError(
            "the GPU has not enough free memory for it; try --dtype bfloat16 or --device cpu"
        ) from None


def _cut_to_positions(name: str, max_tokens: int, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and max_tokens > positions:
        _tell(
            f"{name}: it has {positions} positions, so texts count with {positions} tokens and not "
            f"{max_tokens}"
        )
        return positions
    return max_tokens


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _told(measured: Measured) -> str:
    trend = "undefined" if measured.spearman is None else f"{measured.spearman:+.2f}"
    half = measured.last_half_mean
    return f"Spearman {trend}, last-half mean {'not a number' if math.isnan(half) else f'{half:.3f}'}"


class _Bar:
    """A bar over the texts of a model; a line now and then without a terminal."""

    def __init__(self, name: str, total: int, *, quiet: bool) -> None:
        self._name, self._total, self._quiet = name, total, quiet
        self._done, self._last = 0, time.monotonic()
        self._lines = not sys.stderr.isatty()
        self._bar = tqdm(
            total=total, unit="text", desc=name, disable=quiet or self._lines, dynamic_ncols=True, leave=False
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, number: int) -> None:
        """So many more texts are done."""
        self._done += number
        self._bar.update(number)
        if self._lines and not self._quiet and time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            _tell(f"{self._name}: {self._done}/{self._total} texts")


# --- what comes out --------------------------------------------------------------------------------------


def write_page(out: str, *, figures: bool = False) -> str:
    """The page, and with `figures` PNG and SVG files, of all models in a folder; returns its place."""
    found = measure_tables.read_models(out)
    place = storage.join(out, PAGE_NAME)
    storage.write_bytes(place, render_page(found).encode())
    if figures:
        write_figures(build_panels(found), storage.join(out, "figures"))
    return place


def _table(rows: Sequence[measure_tables.Row]) -> str:
    shown = [
        {
            "model": row["name"],
            "parameters": f"{row['num_parameters'] / 1e6:,.1f} M",
            "layers": row["num_layers"],
            "texts": row["num_texts"],
            "tokens": row["num_tokens"],
            "Spearman": _number(row["spearman"], "+.3f"),
            "Kendall": _number(row["kendall"], "+.3f"),
            "last state": _number(row["last_1_mean"], ".3f"),
            "last half": _number(row["last_half_mean"], ".3f"),
            "+-": _number(row["last_half_stderr"], ".3f"),
        }
        for row in rows
    ]
    columns = list(shown[0])
    return format_table(shown, columns, to_the_right=set(columns[1:]))


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _tell(text: str) -> None:
    tqdm.write(f"raydisp.measure: {text}", file=sys.stderr)
