"""Where Ultra-FineWeb lies on the Hugging Face hub, and what its files are called.

The repository holds tens of thousands of files in other trees, so that listing it takes longer than anyone
waits: its files are named here instead. Columns: content (string), score (a number, of a dtype that differs
between parts), source (string).
"""

import re

REPOSITORY = "openbmb/Ultra-FineWeb"
REVISION = "02c85641e3d19a854be2e09139c25adaa9518063"
PARTS = {"en": 2048, "zh": 256}


def part_files(language: str, parts: str) -> list[str]:
    """Name parts of Ultra-FineWeb.

    Args:
        language: "en" or "zh".
        parts: Part numbers and ranges of them, such as "1-20" or "1-4,9", the first part being 1.

    Returns:
        Paths in the repository, in the order given.

    Raises:
        ValueError: If `parts` is not of that form, names a part twice, or one that there is not.
    """
    total = PARTS[language]
    width = len(str(total))
    numbers: list[int] = []
    for part in parts.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if found is None:
            raise ValueError(f'parts is {parts!r}: want part numbers such as "1-20" or "1-4,9"')
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= total:
            raise ValueError(
                f"parts is {parts!r}: want numbers from 1 to {total} for {language!r}, ascending"
            )
        numbers.extend(range(first, last + 1))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"parts is {parts!r}: want no number twice")
    stem = f"data/ultrafineweb_{language}/ultrafineweb-{language}-part"
    return [f"{stem}-{number:0{width}}-of-{total}.parquet" for number in numbers]
