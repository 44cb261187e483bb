"""Mutants of data/ and disk.py."""

from tests.mutate.mutant import Mutant

BEST_FIT = "tests/data/loading/test_best_fit.py"
FILES = "tests/data/sources/test_files.py"
FINGERPRINT = "tests/data/test_fingerprint.py"
HELD_OUT_ROWS = "tests/data/loading/test_held_out.py"
HELD_OUT = "tests/data/sources/test_held_out.py"
JSONL = "tests/data/sources/test_jsonl.py"
MIXTURE = "tests/data/sources/test_mixture.py"
OVERLAP = "tests/data/sources/test_overlap.py"
PACKING = "tests/data/loading/test_packing.py"
PERMUTATION = "tests/data/test_permutation.py"
PREPARE = "tests/data/shards/test_prepare.py"
SHARDS = "tests/data/sources/test_shards.py"
TITAN = "tests/data/test_titan.py"
TOKENIZER = "tests/data/test_tokenizer.py"
VERIFY = "tests/data/shards/test_verify.py"

MUTANTS = [
    Mutant(
        "data/shards/verify.py",
        "if previous.next != shard.first or previous.is_last",
        "if previous.next != shard.first",
        VERIFY,
    ),
    Mutant(
        "data/shards/verify.py", "int(tokens.max()) >= vocab_size", "int(tokens.max()) > vocab_size", VERIFY
    ),
    Mutant(
        "data/shards/verify.py",
        "(tokens[ends - 1] != end_of_document_id).any()",
        "(tokens[ends[-1:] - 1] != end_of_document_id).any()",
        VERIFY,
    ),
    Mutant(
        "data/shards/verify.py",
        "if index[first:].tolist() != [(start, 0)]:",
        "if index[first:].tolist()[:1] != [(start, 0)]:",
        VERIFY,
    ),
    Mutant(
        "data/shards/verify.py",
        "if shards[0].first is not None or not shards[-1].is_last:",
        "if not shards[-1].is_last:",
        VERIFY,
    ),
    Mutant(
        "data/sources/mixture.py",
        "return _CHARACTERS_PER_TOKEN * len(row.tokens)",
        "return len(row.tokens)",
        MIXTURE,
    ),
    Mutant(
        "data/sources/mixture.py",
        'state[name]["drawn"] / self._weights[name]',
        'state[name]["drawn"] * self._weights[name]',
        MIXTURE,
    ),
    Mutant(
        "data/sources/mixture.py",
        '            state = {**state, name: {"position": row.next_position, "drawn": drawn}}\n',
        '            state[name] = {"position": row.next_position, "drawn": drawn}\n',
        MIXTURE,
    ),
    Mutant(
        "data/titan.py",
        "max_tokens=max_tokens, kept_in=kept_in",
        "max_tokens=max_tokens and max_tokens + 1, kept_in=kept_in",
        TITAN,
    ),
    Mutant(
        "data/titan.py",
        "        max_tokens=max_tokens,\n"
        "        mask_documents=config.mask_documents,\n"
        "        prefetch_batches=config.prefetch_batches,\n",
        "        max_tokens=max_tokens,\n        prefetch_batches=config.prefetch_batches,\n",
        TITAN,
    ),
    Mutant(
        "data/permutation.py",
        "(max(size, 2) - 1).bit_length() + 1, 2) // 2",
        "(max(size, 2) - 1).bit_length(), 2) // 2",
        PERMUTATION,
    ),
    Mutant("data/permutation.py", "_ROUNDS = 8", "_ROUNDS = 2", PERMUTATION),
    Mutant("data/permutation.py", "json.dumps(key).encode()", "json.dumps(key[:1]).encode()", PERMUTATION),
    Mutant("data/sources/split.py", "HELD_OUT_PER_256 = 8", "HELD_OUT_PER_256 = 16", FILES),
    Mutant(
        "data/sources/filters.py",
        "len(text) > self.max_characters",
        "len(text) >= self.max_characters",
        FILES,
    ),
    Mutant("data/sources/filters.py", "if number < self.min_score:", "if number <= self.min_score:", FILES),
    Mutant("data/sources/filters.py", "return None if number != number else number", "return number", FILES),
    Mutant("data/sources/filters.py", "if not value or value.isspace():", "if not value:", FILES),
    Mutant("data/sources/jsonl.py", 'line.decode("utf-8-sig")', 'line.decode("utf-8")', JSONL),
    Mutant("data/sources/jsonl.py", "    if key in record:\n        return record[key]\n", "", JSONL),
    Mutant("data/sources/jsonl.py", "while remaining and (num_read", "if remaining and (num_read", JSONL),
    Mutant(
        "data/sources/document_sample.py", "value < -self._heap[0][0]", "value > -self._heap[0][0]", HELD_OUT
    ),
    Mutant(
        "data/sources/document_sample.py",
        "while self._num_tokens - len(self._heap[0][2]) >= self._max_tokens:",
        "while self._num_tokens - len(self._heap[0][2]) > self._max_tokens:",
        HELD_OUT,
    ),
    Mutant(
        "data/sources/held_out.py",
        "FirstTokens(opened(source, SEED), DRAWN_PER_TOKEN * max_tokens)",
        "FirstTokens(opened(source, SEED), max_tokens)",
        HELD_OUT,
    ),
    Mutant(
        "data/titan.py",
        "        max_tokens=max_tokens,\n        mask_documents",
        "        mask_documents",
        TITAN,
    ),
    Mutant("data/loading/held_out.py", "(2 * np.arange(count) + 1)", "(2 * np.arange(count))", HELD_OUT_ROWS),
    Mutant(
        "data/loading/held_out.py", "math.ceil(max_tokens / seq_len)", "max_tokens // seq_len", HELD_OUT_ROWS
    ),
    Mutant(
        "data/loading/packing.py",
        "labels[index, max(row.num_tokens - 1, 0) :] = IGNORE_INDEX",
        "labels[index, row.num_tokens :] = IGNORE_INDEX",
        PACKING,
    ),
    Mutant("data/loading/packing.py", "if end <= self.seq_len)", "if end < self.seq_len)", PACKING),
    Mutant("data/loading/packing.py", "if num_tokens >= 2:", "if num_tokens >= 1:", PACKING),
    Mutant("data/loading/best_fit.py", "if length < min(2, span.length):", "if length < 1:", BEST_FIT),
    Mutant(
        "data/loading/best_fit.py",
        "        start += seq_len\n",
        "        start += seq_len + 1\n",
        BEST_FIT,
    ),
    Mutant(
        "disk.py",
        "    for each in [*sorted(partial.iterdir()), partial] if partial.is_dir() else [partial]:\n"
        "        _sync(each)\n",
        "",
        SHARDS,
    ),
    Mutant("data/sources/shards.py", " or zlib.crc32(data) != crc32", "", SHARDS),
    Mutant("data/sources/count.py", "+= weights[name] / sum", "= weights[name] / sum", OVERLAP),
    Mutant("data/sources/files.py", " or num_epochs & (num_epochs - 1):", ":", FILES),
    Mutant("data/sources/files.py", "if num_epochs < WORTHWHILE", "if num_epochs <= WORTHWHILE", FILES),
]
