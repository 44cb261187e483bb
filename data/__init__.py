"""From a file on disk to the batch on a rank, in seven steps.

1. Open. The `[data]` table of a run is a `DataConfig` (config.py). `open_source` (sources/open.py) opens a
   `DocumentSource` (sources/base.py) of one of seven kinds: parquet, jsonl, text, hub, datasets, shards,
   mixture.
2. Read. `DocumentSource.read` yields `Row`s in stored or shuffled order (permutation.py), each with the
   `Position` of the next row. A `Filter` (sources/filters.py) skips rows that are not documents, and the
   split by content (sources/split.py) keeps training and held-out documents apart.
3. Tokenize. `RowStream` (loading/stream.py) encodes text with the `Tokenizer` (tokenizer.py), appends the
   end-of-document token, and yields `Document`s. Shards hold tokens already, which stay unread (`LazyTokens`,
   sources/shards.py); `python -m data.shards` writes them (shards/).
4. Pack. A `Packer`, `ConcatenatePacker` (loading/packing.py) or `BestFitPacker` (loading/best_fit.py), turns
   documents into `PackedRow`s of T + 1 tokens, each with the `PackerState` of the next row. `ShardRows`
   (loading/shard_rows.py) lays out the same rows of shards from document lengths alone (loading/layout.py).
5. Shuffle. `RowShuffle` (loading/row_shuffle.py) serves the rows of training in windows, each in permuted
   order, with the `StreamState` from which a run resumes. `open_rows` (loading/rows.py) chooses how a window
   is held; validation, and `shuffle_seed = "none"`, take the rows of `RowStream` in order.
6. Divide. `PackedLoader` (loading/loader.py) takes its rank's rows of each micro-step
   (loading/global_batch.py) and collates them into a `MicroBatch`: `{"input", "cu_seqlens"}` and labels. The
   state does not depend on the rank, so a run resumes on any number of ranks. For validation `HeldOutLoader`
   (loading/held_out.py) does so, with evenly spaced rows of the documents that `open_held_out`
   (sources/held_out.py) draws.
7. Prefetch. A `Prefetcher` (loading/prefetch.py) prepares micro-batches ahead in a thread of torchdata.
   `TitanLoader` (titan.py) is the loader that torchtitan's trainer iterates over and checkpoints.
"""
