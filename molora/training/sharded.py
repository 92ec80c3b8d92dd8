"""FSDP2 for a mixture (experimental): the frozen base is sharded, the small adapter is on every process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from molora.errors import ConfigError


class ShardedBaseStrategy(ModelParallelStrategy):
    """Adapter, optimiser and checkpoints work as under DDP, since none of their tensors is sharded."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint


def shard_base(model: PeftModel, mesh: DeviceMesh) -> None:
    """Shard the frozen parameters over the mesh's data-parallel processes, block by block.

    Raises ConfigError for a model that does not say what its blocks are.
    """
    names = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            "train.strategy: fsdp2 shards block by block, and this base does not name its blocks.",
            hint="use strategy: ddp.",
        )
    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for block in [*blocks, model]:
        fully_shard(block, mesh=mesh["data_parallel"], ignored_params=adapter)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean gradient over all processes: FSDP leaves parameters it was told to ignore to us."""
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, op=torch.distributed.ReduceOp.SUM)
            parameter.grad /= torch.distributed.get_world_size()
