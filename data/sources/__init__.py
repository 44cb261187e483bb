"""Sources of documents: local files, the Hugging Face hub, prepared shards, and mixtures of these."""
