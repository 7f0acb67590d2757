"""What a benchmark finds, as values: printed as a table for people, written as JSON for the page of figures."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import Struct

FLOOR = "floor"
"""The server to which the others are compared: see floor.py."""

LIBRARIES = ("grpcio", "cryptography", "protobuf", "msgspec")


class Figure(Struct, frozen=True):
    """One quantity, of as many runs as there are values."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        """The median, with the least and the greatest where there are several."""
        middle = f"{digits(self.median)} {self.unit}".rstrip()
        if len(self.values) == 1:
            return middle
        return f"{middle} ({digits(min(self.values))} to {digits(max(self.values))})"


class Row(Struct, frozen=True):
    """What one server did in one case. `case` says what differs between the rows, such as the number of streams."""

    server: str
    case: dict[str, str | int]
    figures: tuple[Figure, ...]


class Machine(Struct, frozen=True):
    """Where it was measured."""

    processor: str
    cores: int
    memory_mb: int
    kernel: str
    python: str
    libraries: dict[str, str]

    @classmethod
    def this(cls) -> "Machine":
        """The one that this program runs on."""
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        return cls(
            processor=model or platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
            kernel=platform.release(),
            python=platform.python_version(),
            libraries={each: version(each) for each in LIBRARIES},
        )


class Report(Struct, frozen=True):
    """All that one benchmark found. `method` says what was done, in the words of the program's own help."""

    benchmark: str
    method: str
    arguments: dict[str, str]
    measured_at: datetime
    machine: Machine
    load_before: float
    """The machine's load average over a minute when the benchmark began: above 0.5 others took part of it."""
    rows: tuple[Row, ...]


def report(benchmark: str, method: str, arguments: dict[str, str], rows: Iterable[Row], load_before: float) -> Report:
    """The report of a benchmark that has just ended."""
    now = datetime.now(UTC).replace(microsecond=0)
    return Report(benchmark, method.strip(), arguments, now, Machine.this(), load_before, tuple(rows))


def ratios(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Each figure of the row over the floor's in the same case, by name; without those that the floor does not have."""
    floor = next((each for each in rows if each.server == FLOOR and each.case == row.case), None)
    if floor is None or row.server == FLOOR:
        return {}
    of_floor = {figure.name: figure for figure in floor.figures}
    found = {}
    for figure in row.figures:
        base = of_floor.get(figure.name)
        if base is None or not base.median or figure.unit == "%":  # which is a ratio already
            continue
        if len(base.values) == len(figure.values) and all(base.values):  # run by run: a machine may drift
            found[figure.name] = statistics.median(a / b for a, b in zip(figure.values, base.values, strict=True))
        else:
            found[figure.name] = figure.median / base.median
    return found


def lines(rows: Sequence[Row]) -> Iterable[str]:
    """The rows for people: one line for each figure, with the ratio to the floor."""
    for row in rows:
        where = ", ".join(f"{key} {value}" for key, value in row.case.items())
        yield f"{row.server}{': ' if where else ''}{where}"
        over = ratios(row, rows)
        for figure in row.figures:
            ratio = f"   {over[figure.name]:.2f} x floor" if figure.name in over else ""
            yield f"    {figure.name:<36} {figure}{ratio}"


def write(found: Report, path: Path) -> None:
    """Write the report as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def read(path: Path) -> Report:
    """Read such a file. Raises msgspec.ValidationError."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def digits(value: float) -> str:
    """The value for people: three digits, with commas between thousands."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
