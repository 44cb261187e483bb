"""Names of Ultra-FineWeb's files on the Hugging Face hub.

The repository holds tens of thousands of other files, so that listing it is too slow: its files are named
here instead. Columns: content (string), score (a number, of a dtype that differs between parts), source
(string).
"""

import re

from errors import UserError, called

REPOSITORY = "openbmb/Ultra-FineWeb"
REVISION = "02c85641e3d19a854be2e09139c25adaa9518063"
PARTS = {"en": 2048, "zh": 256}


def part_files(language: str, parts: str) -> list[str]:
    """Return the paths of parts of Ultra-FineWeb.

    Args:
        language: "en" or "zh".
        parts: Part numbers and ranges, such as "1-20" or "1-4,9", counted from 1.

    Returns:
        Paths in the repository, in the order given.

    Raises:
        UserError: `parts` is malformed, names a part twice, or one that does not exist.
    """
    total, name = PARTS[language], called("parts")
    width = len(str(total))
    numbers: list[int] = []
    for part in parts.split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if found is None:
            raise UserError(f'{name} is {parts!r}: want part numbers such as "1-20" or "1-4,9"')
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= total:
            raise UserError(
                f"{name} is {parts!r}: want numbers from 1 to {total} for {language!r}, ascending"
            )
        numbers.extend(range(first, last + 1))
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{name} is {parts!r}: want no number twice")
    stem = f"data/ultrafineweb_{language}/ultrafineweb-{language}-part"
    return [f"{stem}-{number:0{width}}-of-{total}.parquet" for number in numbers]
