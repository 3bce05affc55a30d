"""The command line that the scripts share which draw a results file: what is drawn, and where the picture goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def plot(
    description: str, script: str, results: Path, picture: Path, draw: Callable[[Mapping[str, Any]], str]
) -> tuple[Mapping[str, Any], Path]:
    """Draw the results that the command line names into the file that it names.

    Args:
        description: of the script, for its help.
        script: what wrote the results.
        results: the file with them, where none is named.
        picture: where the picture goes by default.
        draw: makes the text of the picture.

    Returns:
        The results, and where the picture went.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=results, help=f"what {script} wrote")
    parser.add_argument("--output", type=Path, default=picture, help="where the picture goes")
    chosen = parser.parse_args()
    found = json.loads(chosen.results.read_text(encoding="utf-8"))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(draw(found), encoding="utf-8")
    print(chosen.output)
    return found, chosen.output
