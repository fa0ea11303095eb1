"""Plots as inline SVG: range frames, direct labels, no ink without data. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 46

Label = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, its range, linear or logarithmic.

    Args:
        name: with the unit.
        low, high: of the data.
        label: how a value is written.
    """

    name: str
    low: float
    high: float
    label: Label
    log: bool = False

    @classmethod
    def around(cls, name: str, values: Sequence[float], label: Label, log: bool = False) -> Axis:
        """An axis that just holds the values."""
        low, high = min(values), max(values)
        if log:
            if high / low < 1.5:
                low, high = low / 1.25, high * 1.25
        elif high - low < 1e-12 * max(abs(high), 1e-12):
            pad = abs(high) * 0.05 or 1.0
            low, high = low - pad, high + pad
        return cls(name, low, high, label, log)

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors: tuple[float, ...] = (1,)
    if decades <= 1:
        factors = (1, 1.5, 2, 3, 5, 7)
    elif decades <= 2:
        factors = (1, 2, 5)
    step = max(1, math.ceil(decades / 5))
    powers = range(first, last + 1, step)
    return [f * 10.0**k for k in powers for f in factors if low * 0.999 <= f * 10.0**k <= high * 1.001]


@dataclass
class Plot:
    """A plot that is filled piece by piece and then drawn."""

    x: Axis
    y: Axis
    title: str
    """What the plot shows, for those who cannot see it."""
    height: int = HEIGHT
    _pieces: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        return round(LEFT + self.x.at(value) * (WIDTH - LEFT - RIGHT), 1)

    def py(self, value: float) -> float:
        return round(self.height - BOTTOM - self.y.at(value) * (self.height - TOP - BOTTOM), 1)

    def point(self, x: float, y: float, kind: str, title: str, radius: float = 3.5) -> None:
        self._pieces.append(
            f'<circle class="{kind}" cx="{self.px(x)}" cy="{self.py(y)}" r="{radius}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def line(self, points: Sequence[tuple[float, float]], kind: str, steps: bool = False) -> None:
        """Straight pieces, or steps that hold a value until the next point."""
        if not points:
            return
        path = f"M{self.px(points[0][0])} {self.py(points[0][1])}"
        for x, y in points[1:]:
            path += f"H{self.px(x)}V{self.py(y)}" if steps else f"L{self.px(x)} {self.py(y)}"
        self._pieces.append(f'<path class="{kind}" d="{path}"/>')

    def bar(self, x: float, low: float, high: float, kind: str) -> None:
        """An interval, upright."""
        self._pieces.append(
            f'<line class="{kind}" x1="{self.px(x)}" x2="{self.px(x)}" y1="{self.py(low)}" y2="{self.py(high)}"/>'
        )

    def level(self, value: float, text: str, upright: bool = False) -> None:
        """A thin line across at a value of the upright axis (or of the other one), with its name."""
        if upright:
            x = self.px(value)
            right = x > (WIDTH + LEFT) / 2
            self._pieces.append(
                f'<line class="level" x1="{x}" x2="{x}" y1="{TOP}" y2="{self.height - BOTTOM}"/>'
                f'<text class="note" x="{x + (-5 if right else 5)}" y="{TOP + 9}" '
                f'text-anchor="{"end" if right else "start"}">{escape(text)}</text>'
            )
            return
        y = self.py(value)
        self._pieces.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="note" x="{WIDTH - RIGHT}" y="{y - 4}" text-anchor="end">{escape(text)}</text>'
        )

    def note(self, x: float, y: float, text: str) -> None:
        """A label beside a point, on the side where there is room."""
        right = self.px(x) > (WIDTH + LEFT) / 2
        self._pieces.append(
            f'<text class="note" x="{self.px(x) + (-8 if right else 8)}" y="{self.py(y) + 4}" '
            f'text-anchor="{"end" if right else "start"}">{escape(text)}</text>'
        )

    def draw(self) -> Markup:
        return Markup(
            f'<svg class="plot" viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(self._frame())}{''.join(self._pieces)}</svg>"
        )

    def _frame(self) -> list[str]:
        floor = self.height - BOTTOM + 7
        wall = LEFT - 7
        x1, x2 = self.px(self.x.low), self.px(self.x.high)
        y1, y2 = self.py(self.y.low), self.py(self.y.high)
        pieces = [
            f'<path class="frame" d="M{x1} {floor}H{x2}M{wall} {y1}V{y2}"/>',
            f'<text class="name" x="{x2}" y="{self.height - 6}" text-anchor="end">{escape(self.x.name)}</text>',
            f'<text class="name" x="0" y="12">{escape(self.y.name)}</text>',
        ]
        for tick in _apart(self.x.ticks(), self.px, 44):
            pieces.append(
                f'<path class="frame" d="M{self.px(tick)} {floor}v4"/><text x="{self.px(tick)}" y="{floor + 16}" '
                f'text-anchor="middle">{escape(self.x.label(tick))}</text>'
            )
        for tick in _apart(self.y.ticks(), self.py, 18):
            pieces.append(
                f'<path class="frame" d="M{wall} {self.py(tick)}h-4"/><text x="{wall - 6}" y="{self.py(tick) + 4}" '
                f'text-anchor="end">{escape(self.y.label(tick))}</text>'
            )
        return pieces


def _apart(ticks: list[float], position: Callable[[float], float], distance: float) -> list[float]:
    """The ticks without those that would be written over the one before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or abs(position(tick) - position(kept[-1])) >= distance:
            kept.append(tick)
    return kept


def interval(value: float, low: float | None, high: float | None, limit: float | None, label: Label) -> Markup:
    """A value with its interval on a line on which zero and the accepted limit are marked."""
    marks = [0.0, value, *(v for v in (low, high, limit) if v is not None)]
    left, right = min(marks), max(marks)
    pad = 0.06 * (right - left) or 1.0
    width, middle = 190, 14

    def at(v: float) -> float:
        return round(4 + (v - left + pad) / (right - left + 2 * pad) * (width - 8), 1)

    pieces = [f'<line class="frame" x1="4" x2="{width - 4}" y1="{middle}" y2="{middle}"/>']
    for v, text, kind in ((0.0, "0", "zero"), (limit, "accepted", "level")):
        if v is None:
            continue
        anchor = "start" if at(v) < 30 else "end" if at(v) > width - 30 else "middle"
        if limit is not None and abs(at(limit) - at(0.0)) < 45:
            anchor = "end" if (v == 0.0) == (limit > 0) else "start"
        pieces.append(
            f'<line class="{kind}" x1="{at(v)}" x2="{at(v)}" y1="{middle - 8}" y2="{middle + 8}"/>'
            f'<text class="note" x="{at(v)}" y="{middle + 21}" text-anchor="{anchor}">{text}</text>'
        )
    if low is not None and high is not None:
        pieces.append(f'<line class="whisker" x1="{at(low)}" x2="{at(high)}" y1="{middle}" y2="{middle}"/>')
    pieces.append(f'<circle class="mark" cx="{at(value)}" cy="{middle}" r="5"/>')
    spoken = f"drop {label(value)}"
    if low is not None and high is not None:
        spoken += f", interval {label(low)} to {label(high)}"
    if limit is not None:
        spoken += f", accepted {label(limit)}"
    return Markup(
        f'<svg class="interval" viewBox="0 0 {width} 40" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(pieces)}</svg>"
    )


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, ties at their mean rank; None for fewer than three pairs or without any spread."""
    if len(a) < 3:
        return None
    x, y = _ranks(a), _ranks(b)
    mean = (len(a) - 1) / 2
    covariance = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    spread = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    return covariance / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for i in order[start:end]:
                ranks[i] = (start + end - 1) / 2
            start = end
    return ranks
