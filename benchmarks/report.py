"""What was measured, for people: tables, targets and charts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

MiB = 1024 * 1024

Numbers = Mapping[str, float]
"""What was measured of one run: `wall`, `client` and so on."""


@dataclass(frozen=True)
class Column:
    """How a number is shown; with `ratio`, beside how many times as much that is as with the reference."""

    key: str
    title: str
    scale: float = 1
    digits: int = 1
    ratio: bool = False


COLUMNS = (
    Column("wall", "wall s", digits=2, ratio=True),
    Column("client", "client CPU s", digits=2, ratio=True),
    Column("server", "server CPU s", digits=2, ratio=True),
    Column("store", "store CPU s", digits=2),
    Column("largest", "largest process MiB", MiB, 0),
    Column("python", "Python MiB", MiB, 0),
    Column("MB", "dump MB", ratio=True),
    Column("streamed", "streamed GB", 1e9, 2),
)


@dataclass(frozen=True)
class Results:
    """The runs of a suite, contender by contender, and why others are missing."""

    suite: str
    title: str
    runs: Mapping[str, Sequence[Numbers]]
    ours: frozenset[str]
    missing: Mapping[str, str]
    reference: Callable[[str], str]
    """Whom a contender is compared with."""

    def median(self, name: str, key: str) -> float:
        """Raises KeyError if that was not measured."""
        return statistics.median(run[key] for run in self.runs[name])

    def has(self, name: str, key: str) -> bool:
        return name in self.runs and all(key in run for run in self.runs[name])


@dataclass(frozen=True)
class Target:
    """A limit for a value that follows from medians."""

    suite: str
    text: str
    value: Callable[[Results], float]
    limit: float
    at_least: bool = False
    unit: str = "×"

    def judge(self, results: Results) -> tuple[str, str]:
        """What was measured, and whether that is enough."""
        try:
            value = self.value(results)
        except KeyError:
            return "", "not measured"
        met = value >= self.limit if self.at_least else value <= self.limit
        return f"{value:.2f}{self.unit}" if self.unit == "×" else f"{value:.0f}{self.unit}", "met" if met else "missed"

    @property
    def bound(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"


def _ratio(left: str, right: str, key: str = "wall") -> Callable[[Results], float]:
    def value(results: Results) -> float:
        return results.median(_find(results, left), key) / results.median(_find(results, right), key)

    return value


def _find(results: Results, name: str) -> str:
    """Without --jobs there is one pgclone, which has one job."""
    return "pgclone" if name in ("pgclone --jobs 1", "pgclone --jobs 2") and "pgclone" in results.runs else name


def _beside_fastest_strategy(results: Results) -> float:
    strategies = [name for name in results.runs if name.startswith("createdb")]
    if not strategies:
        raise KeyError("createdb")
    return results.median("pgclone copy", "wall") / min(results.median(name, "wall") for name in strategies)


def _peak(results: Results) -> float:
    return max([results.median(name, "python") for name in results.runs], default=math.nan) / MiB


_PREDECESSOR = "django-pgclone 3.8.0"
_STREAM = "pg_dump -Fc -Z0 | zstd -3 -T0"
_DIRECTORY = "pg_restore -j2 (from -Fd)"

TARGETS = (
    Target("dump", "faster than django-pgclone, 2 jobs", _ratio(_PREDECESSOR, "pgclone --jobs 2"), 6, at_least=True),
    Target("dump", "client CPU of django-pgclone's", _ratio("pgclone --jobs 2", _PREDECESSOR, "client"), 0.25),
    Target("dump", f"wall of `{_STREAM}`'s, 1 job", _ratio("pgclone --jobs 1", _STREAM), 1.05),
    Target("dump", f"wall of `{_STREAM}`'s, 2 jobs", _ratio("pgclone --jobs 2", _STREAM), 1),
    Target("dump", "size of django-pgclone's", _ratio("pgclone --jobs 2", _PREDECESSOR, "MB"), 1),
    Target("restore", "faster than django-pgclone", _ratio(_PREDECESSOR, "pgclone --jobs 2"), 1.7, at_least=True),
    Target("restore", f"wall of `{_DIRECTORY}`'s", _ratio("pgclone --jobs 2", _DIRECTORY), 1.1),
    Target(
        "restore",
        "wall of the same work by hand (swap)",
        _ratio("pgclone --jobs 2", "pg_restore -j2, vacuumdb -Z, swap"),
        1.1,
    ),
    Target("copy", "wall of the server's fastest strategy's", _beside_fastest_strategy, 1.05),
    Target("s3", "dump: wall of local files', at 30 ms", _ratio("dump, S3 at 30 ms", "dump, files"), 1.15),
    Target("s3", "restore: wall of local files', at 30 ms", _ratio("restore, S3 at 30 ms", "restore, files"), 1.15),
    Target("memory", "peak of the Python process", _peak, 512, unit=" MiB"),
    Target("ls", "`pgclone ls`: wall of `manage.py check`'s", _ratio("pgclone ls", "manage.py check"), 1.2),
)
"""For two cores and a database of 1.5 GB."""


def tabulate(results: Results) -> str:
    """Medians, as a Markdown table that can be read in a terminal."""
    columns = [column for column in COLUMNS if any(_known(results, name, column) for name in results.runs)]
    header = ["", *(column.title for column in columns), "wall, min to max"]
    rows = [
        [name, *(_cell(results, name, column) for column in columns), _spread(run["wall"] for run in runs)]
        for name, runs in results.runs.items()
    ]
    return align([header, *rows])


def tabulate_targets(every: Sequence[Results]) -> str:
    rows = [["target", "", "measured", ""]]
    for results in every:
        for target in TARGETS:
            if target.suite == results.suite:
                rows.append([f"{target.suite}: {target.text}", target.bound, *target.judge(results)])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the first column to the left, the others to the right. The first row is its head."""
    # A pipe in a name would end its cell.
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[number]) for row in rows)) for number in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zip(row, widths))
        )
        return f"| {' | '.join(cells)} |"

    rule = "|".join(f"{'-' * (width + 1)}:" if number else "-" * (width + 2) for number, width in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def write(results: Results, facts: Mapping[str, str], folder: Path) -> None:
    """Write <suite>.md and <suite>.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = tabulate_targets([results])
    sections = [
        f"# {results.title}",
        f"![Medians as bars]({results.suite}.svg)",
        NOTES[results.suite],
        tabulate(results),
        *(f"{name} is missing. It {reason}" for name, reason in results.missing.items()),
        "## Targets",
        f"Set for two cores and {SIZES.get(results.suite, 'a database of 1.5 GB')}.",
        targets,
        "## Where this was measured",
        align([["fact", ""], *([name, value] for name, value in facts.items())]),
    ]
    (folder / f"{results.suite}.md").write_text("\n\n".join(sections) + "\n")
    (folder / f"{results.suite}.svg").write_text(draw(results))


_MEASURED = (
    "Medians of runs in turn. Client: all processes of the contender; server: all processes of PostgreSQL, read in ticks of"
    " 10 ms. Peaks are resident memory: of the contender's largest process, and of its Python process alone; none"
    " is below the 13 MiB of the process that starts it. In parentheses:"
    " how many times as much that is as with the contender that has 1.00×."
)
SIZES = {"memory": "a dump of 20 GB", "ls": "1,000 dumps"}
NOTES = {
    "dump": f"One database, dumped to local files. {_MEASURED}",
    "restore": "Dumps of the same database, from local files. pgclone, django-pgclone and the swap by hand build a new database,"
    " swap it in and drop the old one, of the same size, for which the server writes to disk what was restored; the others fill"
    f" a new, empty database, and leave that for later. pgclone analyzes the new database, as vacuumdb does. {_MEASURED}",
    "copy": "A copy of the database on the same server. pgclone with --online, pg_dump and pgcopydb let its users go on; for the"
    f" others nobody may be connected. {_MEASURED}",
    "s3": "pgclone, with local files and with a private SeaweedFS that shares the machine's cores, and so does the proxy"
    f" that adds the latency: the store's CPU time is part of the wall seconds. {_MEASURED}",
    "memory": f"A database whose rows are small on disk and large in a dump. {_MEASURED}",
    "ls": f"With 1,000 dumps in local files, in the smallest possible project. {_MEASURED}",
}


def _known(results: Results, name: str, column: Column) -> bool:
    return results.has(name, column.key) and results.median(name, column.key) > 0


def _cell(results: Results, name: str, column: Column) -> str:
    if not _known(results, name, column):
        return ""
    value = results.median(name, column.key)
    text = f"{value / column.scale:.{column.digits}f}"
    reference = results.reference(name)
    if column.ratio and reference in results.runs and _known(results, reference, column):
        text += f" ({value / results.median(reference, column.key):.2f}×)"
    return text


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"


# Charts: horizontal bars, in as many panels as there is to tell.


@dataclass(frozen=True)
class Panel:
    """Bars of one unit; those of several keys are put end to end."""

    title: str
    keys: tuple[str, ...]
    scale: float = 1
    digits: int = 1
    limit: float | None = None


_WALL = Panel("Wall seconds", ("wall",))
_CPU = Panel("CPU seconds: client, and server (paler)", ("client", "server"))
PANELS = {
    "dump": (_WALL, _CPU, Panel("Size of the dump, MB", ("MB",), digits=0)),
    "restore": (_WALL, _CPU),
    "copy": (_WALL, _CPU),
    "s3": (_WALL, Panel("CPU seconds: client, server and store (paler)", ("client", "server", "store"))),
    "memory": (Panel("Peak of the Python process, MiB", ("python",), MiB, 0, 512), _WALL),
    "ls": (Panel("Wall seconds", ("wall",), digits=2),),
}

WIDTH, LABELS, VALUES = 820, 280, 70
BAR, GAP, TITLE = 18, 8, 34

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.value { font-variant-numeric: tabular-nums }
.ours { fill: #2f6fde } .others { fill: #8c96a3 }
.limit { stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 4 3 }
.axis { stroke: #8c96a3; stroke-opacity: .6 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .ours { fill: #5b9bff } .others { fill: #77818d } .limit { stroke: #ff7b72 }
}
"""


def draw(results: Results) -> str:
    """An SVG that can be read on light and dark pages."""
    parts: list[str] = []
    y = 0
    for panel in PANELS[results.suite]:
        shown = [name for name in results.runs if any(results.has(name, key) for key in panel.keys)]
        if shown:
            parts += _draw_panel(results, panel, shown, y)
            y += TITLE + len(shown) * (BAR + GAP) + 14
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(results.title)}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _draw_panel(results: Results, panel: Panel, names: Sequence[str], top: int) -> list[str]:
    def amounts(name: str) -> list[float]:
        return [results.median(name, key) / panel.scale if results.has(name, key) else 0.0 for key in panel.keys]

    longest = max([panel.limit or 0, *(sum(amounts(name)) for name in names)]) or 1
    stretch = (WIDTH - LABELS - VALUES) / longest
    bottom = top + TITLE + len(names) * (BAR + GAP)
    parts = [
        f'<text class="title" x="0" y="{top + 20}">{escape(panel.title)}</text>',
        f'<line class="axis" x1="{LABELS}" y1="{top + TITLE - 4}" x2="{LABELS}" y2="{bottom - GAP + 4}"/>',
    ]
    for number, name in enumerate(names):
        y = top + TITLE + number * (BAR + GAP)
        kind = "ours" if name in results.ours else "others"
        parts.append(f'<text x="{LABELS - 8}" y="{y + 13.5}" text-anchor="end">{escape(name)}</text>')
        x = float(LABELS)
        for place, amount in enumerate(amounts(name)):
            width = amount * stretch
            shade = (1, 0.55, 0.3)[place]
            parts.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill-opacity="{shade}"/>'
            )
            x += width
        total = f"{sum(amounts(name)):,.{panel.digits}f}"
        parts.append(f'<text class="value" x="{x + 6:.1f}" y="{y + 13.5}">{total}</text>')
    if panel.limit is not None:
        x = LABELS + panel.limit * stretch
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="{top + TITLE - 4}" x2="{x:.1f}" y2="{bottom - GAP + 4}"/>')
        parts.append(f'<text class="value" x="{x:.1f}" y="{top + 20}" text-anchor="middle">{panel.limit:g}</text>')
    return parts
