"""A model in training as lm-evaluation-harness wants it: its requests shared between the workers.

The harness would give each worker every n-th document; examples of few-shot prompts, which it draws one after
the other, would then depend on the number of workers. Here every worker gets all requests, answers its share,
and all answers come back to all: the numbers are those of one process.

Imports the harness, which is an extra.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from torch import nn

from raydisp.layers import unwrap
from raydisp.parallel import Layout, all_reduce_sum, free_gathered, is_sharded
from raydisp.precision import AUTOCAST_DTYPES


class _Face:
    """The model as far as the harness may touch it: it would tie weights anew, and set the mode."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self.config = model.config
        self.device = device
        self.generate = model.generate

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self._model(input_ids=input_ids, use_cache=False)


class SharedModel(HFLM):
    """Answers the harness's requests with a model in training; all workers must ask it the same.

    Attributes:
        num_cut: requests whose prompt was longer than the model's context, and lost its beginning.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, layout: Layout, *, precision: str, batch_tokens: int
    ) -> None:
        """
        Args:
            model: a Hugging Face causal language model, wrapped (DDP) or sharded (FSDP2), in evaluation mode.
            tokenizer: of transformers; may get a padding token.
            precision: fp32, bf16 or fp16: what its forward passes compute in; probabilities are float32.
            batch_tokens: most tokens of one forward pass, padding included.
        """
        self._plain: Any = unwrap(model)
        super().__init__(
            pretrained=_Face(self._plain, layout.device),
            tokenizer=tokenizer,
            backend="causal",
            batch_size="auto",  # then it asks `_batch_scheduler` and `_detect_batch_size`
            mixed_precision_dtype=AUTOCAST_DTYPES.get(precision),
            softmax_dtype=torch.float32,  # else two answers often have the same probability in bf16
        )
        self._layout = layout
        self._batch_tokens = batch_tokens
        self._batch_start = 0
        self.num_cut = 0

    # Of the harness's interface: what it asks a model.

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._share(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._share(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._share(super().generate_until, requests)

    def _share(self, answer: Callable[[list[Any]], list[Any]], requests: Sequence[Any]) -> list[Any]:
        """The answers to all requests, each given by one worker."""
        layout = self._layout
        # By document: requests of the same prompt are answered by one forward pass where they can be.
        documents: dict[tuple[Any, Any], int] = {}
        owners = [
            documents.setdefault((request.task_name, request.doc_id), len(documents)) % layout.world_size
            for request in requests
        ]
        mine = [place for place, owner in enumerate(owners) if owner == layout.rank]
        cut_before = self.num_cut
        with self._in_step():
            answers = answer([requests[place] for place in mine]) if mine else []
        if layout.world_size == 1:
            return answers
        shares: list[Any] = [None] * layout.world_size
        own = (dict(zip(mine, answers, strict=True)), self.num_cut - cut_before)
        dist.all_gather_object(shares, own)
        self.num_cut = cut_before + sum(num_cut for _, num_cut in shares)
        given = {place: one for share, _ in shares for place, one in share.items()}
        return [given[place] for place in range(len(requests))]

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        """Around a share of the requests: every forward pass of a sharded model is one of all workers.

        Before each, the workers tell one another that there is one; who has none left makes an empty one,
        until nobody has. How many it will be, nobody knows beforehand: texts are generated token by token.
        """
        if not is_sharded(self._plain):
            yield
            return

        def tell(*_: Any) -> None:
            self._tell_others(busy=True)

        # Before FSDP2's own hook, which begins to gather parameters.
        hook = self._plain.register_forward_pre_hook(tell, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        anything = torch.zeros((1, 1), dtype=torch.long, device=self._layout.device)
        with torch.no_grad():
            while self._tell_others(busy=False):
                self._model_call(anything)
        free_gathered(self._plain)

    def _tell_others(self, *, busy: bool) -> bool:
        """Whether any worker is about to make a forward pass."""
        told = torch.tensor(float(busy), device=self._layout.device)
        all_reduce_sum([told], self._layout)
        return busy or bool(told.item())

    # Of its Hugging Face model: how requests become batches.

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        for _, _, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise ValueError(
                    f"an answer has {len(answer)} tokens, and the model reads 1 to {self.max_length}: leave "
                    "the task out, or give the model a longer context (data.context_length, from scratch)"
                )
        room = self.max_length + 1  # the last token of an answer is predicted and never read
        self.num_cut += sum(len(context) + len(answer) > room for _, context, answer in requests)
        answers: list[Any] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return answers

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """Size of the batch that a request belongs to: the longest come first, so its first one tells.

        Args:
            pos: of the request; asked for one after the other.
            n_reordered_requests: all of them, each (texts, tokens of the context, tokens of the answer).
        """
        if pos == 0:
            self._batch_start = 0
        _, context, answer = n_reordered_requests[self._batch_start]
        length = min(len(context) + len(answer), self.max_length)
        size = max(1, self._batch_tokens // length)
        if pos - self._batch_start + 1 == size:
            self._batch_start = pos + 1
        return size

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Of texts of any length."""
        return max(1, self._batch_tokens // self.max_length)
