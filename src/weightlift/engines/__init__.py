"""The two engines that move bytes: ``native`` (C) and ``python`` (the reference and the fallback)."""
