"""``weightlift`` and ``python -m weightlift``: the command line, from before its modules are imported.

Importing them takes a moment in which people press Ctrl-C too.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line with this process's arguments and return its exit code."""
    try:
        from weightlift.cli.main import main as run

        return run()
    except KeyboardInterrupt as interrupt:
        from weightlift.cli.outcome import exit_code, write_error

        write_error(interrupt, as_json="--json" in sys.argv, debug="--debug" in sys.argv)
        return exit_code(interrupt)


if __name__ == "__main__":
    sys.exit(main())
