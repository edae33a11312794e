"""Models from scratch and from folders, GGUF files and the hub's cache: small real ones, made here."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tiny_models import tokenizer, write_gguf

from raydisp import hub, models
from raydisp.config.model import GgufModel, HubModel, ModelConfig, PathModel, ScratchModel
from raydisp.errors import ModelError

CONTEXT = 32
VOCABULARY = 300


def scratch(**fields: Any) -> ScratchModel:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "vocab_size": VOCABULARY}
    return ScratchModel.model_validate({"source": "scratch", **sizes, **fields})


def build(model: ModelConfig, *, seed: int = 0, context_length: int = CONTEXT, **options: Any) -> Any:
    return models.build_model(model, context_length=context_length, eos_token_id=0, seed=seed, **options)


def digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(parameter.detach().numpy().tobytes())
    return sha.hexdigest()


# --- from scratch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_study_file(family: str, tied: bool) -> None:
    model = scratch(family=family, ffn_size=24, tie_embeddings=tied, dropout=0.25)
    built = build(model, vocab_size=310)
    embedding = built.get_input_embeddings().weight
    assert embedding.shape == (310, 16)
    assert embedding.dtype == torch.float32
    assert (built.get_output_embeddings().weight is embedding) == tied
    assert built.config.num_hidden_layers == 2
    assert built.config.max_position_embeddings == CONTEXT
    assert built.config.use_cache is False
    assert built.config.eos_token_id == 0
    assert built.training
    shapes = {tuple(parameter.shape) for parameter in built.parameters()}
    assert {(16, 24), (24, 16)} <= shapes
    assert built(torch.zeros(2, CONTEXT, dtype=torch.long)).logits.shape == (2, CONTEXT, 310)
    summary = models.model_summary(scratch(family=family, ffn_size=24, tie_embeddings=tied), CONTEXT)
    expected = sum(
        p.numel() for p in build(scratch(family=family, ffn_size=24, tie_embeddings=tied)).parameters()
    )
    assert summary == models.ModelSummary(expected, 2, 16, VOCABULARY)


def test_parameters_of_a_gpt2_by_hand() -> None:
    # Embeddings, then per block: two norms, attention in and out, MLP in and out, all with biases; last norm.
    f, block = 16, 0
    block += 2 * 2 * f + (f * 3 * f + 3 * f) + (f * f + f) + (f * 4 * f + 4 * f) + (4 * f * f + f)
    expected = VOCABULARY * f + CONTEXT * f + 2 * block + 2 * f
    assert models.model_summary(scratch(), CONTEXT).num_parameters == expected


def test_fewer_key_value_heads() -> None:
    built = build(scratch(family="llama", num_kv_heads=2))
    assert built.model.layers[0].self_attn.k_proj.weight.shape == (8, 16)
    assert built.model.layers[0].self_attn.q_proj.weight.shape == (16, 16)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_weights_depend_on_the_seed_and_on_nothing_else(family: str) -> None:
    torch.manual_seed(1)
    first = digest(build(scratch(family=family), seed=3))
    torch.manual_seed(2)
    torch.rand(5)
    assert digest(build(scratch(family=family, dropout=0.1), seed=3)) == first
    assert digest(build(scratch(family=family), seed=4)) != first


def test_weights_are_the_same_in_another_process() -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'tests');"
        "from test_models import build, digest, scratch; print(digest(build(scratch(), seed=9)))"
    )
    root = Path(__file__).parent.parent
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(build(scratch(), seed=9))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(scratch(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_dtype_and_device_do_not_matter() -> None:
    expected = digest(build(scratch(), seed=3))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert digest(build(scratch(), seed=3)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_dropout_of_gpt2_is_everywhere_or_nowhere() -> None:
    ids = torch.arange(CONTEXT)[None]
    without, with_it = build(scratch()), build(scratch(dropout=0.5))
    assert torch.equal(without(ids).logits, without(ids).logits)
    assert not torch.equal(with_it(ids).logits, with_it(ids).logits)
    found = [module.p for module in with_it.modules() if isinstance(module, torch.nn.Dropout)]
    # After the embedding, and in each block after the attention weights, its output and the MLP.
    assert found == [0.5] * (1 + 3 * 2)


# --- from a folder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2 to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def at(path: Path, **fields: Any) -> PathModel:
    return PathModel.model_validate({"source": "path", "path": str(path), **fields})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_saved_model_comes_back_with_its_dropout_set(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPT2LMHeadModel

    models.check_model(at(saved), 64)
    with caplog.at_level("INFO", logger="raydisp"):
        built = build(at(saved), context_length=64, vocab_size=257)
    assert digest(built) == digest(GPT2LMHeadModel.from_pretrained(saved))
    assert {module.p for module in built.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert "attn_pdrop (was 0.1)" in caplog.text
    assert built.config.use_cache is False
    assert built.training
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    expected = sum(parameter.numel() for parameter in built.parameters())
    assert models.model_summary(at(saved), 64) == models.ModelSummary(expected, 2, 16, VOCABULARY)
    kept = build(at(saved, dropout=0.1))
    assert {module.p for module in kept.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}


def test_half_precision_is_widened(folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert {parameter.dtype for parameter in build(at(folder)).parameters()} == {torch.float32}


def test_dropout_fields_of_other_families() -> None:
    from transformers import GPTNeoXConfig, LlamaConfig, OPTConfig

    opt = OPTConfig(dropout=0.1, attention_dropout=0.2, layerdrop=0.3)
    assert models.set_dropout(opt, 0.05) == {"dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.3}
    assert (opt.dropout, opt.attention_dropout, opt.layerdrop) == (0.05, 0.05, 0.0)
    assert models.set_dropout(LlamaConfig(), 0.0) == {}
    neox = GPTNeoXConfig(hidden_dropout=0.1, attention_dropout=0.1)
    models.set_dropout(neox, 0.0)
    assert (neox.hidden_dropout, neox.attention_dropout) == (0.0, 0.0)


def test_the_tokenizer_comes_along(saved: Path) -> None:
    found = models.load_tokenizer(at(saved))
    assert (len(found), found.eos_token_id) == (257, 0)
    assert found.decode(found("any text, ü")["input_ids"]) == "any text, ü"


def test_a_tokenizer_without_end_of_text(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no eos_token, sep_token or bos_token"):
        models.load_tokenizer(at(folder))
    path.write_text(json.dumps({**settings, "bos_token": "<|endoftext|>"}))
    assert models.load_tokenizer(at(folder)).eos_token_id == 0
    assert "its bos_token '<|endoftext|>' ends documents" in caplog.text


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        models.load_tokenizer(at(folder))


def test_what_pins_a_folder(folder: Path) -> None:
    revision, identity = models.resolve_revision(at(folder)), models.tokenizer_identity(at(folder))
    edit_config(folder, n_positions=32)
    assert models.resolve_revision(at(folder)) != revision
    identity, revision = models.tokenizer_identity(at(folder)), models.resolve_revision(at(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert models.resolve_revision(at(folder)) != revision, "weights belong to the model"
    assert models.tokenizer_identity(at(folder)) == identity, "and not to its tokenizer"


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r'model\.path = ".*absent" does not exist'):
        models.check_model(at(tmp_path / "absent"), 8)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        models.check_model(at(tmp_path), 8)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="configuration cannot be loaded"):
        models.check_model(at(tmp_path), 8)
    with pytest.raises(ModelError, match="is a file"):
        models.check_model(at(tmp_path / "config.json"), 8)


def test_a_context_longer_than_the_positions(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"64 positions, fewer than data\.context_length = 65"):
        models.check_model(at(saved), 65)
    with pytest.raises(ModelError, match=r"64 positions"):
        build(at(saved), context_length=65)


def test_an_encoder_is_not_a_causal_language_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForMaskedLM, not a causal language model"):
        models.check_model(at(tmp_path), 8)


def test_weights_cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be loaded .*complete"):
        build(at(folder))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    models.check_model(at(folder), 8)
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(at(folder))


def test_missing_weights_are_not_left_random(folder: Path) -> None:
    edit_config(folder, n_layer=3)
    with pytest.raises(ModelError, match=r"lacks 12 weights .*h\.2"):
        build(at(folder))


def test_a_tokenizer_larger_than_the_embedding(saved: Path) -> None:
    with pytest.raises(ModelError, match="300 token embeddings, fewer than the 301 tokens"):
        build(at(saved), vocab_size=301)


def test_weights_in_torch_format_are_read_but_not_run(folder: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    expected = digest(build(at(folder)))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert digest(build(at(folder))) == expected

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "ran",)

    torch.save({**state, "harmful": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(at(folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"harmful": Harmful()}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(at(folder))
    assert not (folder / "ran").exists()


def test_code_of_a_model_runs_only_when_the_file_says_so(folder: Path) -> None:
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
        "class OwnModel(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    edit_config(
        folder,
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    for attempt in (lambda: models.check_model(at(folder), 8), lambda: build(at(folder))):
        with pytest.raises(ModelError, match=r"model\.trust_remote_code = true"):
            attempt()
    assert not (folder / "ran").exists()
    assert type(build(at(folder, trust_remote_code=True))).__name__ == "OwnModel"
    assert (folder / "ran").exists()


# --- from a GGUF file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def gguf_model(path: Path) -> GgufModel:
    return GgufModel.model_validate({"source": "gguf", "path": str(path)})


def test_a_gguf_file_is_a_model_and_a_tokenizer(gguf_file: Path) -> None:
    import numpy as np

    model = gguf_model(gguf_file)
    models.check_model(model, 64)
    found = models.load_tokenizer(model)
    assert found.eos_token_id == 0
    assert found.decode(found("any text, ü")["input_ids"]) == "any text, ü"
    built = build(model, context_length=64, vocab_size=len(found))
    assert type(built).__name__ == "LlamaForCausalLM"
    written = np.random.RandomState(0).standard_normal((258, 16)).astype(np.float16)
    np.testing.assert_array_equal(built.get_input_embeddings().weight.detach().numpy(), written)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    expected = sum(parameter.numel() for parameter in built.parameters())
    assert models.model_summary(model, 64) == models.ModelSummary(expected, 2, 16, 258)
    assert models.resolve_revision(model) == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="64 positions"):
        models.check_model(model, 65)


def test_what_is_not_a_gguf_file(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        models.check_model(gguf_model(tmp_path / "absent.gguf"), 8)
    with pytest.raises(ModelError, match="is a folder"):
        models.check_model(gguf_model(tmp_path), 8)
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04 an archive")
    with pytest.raises(ModelError, match=r"not a GGUF file: it begins with b'PK\\x03\\x04'"):
        models.check_model(gguf_model(tmp_path / "other.gguf"), 8)
    (tmp_path / "short.gguf").write_bytes(gguf_file.read_bytes()[:3000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.check_model(gguf_model(tmp_path / "short.gguf"), 8)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install raydisp\[gguf\]"):
        models.check_model(gguf_model(gguf_file), 8)


# --- from the hub -------------------------------------------------------------------------------------


def hub_model(name: str, **fields: Any) -> HubModel:
    return TypeAdapter(HubModel).validate_python({"source": "hub", "id": name, **fields})


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub on a port that nobody listens on: the same with and without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_a_model_that_is_nowhere_is_told_within_seconds(no_network: Path) -> None:
    started = time.monotonic()
    for attempt in (models.check_model, models.model_summary):
        with pytest.raises(ModelError, match=r'model\.id = "no-one/nothing" is not in the local cache'):
            attempt(hub_model("no-one/nothing"), 8)
    with pytest.raises(ModelError, match="not a name that the hub allows"):
        models.check_model(hub_model("no/such/name"), 8)
    assert time.monotonic() - started < 10


def test_a_hub_that_never_answers_is_given_up(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    # As with a dead name server, whose look-up no timeout of a request covers.
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: time.sleep(20))
    monkeypatch.setattr(hub, "ANSWER_TIMEOUT_S", 0.2)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"does not answer \(TimeoutError: no answer within 0\.2 s\)"):
        models.check_model(hub_model("no-one/nothing"), 8)
    assert time.monotonic() - started < 10


def test_a_cached_model_is_read_without_a_network(no_network: Path, saved: Path) -> None:
    sha = "89abcdef0123456789abcdef0123456789abcdef"
    cached = no_network / "models--some-one--tiny"
    shutil.copytree(saved, cached / "snapshots" / sha)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(sha)
    model = hub_model("some-one/tiny", revision="v1")
    started = time.monotonic()
    models.check_model(model, 64)
    assert models.resolve_revision(model) == sha
    assert models.resolve_revision(hub_model("some-one/tiny")) == sha, "the only commit there is"
    assert digest(build(model, revision=sha)) == digest(build(at(saved)))
    assert len(models.load_tokenizer(model, sha)) == 257
    assert models.tokenizer_identity(model) == f"some-one/tiny@{sha}"
    assert time.monotonic() - started < 10, "something waits for the network"
    with pytest.raises(ModelError, match="'v2' is not in the local cache"):
        models.check_model(hub_model("some-one/tiny", revision="v2"), 64)
    (cached / "snapshots" / sha / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(model)


def test_a_folder_with_the_name_of_a_hub_model(
    no_network: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"also a folder here .* model\.source = path"):
        models.check_model(hub_model("gpt2"), 8)
