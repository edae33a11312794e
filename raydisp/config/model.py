"""The study file's `model`: where a causal language model comes from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from raydisp.config.section import Int, PositiveInt, Section


class ScratchModel(Section):
    """A causal language model of the given sizes with fresh random weights (drawn from the trial's seed)."""

    place: ClassVar[str] = "model"

    source: Annotated[Literal["scratch"], Field(description="fresh random weights")]
    family: Annotated[Literal["gpt2", "llama", "qwen3"], Field(description="architecture")] = "gpt2"
    num_layers: Annotated[Int, Field(ge=1, le=1000, description="transformer blocks")] = 6
    hidden_size: Annotated[
        Int, Field(ge=2, description="features of a hidden state; a multiple of num_heads")
    ] = 128
    num_heads: Annotated[PositiveInt, Field(description="attention heads of a block")] = 4
    num_kv_heads: Annotated[
        PositiveInt | None, Field(description="key/value heads of llama and qwen3; null: num_heads")
    ] = None
    ffn_size: Annotated[PositiveInt | None, Field(description="MLP width; null: 4 x hidden_size")] = None
    vocab_size: Annotated[
        Int,
        Field(
            ge=300,
            le=1_000_000,
            description="of the byte-level BPE trained on the training split; left out where there is a "
            "distillation.teacher, whose vocabulary it is then",
        ),
    ] = 4096
    tie_embeddings: Annotated[bool, Field(description="output head shares the input embedding")] = True
    dropout: Annotated[float, Field(ge=0.0, lt=1.0, description="in every dropout of the model")] = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModel:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}; "
                "choose a hidden_size that the heads share evenly"
            )
        if self.family != "gpt2" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size / num_heads = {self.hidden_size // self.num_heads} is odd, and the rotary "
                f"positions of {self.family} rotate features in pairs; choose an even size per head"
            )
        if self.num_kv_heads is not None:
            if self.family == "gpt2":
                raise ValueError("num_kv_heads is for llama and qwen3, family is gpt2; leave it out")
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}"
                )
        return self


class _Pretrained(Section):
    place: ClassVar[str] = "model"
    """Where in a study file it stands, for the sentences of mistakes."""

    dropout: Annotated[float, Field(ge=0.0, lt=1.0, description="set in every dropout of the model")] = 0.0


class HubModel(_Pretrained):
    """A pretrained model and its tokenizer from the Hugging Face hub (or its local cache)."""

    source: Annotated[Literal["hub"], Field(description="of the Hugging Face hub")]
    id: Annotated[str, Field(min_length=1, description="such as gpt2 or HuggingFaceTB/SmolLM2-135M")]
    revision: Annotated[
        str | None, Field(description="branch, tag or commit; resolved to a commit once per study")
    ] = None
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the model")] = False


class PathModel(_Pretrained):
    """A pretrained model and its tokenizer from a local folder written by save_pretrained."""

    source: Annotated[Literal["path"], Field(description="a local folder")]
    path: Annotated[str, Field(min_length=1, description="the folder; all nodes must see it")]
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the model")] = False


class GgufModel(_Pretrained):
    """A pretrained model and its tokenizer from one GGUF file, weights dequantised to float32."""

    source: Annotated[Literal["gguf"], Field(description="a GGUF file")]
    path: Annotated[str, Field(min_length=1, description="the file; all nodes must see it")]


ModelConfig = Annotated[ScratchModel | HubModel | PathModel | GgufModel, Field(discriminator="source")]
