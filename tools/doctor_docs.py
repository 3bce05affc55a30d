"""Writes what follows from the code in ``docs/doctor.md``: the table of findings, and a made-up machine's report.

``--check`` writes nothing and fails where the page differs; a test does the same.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Final

from weightlift.health.checks import RULES
from weightlift.health.examination import examine
from weightlift.health.recommend import recommend
from weightlift.reports.console import make_console
from weightlift.reports.doctor import doctor_tables
from weightlift.testing.machines import two_7900_xtx

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "doctor.md"
_WIDTH: Final = 110
_MARK: Final = "<!-- {edge} of what tools/doctor_docs.py writes: {name} -->"


def findings_table() -> str:
    """Every rule as a row of a Markdown table."""
    rows = ["| id | level | when | why it matters | what mends it |", "|---|---|---|---|---|"]
    rows += [
        f"| `{rule.id}` | {rule.level.value} | " + " | ".join(map(_cell, (rule.when, rule.why, rule.mend))) + " |"
        for rule in RULES
    ]
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def made_up_report() -> str:
    """What doctor prints for two 7900 XTX under ROCm 6.0 with 32 GB."""
    facts = two_7900_xtx()
    stream = io.StringIO()
    tables = doctor_tables(facts, examine(facts), recommend(facts), 3.0)
    make_console(stream, width=_WIDTH).print(*tables, sep="\n")
    lines = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
    return f"```text\n{lines}\n```"


def filled(page: str) -> str:
    """The page with its generated parts as the code has them now.

    Raises:
        ValueError: a part's marks are not in the page.
    """
    for name, text in (("findings", findings_table()), ("made-up machine", made_up_report())):
        begin, end = (_MARK.format(edge=edge, name=name) for edge in ("beginning", "end"))
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE.name} has no part between {begin!r} and {end!r}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main(words: list[str]) -> int:
    """Write the page, or say whether it is up to date."""
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page)
    if "--check" in words:
        print(f"{PAGE.name} is {'up to date' if page == wanted else 'out of date: run tools/doctor_docs.py'}")
        return 0 if page == wanted else 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
