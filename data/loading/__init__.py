"""Documents to micro-batches: packing, batch arithmetic, prefetching and resume."""
