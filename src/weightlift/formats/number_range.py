"""Which JSON numbers the reference parser of safetensors headers refuses as too large.

Owns that one rule, which matters only for numbers in fields that are otherwise ignored.
"""

from __future__ import annotations

import math
from typing import Final

_UINT64_MAX: Final = (1 << 64) - 1
_INT32_MAX: Final = (1 << 31) - 1


def exceeds_double(token: bytes) -> bool:
    """Whether the reference parser refuses a well-formed JSON number as out of the range of a double.

    It multiplies the first digits that fit 64 bits with a power of ten, so its bound differs from the true one in the
    last digits; the steps here are the same.
    """
    mantissa, _, exponent_text = token.lstrip(b"-").replace(b"E", b"e").partition(b"e")
    whole, _, fraction = mantissa.partition(b".")
    significand, used = _leading_digits(0, whole)
    exponent = len(whole) - used
    significand, used = _leading_digits(significand, fraction)
    exponent -= used
    if exponent_text:
        digits = exponent_text.lstrip(b"+-")
        sign = -1 if exponent_text.startswith(b"-") else 1
        given = int(digits) if len(digits.lstrip(b"0")) <= 10 else _INT32_MAX + 1
        if given > _INT32_MAX:
            return bool(significand) and sign > 0
        exponent += sign * given
    if exponent < 0 or not significand:
        return False
    return math.isinf(float(significand) * float(f"1e{exponent}"))


def _leading_digits(significand: int, digits: bytes) -> tuple[int, int]:
    for used, digit in enumerate(digits):
        longer = significand * 10 + digit - 0x30
        if longer > _UINT64_MAX:
            return significand, used
        significand = longer
    return significand, len(digits)
