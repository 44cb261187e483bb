"""From documents to the rows of a batch: packing, order, resume."""
