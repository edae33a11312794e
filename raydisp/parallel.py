"""Data parallelism as functions over a model and plain tensors; the loop asks a `Layout` and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raydisp.config.train import TrainConfig
from raydisp.errors import ConfigError
from raydisp.layers import find_blocks, unwrap
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
        """Whether this process writes rows and checkpoints."""
        return self.rank == 0


def parallelise(model: nn.Module, layout: Layout, settings: TrainConfig, precision: str) -> nn.Module:
    """The model on the layout's device, with its gradients averaged over the workers.

    The names of parameters and buffers stay (DDP's wrapper aside, which `raydisp.layers.unwrap` takes off),
    and so does everything that hooks on blocks see. Optimizers are made after it: `fsdp` replaces the
    parameters by shards of them.

    Args:
        model: a Hugging Face causal language model on the CPU, float32, the same on all workers; changed in
            place. Dispersion hooks may be on it already or come later.
        settings: strategy, reshard_after_forward, activation_checkpointing and compile.
        precision: fp32, bf16 or fp16: what the loop's autocast, which stays around the forward pass,
            computes in.
    Returns:
        What the loop calls: the model itself, or DDP around it.
    Raises:
        ConfigError: fsdp with one worker, or with a parameter that cannot be sharded; activation
            checkpointing of a model that does not offer it.
    """
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.strategy == "fsdp":
        shard(model, layout, precision, reshard_after_forward=settings.reshard_after_forward)
    else:
        model.to(layout.device)
    if settings.compile:
        compile_blocks(model)
    if settings.strategy == "fsdp" or layout.world_size == 1:
        return model
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.10 does not know the new name yet
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[layout.device] if layout.device.type == "cuda" else None,
            # The buffers of these models (rotary frequencies, masks) are constants that every worker has made
            # for itself: nothing to send before each forward pass.
            broadcast_buffers=False,
            # Gradients live in the buffers that are exchanged, not there and beside them.
            gradient_as_bucket_view=True,
        )


def checkpoint_activations(model: nn.Module) -> None:
    """Keep no block's activations for backward, but compute them again there; the same results.

    Raises:
        ConfigError: the model does not offer it.
    """
    plain: Any = unwrap(model)
    try:
        with warnings.catch_warnings():
            # transformers 5.23 gives it another name, which 5.20 does not know yet
            warnings.simplefilter("ignore", FutureWarning)
            # Not reentrant: the reentrant kind knows neither DDP's hooks nor keyword arguments' gradients.
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (AttributeError, ValueError):
        raise ConfigError(
            f"train.activation_checkpointing = true, but {type(plain).__name__} does not support it; set it "
            "to false, and lower train.micro_batch_tokens if memory is short."
        ) from None


def shard(model: nn.Module, layout: Layout, precision: str, *, reshard_after_forward: bool) -> None:
    """Shard the model's parameters over the workers, in place (FSDP2), and move its shards to the device.

    Each block's matrices are one group, gathered for its forward and again for its backward pass, in half
    precision if the forward pass computes in it: they are then what autocast would make of them, without the
    copies that it would keep until backward. The root's group is everything else, in float32: embeddings,
    final norm and head, and the vectors of the blocks. For autocast leaves norms in float32 (a norm's gains
    near 1 in bf16 would move in steps of 0.4 %), and so a forward pass computes what it does under DDP.

    Args:
        precision: fp32, bf16 or fp16.
        reshard_after_forward: free a block's gathered matrices between forward and backward.
    Raises:
        ConfigError: there is one worker, or a parameter without a dimension to shard.
    """
    if layout.world_size == 1:
        raise ConfigError(
            "train.strategy = fsdp shards the model over workers, and there is 1; use ddp, or give the trial "
            "at least 2 workers (resources.num_workers)."
        )
    plain = unwrap(model)
    for name, parameter in plain.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"train.strategy = fsdp shards parameters along their first dimension, and {name} of "
                f"{type(plain).__name__} is a single number; use ddp."
            )
    if layout.device.type == "cuda" and layout.device.index is not None:
        torch.cuda.set_device(layout.device)  # shards go to the current device
    mesh = init_device_mesh(layout.device.type, (layout.world_size,))
    _, blocks = find_blocks(plain)
    matrices = {parameter for parameter in blocks.parameters() if parameter.dim() >= 2}
    # The root first: it would not look into blocks that are sharded already, and their vectors belong to it.
    fully_shard(plain, mesh=mesh, ignored_params=matrices)
    policy = MixedPrecisionPolicy(
        param_dtype=AUTOCAST_DTYPES.get(precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy,
            ignored_params={parameter for parameter in block.parameters() if parameter.dim() < 2},
        )


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward pass of every block, in place; module and parameter names stay.

    `block.forward` and not the block: the hooks around it (ours, FSDP2's) then run as they always do, where
    `block.compile()` would trace them, or break its graph at them.

    What earlier models of this process left in the compiler's caches is dropped: a process that trains one
    trial after another would run into the compiler's limits, behind which it silently compiles no more.
    """
    _, blocks = find_blocks(model)
    torch._dynamo.reset()
    # One piece of code serves all blocks. Alike blocks share what is compiled, but where they differ (sliding
    # and full attention, an expert layer here and there), each may need its own, and each of those for
    # training, for evaluation, and for another batch size.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(blocks))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 16 * len(blocks))
    for block in blocks:
        module: Any = block
        module.forward = torch.compile(module.forward)


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward pass of the model is a collective operation: all workers must make it."""
    return isinstance(unwrap(model), FSDPModule)


def free_gathered(model: nn.Module) -> None:
    """Back to shards, as after a backward pass, if forward passes without one have gathered parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Within it, backward passes exchange gradients between workers only if enabled (accumulation).

    For DDP. FSDP2 exchanges them every time: to put it off would keep whole gradients on every worker, which
    is what it is there to avoid.
    """
    if enabled or not isinstance(model, DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, *, unscale: float = 1.0
) -> Tensor:
    """Multiply the gradients by `unscale`, then clip them by their global norm; all workers must call it.

    Args:
        parameters: whole or sharded; those without a gradient are left out.
        max_norm: None: measure only (and unscale).
        unscale: what undoes the scaling of a loss in fp16.
    Returns:
        The norm after unscaling and before clipping, over all workers' shards: scalar, float32, on the
        device. Nothing waits for it. Where it is not finite, the gradients are not either.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # The local tensors, because each operation on a DTensor is dispatched in Python, one by one.
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norm = nn.utils.get_total_norm(local)
    sharded = next((gradient for gradient in gradients if isinstance(gradient, DTensor)), None)
    if sharded is not None:
        # float64, in which the square of every float32 is finite
        square = norm.double().square()
        dist.all_reduce(square, group=sharded.device_mesh.get_group())
        norm = square.sqrt().to(norm.dtype)
    if unscale != 1.0:
        norm = norm * unscale
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(local, factor * unscale)
    elif unscale != 1.0:
        torch._foreach_mul_(local, unscale)
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
    derived = derive_seed("step", seed, step, layout.rank)
    # Of the devices in use alone: torch.manual_seed asks all kinds there are, five times as long.
    torch.default_generator.manual_seed(derived)
    if layout.device.type == "cuda":
        with torch.cuda.device(layout.device):
            torch.cuda.manual_seed(derived)
