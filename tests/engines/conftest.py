"""Failures inside the conformance kit shall read like failures in a test."""

from __future__ import annotations

import numpy  # noqa: F401 - starts threads of its own, which no test shall take for left behind
import pytest

pytest.register_assert_rewrite("weightlift.testing.conformance", "weightlift.testing.bench")
