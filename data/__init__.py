"""Text to batches: sources of documents, tokenizers, packing, and a loader whose state is global."""
