"""What the runs are: set-ups by the settings in which they differ, and on what, where and with what they ran."""

from collections.abc import Callable, Collection

from study.groups import Group, differences
from study.runs import Run
from study.tables import Table, number
from system.shown import shown

CELL = 60  # characters of one value
UNBROKEN = "\u00a0"  # a space at which no line ends


def fact(name: str) -> Callable[[Run], str]:
    """A fact as its run's log has it; numbers with commas."""
    def value(run: Run) -> str:
        found = run.facts.get(name)
        if found is None:
            return ""
        return f"{found:,}" if type(found) is int else shown(found, CELL)

    return value


def data_set(run: Run) -> str:
    if "dataset" not in run.config:
        return ""
    part = run.config.get("train_fraction", 1.0)
    words = [shown(run.config["dataset"], CELL)]
    if part != 1.0:
        words.append(f"{part:.4g} of it" if isinstance(part, float) else shown(part, CELL))
    words.append(f"V {shown(run.config.get('vocab_size'), 20)}, T {shown(run.config.get('max_seq_len'), 20)}")
    return ", ".join(words)


def validation(run: Run) -> str:
    tokens, checksum = fact("val_tokens")(run), fact("val_crc32")(run)
    return f"{tokens} (checksum {checksum})".strip() if checksum else tokens


def machine(run: Run) -> str:
    words = [fact("device_name")(run) or fact("device")(run)]
    threads, processes = run.facts.get("threads"), run.facts.get("processes")
    if threads is not None:
        words.append("1 thread" if threads == 1 else f"{threads} threads")
    if type(processes) is int and processes > 1:
        words.append(f"{processes} processes")
    return ", ".join(filter(None, words))


def arithmetic(run: Run) -> str:
    found = [shown(run.facts[key], CELL) for key in ("path", "dtype") if key in run.facts]
    return ", ".join(found)


def commit(run: Run) -> str:
    found = run.facts.get("commit")
    if not isinstance(found, str):
        return ""
    return shown(found[:12], 20) + (" with changes" if run.facts.get("dirty") else "")


def day(run: Run) -> str:
    return shown(run.facts.get("started", ""), 40)[:10]


PROPERTIES: dict[str, Callable[[Run], str]] = {
    "data set": data_set, "training tokens": fact("train_tokens"), "validation tokens": validation,
    "parameters": fact("parameters"), "machine": machine, "path": arithmetic, "torch": fact("torch"),
    "commit": commit, "begun": day}


def tables_of_what_was_run(set_ups: list[Group], every: list[Group] | None = None) -> list[Table]:
    """The set-ups, the first of which is the baseline; and of all groups on what, where and with what they ran.

    every: the groups of all values of a setting, those of one set-up under one label.
    """
    every = every or set_ups
    runs = table_of_runs(every)
    return [table_of_set_ups(set_ups, every), *([runs] if runs.rows else [])]


def table_of_set_ups(groups: list[Group], every: list[Group]) -> Table:
    """Each set-up with the settings in which it differs from the first, and the seeds of all groups of its label."""
    base, rows = groups[0], []
    for group in groups:
        differ = [UNBROKEN.join((shown(key, 40), shown(old, 40), "→", shown(new, 40)))
                  for key, old, new in differences(group, base)]
        own = "the baseline" if group is base else ", ".join(differ) or "no setting that their logs have"
        own_seeds = {seed for other in every if other.label == group.label for seed in other.runs}
        rows.append([group.label, own, seeds(own_seeds), f"{group.length:,}", number(group.first.last("tokens"), 0)])
    return Table("Set-ups", ["set-up", "setting: baseline → here", "seeds", "steps", "tokens"], rows,
                 words=("setting: baseline → here",))


def seeds(keys: Collection) -> str:
    """1337-1341, 2001: consecutive ones as a range. keys: of Group.runs, seeds or, where one is unknown, names."""
    numbers = sorted(key for key in keys if isinstance(key, int))
    ranges: list[list[int]] = []
    for seed in numbers:
        if ranges and seed == ranges[-1][-1] + 1:
            ranges[-1].append(seed)
        else:
            ranges.append([seed])
    words = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges]
    unknown = len(keys) - len(numbers)
    return ", ".join(words + ([f"{unknown} unknown"] if unknown else []))


def table_of_runs(groups: list[Group]) -> Table:
    """On what, where and with what they ran: one line where it is the same for all, else one for each value."""
    rows = []
    for name, value in PROPERTIES.items():
        who: dict[str, list[str]] = {}
        for group in groups:
            for run in group.runs.values():
                labels = who.setdefault(value(run), [])
                if group.label not in labels:
                    labels.append(group.label)
        if set(who) == {""}:
            continue
        for k, (text, labels) in enumerate(sorted(who.items()) if name == "begun" else who.items()):
            of = "all" if len(who) == 1 else ", ".join(labels)
            rows.append([name if k == 0 else "", text or "not in the log", of])
    return Table("What was run", ["", "value", "set-ups"], rows, words=("value", "set-ups"))
