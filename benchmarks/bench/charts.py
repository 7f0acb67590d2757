"""Charts as SVG, from values: lines over a number, and dots of every run.

They stand in pages of Markdown as pictures, so each brings its own background and the colours for a light and a dark
one, says in `desc` what it shows to those who do not see it, and names what it draws beside it, without a legend.
Servers differ in colour, in dash and in the shape of their marks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from msgspec import Struct

from bench.figures import digits

STYLE = """\
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#1f2328}
.title{font-size:15px;font-weight:600}
.head{font-weight:600}
.quiet{fill:#59636e}
.ground{fill:#ffffff}
.axis{stroke:#59636e;fill:none}
.grid{stroke:#d1d9e0;fill:none}
.line{fill:none;stroke-width:2}
.c0{stroke:#0757a8}.f0{fill:#0757a8}
.c1{stroke:#6e7781;stroke-dasharray:5 4}.f1{fill:#59636e}
.c2{stroke:#a63c00;stroke-dasharray:2 3}.f2{fill:#a63c00}
.c3{stroke:#7a2e9e;stroke-dasharray:9 3}.f3{fill:#7a2e9e}
.run{fill-opacity:.55}
@media(prefers-color-scheme:dark){
text{fill:#e6edf3}.quiet{fill:#9198a1}.ground{fill:#0d1117}.axis{stroke:#9198a1}.grid{stroke:#30363d}
.c0{stroke:#6cb6ff}.f0{fill:#6cb6ff}.c1{stroke:#9198a1}.f1{fill:#9198a1}
.c2{stroke:#ff9a57}.f2{fill:#ff9a57}.c3{stroke:#d2a8ff}.f3{fill:#d2a8ff}
}"""
LOOKS = 4
"""How many looks the style has: a series' `look` is one of them."""

WIDTH = 800
TOP = 40
PANEL = 250
ROW = 20
MOST_MARKS = 40
"""Points of a line that have marks; those of a longer one would hide each other."""
CHARACTER = 7.4
"""Pixels that a character of a label takes, on the wide side."""


class Point(Struct, frozen=True):
    """The values at one place of the horizontal axis."""

    x: float
    values: tuple[float, ...]
    middle: float


class Series(Struct, frozen=True):
    """What one server did; without a name, where it is alone in its panel."""

    name: str
    look: int
    points: tuple[Point, ...]


class Panel(Struct, frozen=True):
    """One pair of axes."""

    title: str
    unit: str
    series: tuple[Series, ...]


class Strip(Struct, frozen=True):
    """The runs of one server in one case, on a line of their own. `group` is the heading above the first of several."""

    group: str
    name: str
    look: int
    values: tuple[float, ...]
    middle: float


class Scale(Struct, frozen=True):
    """From values to pixels."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * (value - self.low) / ((self.high - self.low) or 1)


def lines(title: str, x_label: str, panels: Sequence[Panel], *, every: int | None = None) -> str:
    """Panels beside and below each other, each with lines over the same kind of number.

    The horizontal axis names the places that were measured, or each multiple of `every`. Both axes begin at 0, so that
    slopes and ratios can be read.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    parts: list[str] = []
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left, width = column * WIDTH / columns, WIDTH / columns
        parts += _panel(panel, x_label, left, TOP + row * PANEL, width, every=every)
    said = " ".join(_said(panel, x_label) for panel in panels)
    return _document(title, said, TOP + rows * PANEL + 8, parts)


def dots(title: str, unit: str, strips: Sequence[Strip]) -> str:
    """A line for each server and case, with a dot for each run, a bar at the median, and the median as a number."""
    left = 24 + CHARACTER * max(len(each.name) for each in strips)
    right = WIDTH - 90
    highest = max(max(each.values) for each in strips)
    ticks = nice(highest)
    scale = Scale(0, max(highest, ticks[-1]), left, right)
    parts, y, group = [], TOP + 6.0, ""
    below: list[str] = []
    for each in strips:
        if each.group != group:
            group = each.group
            y += ROW
            below.append(_text(12, y + 4, group, "head"))
        y += ROW
        below.append(_text(left - 8, y + 4, each.name, f"f{each.look}", anchor="end"))
        below += [_mark(scale(value), y, each.look, run=True) for value in each.values]
        middle = scale(each.middle)
        below.append(f'<path class="axis" stroke-width="2" d="M{middle:.1f} {y - 8:.1f}v16"/>')
        below.append(
            _text(scale(max(each.values)) + 10, y + 4, f"{digits(each.middle)} {unit}".rstrip(), f"f{each.look}")
        )
    bottom = y + ROW
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{scale(tick):.1f} {TOP + 8}V{bottom:.1f}"/>')
        parts.append(_text(scale(tick), bottom + 16, digits(tick), "quiet", anchor="middle"))
    parts.append(_text((left + right) / 2, bottom + 34, unit, "quiet", anchor="middle"))
    said = "; ".join(
        f"{', '.join(filter(None, (each.group, each.name)))}: median {_spread(each.middle, each.values, unit)}"
        for each in strips
    )
    return _document(title, f"{said}.", bottom + 46, parts + below)


def nice(highest: float) -> tuple[float, ...]:
    """Round numbers from 0 to the first that is not below `highest`, four to six of them."""
    if highest <= 0:
        return (0.0, 1.0)
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return tuple(step * count for count in range(math.ceil(highest / step - 1e-9) + 1))


def _panel(panel: Panel, x_label: str, left: float, top: float, width: float, *, every: int | None) -> Iterator[str]:
    longest = max(len(each.name) for each in panel.series)
    begin, end = left + 58, left + width - 20 - CHARACTER * longest
    upper, lower = top + 34, top + PANEL - 50
    points = [point for each in panel.series for point in each.points]
    xs = sorted({point.x for point in points})
    ticks = nice(max(max(point.values) for point in points))
    across = Scale(min(0, xs[0]), xs[-1], begin, end)
    up = Scale(0, ticks[-1], lower, upper)
    yield _text(left + 12, top + 16, panel.title, "head")
    for tick in ticks:
        yield f'<path class="grid" d="M{begin:.1f} {up(tick):.1f}H{end:.1f}"/>'
        yield _text(begin - 6, up(tick) + 4, digits(tick), "quiet", anchor="end")
    yield _text(left + 14, (upper + lower) / 2, panel.unit, "quiet", anchor="middle", turned=True)
    yield f'<path class="axis" d="M{begin:.1f} {lower:.1f}H{end:.1f}"/>'
    named = xs if every is None else [x for x in xs if x % every == 0]
    for x in apart(named, across):
        yield f'<path class="axis" d="M{across(x):.1f} {lower:.1f}v5"/>'
        yield _text(across(x), lower + 18, digits(x), "quiet", anchor="middle")
    yield _text((begin + end) / 2, lower + 36, x_label, "quiet", anchor="middle")
    for each in panel.series:
        yield from _drawn(each, across, up)
    ends = [(up(each.points[-1].middle), each) for each in panel.series if each.name]
    for y, each in _spread_out(ends):
        yield _text(end + 10, y + 4, each.name, f"f{each.look}")


def _drawn(series: Series, across: Scale, up: Scale) -> Iterator[str]:
    path = "L".join(f"{across(point.x):.1f} {up(point.middle):.1f}" for point in series.points)
    yield f'<path class="line c{series.look}" d="M{path}"/>'
    if len(series.points) > MOST_MARKS:
        return
    for point in series.points:
        x, low, high = across(point.x), up(min(point.values)), up(max(point.values))
        if low - high >= 1:
            yield f'<path class="c{series.look}" stroke-dasharray="none" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        yield _mark(x, up(point.middle), series.look)


def apart(values: Sequence[float], scale: Scale) -> list[float]:
    """Those of the values whose labels do not touch; the greatest is among them."""
    kept: list[float] = []
    room = math.inf
    for value in reversed(values):
        half = CHARACTER * len(digits(value)) / 2 + 2
        if scale(value) + half <= room:
            kept.append(value)
            room = scale(value) - half
    return kept


def _spread_out(ends: Iterable[tuple[float, Series]]) -> list[tuple[float, Series]]:
    """The heights of the labels, from the top, none on another."""
    placed: list[tuple[float, Series]] = []
    for y, each in sorted(ends, key=lambda end: end[0]):
        placed.append((max(y, placed[-1][0] + 14) if placed else y, each))
    return placed


def _mark(x: float, y: float, look: int, *, run: bool = False) -> str:
    classes = f"f{look} run" if run else f"f{look}"
    match look % LOOKS:
        case 0:
            return f'<circle class="{classes}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        case 1:
            return f'<rect class="{classes}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
        case 2:
            return f'<path class="{classes}" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'
        case _:
            return f'<path class="{classes}" d="M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z"/>'


def _text(x: float, y: float, text: str, classes: str, *, anchor: str = "start", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}"{place}{turn}>{escape(text)}</text>'


def _said(panel: Panel, x_label: str) -> str:
    """The panel in words: each server's median at each place, or of a curve its mean and its peak."""
    said = []
    for each in panel.series:
        middles = [point.middle for point in each.points]
        words = f"mean {digits(sum(middles) / len(middles))}, greatest {digits(max(middles))}"
        if len(each.points) <= MOST_MARKS:
            words = ", ".join(f"{digits(point.middle)} at {digits(point.x)}" for point in each.points)
        said.append(f"{each.name}: {words}" if each.name else words)
    return f"{panel.title}, in {panel.unit}, over {x_label}. {'; '.join(said)}."


def _spread(middle: float, values: Sequence[float], unit: str) -> str:
    if len(values) == 1:
        return f"{digits(middle)} {unit}"
    return f"{digits(middle)} {unit}, from {digits(min(values))} to {digits(max(values))}"


def _document(title: str, said: str, height: float, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" \
role="img" aria-labelledby="title desc">
<title id="title">{escape(title)}</title>
<desc id="desc">{escape(said)}</desc>
<style>{STYLE}</style>
<rect class="ground" width="{WIDTH}" height="{height:.0f}"/>
{_text(12, 24, title, "title")}
{body}
</svg>
"""
