"""Format how far a run is and how long it takes; without importing torch."""

BAR_WIDTH = 20


def format_duration(seconds: float) -> str:
    """Format seconds as 1d02h, 3h05m, 4m07s or 9s."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{total % 60:02}s" if minutes else f"{total}s"


def format_progress(step: int, steps: int) -> str:
    """Format progress as [######..............]  30%."""
    filled = BAR_WIDTH * step // steps
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {100 * step // steps:3}%"
