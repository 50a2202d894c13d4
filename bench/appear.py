"""Does a gain over next-token prediction grow with the batch? The difference in large batches minus that in small ones.

    python ablate.py appear --vary vocab_size=512,4096
    python ablate.py appear --vary vocab_size=512,4096 --gradient_accumulation_steps=8 --max_iters=400 --out=out/appear8
    python -m bench.appear out/appear_vocab_size/* out/appear8/*

For each vocabulary and each set-up: its difference to the base with the fewest and with the most micro-batches per
step, and the second minus the first, paired by seed, in bits per byte, which all vocabularies share. Once where both
have made as many steps, once where both have read as many tokens, each time as far as the shorter run goes; between
two evaluations losses are interpolated. The rate must be held (lr_schedule=constant), so that each evaluation is the
end of a shorter run.

What this leaves out on purpose: verdicts on the set-ups themselves (compare.py).
"""

from system.program import program

import argparse
import sys
from pathlib import Path

from compare import deliver
from study.groups import Group, split_name
from study.intervals import interval
from study.runs import Reader, Run, joined
from study.tables import Table, as_markdown, as_text
from system.shown import shown_message

BASE = "base"
KEY = "val/bits_per_byte"
VERDICTS = {"better": "grows with the batch", "worse": "shrinks with the batch"}

Groups = dict[tuple[int, str, int], Group]  # by vocabulary, set-up and micro-batches


def by_set_up(runs: list[Run]) -> Groups:
    """Errors: ValueError for a run that cannot be placed, or is there twice."""
    found: Groups = {}
    for run in runs:
        if run.config.get("lr_schedule") != "constant":
            raise ValueError(f"{run.where}: lr_schedule={run.config.get('lr_schedule')}; expected constant")
        for setting in ("vocab_size", "gradient_accumulation_steps"):
            if type(run.config.get(setting)) is not int:
                raise ValueError(f"{run.where}: does not say its {setting}")
        if not len(run.points(KEY)[0]):
            raise ValueError(f"{run.where}: has no {KEY}")
        name, seed = split_name(run)
        key = run.config["vocab_size"], name, run.config["gradient_accumulation_steps"]
        group = found.setdefault(key, Group(name))
        if seed in group.runs:
            raise ValueError(f"{run.where}: the same set-up and seed as {group.runs[seed].where}")
        group.runs[seed] = run
    return found


def steps_alike(small: Run, large: Run) -> tuple[float, float]:
    """The last iteration that both have, twice: as many steps."""
    steps = min(small.length, large.length)
    return steps, steps


def tokens_alike(small: Run, large: Run) -> tuple[float, float]:
    """The iteration of each at which both have read as many tokens, as late as possible."""
    pace = [run.at("tokens", run.length) / run.length for run in (small, large)]
    tokens = min(small.length * pace[0], large.length * pace[1])
    return tokens / pace[0], tokens / pace[1]


def partners(groups: Groups, V: int, name: str, micro: int) -> dict[int, tuple[Run, Run]]:
    """{seed: (a set-up's run, the base's)}; none where one of the two was not run."""
    ours, base = groups.get((V, name, micro)), groups.get((V, BASE, micro))
    return ours.partners(base) if ours and base else {}


def difference(run: Run, base: Run, step: float) -> float:
    return float(run.at(KEY, step) - base.at(KEY, step))


def table(groups: Groups) -> Table:
    """Errors: ValueError without two sizes of a batch."""
    sizes = sorted({micro for _, _, micro in groups})
    if len(sizes) < 2:
        raise ValueError(f"gradient_accumulation_steps={', '.join(map(str, sizes))}: expected runs of two values")
    few, many = sizes[0], sizes[-1]
    rows = []
    for V, name in sorted({(V, name) for V, name, _ in groups if name != BASE}):
        small, large = partners(groups, V, name, few), partners(groups, V, name, many)
        for what, alike in (("steps", steps_alike), ("tokens", tokens_alike)):
            in_small, in_large = [], []
            for seed in small.keys() & large.keys():
                early, late = alike(small[seed][1], large[seed][1])
                in_small.append(difference(*small[seed], early))
                in_large.append(difference(*large[seed], late))
            change = interval([b - a for a, b in zip(in_small, in_large, strict=True)])
            rows.append([f"{V:,}", name, what, str(interval(in_small)), str(interval(in_large)), str(change),
                         VERDICTS.get(change.verdict, change.verdict), str(change.n)])
    head = ["vocabulary", "set-up", "as many", f"at {few}", f"at {many}", f"{many} minus {few}", "verdict", "pairs"]
    return Table("Difference to base by size of the batch, bits per byte", head, rows,
                 f"At {few}, {many}: micro-batches per step. Mean ± half of the 95% interval (Student's t) over pairs "
                 "of one seed; negative is better than base, and in the last difference a gain larger in large "
                 "batches.", words=("set-up", "as many"))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="out_dirs of runs, folders of them, or their logs")
    parser.add_argument("--markdown", metavar="PAGE#NAME", help="also into that page, between <!-- NAME --> and "
                        "<!-- /NAME -->")
    args = parser.parse_args(argv)
    reader = Reader()
    for word in args.runs:
        if not Path(word).is_file() or word.endswith(".jsonl"):  # out/appear8/* has a report too
            reader.read(word)
    for problem in joined(reader.problems):
        print(f"appear.py: {shown_message(problem)}", file=sys.stderr)
    found = table(by_set_up(reader.runs))
    print(as_text(found))
    if args.markdown:
        deliver(as_markdown(found), args.markdown)


if __name__ == "__main__":
    sys.exit(program(main))
