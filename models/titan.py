"""The models for torchtitan: model arguments, the trainable model and its parallelization."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import JobConfig
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.protocols import BaseModelArgs

from models.cast_weights import cast_in_forward
from models.config import ModelConfig
from models.init import init_weights
from models.qwen3 import Block, Qwen3


@dataclass(kw_only=True)
class TitanModelArgs(BaseModelArgs):
    """Model arguments in torchtitan's protocol.

    Attributes:
        config: The [model] table.
        seed: Seed of the initial weights.
    """

    config: ModelConfig
    seed: int

    def update_from_config(self, job_config: JobConfig, **kwargs: object) -> None:
        """Do nothing: the model is defined by `config` alone."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the exact number of parameters, and of training FLOPs per token at seq_len."""
        assert isinstance(model, Qwen3)
        return model.num_parameters()["total"], round(model.num_flops_per_token(seq_len))


class TitanQwen3(Qwen3):
    """Qwen3 with the constructor and the init_weights that torchtitan's trainer calls.

    Args:
        model_args: Config and seed.
    """

    def __init__(self, model_args: TitanModelArgs) -> None:
        super().__init__(model_args.config)
        self.seed = model_args.seed

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw the initial weights from the run's seed; the model has no buffers."""
        self._tie_weights()  # the trainer's to_empty() has untied them, on one rank
        init_weights(self, self.seed)


# ops whose outputs selective activation checkpointing saves: matrix products (of which torchtitan recomputes
# every second one) and attention
_SAVED_OPS = (
    "aten.mm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "torch_attn._varlen_attn.default",
)


def _saved_ops() -> set[torch._ops.OpOverload]:
    saved = set()
    for name in _SAVED_OPS:
        namespace, op, overload = name.split(".")
        saved.add(getattr(getattr(getattr(torch.ops, namespace), op), overload))
    parallax_ops = torch.ops.parallax
    saved.update(getattr(parallax_ops, op).default for op in parallax_ops if "backward" not in op)
    return saved


def device_mesh(device_type: str, replicate: int, shard: int) -> DeviceMesh:
    """Build the device mesh of FSDP (one axis) or HSDP (two); of one rank it has one axis."""
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def parallelize(
    model: Qwen3,
    mesh: DeviceMesh,
    *,
    precision: torch.dtype,
    activation_checkpointing: Literal["selective", "full"] | None,
    compile_blocks: bool,
    reshard_after_forward: bool,
) -> Qwen3:
    """Apply activation checkpointing, per-block compile and FSDP2, in that order.

    On one rank there is nothing to shard: parameters stay plain fp32 tensors, cast in the forward
    (models/cast_weights.py). Loss and gradients are those of FSDP2, bit by bit.

    Args:
        model: The model, on the meta device or not.
        mesh: From device_mesh.
        precision: Dtype of gathered or cast weights and of activations; gradients are reduced in fp32.
        activation_checkpointing: "selective" recomputes all but the outputs of matrix products and attention,
            "full" recomputes whole blocks; None saves all.
        compile_blocks: Compile each block by torch.compile.
        reshard_after_forward: Free a block's gathered or cast weights between forward and backward.

    Returns:
        The same model.
    """
    if activation_checkpointing is not None:
        settings = ActivationCheckpoint(mode=activation_checkpointing, selective_ac_option="op")
        apply_ac(model, settings, model_compile_enabled=compile_blocks, op_sac_save_list=_saved_ops())
    is_alone = mesh.size() == 1
    casts = is_alone and precision != torch.float32
    if compile_blocks:
        for block in model.layers:
            fullgraph = not block.get_submodule("attention").has_graph_breaks
            if casts:
                # around what is compiled
                block.forward = torch.compile(block.forward, fullgraph=fullgraph)
            else:
                block.compile(fullgraph=fullgraph)
    if not is_alone:
        shard(model, mesh, precision, reshard_after_forward)
    elif casts:
        cast_in_forward(model, _edges(model), precision, recast_in_backward=False)
        for block in model.layers:
            # activation checkpointing repeats what is inside of it, and saves none of it
            is_recomputed = activation_checkpointing is not None and not compile_blocks
            module = next(m for m in block.modules() if isinstance(m, Block)) if is_recomputed else block
            recasts = reshard_after_forward and not is_recomputed
            cast_in_forward(module, [block], precision, recast_in_backward=recasts)
    return model


def _edges(model: Qwen3) -> list[nn.Module]:
    """Return the modules outside of the blocks, one group, since embedding and head may be tied."""
    return [model.tok_embeddings, model.norm, model.output]


def shard(model: Qwen3, mesh: DeviceMesh, precision: torch.dtype, reshard_after_forward: bool) -> None:
    """Apply FSDP2 to the blocks and what surrounds them; arguments as for parallelize."""
    # inputs are not cast: the tables of the rotary embedding must stay fp32
    policy = MixedPrecisionPolicy(
        param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(_edges(model), mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gradients are summed: the trainer divides the loss by the global number of tokens
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
