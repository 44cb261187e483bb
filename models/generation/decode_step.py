"""One decoding step of a batch: new tokens in, the tokens after them out; on a GPU a CUDA graph."""

import functools

import torch

from models.attention.base import Attention
from models.generation.cache import Cache, extend, extend_block
from models.generation.sampling import Sampling, choose
from models.qwen3 import Qwen3


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


class DecodeStep:
    """Feeds each sequence the token that it chose last, and chooses the next.

    A graph is captured at construction, on an empty cache, where every attention can be in one.
    """

    def __init__(self, model: Qwen3, cache: Cache, sampling: Sampling, compile_blocks: bool) -> None:
        """Set up, compile and capture.

        Args:
            model: In eval mode.
            cache: Empty, of B sequences; every step adds a token to each.
            sampling: How tokens are chosen.
            compile_blocks: Compile the layers.
        """
        self._model, self._cache, self._sampling = model, cache, sampling
        self._layer = torch.compile(extend_block) if compile_blocks else extend_block
        batch, device = len(cache.lengths_B), cache.lengths_B.device
        self._tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._logprobs_B = torch.zeros(batch, device=device)
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._host = torch.zeros(2, batch, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._graph: torch.cuda.CUDAGraph | None = None
        attentions = [m for m in model.modules() if isinstance(m, Attention)]
        if device.type == "cuda" and all(attention.supports_cuda_graph for attention in attentions):
            self._capture()

    def start(self, logits_BV: torch.Tensor) -> None:
        """Choose the first tokens.

        Args:
            logits_BV: After the prompts `[B, V]`.
        """
        tokens_B, logprobs_B = choose(logits_BV, self._sampling, self._generator)
        self._tokens_B1.copy_(tokens_B[:, None])
        self._logprobs_B.copy_(logprobs_B)

    @torch.no_grad()
    def advance(self) -> None:
        """Add the chosen tokens to the sequences, and choose the next ones."""
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def read(self, then_advance: bool) -> tuple[list[int], list[float]]:
        """The chosen tokens and their log-probabilities in nats.

        Args:
            then_advance: Let the device go on with the next step while the host has these.
        """
        # ids are exact in fp64; one copy, which the next step does not overtake
        chosen = torch.stack((self._tokens_B1.squeeze(1).double(), self._logprobs_B.double()))
        self._host.copy_(chosen, non_blocking=True)
        done = torch.cuda.Event() if self._host.is_pinned() else None
        if done is not None:
            done.record()
        if then_advance:
            self.advance()
        if done is not None:
            done.synchronize()
        tokens, logprobs = self._host.tolist()
        return [int(token) for token in tokens], logprobs

    def _compute(self) -> None:
        x_BTD = extend(self._model, self._tokens_B1, self._cache, self._layer)
        self.start(self._model.output.logits(x_BTD[:, -1]))

    @torch.no_grad()
    def _capture(self) -> None:
        stream = _side_stream(self._tokens_B1.device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # compiles kernels, and lets libraries allocate
            self._compute()
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._generator)
        # thread_local: a loader may pin memory in its own thread meanwhile
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._compute()
        self._generator.manual_seed(self._sampling.seed)
        self._cache.reset()
