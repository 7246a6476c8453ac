"""Numbers and names as text: for tables, tiles, captions and the labels of figures."""

import numpy as np
from jaxtyping import Float

ABSENT = "–"  # for a number that isn't there


def decimal(value: float | None, places: int = 1) -> str:
    """A number as text, a dash for None and nan."""
    if value is None or np.isnan(value):
        return ABSENT
    return f"{value:,.{places}f}".replace("-", "−").replace("inf", "∞")


def percent(fraction: float | None, places: int = 1) -> str:
    """A fraction in %, without the sign; a dash for None and nan."""
    return decimal(None if fraction is None else 100 * fraction, places)


def signed(fraction: float, places: int = 1) -> str:
    """A difference in points with its sign, none at zero; a dash for nan."""
    points = round(100 * fraction, places)
    return f"{'+' if points > 0 else ''}{decimal(points or 0.0, places)}"


def significant(value: float | None, digits: int = 2) -> str:
    """A number as text, in powers of ten where it is far from one; a dash for None and nan."""
    if value is None or not np.isfinite(value):
        return decimal(value)
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}·10{raised}".replace("-", "−")
    return (
        f"{value:#.{digits}g}".removesuffix(".").replace("-", "−")
        if round(abs(value)) < 10**digits
        else decimal(value, 0)
    )


def millions(count: int | np.integer) -> str:
    """In millions, with three digits or more from a hundred thousand on, and two below."""
    return decimal(count / 1e6, 1 if count >= 1e7 else 2) if count >= 1e5 else significant(count / 1e6)


def with_error(value: float | None, error: float | None, places: int = 1) -> str:
    """`value ± error`, without a break; the value alone where there is no error."""
    if error is None or not np.isfinite(error) or value is None or not np.isfinite(value):
        return decimal(value, places)
    return f"{decimal(value, places)}\u00a0±\u00a0{decimal(error, places)}"


def spread(values: Float[np.ndarray, " runs"], places: int = 1) -> str:
    """Mean ± sample standard deviation over runs as text; the number itself where there is one run."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return with_error(float(np.mean(values)), deviation, places)


def counted(count: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def short(name: str, length: int) -> str:
    """The name, cut to `length` letters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def middle(name: str, length: int) -> str:
    """The name, cut to `length` letters in its middle, where what tells names apart stands at their ends."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"
