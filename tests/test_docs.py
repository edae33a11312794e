"""The documentation: it builds without a warning, asks no other host for anything, and says what is true."""

from __future__ import annotations

import contextlib
import functools
import html.parser
import http.server
import importlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import yaml
from test_report_browser import Browser

from raydisp import losses, study
from raydisp.config import StudyConfig
from raydisp.losses import gradients
from raydisp.results import parts
from raydisp.studyfile import parse_study

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *PAGES]}


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def plain(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# --- the site -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in PAGES:
        name = "index" if page.stem == "README" else page.stem  # GitHub shows a README, a server an index
        assert (site / page.relative_to(DOCS).with_name(f"{name}.html")).is_file()
    assert not (site / "hooks.py").exists()


def test_recorded_results_join_the_navigation_where_there_are_any(tmp_path: Path) -> None:
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    config = {"docs_dir": str(tmp_path), "nav": ["index.md"]}
    assert hooks["on_config"](config)["nav"] == ["index.md"]
    (tmp_path / "results" / "a").mkdir(parents=True)
    for name in ("b.md", "README.md", "a/c.md"):
        (tmp_path / "results" / name).write_text("# x")
    pages = ["results/README.md", "results/a/c.md", "results/b.md"]
    assert hooks["on_config"](config)["nav"] == ["index.md", {"Recorded results": pages}]


class Asked(html.parser.HTMLParser):
    """Collects what a page makes a browser fetch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        said = dict(attributes)
        if tag == "link" and said.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(said.get("href") or "")
        self.addresses += [said[name] or "" for name in ("src", "srcset", "poster", "data") if name in said]


def test_no_page_asks_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        asked = Asked()
        asked.feed(page.read_text())
        assert [one for one in asked.addresses if re.match(r"(\w+:)?//", one)] == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", sheet.read_text()) == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on loopback."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.browser
def test_a_browser_gets_all_from_one_host_and_nothing_sticks_out(site: Path) -> None:
    window = Browser()
    try:
        with served(site) as address:
            for page in sorted(site.rglob("*.html")):
                for width, dark in ((390, False), (1200, True)):
                    window.looks(width=width, dark=dark)
                    window.driver.get_log("performance")
                    window.driver.get_log("browser")
                    window.driver.get(f"{address}/{page.relative_to(site)}")
                    asked = [one for one in window.requests() if not one.startswith("data:")]
                    assert [one for one in asked if not one.startswith(f"{address}/")] == []
                    assert [one for one in window.complaints() if page.name != "404.html"] == []
                    assert window.ask("document.documentElement.scrollWidth") <= width, (
                        f"{page.name}, {width}"
                    )
                    scheme = window.ask("document.body.getAttribute('data-md-color-scheme')")
                    assert scheme == ("slate" if dark else "default")
    finally:
        window.driver.quit()


# --- what is named is there ---------------------------------------------------------------------------------


def resolves(dotted: str) -> bool:
    """Whether a name is a module, or something in one, or a field of a class in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None) or getattr(found, "model_fields", {}).get(name)
        return found is not None
    return False


@pytest.mark.parametrize("page", TEXTS)
def test_names_of_the_code_exist(page: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", plain(TEXTS[page]))
    dotted = {match[1] for span in spans if (match := re.match(r"(raydisp(?:\.\w+)+)\b(?!/)", span))}
    dotted.discard(parts.VERSION_KEY.decode())  # a key in files
    assert {name for name in dotted if not resolves(name)} == set()
    files = {
        match[0]
        for span in spans
        if (match := re.match(r"(?:raydisp|tests|studies|benchmarks|docs)/[\w./-]+(?=$|[ :])", span))
    }
    assert {name for name in files if not (ROOT / name).exists()} == set()
    in_tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    tests = {span for span in spans if re.fullmatch(r"test_\w+", span) and page.startswith("docs/how-to/")}
    tests.discard("test_frac")  # a field of `data`
    assert {name for name in tests if f"def {name}(" not in in_tests} == set()


def slug(heading: str) -> str:
    """As GitHub and mkdocs make an anchor of a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", plain(TEXTS["README.md"]))
    for link in (one or other for one, other in links):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else ROOT / "README.md"
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


# --- commands -----------------------------------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    """The commands of raydisp in a page's blocks of shell, as lists of arguments after `python -m`."""
    text = "\n".join(block for language in ("sh", "bash") for block in blocks(page, language))
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"python -m (raydisp[^&|>']*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


@functools.cache
def options_of(module: str) -> str:
    """What a command's `--help` tells, and that of its own commands."""
    is_package = hasattr(importlib.import_module(module), "__path__")
    run = importlib.import_module(f"{module}.__main__" if is_package else module).main
    told = io.StringIO()
    for arguments in (
        ["--help"],
        *([["show", "--help"], ["compact", "--help"]] if module == "raydisp.results" else []),
    ):
        with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
            run(arguments)
    return told.getvalue()


@pytest.mark.parametrize("page", TEXTS)
def test_commands_have_the_options_that_are_shown(page: str) -> None:
    for module, *arguments in commands(page):
        known = options_of(module)
        for argument in arguments:
            if argument.startswith("--"):
                assert re.search(rf"{argument}\b", known), f"{module} has no {argument}"
            if argument.startswith("studies/") and "/x." not in argument:
                assert (ROOT / argument).is_file()


QUICK = [
    arguments
    for module, *arguments in commands("docs/getting-started.md")
    if module == "raydisp.study" and {"--dry-run", "--schema", "--simulate"} & set(arguments)
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_do_what_is_said(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    where = [] if "--schema" in arguments else ["--output", str(tmp_path), "--address", "local"]
    assert study.main([*arguments, *where]) == 0
    out = capsys.readouterr().out
    if "--dry-run" in arguments:
        assert "Dry run: nothing was started or written." in out
        assert list(tmp_path.iterdir()) == []
    elif "--simulate" in arguments:
        assert "31 completed; see" in out
    else:
        assert yaml.safe_load(out)["title"] == "StudyConfig"


def test_the_first_study_is_allowed() -> None:
    """The run that the page shows: its file with what `--set` changes."""
    [run] = [
        arguments
        for module, *arguments in commands("docs/getting-started.md")
        if module == "raydisp.study" and "name=first_look" in arguments
    ]
    changes = [run[index + 1] for index, argument in enumerate(run) if argument == "--set"]
    found = parse_study((ROOT / run[0]).read_text(), run[0], changes)
    assert found.train.budget_tokens * (found.search.num_trials + 1) <= 250_000
    assert found.search.startup_trials < found.search.num_trials


# --- study files --------------------------------------------------------------------------------------------

FRAGMENTS = [
    (page, block)
    for page in TEXTS
    if page.startswith("docs/") and page != "docs/clusters.md"
    for block in blocks(page, "yaml")
]


@pytest.mark.parametrize(
    ("page", "block"), FRAGMENTS, ids=[f"{page}-{block.split(':')[0]}" for page, block in FRAGMENTS]
)
def test_parts_of_study_files_are_allowed(page: str, block: str) -> None:
    """In the place of those of a study that is there."""
    base = yaml.safe_load((ROOT / "studies" / "weight_search.yaml").read_text())
    part = parse_yaml(block)
    assert set(part) <= set(StudyConfig.model_fields)
    for name in ("train", "search"):
        if name in part:
            part[name] = {**base[name], **part[name]}
    parse_study(yaml.safe_dump({**base, **part}), page)


def parse_yaml(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)
    return found


# --- code ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in that has results where the pages say."""
    shutil.copytree(ROOT / "tests" / "results_v1", tmp_path / "results" / "weight_search")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/reference/results.md"])
def test_queries_give_rows(page: str, recorded: Path) -> None:
    queries = [query for block in blocks(page, "sql") for query in block.split(";") if query.strip()]
    assert len(queries) >= 2
    for query in queries:
        assert duckdb.sql(query).fetchall(), query


def test_the_results_are_read_with_pandas(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = blocks("docs/reference/results.md", "python")
    exec(block, {})
    assert "trial" in capsys.readouterr().out


def test_the_loss_is_attached(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = blocks("docs/getting-started.md", "python")
    exec(block, {})
    assert -1.0 < float(capsys.readouterr().out) < 0.1


def test_the_loss_that_is_added_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's value is its formula, and its gradient that of finite differences, with a mask too."""
    formula, function = blocks("docs/how-to/add-a-loss.md", "python")
    monkeypatch.setattr(losses, "VARIANTS", dict(losses.VARIANTS))
    names = dict(vars(gradients))
    exec(formula, names)
    monkeypatch.setitem(gradients.LOSSES, "frame_potential", names["frame_potential"])
    exec(function, dict(vars(losses)))
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    squares = (unit @ unit.mT).square()
    expected = (squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)) / (7 * 6)
    assert losses.dispersion_loss(hidden, "frame_potential").item() == pytest.approx(expected.mean().item())
    for counted in (None, mask):
        loss = functools.partial(losses.dispersion_loss, variant="frame_potential", mask=counted)
        torch.autograd.gradcheck(loss, (hidden.clone().requires_grad_(),))
