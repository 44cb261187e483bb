"""Conventions about tokens that data and models share, neither of which imports the other."""

END_OF_DOCUMENT = "<|endoftext|>"
"""The token that closes a document unless `data.end_of_document` names another; Qwen3's own."""

TOKENIZER_FILE = "tokenizer.json"
"""The file of a tokenizer in the format of the `tokenizers` library."""

IGNORE_INDEX = -100
"""The label of a position that predicts nothing; torch's own default."""
