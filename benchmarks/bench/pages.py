"""Make the plots and the tables of docs/performance.md from the JSON of the benchmarks: `scripts/plots` runs this."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from bench import figures
from bench.contents import CHARTS, Contents
from bench.figures import Report
from bench.plots import UnknownFigureError

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "performance"
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
STRANGE = "<!-- figures:"


class PageError(Exception):
    """The page, or a file with figures, is not what it has to be. The text says where and how to mend it."""


def main() -> int:
    """Write, or check. Exit 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(
        prog="scripts/plots", description="Make the plots and tables of docs/performance.md."
    )
    parser.add_argument("directory", type=Path, nargs="?", help="where the JSON of your own benchmarks is")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    chosen = parser.parse_args()
    folder = chosen.directory or FIGURES
    if chosen.directory is not None and not folder.is_dir():
        print(f"There is no directory {folder}: scripts/bench --json {folder} makes it.", file=sys.stderr)
        return 1
    try:
        contents = Contents(reports(folder))
        made, wrong = pictures(contents, folder)
        if chosen.directory is None:
            made[PAGE] = filled(PAGE.read_text(), contents, FIGURES.name)
        else:
            made[folder / "figures.md"] = contents.alone()
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    odd = sorted(set(FIGURES.glob("*.svg")) - made.keys()) if chosen.directory is None else []
    if chosen.check:
        wrong += stale(made, odd)
    else:
        write(made, odd)
    for each in wrong:
        print(each, file=sys.stderr)
    return 1 if wrong else 0


def reports(folder: Path) -> dict[str, Report]:
    """What the benchmarks found, by their names. Raises PageError."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report = figures.read(path)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PageError(
                f"{path} is not what scripts/bench writes: {error}. Run it again, or remove the file."
            ) from error
        if report.benchmark != path.stem:
            raise PageError(f"{path} holds the figures of {report.benchmark}: give it that name.")
        found[path.stem] = report
    return found


def pictures(contents: Contents, folder: Path) -> tuple[dict[Path, str], list[str]]:
    """The text of each picture by its path, and what is wrong with those that cannot be drawn."""
    made, wrong = {}, []
    for chart in CHARTS:
        try:
            picture = contents.drawn(chart)
        except UnknownFigureError as error:
            wrong.append(str(error))
        else:
            if picture is not None:
                made[folder / f"{chart.name}.svg"] = picture
    return made, wrong


def filled(page: str, contents: Contents, folder: str) -> str:
    """The page with each of its blocks made anew. Raises PageError."""
    blocks: Mapping[str, Callable[[], str]] = contents.blocks(folder)

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in blocks:
            raise PageError(f"{PAGE} has a block {name!r}, which is none of: {', '.join(blocks)}")
        return f"{begin}\n{blocks[name]()}\n\n{end}"

    made, count = BLOCK.subn(block, page)
    if count != page.count(STRANGE):
        raise PageError(f"{PAGE} has a line '{STRANGE} NAME -->' without '<!-- end of figures -->' below it")
    return made


def stale(made: Mapping[Path, str], odd: list[Path]) -> list[str]:
    """What would change."""
    differ = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    return [f"{path} is not what the figures give: run scripts/plots." for path in [*differ, *odd]]


def write(made: Mapping[Path, str], odd: list[Path]) -> None:
    """Write. Pictures for which there are no figures any more are removed."""
    for path, text in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for path in odd:
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
