"""Forward and backward of the micro-batches of a step, as CUDA graphs where the attention allows it.

A graph holds the kernels of one micro-batch. To replay it costs the host microseconds, where launching the
kernels one by one takes milliseconds per layer. Kernels, order and inputs are the same, and so is every bit
of the result. Inputs, loss and gradients have fixed addresses; everything else lives in a pool of memory that
all graphs share.

A graph has fixed shapes, so document bounds are padded with empty documents to one of a few lengths, and the
first micro-batch of each length is captured. The kernels choose their tiles by this length. It follows from
the micro-batch alone, so a step is the same with and without graphs, and after a resume.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models.qwen3 import Qwen3
from training.cublas import limit_workspace
from training.log import logger
from training.replay import graph_refusal, supports_replay
from training.run_config import TrainingConfig

_MEAN_LENGTHS = (2048, 512, 128, 32, 8, 1)
"""Mean lengths of documents: bounds are padded to as many as there are of one of them. The kernels change at
a mean of 1024 (`parallax.kernels.tiles.SHORT`), between the first two."""


def padded_num_documents(num_documents: int, num_tokens: int) -> int:
    """Return to how many documents the bounds are padded, at least num_documents.

    Args:
        num_documents: Documents of a micro-batch.
        num_tokens: Tokens of a micro-batch.
    """
    sizes = (-(-num_tokens // length) for length in _MEAN_LENGTHS)
    return next((size for size in sizes if size >= num_documents), num_documents)


def pad_bounds(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Append empty documents to bounds `[N + 1]`, int32, to padded_num_documents of them."""
    missing = padded_num_documents(len(cu_seqlens) - 1, num_tokens) + 1 - len(cu_seqlens)
    return nn.functional.pad(cu_seqlens, (0, missing), value=num_tokens)


class MicroBatches:
    """Runs forward and backward of micro-batches of one shape; adds up loss and gradients.

    Args:
        model: The model from models.titan.parallelize, on its device.
        config: The [training] table.
        device: Device of the model.

    Attributes:
        refusal: Why micro-batches are not replayed as CUDA graphs, or None; the first step never is.
    """

    def __init__(self, model: Qwen3, config: TrainingConfig, device: torch.device) -> None:
        self.model, self.seq_len, self.device = model, config.seq_len, device
        self._z_loss_coefficient = config.z_loss
        self.refusal = graph_refusal(model, config, device)
        self._pads_bounds = device.type == "cuda" and supports_replay(model)
        if config.cuda_graphs and self.refusal is not None and device.type == "cuda":
            logger.info(f"no CUDA graphs: {self.refusal}")
        self._loss = torch.zeros((), device=device)
        self._z_loss = torch.zeros((), device=device)
        self._num_predicted = torch.zeros((), dtype=torch.int64, device=device)
        # of the shards: once gathered for an evaluation, a sharded model has others
        self._parameters = list(model.parameters())
        limit_workspace(model)
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._graphs = None if self.refusal else _Graphs(self._parameters, device)

    def begin_step(self, num_predicted: torch.Tensor) -> None:
        """Set loss and gradients to zero.

        Args:
            num_predicted: Predicted tokens of the step over all ranks, int64, by which losses are divided.
        """
        self._loss.zero_()
        self._z_loss.zero_()
        self._num_predicted.copy_(num_predicted)
        # an evaluation leaves weights gathered: a graph captured now would not gather them, and a replay
        # would leave them as they are, so that the next evaluation saw old ones
        for module in self._sharded_modules:
            module.reshard()
        if self._graphs is None or not self._graphs.zero_gradients():
            for parameter in self._parameters:
                parameter.grad = None

    def add(self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Add the loss and the gradients of a micro-batch.

        Args:
            inputs: "input", token ids int64 `[B, T]`, and, masked, "cu_seqlens", int32 `[N + 1]`.
            labels: Token ids to predict, int64 `[B, T]`.
        """
        tensors = {"tokens": inputs["input"], "labels": labels}
        if "cu_seqlens" in inputs:
            cu_seqlens = inputs["cu_seqlens"]
            tensors["cu_seqlens"] = (
                pad_bounds(cu_seqlens, labels.numel()) if self._pads_bounds else cu_seqlens
            )
        if self._graphs is None:
            self._run(**{name: x.to(self.device, non_blocking=True) for name, x in tensors.items()})
        else:
            self._graphs.run(self._run, tensors)

    def loss(self) -> torch.Tensor:
        """Return this rank's part of the cross-entropy since begin_step, in nats/token, fp32."""
        return self._loss - self._z_loss

    def z_loss(self) -> torch.Tensor:
        """Return this rank's part of the z-loss per token since begin_step, fp32; 0 for none."""
        return self._z_loss.clone()

    @property
    def graph_bytes(self) -> int:
        """Memory that the graphs use while they run, beside inputs and gradients."""
        return 0 if self._graphs is None else self._graphs.num_bytes

    def close(self) -> None:
        """Free the graphs, before the process groups whose collectives they hold are destroyed."""
        self._graphs = None

    def _run(
        self, tokens: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None = None
    ) -> None:
        if cu_seqlens is not None:
            # its length differs between batches; compile once for all lengths
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        loss = self.model(
            tokens,
            cu_seqlens=cu_seqlens,
            max_seqlen=self.seq_len,
            labels_BT=labels,
            z_loss=self._z_loss_coefficient,
        )
        part = loss / self._num_predicted
        if self._z_loss_coefficient:
            part, z_part = part.unbind()
            self._z_loss += z_part.detach()
        part.backward()
        self._loss += part.detach()


class _Graphs:
    """CUDA graphs of forward and backward, one for each set of shapes.

    Args:
        parameters: The model's parameters, perhaps shards, whose gradients the graphs add to.
        device: Device of the model.

    Attributes:
        num_bytes: Memory that the largest graph uses while it runs, beside inputs and gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self.num_bytes = 0
        self._parameters, self._device = parameters, device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[tuple[str, torch.Size], torch.Tensor] = {}
        self._graphs: dict[tuple[torch.Size, ...], torch.cuda.CUDAGraph] = {}
        self._gradients: list[torch.Tensor] = []
        self._local_gradients: list[torch.Tensor] = []  # found once: to_local takes the host microseconds

    def zero_gradients(self) -> bool:
        """Set the gradients to zero where they are; False if there are none yet."""
        if not self._gradients:
            return False
        current = [parameter.grad for parameter in self._parameters]
        assert all(x is y for x, y in zip(current, self._gradients, strict=True)), "a gradient has moved"
        torch._foreach_zero_(self._local_gradients)
        return True

    def run(self, function: Callable[..., None], tensors: Mapping[str, torch.Tensor]) -> None:
        """Call function with the tensors, from a graph except for the first time.

        Args:
            function: Takes the tensors by name, on the device; the same in every call.
            tensors: On the host.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # one stream for all calls: nodes of the autograd graph that outlive a backward remember theirs
        with torch.cuda.stream(self._stream):
            static = {name: self._static(name, x) for name, x in tensors.items()}
            if self._gradients:
                self._graph(function, static).replay()
            else:
                function(**static)
                gradients = [parameter.grad for parameter in self._parameters]
                self._gradients = [gradient for gradient in gradients if gradient is not None]
                assert len(self._gradients) == len(gradients), "a parameter has no gradient"
                self._local_gradients = [_local(gradient) for gradient in self._gradients]
        current.wait_stream(self._stream)

    def _static(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor at a fixed address that holds an input of this name and shape, filled."""
        key = (name, value.shape)
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(value, device=self._device)
        return self._inputs[key].copy_(value, non_blocking=True)

    def _graph(
        self, function: Callable[..., None], static: Mapping[str, torch.Tensor]
    ) -> torch.cuda.CUDAGraph:
        """Return the graph for inputs of these shapes, captured now if it is the first time."""
        shapes = tuple(x.shape for x in static.values())
        if shapes in self._graphs:
            return self._graphs[shapes]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        # "relaxed": kernels of a new length of bounds may be loaded meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
            function(**static)
        self._graphs[shapes] = graph
        self.num_bytes = max(self.num_bytes, torch.cuda.max_memory_allocated(self._device) - before)
        logger.info(f"captured a CUDA graph of a micro-batch, for {_describe(static)}")
        return graph


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _describe(static: Mapping[str, torch.Tensor]) -> str:
    if "cu_seqlens" not in static:
        return "rows without masks"
    return f"up to {len(static['cu_seqlens']) - 1} documents"
