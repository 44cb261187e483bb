"""Estimate the time of a training step on H200s from FLOPs, bytes, link rates and host work.

A micro-batch takes what its matrix products, its attention and its memory-bound kernels take, or, where it
is not replayed as a CUDA graph, what the host needs to launch them if that is longer. FSDP gathers bf16
weights before the forward and, if they were freed, before the backward, and scatters fp32 gradients; HSDP
then sums them over the replicas; one rank casts its weights instead. This is hidden behind the micro-batch
except for the embedding's weights and gradients, which come first and last. Ranks wait in every micro-batch
for the one with the most attention. Every step adds the optimizer. The host's work between steps is hidden,
as measured on one GPU.
docs/performance/scaling.md compares estimates with measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.config import ParallaxConfig, SoftmaxConfig
from models.qwen3 import Qwen3
from optimizers.build import state_by_group
from optimizers.config import DEFAULT_ITERATIONS, OrthogonalizedGroup, SOAPGroup
from optimizers.param_groups import assign_parameters
from training.memory import FP32
from training.replay import missing_kernels, replay_refusal
from training.run_config import RunConfig

GPUS_PER_NODE = 8

# rates of one H200 in training, measured (docs/performance/scaling.md)
_PRODUCT_FLOPS = 750e12
_ATTENTION_FLOPS = 370e12
_ORTHOGONALIZATION_FLOPS = 560e12
_MEMORY_BANDWIDTH = 4.3e12
_NVLINK_BANDWIDTH = 200e9
# assumed: 80% of one 400 Gb/s adapter per GPU
_NETWORK_BANDWIDTH = 40e9

# share of a causal row's pairs that are visible where documents are masked, and its exponent in the length:
# English text, 0.52 at length 4096 and 0.78 at 1024
_VISIBLE_SHARE, _VISIBLE_EXPONENT = 0.52, -0.3
# by how much the largest rank's share exceeds the mean, over the inverse square of the rows per micro-batch:
# rows of the same text at length 4096, divided by data.loading.global_batch.balance_rows
_UNBALANCED_SHARE = 0.4
# reads and writes of each saved element, of each logit and, in bytes, per weight and micro-batch
_ACTIVATION_PASSES = 4.7
_WEIGHT_BYTES = 40
# counted, on one rank: two casts to 16 bits, and the addition of a 16-bit gradient
_WEIGHT_BYTES_OF_ONE_RANK = 22
# an element-wise optimizer reads weight, gradient and state and writes weight and state, at half of the
# memory's bandwidth: fused AdamW seven fp32 values per weight
_OPTIMIZER_PASSES = 2
# SOAP's products in fp32 (assumed), and those in fp64 of which a new basis takes 8 n^3 FLOPs
_FP32_FLOPS = 40e12
_FP64_FLOPS = 13e12
# seconds of host work per layer of a micro-batch without CUDA graphs
_HOST_SECONDS_PER_LAYER = 3.4e-3


@dataclass(frozen=True)
class StepTime:
    """Estimated parts of a step in seconds.

    Attributes:
        products: Matrix products of the model.
        attention: Attention kernels.
        memory_bound: Norms, activations, loss and other element-wise kernels.
        launch_bound: What the host needs beyond those to launch them.
        waiting: Waiting for the rank with the most attention.
        communication: Collectives that nothing hides.
        optimizer: The optimizer's step, with the exchange of whole matrices, and the average of the weights.
    """

    products: float
    attention: float
    memory_bound: float
    launch_bound: float
    waiting: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())

    @property
    def bottleneck(self) -> str:
        """Name of the largest part besides products and attention."""
        parts = {name: x for name, x in vars(self).items() if name not in ("products", "attention")}
        return max(parts, key=lambda name: parts[name])


def estimate_step_time(config: RunConfig, model: Qwen3, world_size: int) -> StepTime | None:
    """Estimate the time of a step of a compiled run in bf16.

    Args:
        config: The run.
        model: Its model, on any device.
        world_size: Number of H200s, 8 per node.

    Returns:
        The parts; None for attention whose kernels have not been measured: of another kind, of other
            implementations than our kernels, or with heads of a width that these do not serve. Heads of other
            widths than 128 are assumed to take as long per FLOP.

    Raises:
        UserError: The batch or the degrees of parallelism do not fit the number of ranks.
    """
    is_measured = isinstance(config.model.attention, SoftmaxConfig | ParallaxConfig)
    if not is_measured or missing_kernels(model) is not None:
        return None
    num_micro_batches = config.gradient_accumulation_steps(world_size)
    seq_len, tokens = config.training.seq_len, config.tokens_per_micro_batch
    num_weights = model.num_parameters()["total"]
    product_flops = model.weight_flops_per_token()
    attention_flops = model.num_flops_per_token(seq_len) - product_flops
    share, excess = _visible_shares(config, world_size)
    elements = sum(model.num_saved_elements_per_token()) + config.model.vocab_size
    products = tokens * product_flops / _PRODUCT_FLOPS
    whole_rows = tokens * attention_flops / _ATTENTION_FLOPS
    attention, waiting = share * whole_rows, excess * whole_rows
    weight_bytes = _WEIGHT_BYTES_OF_ONE_RANK if world_size == 1 else _WEIGHT_BYTES
    num_bytes = 2 * _ACTIVATION_PASSES * tokens * elements + weight_bytes * num_weights
    memory_bound = num_bytes / _MEMORY_BANDWIDTH
    busy = products + attention + memory_bound
    is_replayed = replay_refusal(model, config.training) is None
    launches = 0.0 if is_replayed else _HOST_SECONDS_PER_LAYER * model.config.dimensions.num_layers
    launch_bound = max(0.0, launches - busy)
    return StepTime(
        products=num_micro_batches * products,
        attention=num_micro_batches * attention,
        memory_bound=num_micro_batches * memory_bound,
        launch_bound=num_micro_batches * launch_bound,
        waiting=num_micro_batches * waiting,
        communication=num_micro_batches * _exposed_seconds(config, model, world_size, busy + launch_bound),
        optimizer=_optimizer_seconds(config, model, world_size),
    )


def _visible_shares(config: RunConfig, world_size: int) -> tuple[float, float]:
    """Return the visible share of pairs in a mean micro-batch, and how much more the largest rank's has."""
    if not config.data.mask_documents:
        return 1.0, 0.0
    share = min(1.0, _VISIBLE_SHARE * (config.training.seq_len / 4096) ** _VISIBLE_EXPONENT)
    excess = _UNBALANCED_SHARE / config.training.local_batch_size**2
    return share, min(1.0 - share, excess) if world_size > 1 else 0.0


def _bandwidth(num_ranks: int) -> float:
    return _NVLINK_BANDWIDTH if num_ranks <= GPUS_PER_NODE else _NETWORK_BANDWIDTH


def _exposed_seconds(config: RunConfig, model: Qwen3, world_size: int, micro_batch: float) -> float:
    """Return the communication of a micro-batch that is not hidden behind it."""
    replicas, shard = config.parallelism.degrees(world_size)
    counts = model.num_parameters()
    sent = (shard - 1) / shard / _bandwidth(shard)  # seconds per byte of an all-gather or a reduce-scatter
    gathers = 2 if config.parallelism.reshard_after_forward else 1
    total = counts["total"] * (2 * gathers + FP32) * sent
    edges = counts["embedding"] * (2 + FP32) * sent
    summed = 2 * (replicas - 1) / replicas * FP32 / shard / _bandwidth(world_size)
    total += counts["total"] * summed
    edges += counts["embedding"] * summed
    return edges + max(0.0, total - edges - micro_batch)


def _optimizer_seconds(config: RunConfig, model: Qwen3, world_size: int) -> float:
    groups = config.optimizer.groups
    _, shard = config.parallelism.degrees(world_size)
    states = state_by_group(model.named_parameters(), groups)
    elementwise = orthogonalization = exchange = soap = 0.0
    for name, parameters in assign_parameters(model.named_parameters(), groups).items():
        group = groups[name]
        num_weights = sum(p.numel() for p in parameters)
        if isinstance(group, SOAPGroup):
            soap += sum(_soap_seconds(p.shape, group) for p in parameters) / world_size
            if world_size > 1:
                # gradient or update, and the state, to the matrix's owner and back
                num_bytes = FP32 * num_weights + sum(state.nbytes for state in states[name])
                soap += 2.0 * num_bytes / shard / _bandwidth(world_size)
            continue
        if not isinstance(group, OrthogonalizedGroup):
            num_bytes = 3 * FP32 * num_weights + 2 * sum(state.nbytes for state in states[name])
            elementwise += _OPTIMIZER_PASSES * num_bytes / shard / _MEMORY_BANDWIDTH
            continue
        iterations = group.num_iterations or DEFAULT_ITERATIONS[group.orthogonalization]
        for p in parameters:
            short, long = sorted(p.shape)
            # X X^T and its square are symmetric: half of their products; then a product with X
            flops = iterations * (3.0 * short * short * long + short**3)
            orthogonalization += flops / world_size / _ORTHOGONALIZATION_FLOPS
        if world_size > 1:
            # 16-bit shards to the matrix's owner and back
            exchange += 4.0 * num_weights / shard / _bandwidth(world_size)
    if config.average.decay is not None:
        num_bytes = 3 * FP32 * model.num_parameters()["total"]
        elementwise += _OPTIMIZER_PASSES * num_bytes / shard / _MEMORY_BANDWIDTH
    return elementwise + max(orthogonalization, exchange) + soap


def _soap_seconds(shape: Sequence[int], group: SOAPGroup) -> float:
    """Return the seconds of SOAP's products and decompositions for a matrix, per step on average."""
    seconds, (rows, cols) = 0.0, shape
    for side in shape:
        if side <= group.max_factor_size:
            # into the basis the gradient and the momentum, back the update, and the factor
            seconds += 4 * 2.0 * rows * cols * side / _FP32_FLOPS
            refresh = 2.0 * side**3 / _FP32_FLOPS + 8.0 * side**3 / _FP64_FLOPS
            seconds += refresh / group.refresh_every
    return seconds
