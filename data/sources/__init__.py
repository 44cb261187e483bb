"""Documents from wherever they lie: files, the hub, prepared shards, mixtures of these."""
