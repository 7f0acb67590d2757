"""The reports of benchmarks as Markdown: a table for each, where it was measured, and what grows by how much."""

from collections.abc import Iterable, Iterator, Sequence

from bench.figures import Figure, Machine, Report, Row, digits, ratios

OURS = ("agent", "sds-agent")
"""What rows call the agent, and the CA server that is the same program."""

MOST_COLUMNS = 6
"""Figures beside each other; more of them than this, and than there are rows, stand below each other."""

LOADED = 0.5
"""The load average above which a measurement had not the machine to itself."""


def named(server: str) -> str:
    """What a page calls that server."""
    return "sds-agent" if server in OURS else server


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each kind of row: those whose cases have the same keys, and figures in common.

    A table has a line for each server in each case, and a column for each figure: the median, from the least to the
    greatest, and how many times the floor's that is.
    """
    kinds: list[list[Row]] = []
    for row in rows:
        kind = next((each for each in kinds if _alike(each[0], row)), None)
        if kind is None:
            kinds.append([row])
        else:
            kind.append(row)
    for kind in kinds:
        yield _table(kind, rows)


def _alike(one: Row, other: Row) -> bool:
    names = {each.name for each in one.figures}
    return one.case.keys() == other.case.keys() and any(each.name in names for each in other.figures)


def _table(kind: Sequence[Row], rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys((each.name, each.unit) for row in kind for each in row.figures))
    heads = [*kind[0].case, "server"]
    names = [f"{name}, {unit}" if unit else name for name, unit in columns]
    body = [[*_case(row), named(row.server), *_figures(row, rows, columns)] for row in kind]
    if len(columns) <= max(MOST_COLUMNS, len(kind)):
        return markdown([*heads, *names], body, numbers=len(columns))
    turned = zip([*heads, *names], *body, strict=True)
    return markdown(["", *("" for _ in kind)], turned, numbers=len(kind))


def _case(row: Row) -> Iterator[str]:
    for value in row.case.values():
        yield value if isinstance(value, str) else digits(value)


def _figures(row: Row, rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> Iterator[str]:
    over = ratios(row, rows)
    have = {(each.name, each.unit): each for each in row.figures}
    for column in columns:
        figure = have.get(column)
        if figure is None:
            yield ""
            continue
        ratio = f"; {over[figure.name]:.2f} × floor" if figure.name in over else ""
        yield f"{shown(figure)}{ratio}"


def shown(figure: Figure) -> str:
    """The median without its unit, and the least and the greatest where they differ."""
    low, high = min(figure.values), max(figure.values)
    return digits(figure.median) if low == high else f"{digits(figure.median)} ({digits(low)} to {digits(high)})"


def origin(found: Report) -> str:
    """When, how and beside what it was measured, as one paragraph."""
    given = " ".join(_option(key, value) for key, value in found.arguments.items() if _matters(key, value))
    more = f" -- {given}" if given else ""
    loaded = (
        "" if found.load_before <= LOADED else f" The load average before it was {found.load_before:.1f}, not idle."
    )
    return f"`scripts/bench {found.benchmark}{more}` on {found.measured_at:%d %B %Y}.{loaded}"


def _matters(key: str, value: str) -> bool:
    """Where a peer was is of no use on another machine."""
    return not key.startswith(("peer", "beside")) and value not in {"", "False"}


def _option(key: str, value: str) -> str:
    option = f"--{key.replace('_', '-')}"
    return option if value == "True" else f"{option} {value}"


def machines(reports: Iterable[Report]) -> str:
    """The machines that the reports come from, with the versions of what they ran."""
    seen: dict[str, list[str]] = {}
    for found in reports:
        seen.setdefault(_machine(found.machine), []).append(found.benchmark)
    return markdown(["benchmarks", "machine"], [[", ".join(names), words] for words, names in seen.items()])


def _machine(machine: Machine) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    memory = f"{machine.memory_mb / 1024:.0f} GB"
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    return f"{machine.processor}, {cores}, {memory}; Linux {machine.kernel}, Python {machine.python}, {libraries}"


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The straight line nearest to the points (least squares): its value at 0, and what each unit adds.

    Raises ValueError where all points have one place.
    """
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    width = sum((x - mean_x) ** 2 for x, _ in points)
    if not width:
        raise ValueError("a line needs two places")
    each = sum((x - mean_x) * (y - mean_y) for x, y in points) / width
    return mean_y - each * mean_x, each


def markdown(heads: Sequence[str], body: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A table; its last `numbers` columns are set to the right."""
    lines = [heads, ["---"] * (len(heads) - numbers) + ["--:"] * numbers, *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
