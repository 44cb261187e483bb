"""The recurrent mechanisms as plain functions of (q, k, v, gates): chunked over a row, and token by token."""
