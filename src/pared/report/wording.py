"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def significant(value: float, digits: int = 3) -> str:
    """
    >>> significant(0.0012345), significant(1234.5), significant(-0.5), significant(4.2e-9)
    ('0.00123', '1,234', '−0.5', '4.2e−9')
    """
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 8:
        mantissa, _, exponent = f"{value:.{max(0, digits - 2)}e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - size)
        text = f"{value:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


def size(n_bytes: Any) -> str:
    """Bytes with a decimal prefix: MB = 10^6.

    >>> size(812), size(39_842), size(1_724_320), size(None)
    ('812 B', '39.8 kB', '1.72 MB', '–')
    """
    value = number(n_bytes)
    if value is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return f"{fixed(value / scale)} {unit}"
    return f"{value:.0f} B"


def count(n: Any) -> str:
    """
    >>> count(431_080), count(1_814_073_344), count(12)
    ('431 k', '1.81 G', '12')
    """
    value = number(n)
    if value is None:
        return "–"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            return f"{fixed(value / scale)} {unit}"
    return f"{value:,.0f}"


def fixed(value: float) -> str:
    """Three digits, with zeros kept, so that columns line up.

    >>> fixed(1.7243), fixed(39.84), fixed(431.08), fixed(9.999)
    ('1.72', '39.8', '431', '10.0')
    """
    for decimals, limit in ((2, 9.995), (1, 99.95)):
        if abs(value) < limit:
            return f"{value:.{decimals}f}".replace("-", "−")
    return f"{value:,.0f}".replace("-", "−")


def milliseconds(value: Any) -> str:
    """
    >>> milliseconds(0.0123), milliseconds(12.34), milliseconds(2100)
    ('12.3 µs', '12.3 ms', '2.10 s')
    """
    found = number(value)
    if found is None:
        return "–"
    for unit, scale in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if abs(found) >= 0.9995 * scale or unit == "µs":
            return f"{fixed(found / scale)} {unit}"
    return "–"


def seconds(value: Any) -> str:
    """
    >>> seconds(0.4), seconds(75), seconds(7800)
    ('0.4 s', '1 min 15 s', '2 h 10 min')
    """
    found = number(value)
    if found is None:
        return "–"
    if found < 59.95:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ratio(before: Any, after: Any) -> float | None:
    """before / after, None where it is not defined."""
    a, b = number(before), number(after)
    return a / b if a is not None and b is not None and b > 0 and a > 0 else None


def score(value: Any, in_points: bool) -> str:
    """A metric's value: per cent of a share, or the plain number.

    >>> score(0.91623, True), score(-2.30259, False)
    ('91.62 %', '−2.303')
    """
    found = number(value)
    if found is None:
        return "–"
    return f"{100 * found:.2f} %" if in_points else significant(found, 4)


def signed(value: Any) -> str:
    """
    >>> signed(0.134), signed(-0.05), signed(0.001)
    ('0.13', '−0.05', '0.00')
    """
    found = number(value)
    if found is None:
        return "–"
    text = f"{found:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def links_of(technique: Any) -> list[tuple[str, str]]:
    """The techniques along a chain, each with its settings.

    >>> links_of("chain(prune.magnitude(sparsity=0.9), quantize.codebook(bits=4, tune=True))")
    [('prune.magnitude', 'sparsity 0.9'), ('quantize.codebook', 'bits 4, tune True')]
    >>> links_of("as it is")
    [('as it is', '')]
    """
    text = str(technique).strip()
    name, bracket, rest = text.partition("(")
    if not bracket or not rest.endswith(")"):
        return [(text, "")]
    if name == "chain":
        return [link for part in _split(rest[:-1]) for link in links_of(part)]
    return [(name, ", ".join(part.replace("=", " ", 1) for part in _split(rest[:-1])))]


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def chain(technique: Any) -> str:
    """
    >>> chain("chain(prune.magnitude(sparsity=0.9), quantize.codebook(bits=4))")
    'prune.magnitude sparsity 0.9 → quantize.codebook bits 4'
    """
    return " → ".join(f"{name} {settings}".strip() for name, settings in links_of(technique))


def shortened(paths: Sequence[str], longest: int) -> dict[str, str]:
    """Short names for dotted paths: without what all share at both ends, and cut in the middle where still too long.

    >>> shortened(["net.layers.0.fc.weight", "net.layers.1.fc.weight"], 20)
    {'net.layers.0.fc.weight': 'layers.0', 'net.layers.1.fc.weight': 'layers.1'}
    >>> shortened(["conv1.weight", "fc.weight", "fc.bias"], 8)
    {'conv1.weight': 'con…ight', 'fc.weight': 'fc.…ight', 'fc.bias': 'fc.bias'}
    """
    split = [path.split(".") for path in dict.fromkeys(paths)]
    start = end = 0
    if len(split) > 1:
        shortest = min(map(len, split))
        while start < shortest - 1 and len({parts[start] for parts in split}) == 1:
            start += 1
        while end < shortest - 1 - start and len({parts[-1 - end] for parts in split}) == 1:
            end += 1
        if start and any(parts[start].isdigit() for parts in split):
            start -= 1  # a bare number says nothing
    names = {}
    for parts in split:
        name = ".".join(parts[start : len(parts) - end])
        if len(name) > longest:
            head = (longest - 1) // 2
            name = f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"
        names[".".join(parts)] = name
    return names
