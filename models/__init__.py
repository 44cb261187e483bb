"""The Qwen3 decoder, what attends in it, and its parallelization."""
