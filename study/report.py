"""The plots of compare.py, and its page: one file with tables and plots in it, for any screen, light or dark.

Each plot is a picture of its own, so that a narrow screen shows them one below the other.

What this leaves out on purpose: the figures themselves (groups.py).
"""

import html
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend comes first)
from matplotlib.ticker import EngFormatter  # noqa: E402

from study.figures import Figures  # noqa: E402
from study.groups import Group  # noqa: E402
from study.intervals import interval  # noqa: E402
from system.files import atomic_write  # noqa: E402

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright; fine on dark as well
STROKES = ("-", "--", ":", "-.")
INK = "#010203"  # of axes and words; in the page it becomes that of the text around it
STYLE = {"axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "lookahead",
         "font.size": 10, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 8.5}
WIDTH, HEIGHT = 5.4, 3.6  # inches, the legend not counted
FEW = 5  # remarks that stand open above the tables; more are folded
EARLY = 0.15  # of a run, before which differences dwarf all later ones
Draw = Callable[[pyplot.Axes], None]


def named(group: Group) -> str:
    """The group's label as it is: matplotlib would read $...$ as mathematics, and leave _... out of legends."""
    label = group.label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def look(k: int) -> dict:
    """Colour and stroke of the k-th group, the same in every plot."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": STROKES[k // len(COLOURS) % len(STROKES)]}


# ---------------------------------------------------------------------------------------------
# plots

def panels(found: list[Figures]) -> dict[str, tuple[str, Draw]]:
    """{name: (title, what draws it)} of all plots that these runs have something for."""
    groups = [f.group for f in found]
    shown = {"ntp_step": ("Validation NTP by step", curves(groups, "val/ntp", "iter")),
             "ntp_tokens": ("Validation NTP by tokens", curves(groups, "val/ntp", "tokens")),
             "ntp_seconds": ("Validation NTP by seconds of training", curves(groups, "val/ntp", "seconds"))}
    shown = {name: panel for name, panel in shown.items()
             if name == "ntp_step" or any(len(points(g, "val/ntp", name[4:])[0]) for g in groups)}
    if any(g.pairs(groups[0]) for g in groups[1:]):
        shown["difference"] = (f"Difference to {named(groups[0])}, 95% interval", differences(groups))
    if ends := [f for f in found[1:] if f.difference.n or f.equal_seconds.n]:
        shown["ends"] = (f"Difference to {named(groups[0])} at the end", forest(ends, found[0]))
    keys = dict.fromkeys(key for g in groups for run in g.runs.values() for line in run.lines for key in line)
    for key in sorted(keys):
        kind, _, name = key.partition("/")
        if kind == "val" and re.fullmatch(r"(nitp|consistency|kl|spelling|exact)_\w+|order|soft", name):
            shown[f"val_{name}"] = (f"Validation {name}", curves(groups, key, "iter"))
        elif kind == "val" and re.fullmatch(r"(acc|agree)_\d+", name):
            title = f"Accuracy of head {name[4:]}" if name[:3] == "acc" else f"Agreement of head {name[6:]} with NTP"
            shown[f"val_{name}"] = (title, curves(groups, key, "iter"))
    weights = sorted(key for key in keys if key.startswith("weight/"))
    if any(max(g.first.points(key)[1], default=0.0) > 0.0 for key in weights for g in groups):
        shown["weights"] = ("Weights of auxiliary losses", schedules(groups, weights))
    return shown


def panels_along(found: dict[float, list[Figures]], setting: str) -> dict[str, tuple[str, Draw]]:
    """{name: (title, what draws it)}: where set-ups end, and how far from the baseline, against a setting."""
    return {f"along_{setting}": (f"Validation NTP against {setting}", along(found, setting, relative=False)),
            f"difference_along_{setting}": ("Difference to the first set-up, 95% interval",
                                            along(found, setting, relative=True))}


def along(found: dict[float, list[Figures]], setting: str, relative: bool) -> Draw:
    """A line for each set-up; with bars between the lowest and highest seed, or the interval of the difference.

    A single seed has no bar.
    """
    def draw(axes: pyplot.Axes) -> None:
        labels = list(dict.fromkeys(f.group.label for each in found.values() for f in each))
        values = list(found)
        for k, label in enumerate(labels):
            at, mean, bars = [], [], []
            for value, each in found.items():
                for f in each:
                    d = f.difference
                    if f.group.label != label or relative and not d.n:
                        continue
                    at.append(value)
                    mean.append(d.mean if relative else f.end)
                    if relative:
                        bars.append((d.half, d.half))  # NaN with one pair
                    else:
                        bars.append((f.end - min(f.ends), max(f.ends) - f.end) if len(f.ends) > 1 else (math.nan,) * 2)
            if at:
                axes.errorbar(at, mean, yerr=np.transpose(bars), label=label, linewidth=1.5, marker=".", capsize=3,
                              **look(k))
        if relative:
            axes.axhline(0.0, color=INK, linewidth=0.8)
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xlabel(setting)
        axes.set_ylabel("nats; below 0 is better" if relative else "nats")
    return draw


def points(group: Group, key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """x and the values (seeds, x) of `key` there, where x is the seeds' mean of `axis` (iter, tokens, seconds)."""
    at, values = group.curve(key)
    x = np.mean([run.at(axis, at) for run in group.runs.values()], axis=0) if axis != "iter" else at
    known = ~np.isnan(x)
    return x[known], values[:, known]


def curves(groups: list[Group], key: str, axis: str) -> Draw:
    """The mean over seeds as a line, and all seeds between the edges of a band."""
    def draw(axes: pyplot.Axes) -> None:
        tops, lows = [], []
        for k, group in enumerate(groups):
            x, values = points(group, key, axis)
            if len(x):
                axes.plot(x, values.mean(0), label=f"{named(group)} ({len(values)})", linewidth=1.5, **look(k))
                axes.fill_between(x, values.min(0), values.max(0), color=look(k)["color"], alpha=0.15, linewidth=0)
                tops.append(values[:, x >= EARLY * x[-1]].max())
                lows.append(values.min())
        if key == "val/ntp":  # of its fall from ln V nothing could be seen but the fall
            top, bottom = sorted(tops)[len(tops) // 2], min(lows)
            axes.set_ylim(bottom - 0.04 * (top - bottom), 1.02 * top)
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())  # 10 M
        axes.set_xlabel({"iter": "step", "tokens": "tokens", "seconds": "seconds of training"}[axis])
        axes.set_ylabel("share" if "acc" in key or "agree" in key or "exact" in key else "nats")
    return draw


def differences(groups: list[Group]) -> Draw:
    """Mean and interval of the differences to the first group, paired by seed, at each evaluation but early ones."""
    def draw(axes: pyplot.Axes) -> None:
        base = groups[0]
        axes.axhline(0.0, linewidth=0.8, **look(0))
        reach = 0.0
        for k, group in enumerate(groups[1:], 1):
            pairs = group.pairs(base)  # none with runs of other lengths, whose learning rates fall at another pace
            at = [x for x in group.curve("val/ntp")[0] if EARLY * base.length <= x <= base.length]
            found = [interval([float(a.at("val/ntp", x) - b.at("val/ntp", x)) for a, b in pairs]) for x in at]
            shown = [(x, d.mean, d.half if d.n > 1 else 0.0) for x, d in zip(at, found, strict=True) if d.n]
            if shown:
                x, mean, half = np.array(shown).T
                axes.plot(x, mean, label=f"{named(group)} ({len(pairs)})", linewidth=1.5, **look(k))
                axes.fill_between(x, mean - half, mean + half, color=look(k)["color"], alpha=0.15, linewidth=0)
                reach = max(reach, *abs(mean) * 1.5, *(half * 1.5 if len(pairs) > 2 else []))
        if reach:
            axes.set_ylim(-reach, reach)  # an interval of two seeds is ten times as wide as it need be
        axes.set_xlabel("step")
        axes.set_ylabel("nats; below 0 is better")
    return draw


def forest(found: list[Figures], base: Figures) -> Draw:
    """Each set-up's difference at the end, at equal steps and at equal seconds: mean, interval, and seeds as points."""
    def draw(axes: pyplot.Axes) -> None:
        if not math.isnan(base.spread):
            axes.axvspan(-base.spread, base.spread, color="#999999", alpha=0.2, linewidth=0,
                         label=f"deviation between seeds of {named(base.group)}")
        axes.axvline(0.0, color=INK, linewidth=0.8)
        for name, colour, offset in (("steps", COLOURS[0], 0.16), ("seconds", COLOURS[1], -0.16)):
            label = f"at equal {name}: mean, 95% interval"
            for k, f in enumerate(found):
                d, y = f.difference if name == "steps" else f.equal_seconds, len(found) - k + offset
                if name == "steps":
                    axes.plot(f.each, [y] * len(f.each), "o", color=colour, markersize=3, alpha=0.5)
                if d.n:
                    axes.errorbar(d.mean, y, xerr=0.0 if math.isnan(d.half) else d.half, fmt="|", color=colour,
                                  markersize=11, markeredgewidth=2, elinewidth=1.2, label=label)
                    label = None
        told = [d for f in found for d in (f.difference, f.equal_seconds) if d.n]
        reach = 1.1 * max(*(1.3 * abs(d.mean) for d in told), *(abs(v) for f in found for v in f.each),
                          *(abs(d.mean) + d.half for d in told if d.n > 2), 0.0)  # of two, it is ten times as wide
        axes.set_xlim(-reach or -0.01, reach or 0.01)
        axes.set_yticks([len(found) - k for k in range(len(found))], [named(f.group) for f in found])
        axes.set_ylim(0.4, len(found) + 0.6)
        axes.set_xlabel("nats; left is better")
    return draw


def schedules(groups: list[Group], keys: list[str]) -> Draw:
    def draw(axes: pyplot.Axes) -> None:
        for k, group in enumerate(groups):
            for n, key in enumerate(keys):
                x, y = group.first.points(key)
                if len(y) and y.max() > 0.0:
                    axes.plot(x, y, color=look(k)["color"], linestyle=STROKES[n % len(STROKES)], linewidth=1.5,
                              label=f"{named(group)}: {key.removeprefix('weight/')}")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel("weight (NTP has 1)")
    return draw


def figure(title: str, draw: Draw) -> pyplot.Figure:
    """One plot with its legend below; high enough for both."""
    with pyplot.rc_context(STYLE):
        made, axes = pyplot.subplots(figsize=(WIDTH, HEIGHT))
        draw(axes)
        axes.set_title(title)
        entries, columns = axes.get_legend_handles_labels(), 1
        if entries[1]:
            columns = max(1, int(75 / (5 + max(map(len, entries[1])))))
            made.legend(*entries, loc="lower center", ncols=columns)
        rows = max(len(axes.get_yticks()) - 12, 0)  # of a forest
        below = 0.22 * math.ceil(len(entries[1]) / columns) + 0.1
        made.set_size_inches(WIDTH, height := HEIGHT + 0.2 * rows + below)
        made.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - below / height))
    return made


def write_plots(shown: dict[str, tuple[str, Draw]], folder: Path) -> None:
    """folder/<name>.svg and .png of each."""
    for name, panel in shown.items():
        made = figure(*panel)
        for kind, metadata in (("svg", {"Date": None}), ("png", {})):
            with pyplot.rc_context(STYLE), atomic_write(folder / f"{name}.{kind}") as f:
                made.savefig(f, format=kind, metadata=metadata, dpi=150)
        pyplot.close(made)


# ---------------------------------------------------------------------------------------------
# page

def inline(made: pyplot.Figure, title: str) -> str:
    """The figure as an <svg> in the colour of the text around it."""
    text = io.StringIO()
    with pyplot.rc_context(STYLE):
        made.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg[svg.index("<svg"):].replace(INK, "currentColor"))
    begin, end, rest = svg.partition(">")
    svg = re.sub(r' (width|height)="[^"]*"', "", begin) + end + rest  # as wide as its place
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def as_html(table) -> str:
    def row(cells: list[str], tag: str) -> str:
        def one(head: str, cell: str) -> str:
            mark = f' class="{cell}"' if head == "verdict" and cell in ("better", "worse") else ""
            return f"<{tag}{mark}>{html.escape(cell)}</{tag}>"

        return f"<tr>{''.join(map(one, table.head, cells))}</tr>"

    return (f"<h2>{html.escape(table.title)}</h2><div class=wide><table><thead>{row(table.head, 'th')}</thead><tbody>"
            + "".join(row(cells, "td") for cells in table.rows)
            + f"</tbody></table></div><p>{html.escape(table.note)}</p>")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --faint: #6b6b6b; --line: #d8d8d8;
         --better: #1a7f37; --worse: #b3261e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14161a; --ink: #e4e4e4; --faint: #9a9a9a; --line: #363a40;
           --better: #57c26f; --worse: #ff8a80; }} }}
body {{ margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
        font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p, footer, details {{ color: var(--faint); font-size: .85rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--paper); }}
.better {{ color: var(--better); font-weight: 600; }} .worse {{ color: var(--worse); font-weight: 600; }}
.plots {{ display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{remarks}
{tables}
<h2>Plots</h2>
<p>Lines are means over seeds (how many: in brackets); bands hold all seeds, those of differences are 95% intervals.</p>
<div class="plots">
{plots}
</div>
<footer><p>{command}</p></footer>
</body>
</html>
"""


def write_page(title: str, tables: list, shown: dict[str, tuple[str, Draw]], remarks: list[str], command: str,
               path: Path) -> None:
    """One file that needs no other. remarks: what a reader must know of the runs. command: that made it."""
    plots = []
    for name, draw in shown.values():
        made = figure(name, draw)
        plots.append(f"<figure style=\"margin: 0\">{inline(made, name)}</figure>")
        pyplot.close(made)
    told = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
    opened = " open" if len(remarks) <= FEW else ""
    told = f"<details{opened}><summary>{len(remarks)} remarks</summary><ul>{told}</ul></details>" if remarks else ""
    page = PAGE.format(title=html.escape(title), tables="\n".join(map(as_html, tables)), plots="\n".join(plots),
                       command=html.escape(command), remarks=told)
    with atomic_write(path, "w", encoding="utf-8") as f:
        f.write(page)
