"""Write docs/benchmarks.md from the results that are committed.

    python benchmarks/render.py

What a benchmark measures is told by its script's docstring; the columns of its tables are declared
here. A result without a declaration, and one whose form is another, is an error: nothing that was
measured is left out in silence. Needs nothing but Python, and gives the same page for the same
files.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "benchmarks.md"
INTRODUCTION = """\
# Benchmarks

Every figure about quality or speed in this repository comes from a script in `benchmarks/`. This
page is written by `benchmarks/render.py` (`make docs`) from the JSON files that they left in
`benchmarks/results/`, and is not edited by hand. Words are those of the scripts. A commit that ends
in `+changes` was measured on a working tree that had more in it than the commit.

No GPU could be had: everything here ran on processor cores, most of it while other work kept the
machine busy. Where two things are compared they ran in turn, in one process or one call, so
ratios hold better than seconds do. [limits.md](limits.md) says what was not measured.
"""

Json = Mapping[str, Any]
Show = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, where a row keeps its value (`a.b`), and how it is shown.

    A value that is null, not a number or, with `optional`, not there is shown as a dash.
    """

    heading: str
    path: str
    show: Show = str
    optional: bool = False

    def cell(self, row: Json) -> str:
        """Return what stands in a row's cell; KeyError where the row's form is another."""
        value: Any = row
        for name in self.path.split("."):
            if self.optional and name not in value:
                return "-"
            value = value[name]
            if value is None:
                return "-"
        if isinstance(value, float) and math.isnan(value):
            return "-"
        return self.show(value)


@dataclass(frozen=True)
class Grid:
    """A table as it stands on the page."""

    caption: str
    header: list[str]
    rows: list[list[str]]

    def lines(self) -> Iterator[str]:
        """Yield the lines in Markdown; numbers are set to the right of the first column."""
        if self.caption:
            yield from (f"**{self.caption}**", "")
        yield _line(self.header)
        yield _line(["---", *["---:"] * (len(self.header) - 1)])
        yield from map(_line, self.rows)
        yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def grid(columns: Sequence[Column], rows: Iterable[Json], caption: str = "") -> Grid:
    """Return the table of some rows."""
    header = [column.heading for column in columns]
    return Grid(caption, header, [[column.cell(row) for column in columns] for row in rows])


def number(digits: int = 2, factor: float = 1.0, sign: str = "") -> Show:
    """Show a number times `factor`; `sign` "+" also shows a plus."""
    return lambda value: f"{factor * value:{sign},.{digits}f}"


def small(value: float) -> str:
    """Show a number that may be tiny."""
    return f"{value:.1e}"


def spread(digits: int = 1, factor: float = 100.0) -> Show:
    """Show {mean, sd}; the deviation only where there is one."""

    def show(value: Json) -> str:
        if value["mean"] is None:
            return "-"
        mean = f"{factor * value['mean']:,.{digits}f}"
        return mean if value["sd"] is None else f"{mean} ± {factor * value['sd']:,.{digits}f}"

    return show


def interval(value: Json) -> str:
    """Show {mean, low, high} in points."""
    mean = f"{100 * value['mean']:.1f}"
    if value["low"] is None:
        return mean
    return f"{mean} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def share_interval(value: Json) -> str:
    """Show {mean, low, high} as shares."""
    return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def mean_of(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


PERCENT = number(1, 100)
POINTS = number(1, 100, "+")


def _world(report: Json) -> Iterator[Grid]:
    columns = [
        Column("test mAP, %", "name"),
        Column("default", "mAP", spread()),
        Column("known object", "mAP_known_object", spread()),
        Column("few@10", "few@10", spread()),
        Column("few@5", "few@5", spread()),
        Column("gap closed", "gap_closed", spread(2, 1)),
        Column("seconds", "seconds", spread(0, 1)),
    ]
    yield grid(columns, report["rows"], f"Mean ± standard deviation over worlds {report['seeds']}")


def _losses(report: Json) -> Iterator[Grid]:
    images = f", {report['images']} training images" if "images" in report else ""
    for teacher, found in report["tuning"].items():
        rows = [{"loss": loss, **entry, **entry["setting"]} for loss, entry in found.items()]
        columns = [
            Column("loss", "loss"),
            Column("T", "temperature", "{:g}".format),
            Column("rate", "rate", "x{:g}".format),
            Column("clip, of the median norm", "clip", "x{:g}".format),
            Column("clip", "clip_norm", "{:.2g}".format),
            Column("mAP, %", "mAP", PERCENT),
            Column("at an edge", "at_edge", lambda edge: "yes" if edge else "no"),
        ]
        worlds = report["tuned_on"]
        yield grid(columns, rows, f"Chosen with the teacher {teacher}, on worlds {worlds}{images}")
    columns = [
        Column("test AP, %", "name"),
        Column("mAP", "mAP", interval),
        Column("few@5", "few@5", interval, optional=True),
        Column("few@10", "few@10", interval, optional=True),
        Column("mAP, less LSE-Sign's", "mAP_minus_lse_sign", interval),
        Column("few@5, less LSE-Sign's", "few@5_minus_lse_sign", interval, optional=True),
        Column("few@10, less LSE-Sign's", "few@10_minus_lse_sign", interval, optional=True),
    ]
    for part in report["comparison"]:
        caption = (
            f"Student: {part['student']}. Teacher {part['teacher']}, settings chosen with"
            f" {part['tuned_with']}: worlds {part['worlds']}, seeds {part['seeds']}{images}"
        )
        yield grid(columns, part["rows"], caption)
    if "scarce" in report:
        yield from _losses(report["scarce"])


def _teachers(report: Json) -> Iterator[Grid]:
    rows = [
        {**entry, **row, "name": name}
        for entry in report["rows"]
        for name, row in entry["rows"].items()
    ]
    columns = [
        Column("student", "student"),
        Column("seeds", "seeds", lambda seeds: ", ".join(map(str, seeds))),
        Column("teacher", "teacher"),
        Column("its mAP, %", "teacher_mAP", PERCENT),
        Column("zero-shot", "zero_shot", PERCENT),
        Column("supervised", "supervised", interval),
        Column("supervised, demo", "supervised_chosen", interval),
        Column("settings", "name"),
        Column("HTS, mAP in %", "mAP", interval),
        Column("gap closed", "gap_closed", share_interval),
        Column("gap to its loss", "gap_closed_of_its_loss", share_interval, optional=True),
    ]
    yield grid(columns, rows, f"Worlds {report['worlds']}")
    parts = [{"name": name, "mAP": value} for name, value in report["parts"].items()]
    columns = [Column("on validation worlds", "name"), Column("mAP, %", "mAP", PERCENT)]
    yield grid(columns, parts, "The stand-in, with parts of the choice undone")
    chosen = [{"name": name, "value": value} for name, value in report["choice"].items()]
    columns = [Column("chosen", "name"), Column("", "value")]
    yield grid(columns, chosen, f"Settings chosen on worlds {report['tuned_on']}")


def _rescue(report: Json) -> Iterator[Grid]:
    columns = [
        Column("labels", "labels"),
        Column("search", "search"),
        Column("worlds", "worlds"),
        Column("won back, %", "back", number(0, 100)),
        Column("standard error", "error", number(0, 100)),
        Column("mean gain", "mean_gain", POINTS),
        Column("worst gain", "worst_gain", POINTS),
        Column("CPU seconds", "cpu_seconds", number(0)),
    ]
    yield grid(columns, report["summary"], f"Sweeps of {report['trials']} trials")
    searches = ("sweep", "grid", "random")
    rows = [
        {**row, **{search: row[search]["after"] for search in searches if search in row}}
        for row in report["rows"]
    ]
    columns = [
        Column("world", "world"),
        Column("labels", "labels"),
        Column("start", "start"),
        *(Column(n, n, PERCENT, optional=True) for n in ("good", "before", *searches)),
    ]
    yield grid(columns, rows, "Test mAP in %")


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0, equal values sharing their mean rank."""
    less = [sum(other < value for other in values) for value in values]
    return [
        low + (values.count(value) - 1) / 2 for low, value in zip(less, list(values), strict=True)
    ]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN where all values of one are equal."""
    ranks = [_ranks(list(first)), _ranks(list(second))]
    (a, b) = [[rank - mean_of(own) for rank in own] for own in ranks]
    size = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else math.nan


def _best_third(worlds: Sequence[Json], teacher: str, space: str, name: str) -> float:
    """Return a criterion's rank correlation among the third of the settings that are truly best."""
    found = []
    for world in worlds:
        measured = world["measured"][teacher][space]
        truth, values = measured["truth"], measured["values"][name]
        third = sorted(range(len(truth)), key=lambda i: -truth[i])[: len(truth) // 3]
        draws = values if isinstance(values[0], list) else [[value] for value in values]
        for draw in range(len(draws[0])):
            found.append(spearman([draws[i][draw] for i in third], [truth[i] for i in third]))
    return mean_of([value for value in found if not math.isnan(value)])


def _objectives(report: Json) -> Iterator[Grid]:
    columns = [
        Column("criterion", "name"),
        Column("Spearman", "spearman.mean", number()),
        Column("95 %", "spearman.interval", lambda pair: f"{pair[0]:.2f} to {pair[1]:.2f}"),
        Column("among the best third", "best_third", number()),
        Column("Kendall", "kendall.mean", number()),
        Column("full training", "fine_tuned_spearman", lambda found: f"{mean_of(found):.2f}"),
        Column("gain", "gain", POINTS),
        Column("worst gain", "gain_worst", POINTS),
        Column("regret", "regret", PERCENT),
        Column("gain of 20", "small.gain", POINTS),
        Column("below own, %", "small.below_own", number(0, 100)),
    ]
    for teacher, spaces in report["summary"].items():
        for space, rows in spaces.items():
            found = [world["measured"][teacher][space]["truth"] for world in report["worlds"]]
            own = ", ".join(f"{100 * truth[0]:.1f}" for truth in found)
            best = ", ".join(f"{100 * max(truth):.1f}" for truth in found)
            caption = f"Teacher {teacher}; {space} varied. mAP of own setting {own}; of best {best}"
            known = report["worlds"]
            ranked = [
                {**row, "best_third": _best_third(known, teacher, space, row["name"])}
                for row in rows
            ]
            yield grid(columns, ranked, caption)
    full = report["full_training"]
    rows = [{"name": "trial's true mAP", "value": full["spearman_of_trial_truth"]}]
    rows += [
        {"name": f"finalists' {n}", "value": v} for n, v in full["spearman_of_finalists"].items()
    ]
    columns = [
        Column("Spearman with the mAP of full training", "name"),
        Column("", "value", lambda v: f"{v if isinstance(v, float) else mean_of(v):.2f}"),
    ]
    yield grid(columns, rows)


def _sweep(report: Json) -> Iterator[Grid]:
    if "time" in report:
        names = {
            "full_run": "one run of label, filter and train",
            "as_many_full_runs": "as many such runs as the sweep has trials",
            "sweep": "the whole sweep",
            "times_faster": "times faster",
        }
        timing = report["time"]
        rows = [
            {"name": text, **{unit: timing[unit][name] for unit in ("seconds", "cpu_seconds")}}
            for name, text in names.items()
        ]
        columns = [
            Column("", "name"),
            Column("seconds", "seconds", number(1)),
            Column("CPU seconds", "cpu_seconds", number(1)),
        ]
        yield grid(columns, rows, f"Time, sweeps timed: {len(timing['sweeps'])}")
    if "quality" in report:
        worlds = report["quality"]["worlds"]
        rows = [
            {
                "name": name,
                **{str(world["seed"]): 100 * world["mAP"][name] for world in worlds},
                **{f"gap {world['seed']}": world["gap_closed"].get(name) for world in worlds},
            }
            for name in worlds[0]["mAP"]
        ]
        seeds = [str(world["seed"]) for world in worlds]
        columns = [Column("test mAP, %", "name")]
        columns += [Column(f"world {seed}", seed, number(1)) for seed in seeds]
        columns += [Column(f"gap closed, world {seed}", f"gap {seed}", number()) for seed in seeds]
        yield grid(columns, rows, "Quality")


def _gpu(report: Json) -> Iterator[Grid]:
    found = {name: part.get("figures") for name, part in report["parts"].items()}
    rows = [{"name": name, **found[name]} for name in ("blip", "git", "chat") if found.get(name)]
    columns = [
        Column("teacher", "name"),
        Column("regions/s", "regions_per_second", number()),
        Column("bare model, regions/s", "bare_regions_per_second", number()),
        Column("share", "share_of_bare", number(3)),
        Column("batched over trie", "batched_over_trie", number(1)),
        Column("one by one over trie", "naive_over_trie", number()),
        Column("bfloat16, nats a token", "self_check.bfloat16.nats", number(4)),
        Column("float16", "self_check.float16.nats", number(4)),
    ]
    if rows:
        yield grid(columns, rows, "Teacher, 600 prompts")
    rows = [{"name": name, **found[name]} for name in ("training", "compiled") if found.get(name)]
    columns = [
        Column("steps", "name"),
        Column("images/s", "images_per_second", number()),
        Column("bare, images/s", "bare_images_per_second", number()),
        Column("share", "share_of_bare", number(3)),
        Column("augmentation's share", "augmentation_share", number(3)),
        Column("TFLOP/s", "tflop_per_second", number()),
        Column("of a matrix product's", "model_flop_utilisation", number(3)),
        Column("waits a step", "waits_a_step", number(1)),
    ]
    if rows:
        yield grid(columns, rows, "Training, ViT-B/16 at 672 pixels")


def _train_speed(report: Json) -> Iterator[Grid]:
    kinds = {"kept": "decoded once, kept", "decoded": "decoded in every epoch"}
    rows = []
    for row in report["rows"]:
        shares = [rate / bare for rate, bare in zip(row["rates"], row["bare"], strict=True)]
        means = {name: mean_of(row[name]) for name in ("rates", "bare", "starts")}
        ends = {"lowest": min(shares), "highest": max(shares)}
        rows.append({**row, **means, **ends, "name": kinds[row["kind"]]})
    columns = [
        Column("workers", "workers"),
        Column("layers", "layers"),
        Column("images", "name"),
        Column("images/s", "rates", number()),
        Column("bare loop, images/s", "bare", number()),
        Column("share, median", "share", number(3)),
        Column("lowest", "lowest", number(3)),
        Column("highest", "highest", number(3)),
        Column("first batch after, s", "starts", number(1)),
    ]
    yield grid(columns, rows)


def _epoch_start(report: Json) -> Iterator[Grid]:
    columns = [
        Column("workers", "workers"),
        Column("stored side, px", "stored"),
        Column("side here, px", "side"),
        Column("images of a worker's batch", "batch"),
        Column("load average", "load", number(0)),
        Column("buffer, s", "median.buffer", number()),
        Column("mixed, s", "median.mixed", number()),
        Column("ratio", "ratio", number(3)),
    ]
    yield grid(columns, report["rows"])


def _head_fit(report: Json) -> Iterator[Grid]:
    columns = [
        Column("preset", "preset"),
        Column("images", "images", number(0)),
        Column("features", "features"),
        Column("classes", "classes"),
        Column("epochs", "epochs"),
        Column("seconds", "seconds", number(1)),
        Column("CPU seconds", "cpu_seconds", number(1)),
        Column("images/s", "images_per_second", number(0)),
        Column("peak GiB", "peak_gib", number(1)),
    ]
    yield grid(columns, report["results"], f"{report['threads']} threads, the best of the rounds")


def _pipeline_efficiency(report: Json) -> Iterator[Grid]:
    columns = [
        Column("round", "round"),
        Column("bare", "bare", number()),
        Column("pipeline", "pipeline", number()),
        Column("whole", "whole", number()),
        Column("pipeline / bare", "efficiency", number(3)),
    ]
    rows = [
        {**entry, "round": place, "efficiency": entry["pipeline"] / entry["bare"]}
        for place, entry in enumerate(report["rounds"])
    ]
    median = f"{report['efficiency']:.3f}"
    yield grid(columns, rows, f"Regions/s; median efficiency {median}")
    captions = [{"by": k, "rate": v} for k, v in report["captions_images_per_second"].items()]
    columns = [
        Column("captions by", "by", lambda name: name.replace("_", " ")),
        Column("images/s", "rate", number(1)),
    ]
    yield grid(columns, captions)


def _scale(report: Json) -> Iterator[Grid]:
    columns = [
        Column("actors", "actors"),
        Column("images", "images", number(0)),
        Column("ideal/s", "ideal_images_per_second", number(1)),
        Column("steady/s", "steady_images_per_second", number(1)),
        Column("steady efficiency", "steady_efficiency", number(3)),
        Column("whole run", "whole_efficiency", number(3)),
        Column("driver MiB, early", "driver_mib_early", number(0)),
        Column("late", "driver_mib_late", number(0)),
        Column("all processes MiB, early", "total_mib_early", number(0)),
        Column("late", "total_mib_late", number(0)),
        Column("date", "date", lambda date: str(date)[:10]),
    ]
    yield grid(columns, report["rows"])


def _scale_stages(report: Json) -> Iterator[Grid]:
    columns = [
        Column("stage", "stage"),
        Column("images", "images", number(0)),
        Column("s", "seconds", number(1)),
        Column("us an image", "microseconds_an_image", number(0)),
        Column("of the smallest", "microseconds_an_image_of_smallest", number(2)),
        Column("CPU us an image", "cpu_microseconds_an_image", number(0)),
        Column("of the smallest", "cpu_microseconds_an_image_of_smallest", number(2)),
        Column("driver MiB", "driver_mib", number(0)),
        Column("driver bytes an image", "driver_bytes_an_image", number(0)),
        Column("largest other process, MiB", "largest_mib", number(0)),
        Column("date", "date", lambda date: str(date)[:10]),
    ]
    yield grid(columns, report["rows"])


def _shards(report: Json) -> Iterator[Grid]:
    columns = [
        Column("", "part"),
        Column("source", "source"),
        Column("images", "images", number(0)),
        Column("GiB", "gib", number(2)),
        Column("requests an image", "requests_per_image", number(3)),
        Column("images/s", "images_per_s", number(0)),
    ]
    yield grid(columns, report["reading"])
    columns = [
        Column("resume of a stage on", "place"),
        Column("committed files", "files", number(0)),
        Column("rows counted", "counted", lambda value: "yes" if value else "no"),
        Column("seconds", "seconds", number(1)),
        Column("list requests", "lists", number(0)),
    ]
    yield grid(columns, report["resume"])


def _trie_speed(report: Json) -> Iterator[Grid]:
    columns = [
        Column("model", "model"),
        Column("end scored", "append_eos", lambda value: "yes" if value else "no"),
        Column("encode, s", "encode_s", number()),
        Column("trie, s", "trie_s", number()),
        Column("batched, s", "batched_s", number(1)),
        Column("naive, s", "naive_s", number(0)),
        Column("batched / trie", "batched_over_trie", number(1)),
        Column("naive / trie", "naive_over_trie", number(0)),
        Column("largest difference, nats", "max_difference_nats", small),
    ]
    yield grid(columns, report["rows"])


def _preparation(report: Json) -> Iterator[Grid]:
    columns = [
        Column("processor", "processor"),
        Column("images", "image"),
        Column("preparing, ms a region", "prepare_ms", number(1)),
        Column("model, ms a region", "model_ms", number(1)),
        Column("in turn, regions/s", "in_turn", number(1)),
        Column("beside, regions/s", "beside", number(1)),
        Column("beside / in turn", "beside_over_in_turn", number()),
        Column("share of what is possible", "share_of_possible", number()),
    ]
    yield grid(columns, report["rows"])
    sent = [
        Column("pixels of 16 images, MB", "images_mb", number(0)),
        Column("sent to the device for 224 regions, MB", "sent_mb", number(0)),
        Column("ratio", "ratio", number()),
    ]
    yield grid(sent, [report["sent"]])


def _scoring_memory(report: Json) -> Iterator[Grid]:
    columns = [
        Column("regions", "regions"),
        Column("prompts", "prompts"),
        Column("vocabulary", "vocabulary", number(0)),
        Column("fed nodes", "fed_nodes", number(0)),
        Column("model, GB", "model_gb", number()),
        Column("peak above it, GB", "peak_above_model_gb", number()),
        Column("all logits at once, GB", "all_logits_would_take_gb", number(1)),
    ]
    yield grid(columns, [report])


def _search(report: Json) -> Iterator[Grid]:
    columns = [
        Column("model", "setting"),
        Column("search", "row"),
        Column("all, s", "all_s", number()),
        Column("encoding, s", "encode_s", number()),
        Column("search / all", "ratio", number()),
        Column("decoding alone", "decoding_ratio", number()),
        Column("nodes a region", "nodes", number(0)),
        Column("of", "full_nodes"),
        Column("forwards", "forwards"),
    ]
    yield grid(columns, report["rows"], "Cost")
    columns = [
        Column("model", "setting"),
        Column("search", "row"),
        Column("regions", "regions"),
        Column("classes kept, %", "kept", PERCENT),
        Column("best class kept, %", "top_1", PERCENT),
        Column("best ten kept, %", "top_k", PERCENT),
        Column("probability lost, %", "lost_mass", PERCENT),
        Column("worst region, %", "worst_lost_mass", PERCENT),
    ]
    yield grid(columns, report["agreement"], "What it keeps")


def _caption_matching(report: Json) -> Iterator[Grid]:
    rates = [Column("precision", "precision", number()), Column("recall", "recall", number())]
    first = [{"part": part, **found} for part, found in report["first_counts"].items()]
    caption = "First counts of each part: what new captions should expect"
    yield grid([Column("part", "part"), *rates], first, caption)
    columns = [
        Column("part", "part"),
        Column("captions", "captions"),
        Column("right", "right"),
        Column("wrong", "wrong"),
        Column("missed", "missed"),
        *rates,
    ]
    rows = [{"part": part, **found["kinds"]["all"]} for part, found in report["splits"].items()]
    speed = f"{report['captions_per_cpu_second']:,.0f}"
    yield grid(columns, rows, f"Today, after all were read; {speed} captions a CPU second")


def _caption_styles(report: Json) -> Iterator[Grid]:
    columns = [
        Column("texts", "set", lambda name: name.replace("_", " ")),
        Column("half", "half"),
        Column("texts counted", "texts"),
        Column("right", "right"),
        Column("wrong", "wrong"),
        Column("missed", "missed"),
        Column("precision", "precision", number(3)),
        Column("recall", "recall", number(3)),
    ]
    first = str(report["first"]["date"])[:10]
    yield grid(columns, report["first"]["rows"], f"First counts, {first}, before any change")
    yield grid(columns, report["rows"], "With the grammar as it is")


def _abstention(report: Json) -> Iterator[Grid]:
    kinds = ("noise", "one colour", "soft colours", "blank", "lone objects")
    found = [
        Column("precision", "precision", number(2)),
        Column("recall", "recall", number(2)),
        *(Column(f"{kind}: none", kind, number(2)) for kind in kinds),
    ]
    at = [Column(f"P at 0.{at}", f"precision_at_{at}0", number(2)) for at in (6, 8, 9)]
    ways = [Column("classes", "classes"), Column("way", "way"), *at, *found]
    yield grid(ways, report["ways"], "Ways to abstain, all worlds judged together")
    filtered = [Column("world", "seed"), Column("classes", "classes"), *found]
    yield grid(filtered, report["filter"], "What the filter of own-images labels")


def _questions(report: Json) -> Iterator[Grid]:
    if "ranking" in report:
        found = report["ranking"]
        columns = [
            Column("mAP of the teacher's scores, %", "name"),
            Column("chosen", "choice"),
            Column("mean ± sd", "mAP", spread()),
            Column("worlds", "worlds", lambda values: ", ".join(f"{100 * v:.1f}" for v in values)),
        ]
        yield grid(columns, found["rows"], f"{found['images']} images a world")
        columns = [
            Column("bound of object first", "bound", number(1)),
            Column("chosen", "chosen", lambda value: "yes" if value else ""),
            Column("questions asked, %", "asked", PERCENT),
            Column("mAP, world 110", "tuning_mAP", PERCENT),
            Column("mAP, worlds 0 to 2", "mAP", PERCENT),
        ]
        few = [r for n, r in enumerate(found["object_first"]) if r["chosen"] or n % 4 == 0]
        yield grid(columns, few, "Object first")
        columns = [
            Column("empty", "name"),
            *(Column(f"{n} class{'es' if n > 1 else ''}", str(n), number(2)) for n in (1, 3, 10)),
        ]
        yield grid(columns, found["empty"], "Pictures that show nothing and keep no positive")
    if "cost" in report:
        columns = [
            Column("a region", "name"),
            Column("CPU seconds", "seconds", number()),
            Column("over prompts", "over_prompts", number()),
            Column("tokens fed", "nodes", number(0)),
        ]
        yield grid(columns, report["cost"]["rows"], f"Cost, {report['cost']['rounds']} rounds")


def _metrics_speed(report: Json) -> Iterator[Grid]:
    columns = [
        Column("scores", "scores"),
        Column("loop sorts", "loop_sort"),
        Column("loop, s", "loop_s", number(3)),
        Column("ours, s", "ours_s", number(3)),
        Column("ours / loop", "ratio", number()),
        Column("least", "ratio_min", number()),
        Column("most", "ratio_max", number()),
        Column("both settings, s", "evaluate_both_settings_s", number(3)),
        Column("largest difference of AP", "max_ap_difference", small),
    ]
    yield grid(columns, report["rows"])


def _node_loss(report: Json) -> Iterator[Grid]:
    columns = [
        Column("round", "round"),
        Column("unbroken, s", "unbroken_s", number(1)),
        Column("a node killed, s", "broken_s", number(1)),
        Column("lost, s", "lost_s", number(1)),
        Column("detection, s", "detection_s", number(1)),
        Column("block, s", "block_s", number(1)),
        Column("lost / (detection + block)", "lost_over_aim", number()),
    ]
    rows = [{**entry, "round": place} for place, entry in enumerate(report["rounds"])]
    yield grid(columns, rows)


def _photos(report: Json) -> Iterator[Grid]:
    columns = [
        Column("test mAP, %", "name"),
        Column("mAP", "mAP", spread()),
        Column("gap closed, 95 %", "gap_closed", share_interval),
        Column("validation", "validation_mAP", PERCENT),
        Column("labels' precision", "labels.precision", PERCENT, optional=True),
        Column("recall", "labels.recall", PERCENT, optional=True),
    ]
    differences = [Column("difference in mAP", "name"), Column("points, 95 %", "points", interval)]

    def by_alpha(values: Json) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in values.values())

    teachers = [
        Column("teacher", "teacher"),
        Column("read as", "way"),
        Column("alpha 0 / 0.5 / 1", "mAP_by_alpha", by_alpha),
    ]
    for name, found in report["sets"].items():
        sizes = ", ".join(f"{count:,} {split}" for split, count in found["sizes"].items())
        students = f"{len(found['students'])} students and {found['captioners']} captioner(s)"
        yield grid(columns, found["rows"], f"{name}: {sizes} images; {students}")
        rows = [{"name": pair["name"], "points": pair} for pair in found["differences"]]
        yield grid(differences, rows)
        judged = f"{name}: mAP in % of the teachers themselves, on the training images"
        yield grid(teachers, found.get("teachers", []), judged)


# Result -> title and tables, in the order of the page.
TABLES: dict[str, tuple[str, Callable[[Json], Iterator[Grid]]]] = {
    "world": ("What each part of the method gains", _world),
    "photos": ("Real photographs", _photos),
    "losses": ("Losses", _losses),
    "teachers": ("Weak teachers", _teachers),
    "sweep": ("Sweep", _sweep),
    "rescue": ("Rescue by sweep", _rescue),
    "objectives": ("Objectives without labels", _objectives),
    "abstention": ("None of these", _abstention),
    "questions": ("Questions beside likelihoods", _questions),
    "caption_matching": ("Captions to classes", _caption_matching),
    "caption_styles": ("Captions by style", _caption_styles),
    "pipeline_efficiency": ("The teacher pass beside a bare loop", _pipeline_efficiency),
    "scale": ("Scale, by simulation", _scale),
    "scale_stages": ("Scale of the stages without a model", _scale_stages),
    "shards": ("Shards beside loose files, and many files", _shards),
    "node_loss": ("A node that dies", _node_loss),
    "trie_speed": ("Prompts by trie", _trie_speed),
    "preparation": ("A chat model's processor beside the model", _preparation),
    "scoring_memory": ("Memory of scoring", _scoring_memory),
    "search": ("Search for the best classes", _search),
    "gpu": ("On a GPU", _gpu),
    "train_speed": ("Training beside a bare loop", _train_speed),
    "epoch_start": ("The first batch of an epoch", _epoch_start),
    "head_fit": ("Fitting the classifier alone", _head_fit),
    "metrics_speed": ("The metric beside a plain loop", _metrics_speed),
}


def render(results: Path = RESULTS, scripts: Path = ROOT) -> str:
    """Return the page of all results in a folder.

    ValueError names a result that no table is declared for, or whose form is another.
    """
    found = {path.stem: path for path in results.glob("*.json")}
    if unknown := sorted(set(found) - set(TABLES)):
        raise ValueError(f"{unknown[0]}.json: declare its tables in benchmarks/render.py")
    parts = [INTRODUCTION]
    for name, (title, tables) in TABLES.items():
        if name not in found:
            continue
        report = json.loads(found[name].read_text(encoding="utf-8"))
        try:
            lines = [line for table in tables(report) for line in table.lines()]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{name}.json has another form than benchmarks/render.py declares: {error!r}"
            ) from error
        measured = [f"_{text}_" for text in provenance(report)]
        about = described(scripts / f"{name}.py")
        parts.append("\n".join([f"## {title}", "", about, "", *lines, *measured, ""]))
    return "\n".join(parts)


def described(script: Path) -> str:
    """Return a script's docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{script} has no docstring that says what it measures")
    return text


def provenance(report: Json) -> Iterator[str]:
    """Yield when, where and with what a report, or each of its parts, was measured."""
    if "machine" in report:  # one file of the first day
        machine = report["machine"]
        words = (machine["cores"], machine["cpu"], machine["python"], machine["numpy"])
        yield "Measured {} on {} cores of {}; python {}, numpy {}.".format(
            machine["date"][:10], *words
        )
        return
    if "date" not in report:
        parts = {n: v for n, v in report.items() if isinstance(v, Mapping) and "date" in v}
        for name, part in parts.items():
            yield from (f"{name}: {line}" for line in provenance(part))
        return
    hardware = report["hardware"]
    gpus = ", ".join(map(str, hardware["gpus"])) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    commit, _, changes = str(report["git_commit"]).partition("+")
    yield (
        f"Measured {report['date'][:10]} on {hardware['cores']} cores of {hardware['processor']},"
        f" {hardware['memory_gib']} GiB, {gpus}; commit {commit[:7]}"
        f"{'+' + changes if changes else ''}; {versions}{_settings(report.get('settings'))}."
    )


def _settings(settings: Json | None) -> str:
    """Show the settings of a script; those of a whole run stay in the file."""
    if not settings:
        return ""
    if "run_dir" in settings:
        return "; settings of the run: in the file"
    return "; settings: " + ", ".join(f"{name} {value}" for name, value in settings.items())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
