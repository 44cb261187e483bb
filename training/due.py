"""What is done every so many steps."""


def is_due(step: int, every: int | None) -> bool:
    """Return whether something is due at a step that is done every so many steps, or never (None)."""
    return every is not None and step % every == 0
