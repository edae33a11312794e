"""Parallelism as functions over a model and plain tensors; the loop asks a `Layout` and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raydisp.config import TrainConfig
from raydisp.errors import ConfigError
from raydisp.layers import find_blocks
from raydisp.precision import AUTOCAST_DTYPES
from raydisp.seeds import derive_seed


@dataclass(frozen=True)
class Layout:
    """Which share of the work this process has, and where it computes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes rows."""
        return self.rank == 0


def parallelise(model: nn.Module, layout: Layout, settings: TrainConfig, precision: str) -> nn.Module:
    """The model on the layout's device, as the settings say: checkpointed, compiled, replicated or sharded.

    The names of its parameters and buffers stay what they were, and so do the hooks on it.

    Args:
        model: a Hugging Face causal language model on the CPU, the same on all workers; changed in place.
        precision: fp32, bf16 or fp16: what autocast computes in.
    Raises:
        ConfigError: the model or the layout does not allow it.
    """
    if settings.activation_checkpointing:
        _checkpoint_activations(model)
    if settings.compile:
        _compile_blocks(model)
    if settings.strategy == "fsdp":
        return _shard(model, layout, settings, precision)
    model = model.to(layout.device)
    if layout.world_size == 1:
        return model
    device_ids = [layout.device] if layout.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


def _checkpoint_activations(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"train.activation_checkpointing = true, but {type(model).__name__} does not support it in "
            "transformers; set it to false"
        )
    # The reentrant kind would lose the gradients of hidden states that hooks have caught.
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def _compile_blocks(model: nn.Module) -> None:
    """Compile what each block computes, and not the calls of its hooks: those of FSDP2 and of the dispersion
    term run as they always do."""
    for block in find_blocks(model)[1]:
        block.forward = torch.compile(block.forward, dynamic=False)


def _shard(model: nn.Module, layout: Layout, settings: TrainConfig, precision: str) -> nn.Module:
    """FSDP2: every block a unit, and the rest of the model (embeddings, final norm, head) another.

    Under bf16 and fp16 the blocks' weights are gathered in that type on a GPU, which halves the traffic;
    autocast decides the type of every product as it does without sharding, and the residual stream stays
    float32. On a CPU, whose autocast leaves a norm of float32 states with half-precision weights alone (an
    error), weights are gathered as they are. Gradients are summed in float32.
    """
    if layout.world_size == 1:
        raise ConfigError(
            "train.strategy = fsdp shards the model over workers, and this trial has one; use ddp, or raise "
            "resources.num_workers"
        )
    mesh = init_device_mesh(layout.device.type, (layout.world_size,))
    gathered = AUTOCAST_DTYPES.get(precision) if layout.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = settings.reshard_after_forward
    for block in find_blocks(model)[1]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        reshard_after_forward=reshard,
    )
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass of the model needs all workers."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Give gathered weights back after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Within it, backward passes exchange gradients between workers only if enabled (accumulation).

    FSDP2 always exchanges them: it would have to hold whole gradients otherwise.
    """
    if enabled or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, *, unscale: float = 1.0
) -> Tensor:
    """Clip by the global norm over all parameters, sharded ones included; the device is not waited for.

    Args:
        max_norm: None: only measure.
        unscale: factor that all gradients are multiplied with first.
    Returns:
        The norm before clipping, after `unscale`: a scalar tensor, the same on all workers.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    if unscale != 1.0:
        torch._foreach_mul_(gradients, unscale)
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def all_reduce_sum(tensors: Iterable[Tensor], layout: Layout) -> None:
    """Replace each tensor, in place, by its sum over the workers; all workers must call it."""
    if layout.world_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def seed_step(seed: int, step: int, layout: Layout) -> None:
    """Seed the noise of one step (dropout) as a function of (seed, step, rank).

    Nothing of a generator's state then has to be kept in a checkpoint.
    """
    torch.manual_seed(derive_seed("step", seed, step, layout.rank))
