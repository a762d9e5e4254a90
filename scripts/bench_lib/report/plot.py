"""Renders stacked line charts with a common time axis as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP = 860, 92, 16, 40
HEIGHT, GAP, BOTTOM = 150, 34, 40
TICK_S = 15
COLORS = ("#2563eb", "#d97706", "#059669")
INK, GRID, PAPER = "#334155", "#cbd5e1", "#ffffff"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line; `is_step`: a value lasts until the next."""

    name: str
    points: Points
    is_step: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: title, lines, and labels of its axis marks if they are not numbers."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, slots=True)
class Band:
    """A time span that is shaded in all charts."""

    start: float
    end: float
    color: str


def draw(title: str, charts: Sequence[Chart], bands: Sequence[Band], end_s: float) -> str:
    """Return the SVG; times run from 0 to `end_s` seconds."""
    height = TOP + len(charts) * (HEIGHT + GAP) + BOTTOM - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
        _text(WIDTH / 2, 22, title, anchor="middle", size=15),
    ]
    for index, chart in enumerate(charts):
        parts += _chart(chart, TOP + index * (HEIGHT + GAP), bands, end_s)
    bottom = height - BOTTOM
    for second in range(0, int(end_s) + 1, TICK_S):
        parts.append(_text(_x(second, end_s), bottom + 18, f"{second}", anchor="middle"))
    parts.append(_text(WIDTH / 2, bottom + 34, "seconds", anchor="middle"))
    return "\n".join([*parts, "</svg>", ""])


def _chart(chart: Chart, top: float, bands: Sequence[Band], end_s: float) -> list[str]:
    values = [value for line in chart.lines for _, value in line.points]
    marks = chart.marks or _ticks(max(values, default=1.0))
    low = min([0.0, *(value for value, _ in marks)])
    high = max([*values, *(value for value, _ in marks)], default=1.0) or 1.0

    def y(value: float) -> float:
        return top + HEIGHT * (1 - (value - low) / (high - low))

    parts = [
        f'<rect x="{_x(band.start, end_s):.1f}" y="{top}" height="{HEIGHT}" '
        f'width="{_x(band.end, end_s) - _x(band.start, end_s):.1f}" fill="{band.color}"/>'
        for band in bands
    ]
    for value, label in marks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="{GRID}"/>'
        )
        parts.append(_text(LEFT - 8, y(value) + 4, label, anchor="end"))
    parts.append(_text(LEFT, top - 8, chart.title))
    for number, line in enumerate(chart.lines):
        color = COLORS[number % len(COLORS)]
        parts.append(
            f'<path d="{_path(line, y, end_s)}" fill="none" stroke="{color}" stroke-width="1.8"/>'
        )
        if len(chart.lines) > 1:
            place = WIDTH - RIGHT - 130 * (len(chart.lines) - number) + 130
            parts.append(_text(place, top - 8, line.name, anchor="end", color=color))
    return parts


def _path(line: Line, y: "object", end_s: float) -> str:
    assert callable(y)
    commands: list[str] = []
    for second, value in line.points:
        place = f"{_x(second, end_s):.1f}"
        if commands and line.is_step:
            commands.append(f"H{place}")
        commands.append(f"{'L' if commands else 'M'}{place},{y(value):.1f}")
    return " ".join(commands)


def _ticks(greatest: float) -> list[tuple[float, str]]:
    """Return about three round values from 0 up, and a suitable unit."""
    scale, unit = next(
        (pair for pair in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if greatest >= 10 * pair[0]),
        (1.0, ""),
    )
    step = 1.0
    while greatest / scale / step > 4:
        step *= 2.5 if str(step)[0] == "2" else 2
    count = int(greatest / scale / step) + 1
    return [(number * step * scale, f"{number * step:g}{unit}") for number in range(count + 1)]


def _x(second: float, end_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * second / end_s


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, color: str = INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{color}">{escape(text)}</text>'
    )
