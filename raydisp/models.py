"""A causal language model and its tokenizer: from scratch, from the hub, a folder or a GGUF file.

Everything that can be told early is told by `check_model` and `model_summary`, which read configurations and
never weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raydisp import hub
from raydisp.config.model import GgufModel, HubModel, ModelConfig, PathModel, ScratchModel
from raydisp.errors import ModelError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


@dataclass(frozen=True)
class ModelSummary:
    """Sizes of a model.

    Attributes:
        num_parameters: weights shared between two layers (tied embeddings) count once.
        num_layers: transformer blocks.
        hidden_size: features of a hidden state.
        vocab_size: rows of the input embedding.
    """

    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int


# --- early checks -------------------------------------------------------------------------------------


def check_model(model: ModelConfig, context_length: int) -> None:
    """Refuse a model that is not there, not a causal language model, or too short for the context.

    Args:
        context_length: tokens in a sequence.
    Raises:
        ModelError: within seconds also without a network; no weights are read.
    """
    if isinstance(model, ScratchModel):
        return
    config = _pretrained_config(model, None)
    _check_causal(model, config)
    _check_positions(model, config, context_length)


def model_summary(model: ModelConfig, context_length: int) -> ModelSummary:
    """Sizes of the model, from its configuration alone: no weight is allocated or read.

    Raises:
        ModelError: as `check_model`.
    """
    if isinstance(model, ScratchModel):
        count = _count_scratch_parameters(model, context_length)
        return ModelSummary(count, model.num_layers, model.hidden_size, model.vocab_size)
    import torch
    from transformers import AutoModelForCausalLM

    config = _pretrained_config(model, None)
    _check_causal(model, config)
    _check_positions(model, config, context_length)
    trust = getattr(model, "trust_remote_code", False)
    with _model_errors(model), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    text = config.get_text_config()
    return ModelSummary(
        sum(parameter.numel() for parameter in built.parameters()),
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
    )


def ties_embeddings(model: ModelConfig) -> bool:
    """Whether the output head shares the weight of the input embeddings, from the configuration alone.

    Raises:
        ModelError: the model is not there.
    """
    if isinstance(model, ScratchModel):
        return model.tie_embeddings
    return bool(_pretrained_config(model, None).get_text_config().tie_word_embeddings)


def vocabulary_size(model: HubModel | PathModel | GgufModel, revision: str | None = None) -> int:
    """Tokens that the model predicts, from the configuration alone; at least those of its tokenizer.

    Args:
        revision: commit of a hub model; None resolves it anew.
    Raises:
        ModelError: the model is not there.
    """
    return int(_pretrained_config(model, revision).get_text_config().vocab_size)


def _count_scratch_parameters(model: ScratchModel, context_length: int) -> int:
    """By arithmetic: torch and transformers take seconds to import, and the command needs them for nothing
    else."""
    hidden, vocabulary = model.hidden_size, model.vocab_size
    ffn_size = model.ffn_size or 4 * hidden
    embeddings = vocabulary * hidden * (1 if model.tie_embeddings else 2)
    if model.family == "gpt2":
        attention = 4 * hidden * hidden + 4 * hidden
        mlp = 2 * hidden * ffn_size + ffn_size + hidden
        norms = 4 * hidden
        outside = context_length * hidden + 2 * hidden  # positions; the final norm
    else:
        head_size = hidden // model.num_heads
        attention = 2 * hidden * hidden + 2 * hidden * head_size * (model.num_kv_heads or model.num_heads)
        mlp = 3 * hidden * ffn_size
        norms = 2 * hidden + (2 * head_size if model.family == "qwen3" else 0)
        outside = hidden
    return embeddings + outside + model.num_layers * (attention + mlp + norms)


def resolve_revision(model: ModelConfig) -> str | None:
    """What pins the model's content: None for one from scratch.

    Returns:
        hub: the commit (40 hexadecimal digits). gguf: sha256 of the file. path: sha256 over the names and
        contents of the files of the folder, weights included. Hashing reads everything once, at about the
        speed of the disk: call it once per study.
    Raises:
        ModelError: it is not there.
    """
    if isinstance(model, HubModel):
        return _commit(model, None).sha
    if isinstance(model, GgufModel):
        return _file_sha256(_gguf_file(model))
    if isinstance(model, PathModel):
        return _folder_sha256(_model_folder(model), weights=True)
    return None


def tokenizer_identity(model: HubModel | PathModel | GgufModel) -> str:
    """What pins the model's tokenizer: a commit, or sha256 of the files that it may be made of.

    Raises:
        ModelError: the model is not there.
    """
    if isinstance(model, HubModel):
        return f"{model.id}@{_commit(model, None).sha}"
    if isinstance(model, GgufModel):
        return _file_sha256(_gguf_file(model))
    return _folder_sha256(_model_folder(model), weights=False)


# --- building -----------------------------------------------------------------------------------------


def build_model(
    model: ModelConfig,
    *,
    context_length: int,
    eos_token_id: int,
    vocab_size: int | None = None,
    seed: int,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """A transformers causal language model on the CPU, in training mode, without a key-value cache.

    The weights of a model from scratch depend on (model, context_length, vocab_size, seed) only and are the
    same in every process; the global random state is left as it was.

    Args:
        context_length: positions of a model from scratch; a pretrained one must have at least as many.
        eos_token_id: written into the configuration of a model from scratch; a pretrained one keeps its own.
        vocab_size: of a model from scratch, None means `model.vocab_size`; a pretrained one must have at
            least as many embedding rows.
        seed: of the initial weights; a pretrained model does not depend on it.
        revision: commit of a hub model, as `resolve_revision` found it; None resolves it anew.
        dtype: of the weights of a pretrained model; None means float32, which one from scratch always has.
    Raises:
        ModelError: not there, not readable, not a causal language model, too short or too small.
    """
    if isinstance(model, ScratchModel):
        return _build_scratch(model, context_length, eos_token_id, vocab_size, seed)
    return _load_pretrained(model, context_length, vocab_size, revision, dtype)


def _build_scratch(
    model: ScratchModel, context_length: int, eos_token_id: int, vocab_size: int | None, seed: int
) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    config = _scratch_config(model, context_length, vocab_size or model.vocab_size, eos_token_id)
    # The default generator alone: torch.manual_seed would also reseed every GPU, which is not restored here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        built: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return built.train()


def _scratch_config(
    model: ScratchModel, context_length: int, vocab_size: int, eos_token_id: int | None
) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    ffn_size = model.ffn_size or 4 * model.hidden_size
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "use_cache": False,
    }
    if model.family == "gpt2":
        return GPT2Config(
            n_positions=context_length,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_inner=ffn_size,
            resid_pdrop=model.dropout,
            embd_pdrop=model.dropout,
            attn_pdrop=model.dropout,
            **shared,
        )
    family = {"llama": LlamaConfig, "qwen3": Qwen3Config}[model.family]
    return family(
        max_position_embeddings=context_length,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.hidden_size // model.num_heads,
        intermediate_size=ffn_size,
        attention_dropout=model.dropout,
        **shared,
    )


def _load_pretrained(
    model: HubModel | PathModel | GgufModel,
    context_length: int,
    vocab_size: int | None,
    revision: str | None,
    dtype: torch.dtype | None,
) -> torch.nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    place = _place(model, revision)
    config = _pretrained_config(model, revision)
    _check_causal(model, config)
    _check_positions(model, config, context_length)
    changed = set_dropout(config, model.dropout)
    if changed:
        logger.info(
            "%s.dropout = %g set in %s",
            model.place,
            model.dropout,
            ", ".join(f"{name} (was {old:g})" for name, old in changed.items()),
        )
    with _model_errors(model):
        built, loading = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"{named(model)} lacks {len(missing)} weights of a {type(built).__name__} ({missing[0]} is the "
            "first), which would be left random; name a complete causal language model"
        )
    rows = built.get_input_embeddings().weight.shape[0]
    if vocab_size is not None and vocab_size > rows:
        raise ModelError(
            f"{named(model)} has {rows} token embeddings, fewer than the {vocab_size} tokens of its "
            "tokenizer; its tokenizer belongs to another model"
        )
    built.config.use_cache = False
    trained: torch.nn.Module = built.train()
    return trained


def weights_sha256(model: Any) -> str:
    """Hex digest of a model's parameters, by name; shared ones count once.

    Args:
        model: on the CPU, not sharded.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.view(-1).numpy().tobytes())
    return digest.hexdigest()


def set_dropout(config: Any, dropout: float) -> dict[str, float]:
    """Set every dropout probability of a transformers configuration, and no layer drop.

    The fields are those whose name contains "dropout" or ends in "pdrop", sub-configurations included;
    "layerdrop" drops whole layers rather than activations and is set to 0.

    Returns:
        field -> former value, for the fields that changed.
    """
    changed: dict[str, float] = {}
    for name in list(vars(config)):
        value = getattr(config, name)
        if name in getattr(config, "sub_configs", {}) and hasattr(value, "to_dict"):
            changed |= {f"{name}.{field}": old for field, old in set_dropout(value, dropout).items()}
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wanted = (
            dropout if "dropout" in name or name.endswith("pdrop") else 0.0 if "layerdrop" in name else value
        )
        if value != wanted:
            changed[name] = float(value)
            setattr(config, name, wanted)
    return changed


def load_tokenizer(model: HubModel | PathModel | GgufModel, revision: str | None = None) -> Any:
    """The model's own tokenizer (transformers), with an end-of-text token.

    A tokenizer without `eos_token` gets its `sep_token` or `bos_token` as one, and a warning says so.

    Args:
        revision: commit of a hub model; None resolves it anew.
    Raises:
        ModelError: not there, not readable, or without any of these tokens.
    """
    from transformers import AutoTokenizer

    place = _place(model, revision)
    with _model_errors(model, what="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**place)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(
            f"{named(model)} comes without a tokenizer; put its tokenizer files (tokenizer.json) beside the "
            "weights"
        )
    if tokenizer.eos_token_id is None:
        for name in ("sep_token", "bos_token"):
            token = getattr(tokenizer, name)
            if token is not None:
                logger.warning("%s has no eos_token; its %s %r ends documents", named(model), name, token)
                tokenizer.eos_token = token
                break
        else:
            raise ModelError(
                f"{named(model)}: its tokenizer has no eos_token, sep_token or bos_token to put between "
                "documents; set eos_token in its tokenizer_config.json"
            )
    return tokenizer


# --- where a pretrained model lies --------------------------------------------------------------------


def named(model: ModelConfig) -> str:
    """Where a model stands in a study file and what it is, for a sentence: `model.id = "gpt2"`."""
    if isinstance(model, HubModel):
        return f'{model.place}.id = "{model.id}"'
    return f'{model.place}.path = "{model.path}"' if isinstance(model, PathModel | GgufModel) else model.place


def _commit(model: HubModel, revision: str | None) -> hub.Commit:
    return hub.resolve(model.id, revision or model.revision, "model", where=named(model), error=ModelError)


def _model_folder(model: PathModel) -> Path:
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise ModelError(
            f"{named(model)} {state} (looked for {folder.absolute()}); "
            "name a folder written by save_pretrained"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{named(model)} holds no config.json; name a folder written by save_pretrained")
    return folder


def _gguf_file(model: GgufModel) -> Path:
    path = Path(model.path).expanduser()
    if not path.is_file():
        state = "is a folder" if path.exists() else "does not exist"
        raise ModelError(f"{named(model)} {state} (looked for {path.absolute()}); name one GGUF file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{named(model)} is not a GGUF file: it begins with {magic!r}, not b'GGUF'; "
            f"for a folder written by save_pretrained use {model.place}.source = path"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{named(model)} needs the package gguf: pip install raydisp[gguf]")
    return path


def _place(model: HubModel | PathModel | GgufModel, revision: str | None) -> dict[str, Any]:
    """Arguments of from_pretrained that say where to read, and what it may do there."""
    if isinstance(model, GgufModel):
        path = _gguf_file(model)
        return {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "local_files_only": True,
        }
    # False, not None: transformers asks on the terminal at None.
    trust = model.trust_remote_code
    if isinstance(model, PathModel):
        return {
            "pretrained_model_name_or_path": str(_model_folder(model)),
            "trust_remote_code": trust,
            "local_files_only": True,
        }
    if os.path.isdir(model.id):
        raise ModelError(
            f"{named(model)} is also a folder here ({os.path.abspath(model.id)}), which transformers would "
            f"read instead of the hub; use {model.place}.source = path for the folder, or run from elsewhere"
        )
    commit = _commit(model, revision)
    return {
        "pretrained_model_name_or_path": model.id,
        "revision": commit.sha,
        "trust_remote_code": trust,
        "local_files_only": not commit.online,
    }


def _pretrained_config(model: HubModel | PathModel | GgufModel, revision: str | None) -> Any:
    from transformers import AutoConfig

    place = _place(model, revision)
    with _model_errors(model, what="configuration"):
        return AutoConfig.from_pretrained(**place)


@contextmanager
def _model_errors(model: ModelConfig, what: str = "model") -> Iterator[None]:
    try:
        yield
    except (ModelError, MemoryError):
        raise
    # transformers raises OSError, ValueError, KeyError, ImportError, RuntimeError and the errors of
    # safetensors, gguf and pickle for files that are missing, cut short or of another kind.
    except Exception as problem:
        if "trust_remote_code" in str(problem):
            raise ModelError(
                f"{named(model)} comes with Python code of its own; read it, and set "
                f"{model.place}.trust_remote_code = true to run it"
            ) from None
        raise ModelError(
            f"{named(model)}: its {what} cannot be loaded ({type(problem).__name__}: "
            f"{hub.one_line(problem)}); check that it is complete and one that transformers knows"
        ) from problem


def _check_causal(model: ModelConfig, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    # An encoder such as BERT can be loaded as a decoder, but looks ahead; what it was saved as tells.
    known = {name for names in CAUSAL.values() for name in ([names] if isinstance(names, str) else names)}
    architectures = list(config.architectures or [])
    if config.model_type not in CAUSAL or (architectures and not known.intersection(architectures)):
        kind = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"{named(model)} is a {kind}, not a causal language model; name one whose architecture is like "
            "GPT2LMHeadModel or LlamaForCausalLM"
        )


def _check_positions(model: ModelConfig, config: Any, context_length: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and context_length > positions:
        raise ModelError(
            f"{named(model)} has {positions} positions, fewer than data.context_length = {context_length}; "
            f"lower data.context_length to {positions} or less"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_sha256(folder: Path, *, weights: bool) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if weights or not path.name.endswith(_WEIGHT_SUFFIXES):
            digest.update(f"{path.name}\0{_file_sha256(path)}\0".encode())
    return digest.hexdigest()
