"""Which hidden states a layer choice means, and how they are caught while a model runs.

Layers are counted as Hugging Face counts `hidden_states`: 0 is the embedding output, 1..n the outputs of the
n blocks, and number n is taken after the model's final norm. torch is imported only where a model is at hand,
so that reading a study file stays cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raydisp.errors import suggest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

LAYER_CHOICES = ("all", "last", "early_half", "late_half")


def resolve_layers(choice: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The layer numbers, sorted, that a choice means for a model of `num_layers` blocks.

    Args:
        choice: `all` (1..n), `last` (n), `early_half` (the first floor(n/2) of 1..n; layer 1 where n = 1),
            `late_half` (the last n - floor(n/2)), or layer numbers in 0..n, none of them twice.
        num_layers: n >= 1, the number of blocks.
    Raises:
        ValueError: an unknown word, no layer, a repeated one, or one outside 0..n.
    """
    if num_layers < 1:
        raise ValueError(f"A model has at least one block; num_layers is {num_layers}.")
    if isinstance(choice, str):
        half = num_layers // 2
        if choice not in LAYER_CHOICES:
            raise ValueError(
                f'layers = "{choice}" is not one of {", ".join(LAYER_CHOICES)} or a list of layer numbers.'
                + suggest(choice, LAYER_CHOICES)
            )
        first, last = {
            "all": (1, num_layers),
            "last": (num_layers, num_layers),
            "early_half": (1, max(half, 1)),
            "late_half": (half + 1, num_layers),
        }[choice]
        return tuple(range(first, last + 1))
    numbers = list(choice)
    if not numbers:
        raise ValueError(
            f"layers is an empty list; name at least one layer of 0..{num_layers}, or one of "
            f"{', '.join(LAYER_CHOICES)}."
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"layers holds {number!r}, which is not a whole number of 0..{num_layers}.")
        if not 0 <= number <= num_layers:
            raise ValueError(
                f"layers holds {number}, but this model has layers 0 (the embedding output) to {num_layers} "
                "(the last block, after the final norm)."
            )
        if numbers.count(number) > 1:
            raise ValueError(f"layers names {number} more than once; each layer counts once.")
    return tuple(sorted(numbers))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel wrappers (FSDP2 leaves no wrapper)."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and not hasattr(model, "config"):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def num_hidden_layers(model: nn.Module) -> int:
    """The number of blocks n that the model's configuration states.

    Raises:
        ValueError: the model has no configuration that says so (a multimodal one keeps it elsewhere).
    """
    config = getattr(unwrap(model), "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no config.num_hidden_layers, by which its blocks are found; "
            "a Hugging Face causal language model has one. For a multimodal model, pass its language model."
        )
    return count


def find_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The base model and its list of blocks: the one ModuleList of `config.num_hidden_layers` entries.

    The base model is the module that holds the list; its forward returns the state after the final norm.

    Raises:
        ValueError: there is no such list, or more than one (encoder-decoder models).
    """
    from torch import nn

    model = unwrap(model)
    count = num_hidden_layers(model)
    found: list[tuple[str, nn.Module, nn.ModuleList]] = []
    for path, parent in model.named_modules():
        if any(path.startswith(prefix) for prefix, _, _ in found):
            continue  # a list inside a block (experts, say) can have the same length by chance
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                found.append((f"{path}.{name}".lstrip(".") + ".", parent, child))
    if len(found) != 1:
        where = ", ".join(prefix.rstrip(".") for prefix, _, _ in found) or "none"
        raise ValueError(
            f"The blocks of {type(model).__name__} cannot be found: exactly one ModuleList of "
            f"config.num_hidden_layers = {count} modules is needed, found {where}. "
            "Only decoder-only language models are supported."
        )
    return found[0][1], found[0][2]


def _hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's inputs: the first positional argument, by name otherwise."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


class HiddenStateCapture:
    """Catches the chosen hidden states of a causal language model while it runs.

    State number i < n is the *input* of block i, caught by a forward pre-hook (so that nothing is caught
    again when activation checkpointing runs a block a second time); number n is what the base model returns,
    after its final norm. Only the chosen layers carry hooks. The model may be wrapped by `torch.compile`, DDP
    or FSDP2; hooks have to be there before `torch.compile` first traces the model.

    Attributes:
        layers: the numbers caught, sorted.
        handles: number -> the handle of its hook.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        base, blocks = find_blocks(model)
        self.layers = resolve_layers(layers, len(blocks))
        self.handles: dict[int, RemovableHandle] = {}
        self._active = False
        self._states: dict[int, Tensor] = {}
        for number in self.layers:
            if number < len(blocks):
                hook = self._input_hook(number)
                self.handles[number] = blocks[number].register_forward_pre_hook(hook, with_kwargs=True)
            else:
                self.handles[number] = base.register_forward_hook(self._output_hook)

    def _input_hook(self, number: int) -> Any:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active:
                self._states[number] = _hidden_argument(args, kwargs)

        return record

    def _output_hook(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._active:
            self._states[self.layers[-1]] = output[0]

    def start(self) -> None:
        """Forget what was caught and catch from now on; `recording` is the safe form."""
        self._states = {}
        self._active = True

    def stop(self) -> None:
        """Catch nothing more; what was caught stays until `take`."""
        self._active = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, a forward pass of the model is caught (the last one, if there are several)."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def take(self) -> dict[int, Tensor]:
        """Layer number -> [B, L, F] hidden states of the recorded pass, handed over and no longer held here.

        Raises:
            RuntimeError: a chosen layer was not recorded.
        """
        states, self._states = self._states, {}
        missing = [number for number in self.layers if number not in states]
        if missing:
            raise RuntimeError(
                f"Layers {missing} were not recorded (recorded: {sorted(states) or 'none'}). Run the "
                "model inside `with capture.recording():` before take(); if it is compiled, attach the hooks "
                "before its first call."
            )
        return {number: states[number] for number in self.layers}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles.values():
            handle.remove()
        self.handles = {}
        self._states = {}
