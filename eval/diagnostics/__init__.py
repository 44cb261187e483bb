"""What attention does inside: sizes of the correction, the attention sink, spectra of the weights.

In this order: `sample` draws query rows of held-out text, `collect` runs a forward over it and measures every
attention module, `row_statistics` and `covariance` compute quantities of single rows, `spectra` those of
weights, `transfer` copies them all to the host, `summary` reduces rows to heads, `record` makes the JSON
record, and `plots` draws it.
docs/diagnostics.md has the definitions.
"""
