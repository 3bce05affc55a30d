"""What ``WEIGHTLIFT_PATCH=1`` has every Python process do when it starts: patch, and say so if that is not possible.

Imported by the file ``weightlift_patch.pth``, which lies beside the installed package and does nothing without the
variable. A program must never fail to start because of it.
"""

from __future__ import annotations

import sys

from weightlift.errors import WeightliftError
from weightlift.integrations.patching import patch

try:
    patch()
except WeightliftError as err:
    sys.stderr.write(f"weightlift: WEIGHTLIFT_PATCH has no effect: {err}\n")
