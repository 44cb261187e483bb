"""The recurrent baselines: their base class, and their recurrences as functions of (q, k, v, gates)."""
