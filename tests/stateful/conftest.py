"""Frameworks are imported before any test counts threads, since they start some of their own."""

from __future__ import annotations

import numpy  # noqa: F401 - see above
import torch

torch.zeros(1 << 20).sum()
