"""Write the tables of docs/benchmarks.md and the plots beside it from the figures in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "tables", "with_tables"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * lines[0].count(" | ") + "---|")
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def short(value: float) -> str:
    """Write three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def middle(figures: Any) -> str:
    return short(figures["median"])


def whole(figures: dict[str, float] | None) -> str:
    """Write a median with its range."""
    if figures is None:
        return ""
    return f"{short(figures['median'])} ({short(figures['min'])} to {short(figures['max'])})"


#: Where the value is computed, in the order of the tables.
ENGINES = ("Celery worker", "RQ worker", "caller")
OUR_NAMES = ("get_cached", "aget_cached", "RQ get_cached", "RQ aget_cached", "MemoLock.get", "MemoLock.aget")


def engine_of(contender: str) -> str:
    """Say where a contender's value is computed."""
    if contender.startswith("RQ "):
        return "RQ worker"
    celerys = ("get_cached", "aget_cached", "celery-singleton .delay().get()")
    return "Celery worker" if contender in celerys else "caller"


def name_of(contender: str, ours: Iterable[str]) -> str:
    return f"**`{contender}`**" if contender in ours else contender


# ---- the tables ------------------------------------------------------------------------------------------------


def hit() -> str:
    rows = []
    for lane, found in read("hit").items():
        ours = "aget_cached" if "aget_cached" in found["microseconds"] else "get_cached"
        ratios = found[f"{ours} as a multiple of"]
        for name, took in sorted(found["microseconds"].items(), key=lambda each: each[1]["median"]):
            rows.append([lane, name_of(name, [ours]), middle(took), whole(ratios.get(name))])
    return table(["lane", "contender", "microseconds", "ours as a multiple of it"], rows)


def local() -> str:
    rows = []
    for value, found in read("local").items():
        for name, took in sorted(found["microseconds"].items(), key=lambda each: each[1]["median"]):
            ratio = found["local_ttl as a multiple of"].get(name)
            rows.append([value, name_of(name, ["local_ttl"]), middle(took), whole(ratio)])
    return table(["value", "contender", "microseconds", "`local_ttl` as a multiple of it"], rows)


def herd() -> str:
    head = [
        *("callers are", "processes", "callers", "computed by", "contender", "runs"),
        *("stored to caller p50 ms", "p99 ms", "p50 in bare hops", "commands per process", "server CPU ms"),
    ]
    rows = [
        [
            found["driver"],
            found["processes"],
            f"{found['callers']:,}",
            engine_of(found["contender"]),
            name_of(found["contender"], OUR_NAMES),
            f"{found['runs']['max']:.0f}",
            middle(found["stored to caller p50 ms"]),
            middle(found["stored to caller p99 ms"]),
            middle(found["p50 as a multiple of the bare hop"]),
            short(found["commands per asking process"]),
            middle(found["server CPU ms"]),
        ]
        for found in read("herd")
    ]
    return table(head, rows)


def herd_memory() -> str:
    rows = [
        [
            f"{found['callers']:,}",
            f"{found['bytes per waiter']:,.0f}",
            f"{found['bytes per waiter of a bare future']:,.0f}",
        ]
        for found in read("herd")
        if "bytes per waiter" in found
    ]
    return table(["coroutines that wait", "bytes for each", "of those, a task with a bare future and a timer"], rows)


def miss() -> str:
    rows = []
    for lane, found in read("miss").items():
        (ratios,) = (each for what, each in found.items() if what.endswith("as a multiple of"))
        for name, took in sorted(found["p50 ms"].items(), key=lambda each: each[1]["median"]):
            whats = middle(took), middle(found["p99 ms"][name]), whole(ratios.get(name))
            rows.append([lane, name_of(name, OUR_NAMES), *whats])
    return table(["computed by", "contender", "p50 ms", "p99 ms", "p50 of ours as a multiple of it"], rows)


def storm() -> str:
    whats = ["calls", "origin calls", "needless origin calls", "p50 ms", "p95 ms", "p99 ms", "most ms"]
    rows = [
        [name_of(found["contender"], ["memolock"]), *(middle(found[what]) for what in whats)] for found in read("storm")
    ]
    return table(["cache", *whats], rows)


def scale_keys() -> str:
    whats = ["hit microseconds", "cold look microseconds", "invalidate microseconds"]
    rows = [
        [f"{found['keys']:,}", *(whole(found[what]) for what in whats), f"{found['bytes per value']:,.0f}"]
        for found in read("scale")["keys"]
    ]
    flight = read("scale")["keys"][-1]["bytes per flight"]
    rows.append(["a flight under way", "", "", "", f"{flight:,.0f}"])
    return table(["values stored", *whats, "server bytes for each"], rows)


def scale_inboxes() -> str:
    whats = [f"{what} microseconds" for what in ("last look", "settle", "all told", "bare publishes")]
    rows = [[found["inboxes"], *(whole(found[what]) for what in whats)] for found in read("scale")["inboxes"]]
    return table(["waiting processes", *whats], rows)


def overhead_tasks() -> str:
    found = read("overhead")["worker CPU microseconds per task"]
    return table(
        ["an empty task, as", "worker CPU microseconds"], [[name, whole(took)] for name, took in found.items()]
    )


def overhead_heartbeat() -> str:
    found = read("overhead")["heartbeat"]
    whats = [what for what in found[0] if what not in ("running", "lease seconds")]
    return table(["running", *whats], [[row["running"], *(whole(row[what]) for what in whats)] for row in found])


def overhead_idle() -> str:
    rows = [
        [row["state"], whole(row["CPU ms per second"]), row["threads"], whole(row["resident MB"])]
        for row in read("overhead")["idle web process"]
    ]
    return table(["a web process", "CPU ms per second", "threads", "resident MB"], rows)


def chaos() -> str:
    found = read("chaos")
    rows = [
        [name, found["faults"][name], f"{took['median']:.2f}", f"{took['max']:.2f}"]
        for name, took in sorted(found["recovery seconds"].items())
    ]
    return table(["fault", "times", "recovery p50 s", "max s"], rows)


TABLES: list[Callable[[], str]] = [
    *(hit, local, herd, herd_memory, miss, storm, scale_keys, scale_inboxes),
    *(overhead_tasks, overhead_heartbeat, overhead_idle, chaos),
]


def tables() -> dict[str, str]:
    """Return each table of the page by the name that its place bears."""
    return {each.__name__: each() for each in TABLES}


def with_tables(page: str) -> str:
    """Return the page with all tables anew."""
    for name, text in tables().items():
        page, times = re.subn(
            f"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, text=text: f"{found[1]}{text}\n{found[2]}",
            page,
            flags=re.S,
        )
        assert times == 1, name
    return page


# ---- the plots -------------------------------------------------------------------------------------------------

OURS = "#c2410c"
OTHERS = "#94a3b8"
MANY = ("#64748b", "#0ea5e9", "#65a30d", "#9333ea", "#ca8a04")


class Plots:
    """Draws with matplotlib, which only this part needs."""

    def __init__(self) -> None:
        import matplotlib as mpl

        mpl.use("svg")
        mpl.rcParams.update({"svg.hashsalt": "memolock", "font.size": 9, "axes.spines.top": False})
        mpl.rcParams.update({"axes.spines.right": False, "svg.fonttype": "none"})
        import matplotlib.pyplot as plt

        self._plt: Any = plt
        PLOTS.mkdir(exist_ok=True)

    def save(self, figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
        self._plt.close(figure)

    def bars(
        self,
        name: str,
        unit: str,
        groups: dict[str, dict[str, Any]],
        ours: set[str],
        log: bool = False,
        shared: bool = True,
    ) -> None:
        """Draw a group of bars for each lane, with the range of the rounds."""
        heights = [max(1, len(each)) for each in groups.values()]
        figure, rows = self._plt.subplots(
            len(groups),
            1,
            figsize=(8, 0.9 + 0.27 * sum(heights) + 0.5 * len(groups)),
            height_ratios=heights,
            sharex=shared,
            squeeze=False,
        )
        for axes, (title, found) in zip(rows[:, 0], groups.items(), strict=True):
            order = sorted(found.items(), key=lambda each: -each[1]["median"])
            for place, (label, figures) in enumerate(order):
                middle = figures["median"]
                low, high = middle - figures["min"], figures["max"] - middle
                color = OURS if label in ours else OTHERS
                axes.barh(place, middle, xerr=[[low], [high]], color=color, ecolor="#475569", capsize=2)
                axes.annotate(short(middle), (figures["max"], place), xytext=(4, -3), textcoords="offset points")
            axes.set_yticks(range(len(order)), [label for label, _ in order])
            axes.set_title(title, loc="left", fontsize=9)
            if log:
                axes.set_xscale("log")
            axes.margins(x=0.12)
        rows[-1, 0].set_xlabel(unit)
        self.save(figure, name)

    def lines(self, name: str, x: str, y: str, series: dict[str, list[tuple[float, Any]]]) -> None:
        """Draw lines over a logarithmic axis, with the range of the rounds."""
        figure, axes = self._plt.subplots(figsize=(8, 4))
        for label, points in series.items():
            xs = [at for at, _ in points]
            middles = [figures["median"] for _, figures in points]
            line = axes.plot(xs, middles, marker="o", markersize=3, label=label)[0]
            low, high = [f["min"] for _, f in points], [f["max"] for _, f in points]
            axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.15)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(frameon=False)
        self.save(figure, name)

    def panels(
        self, name: str, x: str, y: str, groups: dict[str, dict[str, list[tuple[float, Any]]]], ours: set[str]
    ) -> None:
        """Draw a panel of lines over logarithmic axes for each group that has any."""
        groups = {title: series for title, series in groups.items() if series}
        figure, rows = self._plt.subplots(
            len(groups), 1, figsize=(8, 0.5 + 3.1 * len(groups)), sharex=True, sharey=True, squeeze=False
        )
        for axes, (title, series) in zip(rows[:, 0], groups.items(), strict=True):
            colors: dict[str, str] = {}
            for label, points in series.items():
                contender, _, size = label.rpartition(", ")
                mine = contender in ours
                color = OURS if mine else colors.setdefault(contender, MANY[len(colors) % len(MANY)])
                dashed = mine and contender.endswith(("aget_cached", ".aget"))
                xs = [at for at, _ in points]
                middles = [figures["median"] for _, figures in points]
                low, high = [f["min"] for _, f in points], [f["max"] for _, f in points]
                marker = "o" if size == "1 process" else "s"
                axes.plot(xs, middles, "--" if dashed else "-", marker=marker, color=color, markersize=4, label=label)
                axes.fill_between(xs, low, high, color=color, alpha=0.1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylabel(y)
            axes.set_title(f"computed by: {title}", loc="left", fontsize=9)
            axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        rows[-1, 0].set_xlabel(x)
        self.save(figure, name)

    def all(self) -> None:
        ours = {*OUR_NAMES, "local_ttl", "memolock", "a flight", "flights"}
        self.bars("hit", "microseconds per hit", {k: v["microseconds"] for k, v in read("hit").items()}, ours)
        values = {k: v["microseconds"] for k, v in read("local").items()}
        self.bars("local", "microseconds per hit (logarithmic)", values, ours, log=True)
        self.bars("miss", "milliseconds per miss, p50", {k: v["p50 ms"] for k, v in read("miss").items()}, ours)
        rows = read("storm")
        whats = ("origin calls", "needless origin calls", "p95 ms", "p99 ms")
        self.bars(
            "storm", "", {what: {row["contender"]: row[what] for row in rows} for what in whats}, ours, shared=False
        )
        panels: dict[str, dict[str, list[tuple[float, Any]]]] = {engine: {} for engine in ENGINES}
        for row in read("herd"):
            if row["processes"] in (1, 10):
                name = f"{row['contender']}, {'1 process' if row['processes'] == 1 else '10 processes'}"
                line = panels[engine_of(row["contender"])].setdefault(name, [])
                line.append((row["callers"], row["stored to caller p50 ms"]))
        self.panels("herd", "callers of one cold key", "stored to caller, p50 ms", panels, set(OUR_NAMES))
        found = read("scale")
        self.lines(
            "scale-keys",
            "values stored",
            "microseconds",
            {
                what: [(row["keys"], row[f"{what} microseconds"]) for row in found["keys"]]
                for what in ("hit", "cold look", "invalidate")
            },
        )
        self.lines(
            "scale-inboxes",
            "waiting processes",
            "microseconds",
            {
                what: [(row["inboxes"], row[f"{what} microseconds"]) for row in found["inboxes"]]
                for what in ("last look", "settle", "all told", "bare publishes")
            },
        )
        found = read("overhead")
        beats = {row["running"]: row["worker CPU ms per second"] for row in found["heartbeat"]}
        idle = {row["state"]: row["resident MB"] for row in found["idle web process"]}
        groups = {
            "worker CPU, microseconds per empty task": found["worker CPU microseconds per task"],
            "worker CPU, ms per second, while sleeping tasks run": beats,
            "resident MB of an idle web process": idle,
        }
        self.bars("overhead", "", groups, ours | {"50 flights", "has waited", "local cache"}, shared=False)


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text()))
    Plots().all()


if __name__ == "__main__":
    main()
