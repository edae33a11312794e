"""The hub, imitated by a small server on this machine: pinned while it answers, and from the cache after.

huggingface_hub, transformers and datasets read the hub's address when they are imported, so all of it happens
in one process of its own, which runs this file as a script.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL_SHA, DATASET_SHA = "a" * 40, "b" * 40
TEXTS = [f"document {i} speaks of the number {i * i}" for i in range(300)]


class Hub(http.server.BaseHTTPRequestHandler):
    """What the three libraries ask of the hub, over the folders models/ and datasets/ of `root`."""

    protocol_version = "HTTP/1.1"
    root: Path
    gone = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.gone:
            # A connection that was kept open outlives the server's socket.
            self.close_connection = True
            return None
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api = path.startswith("/api/")
        parts = path.removeprefix("/api").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        folder, rest = self.root / kind / "/".join(parts[:2]), parts[2:]
        sha = MODEL_SHA if kind == "models" else DATASET_SHA
        if parts[1:2] == ["gated"]:
            return self.answer(403, {}, error="GatedRepo")
        if not folder.is_dir():
            return self.answer(404, {}, error="RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", "v1", sha):
            return self.answer(404, {}, error="RevisionNotFound")
        files = {p.name: {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in
                 sorted(folder.iterdir())}  # fmt: skip
        if api and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": "/".join(parts[:2]), "sha": sha, "siblings": siblings, "tags": []})
        if api and rest[0] == "tree":
            return self.answer(200, list(files.values()) if len(rest) == 2 else [])
        if api and rest[0] == "paths-info":
            asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            return self.answer(200, [files[name] for name in asked["paths"] if name in files])
        if rest[0] == "resolve" and "/".join(rest[2:]) in files:
            return self.answer(200, (folder / rest[2]).read_bytes(), ETag=f'"{rest[2]}"', commit=sha)
        return self.answer(404, {}, error="EntryNotFound", commit=sha)

    do_HEAD = do_POST = do_GET  # noqa: N815 - names that the base class looks for

    def answer(self, code: int, body: Any, *, error: str = "", commit: str = "", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        begin, end = 0, len(content)
        wanted = self.headers.get("Range")
        if wanted and code == 200:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first or 0), min(end, int(last) + 1 if last else end)
            code, headers["Content-Range"] = 206, f"bytes {begin}-{end - 1}/{len(content)}"
        self.send_response(code)
        for name, value in {**headers, "X-Error-Code": error, "X-Repo-Commit": commit}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[begin:end])


def main(root: Path) -> dict[str, Any]:
    Hub.root = root
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(root / "home"),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    from raydisp import models
    from raydisp.config.data import HubData
    from raydisp.config.model import HubModel
    from raydisp.data import corpus

    def model(id: str, **fields: Any) -> HubModel:
        return HubModel.model_validate({"source": "hub", "id": id, **fields})

    def dataset(path: str, **fields: Any) -> HubData:
        return HubData.model_validate({"source": "hub", "path": path, "context_length": 8, **fields})

    def message(act: Callable[[], Any]) -> str:
        with pytest.raises(Exception) as raised:
            act()
        return f"{raised.type.__name__}: {raised.value}"

    def use() -> dict[str, Any]:
        started = time.monotonic()
        tiny, little = model("some-one/tiny", revision="v1"), dataset("some-one/Little")
        models.check_model(tiny, 16)
        revision = models.resolve_revision(tiny)
        built: Any = models.build_model(tiny, context_length=16, eos_token_id=0, seed=0, revision=revision)
        splits = list(corpus.split_documents(little))
        return {
            "model_revision": revision,
            "weight": built.get_input_embeddings().weight[1].tolist(),
            "eos": models.load_tokenizer(tiny, revision).eos_token,
            "dataset": corpus.describe(little).source,
            "dataset_revision": corpus.resolve_data_revision(little),
            "texts": [text for _, _, text in splits],
            "opened": corpus.open_corpus(little).sha256,
            "elapsed_s": time.monotonic() - started,
        }

    online = use()
    online["messages"] = {
        "model": message(lambda: models.check_model(model("some-one/absent"), 8)),
        "revision": message(lambda: models.check_model(model("some-one/tiny", revision="v9"), 8)),
        "gated": message(lambda: models.check_model(model("some-one/gated"), 8)),
        "dataset": message(lambda: corpus.describe(dataset("some-one/absent"))),
        "configuration": message(lambda: corpus.describe(dataset("some-one/Little", name="big"))),
        "column": message(lambda: list(corpus.documents(dataset("some-one/Little", text_field="body")))),
    }
    Hub.gone = True
    server.shutdown()
    server.server_close()
    offline = use()
    # Nothing but the prepared Arrow files is left: they are enough.
    for path in (root / "home" / "hub" / "datasets--some-one--Little" / "snapshots" / DATASET_SHA).iterdir():
        path.unlink()
    little = dataset("some-one/Little", revision=DATASET_SHA)
    offline["prepared_texts"] = [text for _, text in corpus.documents(little)]
    offline["messages"] = {"model": message(lambda: models.check_model(model("some-one/other"), 8))}
    return {"online": online, "offline": offline}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("hub")
    folder = root / "models" / "some-one" / "tiny"
    config = GPT2Config(vocab_size=8, n_positions=16, n_embd=4, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"[end]": 0, "[unknown]": 1}, unk_token="[unknown]"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[end]").save_pretrained(folder)
    (root / "datasets" / "some-one" / "Little").mkdir(parents=True)
    (root / "datasets" / "some-one" / "Little" / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    )
    child = subprocess.run(
        [sys.executable, __file__, str(root)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout.splitlines()[-1]))


@pytest.mark.parametrize("when", ["online", "offline"])
def test_models_and_datasets_are_pinned_and_read(found: dict[str, Any], when: str) -> None:
    seen = found[when]
    assert (seen["model_revision"], seen["dataset_revision"]) == (MODEL_SHA, DATASET_SHA)
    assert seen["texts"] == TEXTS
    assert seen["eos"] == "[end]"
    assert DATASET_SHA[:12] in seen["dataset"]


def test_without_the_hub_the_cache_gives_the_same(found: dict[str, Any]) -> None:
    assert found["offline"]["weight"] == found["online"]["weight"]
    assert found["offline"]["opened"] == found["online"]["opened"]
    assert found["offline"]["prepared_texts"] == TEXTS
    # One file's retries without a network would alone take longer.
    assert found["offline"]["elapsed_s"] < 15


@pytest.mark.parametrize(
    ("when", "which", "expected"),
    [
        ("online", "model", ["ModelError", 'model.id = "some-one/absent"', "not a model that the hub knows"]),
        ("online", "revision", ["ModelError", "no revision 'v9'", "branch, a tag or a commit"]),
        ("online", "gated", ["ModelError", "gated", "HF_TOKEN"]),
        ("online", "dataset", ["DataError", 'data.path = "some-one/absent"', "check the spelling"]),
        ("online", "configuration", ["DataError", "cannot be loaded", "data.name"]),
        ("online", "column", ["DataError", "no column", "body", "text"]),
        ("offline", "model", ["ModelError", "not in the local cache and the hub does not answer"]),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    found: dict[str, Any], when: str, which: str, expected: list[str]
) -> None:
    for part in expected:
        assert part in found[when]["messages"][which]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
