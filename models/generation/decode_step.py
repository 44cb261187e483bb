"""One decoding step of a batch, captured as a CUDA graph on a GPU."""

import functools

import torch

from models.generation.cache import Cache, ExtendBlock, extend
from models.generation.sampling import Sampling, sample_tokens
from models.qwen3 import Block, Qwen3


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: libraries allocate a workspace per stream and never free it."""
    return torch.cuda.Stream(device)


class DecodeStep:
    """Appends the last sampled token to each sequence, and samples the next.

    On CUDA, if all attention modules support it, the step is captured as a CUDA graph at construction.

    Args:
        model: In eval mode.
        cache: Empty, of B sequences; every step adds a token to each.
        sampling: Sampling options.
        compile_blocks: Compile the blocks by torch.compile.
    """

    def __init__(self, model: Qwen3, cache: Cache, sampling: Sampling, compile_blocks: bool) -> None:
        self._model, self._cache, self._sampling = model, cache, sampling
        self._extend_block: ExtendBlock = torch.compile(Block.extend) if compile_blocks else Block.extend
        batch, device = len(cache.lengths_B), cache.lengths_B.device
        self._tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._logprobs_B = torch.zeros(batch, device=device)
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._host = torch.zeros(2, batch, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda" and all(each.supports_cuda_graph for each in model.attention_modules()):
            self._capture()

    def start(self, logits_BV: torch.Tensor) -> None:
        """Sample the first tokens.

        Args:
            logits_BV: Logits at the last tokens of the prompts, `[B, V]`.
        """
        tokens_B, logprobs_B = sample_tokens(logits_BV, self._sampling, self._generator)
        self._tokens_B1.copy_(tokens_B[:, None])
        self._logprobs_B.copy_(logprobs_B)

    @torch.no_grad()
    def advance(self) -> None:
        """Append the sampled tokens to the sequences, and sample the next ones."""
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def read(self, then_advance: bool) -> tuple[list[int], list[float]]:
        """Copy the sampled tokens and their log-probabilities in nats to the host.

        Args:
            then_advance: Launch the next step before waiting for the copy, so that device and host overlap.
        """
        # one copy for both: ids are exact in fp64; the next step runs after it on the same stream
        sampled = torch.stack((self._tokens_B1.squeeze(1).double(), self._logprobs_B.double()))
        self._host.copy_(sampled, non_blocking=True)
        copied = torch.cuda.Event() if self._host.is_pinned() else None
        if copied is not None:
            # not that of the current device, on which the model need not be
            copied.record(torch.cuda.current_stream(sampled.device))
        if then_advance:
            self.advance()
        if copied is not None:
            copied.synchronize()
        tokens, logprobs = self._host.tolist()
        return [int(token) for token in tokens], logprobs

    def _compute(self) -> None:
        x_BTD = extend(self._model, self._tokens_B1, self._cache, self._extend_block)
        self.start(self._model.output.logits(x_BTD[:, -1]))

    @torch.no_grad()
    def _capture(self) -> None:
        stream = _side_stream(self._tokens_B1.device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # warm-up: compiles kernels, allocates workspaces
            self._compute()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._generator)
        # thread_local: a data loader's thread may pin memory during the capture
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._compute()
        self._generator.manual_seed(self._sampling.seed)
        self._cache.reset()
