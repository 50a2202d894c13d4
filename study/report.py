"""The plots of compare.py, and its page: one file with tables and plots in it, for any screen, light or dark.

Each plot is a picture of its own, so that a narrow screen shows them one below the other.

What this leaves out on purpose: the figures themselves (groups.py).
"""

import html
import io
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend comes first)
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator  # noqa: E402

from study.figures import SHARES, Figures  # noqa: E402
from study.groups import Group  # noqa: E402
from study.intervals import interval  # noqa: E402
from study.runs import Remark  # noqa: E402
from study.tables import Table  # noqa: E402
from system.files import atomic_write  # noqa: E402

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright; fine on dark as well
STROKES = ("-", "--", ":", "-.")
INK = "#010203"  # of axes and words; in the page it becomes that of the text around it
STYLE = {"axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "lookahead",
         "font.size": 10, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 8.5}
WIDTH, HEIGHT = 5.4, 3.6  # inches, the legend not counted
FEW = 8  # remarks that stand open; more are folded
EARLY = 0.15  # of a run, before which differences dwarf all later ones
FEW_POINTS = 12  # on a line that shows each of them
MOST_POINTS = 150  # on a line of what is logged at every step
CURVES = {  # key -> title of what is drawn by step besides validation NTP
    r"train/ntp": "Training NTP",
    r"val/exact_(\w+)": "Answers wholly right: {0}",
    r"val/acc_(\d+)": "Accuracy of head {0}",
    r"val/acc_((?!\d)\w+)": "Accuracy on tokens of the group {0}",
    r"val/agree_(\d+)": "Agreement of head {0} with NTP",
    r"val/((?!ntp$|acc_|agree_|exact_|count_|bits_per_byte)\w+)": "Validation {0}",
    r"train/((?!ntp$|total$)\w+)": "Training {0}",
    r"train/total": "Training total, weighted",
    r"grad_norm": "Gradient norm",
    r"lr": "Learning rate"}
FALLING = {"val/ntp", "train/ntp", "train/total"}  # from ln V, of which the plot leaves out the first part
UNITS = {"grad_norm": "norm before clipping", "lr": "learning rate"}
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
    """{name: (title, what draws it)} of all plots that these runs have something for, each of them once."""
    groups = [f.group for f in found]
    shown = {"ntp_step": ("Validation NTP by step", curves(groups, "val/ntp", "iter"))}
    if have_several_points(groups, "val/ntp", "seconds"):
        shown["ntp_seconds"] = ("Validation NTP by seconds of training", curves(groups, "val/ntp", "seconds"))
    if len({round(tokens_per_step(g)) for g in groups if tokens_per_step(g)}) > 1:  # else it is the plot by step
        shown["ntp_tokens"] = ("Validation NTP by tokens", curves(groups, "val/ntp", "tokens"))
    if any(len(compared_at(g, groups[0])) > 1 for g in groups[1:]):
        shown["difference"] = (f"Difference to {named(groups[0])}, 95% interval", differences(groups))
    if ends := [f for f in found[1:] if f.difference.n or f.equal_seconds.n]:
        shown["ends"] = (f"Difference to {named(groups[0])} at the end", forest(ends, found[0]))
    drawn = [values_of(groups, "val/ntp")]
    for key, title in titles(groups).items():
        if have_several_points(groups, key, "iter"):
            values = values_of(groups, key)
            if not any(mostly_same(values, other) for other in drawn):  # kl_1 may be consistency_1
                drawn.append(values)
                shown[key.replace("/", "_")] = (title, curves(groups, key, "iter"))
    weights = sorted({key for g in groups for key in keys_of(g) if key.startswith("weight/")})
    if any(max(g.first.points(key)[1], default=0.0) > 0.0 for key in weights for g in groups):
        shown["weights"] = ("Weights of auxiliary losses", schedules(groups, weights))
    return shown


def titles(groups: list[Group]) -> dict[str, str]:
    """{key: title} of all that is drawn by step besides validation NTP, in the order of the page."""
    keys = sorted({key for g in groups for key in keys_of(g)},
                  key=lambda key: ("/kl_" in key, len(key), key))  # kl_1 after consistency_1, which it may repeat
    found = {}
    for pattern, title in CURVES.items():
        for key in keys:
            if match := re.fullmatch(pattern, key):
                found[key] = title.format(*match.groups())
    return found


def keys_of(group: Group) -> set[str]:
    return {key for run in group.runs.values() for line in run.lines for key in line}


def tokens_per_step(group: Group) -> float:
    tokens = group.first.last("tokens")
    return tokens / group.length if group.length and tokens > 0.0 else 0.0


def have_several_points(groups: list[Group], key: str, axis: str) -> bool:
    """Is there more to draw than the start and the end?"""
    return any(len(points(group, key, axis)[0]) > 2 for group in groups)


def values_of(groups: list[Group], key: str) -> list[np.ndarray]:
    return [points(group, key, "iter")[1] for group in groups]


def mostly_same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Does more than half of one plot's lines lie where another has them, as far as one could see?"""
    lines = [(x, y) for x, y in zip(a, b, strict=True) if x.size]
    return 2 * sum(x.shape == y.shape and np.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in lines) > len(lines)


def panels_along(lines: dict[str, list[tuple[float, Figures]]], setting: str) -> dict[str, tuple[str, Draw]]:
    """{name: (title, what draws it)}: where set-ups end, and how far from the baseline, against a setting."""
    return {f"along_{setting}": (f"Validation NTP against {setting}", along(lines, setting, relative=False)),
            f"difference_along_{setting}": ("Difference to the first set-up, 95% interval",
                                            along(lines, setting, relative=True))}


def along(lines: dict[str, list[tuple[float, Figures]]], setting: str, relative: bool) -> Draw:
    """A line for each set-up; with bars between the lowest and highest seed, or the interval of the difference.

    A single seed has no bar.
    """
    def bar(f: Figures) -> tuple[float, float]:
        if relative:
            return f.difference.half, f.difference.half  # NaN with one pair
        if len(f.ends) < 2:
            return math.nan, math.nan
        return f.end - min(f.ends), max(f.ends) - f.end

    def draw(axes: pyplot.Axes) -> None:
        for k, (label, line) in enumerate(lines.items()):
            drawn = [(value, f) for value, f in line if f.difference.n or not relative]
            if drawn:
                mean = [f.difference.mean if relative else f.end for _, f in drawn]
                bars = np.transpose([bar(f) for _, f in drawn])
                axes.errorbar([value for value, _ in drawn], mean, yerr=bars, label=label, linewidth=1.5, marker=".",
                              capsize=3, **look(k))
        if relative:
            axes.axhline(0.0, color=INK, linewidth=0.8)
        values = sorted({value for line in lines.values() for value, _ in line})
        if min(values) > 0 and max(values) > 4 * min(values):
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(setting)
        axes.set_ylabel("nats; below 0 is better" if relative else "nats")
    return draw


def points(group: Group, key: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """x and the values (seeds, x) of `key` there, where x is the seeds' mean of `axis` (iter, tokens, seconds).

    What is logged at every step and differs with the batch is averaged over stretches of the run.
    """
    at, values = group.curve(key)
    if len(at) > MOST_POINTS and not key.startswith("val/"):
        edges = np.linspace(0, len(at), MOST_POINTS + 1).astype(int)
        at = np.add.reduceat(at, edges[:-1]) / np.diff(edges)
        values = np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
    x = np.mean([run.at(axis, at) for run in group.runs.values()], axis=0) if axis != "iter" else at
    known = ~np.isnan(x)
    return x[known], values[:, known]


def marker(x: np.ndarray) -> dict:
    """Points on a line of few evaluations, so that it shows where they were."""
    return {"marker": "."} if len(x) <= FEW_POINTS else {}


def curves(groups: list[Group], key: str, axis: str) -> Draw:
    """The mean over seeds as a line, and all seeds between the edges of a band."""
    def draw(axes: pyplot.Axes) -> None:
        tops, lows = [], []
        for k, group in enumerate(groups):
            x, values = points(group, key, axis)
            if len(x):
                axes.plot(x, values.mean(0), label=f"{named(group)} ({len(values)})", linewidth=1.5, **marker(x),
                          **look(k))
                axes.fill_between(x, values.min(0), values.max(0), color=look(k)["color"], alpha=0.15, linewidth=0)
                tops.append(values[:, x >= EARLY * x[-1]].max())
                lows.append(values.min())
        if key in FALLING:  # of its fall from ln V nothing could be seen but the fall
            tops, bottom = sorted(tops), min(lows)
            top = tops[-1] if key == "train/total" else tops[len(tops) // 2]  # totals differ by their weights
            if top > bottom:
                axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom))
        if axis == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())  # 10 M
        axes.set_xlabel({"iter": "step", "tokens": "tokens", "seconds": "seconds of training"}[axis])
        axes.set_ylabel("share" if re.fullmatch(SHARES, key) else UNITS.get(key, "nats"))
    return draw


def compared_at(group: Group, base: Group) -> list[float]:
    """The evaluations, but early ones, at which a group is compared with the baseline.

    None of runs of another length, whose learning rates fall at another pace.
    """
    if not group.pairs(base):
        return []
    return [x for x in group.curve("val/ntp")[0] if EARLY * base.length <= x <= base.length]


def differences(groups: list[Group]) -> Draw:
    """Mean and interval of the differences to the first group, paired by seed, at each evaluation but early ones."""
    def draw(axes: pyplot.Axes) -> None:
        base = groups[0]
        axes.axhline(0.0, linewidth=0.8, **look(0))
        far = []
        for k, group in enumerate(groups[1:], 1):
            pairs, at = group.pairs(base), compared_at(group, base)
            found = [interval([float(a.at("val/ntp", x) - b.at("val/ntp", x)) for a, b in pairs]) for x in at]
            shown = [(x, d.mean, d.half if d.n > 1 else 0.0) for x, d in zip(at, found, strict=True) if d.n]
            if shown:
                x, mean, half = np.array(shown).T
                axes.plot(x, mean, label=f"{named(group)} ({len(pairs)})", linewidth=1.5, **marker(x), **look(k))
                axes.fill_between(x, mean - half, mean + half, color=look(k)["color"], alpha=0.15, linewidth=0)
                far.append(abs(mean).max())
                if len(pairs) > 2:  # an interval of two seeds is six times as wide as their difference
                    far[-1] = max(far[-1], half.max())
        if reach := 1.5 * min(max(far), 4 * sorted(far)[len(far) // 2]):  # one that is far off does not dwarf the rest
            axes.set_ylim(-reach, reach)
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
        drawn = [d for f in found for d in (f.difference, f.equal_seconds) if d.n]
        far = [1.3 * abs(d.mean) for d in drawn] + [abs(v) for f in found for v in f.each]
        far += [abs(d.mean) + d.half for d in drawn if d.n > 2 and not math.isnan(d.half)]  # of two it is far wider
        reach = 1.1 * max(far)
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
        axes.set_title(title, wrap=True)
        entries, columns = axes.get_legend_handles_labels(), 1
        if any(entries[1]):
            columns = max(1, int(75 / (5 + max(map(len, entries[1])))))
            made.legend(*entries, loc="lower center", ncols=columns)
        rows = max(len(axes.get_yticks()) - 12, 0)  # of a forest
        below = 0.22 * math.ceil(len(entries[1]) / columns) + 0.1
        made.set_size_inches(WIDTH, height := HEIGHT + 0.2 * rows + below)
        made.set_layout_engine("constrained", rect=(0, below / height, 1, 1 - below / height))
        keep_labels_apart(made, axes)
    return made


def keep_labels_apart(made: pyplot.Figure, axes: pyplot.Axes) -> None:
    """Fewer ticks on the x axis, or slanted labels where ticks are given, until no two labels touch."""
    def touch() -> bool:
        made.draw_without_rendering()
        low, high = axes.get_xlim()
        boxes = [label.get_window_extent() for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                 if label.get_text() and low <= at <= high]
        return any(a.x1 + 4 > b.x0 for a, b in zip(boxes, boxes[1:], strict=False))

    if not touch():
        return
    if isinstance(axes.xaxis.get_major_locator(), FixedLocator):
        axes.tick_params(axis="x", labelrotation=90)
        while touch():
            labels = [label.get_text() for label in axes.get_xticklabels()]
            axes.set_xticks(axes.get_xticks()[::2], labels[::2])
        return
    for ticks in (5, 4, 3, 2):
        axes.xaxis.set_major_locator(MaxNLocator(ticks))
        if not touch():
            return


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


MARKS = {"better": "better", "worse": "worse", "not comparable": "worse"}  # verdict -> class


def as_html(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(map(one, table.head, cells, [tag] * len(cells))) + "</tr>"

    def one(head: str, cell: str, tag: str) -> str:
        marks = ["words"] if head in table.words else []
        if head == "verdict" and cell in MARKS:
            marks.append(MARKS[cell])
        attribute = f' class="{" ".join(marks)}"' if marks else ""
        return f"<{tag}{attribute}>{html.escape(cell)}</{tag}>"

    warnings = "".join(f"<p class=grave>{html.escape(text)}</p>" for text in table.warnings)
    body = "".join(row(cells, "td") for cells in table.rows)
    head = row(table.head, "th")
    return (f"<h2>{html.escape(table.title)}</h2>{warnings}<div class=wide><table><thead>{head}</thead>"
            f"<tbody>{body}</tbody></table></div><p>{html.escape(table.note)}</p>")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --faint: #5f5f5f; --line: #d8d8d8;
         --better: #1a7f37; --worse: #b3261e; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14161a; --ink: #e4e4e4; --faint: #a3a3a3; --line: #363a40;
           --better: #57c26f; --worse: #ff8a80; }} }}
body {{ margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
        font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p, footer, details {{ color: var(--faint); font-size: .85rem; overflow-wrap: anywhere; max-width: 60rem; }}
.summary {{ color: var(--ink); font-size: 1rem; padding-left: 1.1rem; }}
.grave, .worse {{ color: var(--worse); font-weight: 600; }} .better {{ color: var(--better); font-weight: 600; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--paper);
                                 min-width: 5.5rem; max-width: 40vw; white-space: normal; overflow-wrap: break-word; }}
th.words, td.words {{ text-align: left; white-space: normal; min-width: 9rem; }}
.plots {{ display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
svg {{ width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<ul class="summary">{summary}</ul>
{tables}
{remarks}
<h2>Plots</h2>
<p>Lines are means over seeds (how many: in brackets); bands hold all seeds, those of differences are 95% intervals.</p>
<div class="plots">
{plots}
</div>
<footer><p>{command}</p></footer>
</body>
</html>
"""


def write_page(title: str, summary: list[str], tables: list[Table], shown: dict[str, tuple[str, Draw]],
               remarks: list[Remark], command: str, path: Path) -> None:
    """One file that needs no other. remarks: what a reader must know of the runs. command: that made it."""
    plots = []
    for name, draw in shown.values():
        made = figure(name, draw)
        plots.append(f"<figure style=\"margin: 0\">{inline(made, name)}</figure>")
        pyplot.close(made)
    page = PAGE.format(title=html.escape(title), summary=items(summary), tables="\n".join(map(as_html, tables)),
                       remarks=folded(remarks), plots="\n".join(plots), command=html.escape(command))
    with atomic_write(path, "w", encoding="utf-8") as f:
        f.write(page)


def items(texts: Iterable[object]) -> str:
    return "".join(f"<li>{html.escape(str(text))}</li>" for text in texts)


def folded(remarks: list[Remark]) -> str:
    """All remarks; closed if they are many, but for grave ones."""
    grave, others = [r for r in remarks if r.grave], [r for r in remarks if not r.grave]
    text = f"<ul class=grave>{items(grave)}</ul>" if grave else ""
    if others:
        state = " open" if len(others) <= FEW else ""
        count = f"{len(others)} remark{'' if len(others) == 1 else 's'} on these runs"
        text += f"<details{state}><summary>{count}</summary><ul>{items(others)}</ul></details>"
    return text
