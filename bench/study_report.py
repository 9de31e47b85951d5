"""The tables and figures of the study, from docs/study/records/ alone: `make study-report` writes docs/study/results.md
and docs/study/figures/. Statistics are in `study_statistics`, what is exploratory in `study_mechanism`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import study_figures, study_mechanism
from bench.study import RECORDS
from bench.study_plan import SIZES
from bench.study_statistics import FEWEST, Arms, Paired, baseline_of, holm, paired, pairs_needed, slope_on_size
from nanodisp.condensation.figures import STYLE
from nanodisp.condensation.sums import STRATA
from nanodisp.errors import UserError
from nanodisp.report.scaling import effective_interval, effective_parameters, fit, resampled
from nanodisp.report.tables import NOTHING

PAGE, FIGURES = RECORDS.parent / "results.md", RECORDS.parent / "figures"
MARGINS = {"loss": 0.01, "BLiMP": 0.005}  # of equivalence
RESAMPLES = 200  # of the scaling law
BENCHMARKS = {  # exploratory: title -> task and metric of a record
    "LAMBADA, perplexity of the last word, as a logarithm": ("lambada", "perplexity"),
    "WikiText-103, bits per byte": ("wikitext", "bits_per_byte"),
    "STS-B, Spearman's rho": ("similarity_stsb", "spearman raw"),
    "STS-B, Spearman's rho after whitening": ("similarity_stsb", "spearman whitened"),
    "Cranfield, nDCG@10": ("retrieval_cranfield", "ndcg@10 raw"),
    "Cranfield, nDCG@10 after whitening": ("retrieval_cranfield", "ndcg@10 whitened"),
    "Polarity of sentences, accuracy of a linear probe": ("probe_sentence_polarity", "acc"),
    "Subjectivity of sentences, accuracy of a linear probe": ("probe_subjectivity", "acc"),
}

# --- from records to arms ------------------------------------------------------------------------


def read_records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The finished runs that take part in comparisons: all but those of the search for a rate."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if record["design"] != "lr"]


def arms_of(records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> Arms:
    """Arm -> seed -> value, of the runs that have one."""
    arms: Arms = defaultdict(dict)
    for record in records:
        arm, _, seed = record["name"].rpartition("-s")
        if (found := value(record)) is not None:
            arms[arm][int(seed)] = found
    return dict(arms)


def loss(record: dict[str, Any]) -> float | None:
    return record["loss"]


def score(task: str, metric: str) -> Callable[[dict[str, Any]], float | None]:
    """A benchmark's figure; the logarithm of a perplexity, which scatters by factors."""

    def of(record: dict[str, Any]) -> float | None:
        value = record.get("tasks", {}).get(task, {}).get(metric)
        return math.log(value) if value and metric == "perplexity" else value

    return of


blimp = score("blimp", "acc")


def middle_cosine(record: dict[str, Any]) -> float:
    """The mean cosine of the layers between the embedding and the last one at the end."""
    return statistics.fmean(record["val"][-1]["mean_cosine"][1:-1])


def family_of(arm: str) -> str:
    """Tests that are corrected together: each lambda of design (a), each other design with dispersion, and without."""
    design, _, *rest = arm.split("-")
    if design == "a":
        return f"(a) lambda {rest[0].removeprefix('lam')}"
    return f"({design}) without dispersion, against (a)" if rest[-1] == "lam0" else f"({design})"


def families(arms: Arms) -> dict[str, list[str]]:
    """Family -> its arms that share a seed with their baseline, lambda 0.1 of (a) first, sizes in ascending order."""
    order = list(SIZES)
    shared = {arm: arms[arm].keys() & arms.get(baseline_of(arm), {}).keys() for arm in arms}
    compared = [arm for arm in arms if baseline_of(arm) != arm and shared[arm]]
    compared.sort(
        key=lambda arm: (family_of(arm) != "(a) lambda 0.1", family_of(arm), order.index(arm.split("-")[1]), arm)
    )
    found: dict[str, list[str]] = {}
    for arm in compared:
        found.setdefault(family_of(arm), []).append(arm)
    return found


def effective(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How much larger a model without dispersion must be to equal each arm of (a), by the law of all runs without."""
    plain = [r for r in records if r["name"].rpartition("-s")[0].endswith("lam0") and r["design"] in ("a", "b")]
    n, d, losses = zip(*((r["non_embedding"], r["config"]["train"]["tokens"], r["loss"]) for r in plain), strict=True)
    yield "\n### Effective parameters\n"
    try:
        law = fit(n, d, losses)
    except UserError as error:
        yield f"Not known yet: {error}."
        return
    yield (
        f"Without dispersion L = {law.E:.3f} + {law.A:.4g} N^-{law.alpha:.3f} + {law.B:.4g} D^-{law.beta:.3f}. An "
        "arm's loss is that of a model without dispersion with so many times its parameters, on the same tokens, with "
        f"the 95% interval of {RESAMPLES} resamplings of all runs:\n"
    )
    laws = resampled(law, n, d, losses, RESAMPLES)
    yield "| arm | runs | times |"
    yield "| --- | --- | --- |"
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["design"] == "a":
            by_arm[record["name"].rpartition("-s")[0]].append(record)
    for arm, runs in by_arm.items():
        mean, tokens = statistics.fmean(r["loss"] for r in runs), runs[0]["config"]["train"]["tokens"]
        times = effective_parameters(law, runs[0]["non_embedding"], tokens, mean)
        low, high = effective_interval(laws, runs[0]["non_embedding"], tokens, [r["loss"] for r in runs])
        yield f"| {arm} | {len(runs)} | {times:.2f} [{low:.2f}, {high:.2f}] |"


def by_frequency(arms: Sequence[Arms]) -> Iterator[str]:
    """A line per arm, a column per stratum of `study_frequency`."""
    yield "\n### Validation loss by frequency of the predicted token, nats per token\n"
    measured = families(arms[0])
    if not measured:
        yield "Not known yet: no pair has been measured."
        return
    yield "| arm | pairs | most frequent quarter | frequent | rare | rarest quarter |"
    yield "| --- | --- |" + " --- |" * STRATA
    for arm in (arm for members in measured.values() for arm in members):
        found = [paired(of[arm], of[baseline_of(arm)], 0.0) for of in arms]
        yield f"| {arm} | {found[0].n} | {' | '.join(difference(each, 4) for each in found)} |"


def loss_of(stratum: int) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: record["by_frequency"][stratum] if "by_frequency" in record else None


# --- the page ------------------------------------------------------------------------------------


def tables(title: str, arms: Arms, margin: float | None, digits: int) -> Iterator[str]:
    """A table for each family."""
    for family, members in families(arms).items():
        yield from table(f"{title}, {family}", arms, members, margin, digits)


def table(title: str, arms: Arms, members: Sequence[str], margin: float | None, digits: int) -> Iterator[str]:
    """A Markdown table of arms that are corrected together; without a margin no columns about equivalence."""
    heads = ["arm", "pairs", "baseline", "difference, 95%", "deviation", "p (Holm)"]
    heads += ["within", "pairs for it"] if margin else []
    found = [paired(arms[arm], arms[baseline_of(arm)], margin or 0.0) for arm in members]
    yield f"\n### {title}\n"
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(['---'] * len(heads))} |"
    for arm, of, adjusted in zip(members, found, holm([each.p for each in found]), strict=True):
        shared = arms[arm].keys() & arms[baseline_of(arm)].keys()
        base = statistics.fmean(arms[baseline_of(arm)][seed] for seed in shared)
        cells = [arm, str(of.n), number(base, digits), difference(of, digits), number(of.deviation, digits)]
        cells.append(probability(adjusted))
        if margin:
            needed = str(pairs_needed(margin, of.deviation)) if of.deviation > 0 else NOTHING
            cells += [probability(of.equivalent), needed]
        yield f"| {' | '.join(cells)} |"


def trend(arms: Arms) -> Iterator[str]:
    """Hypothesis H2: does the difference at lambda 0.1 depend on size?"""
    yield "\n### Does the difference depend on size? (H2)\n"
    gaps: dict[float, Sequence[float]] = {}
    for size, of in SIZES.items():
        without, treated = (arms.get(f"a-{size}-lam{lam}", {}) for lam in ("0", "0.1"))
        gaps[float(of.non_embedding)] = [treated[seed] - without[seed] for seed in sorted(treated.keys() & without)]
    slope, low, high = slope_on_size(gaps)
    if math.isnan(slope):
        yield f"Not known yet: fewer than two sizes have {FEWEST} pairs."
        return
    yield (
        f"With each doubling of the parameters it changes by {slope:+.4f} [{low:+.4f}, {high:+.4f}] nats: weighted "
        f"least squares over the sizes with at least {FEWEST} pairs, 95% interval of resampled pairs, which is too "
        "narrow where these are few."
    )


def benchmarks(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for each of `BENCHMARKS`, with all arms that were evaluated."""
    for title, (task, metric) in BENCHMARKS.items():
        arms = arms_of(records, score(task, metric))
        if members := [arm for family in families(arms).values() for arm in family]:
            yield from table(title, arms, members, None, 4)


def difference(of: Paired, digits: int) -> str:
    interval = "" if math.isnan(of.half) else f" [{of.mean - of.half:+.{digits}f}, {of.mean + of.half:+.{digits}f}]"
    return f"{of.mean:+.{digits}f}{interval}"


def number(value: float, digits: int) -> str:
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}"


def probability(p: float) -> str:
    return NOTHING if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def page(records: Sequence[dict[str, Any]]) -> str:
    n = {name: sum(record["design"] == name for record in records) for name in {r["design"] for r in records}}
    counted = ", ".join(f"({name}) {count}" for name, count in sorted(n.items()))
    lines = [
        "# Results of the study",
        "",
        "Written by `make study-report` from the records; do not edit. [plan.md](plan.md) says what is compared.",
        "",
        f"{len(records)} runs beside the search for learning rates: {counted}. Until the plan's numbers of pairs are",
        "reached, this is an interim look, from which nothing is concluded.",
        "",
        "A difference is arm minus its baseline without dispersion, of pairs with the same seed; of an arm that has no",
        "dispersion itself, minus lambda 0 of design (a). `p` is that of a",
        "paired t test, corrected by Holm within the table. `within` is the p value of equivalence: below 0.05 the",
        f"difference lies within ±{MARGINS['loss']} nats (BLiMP: ±{MARGINS['BLiMP']}). The last column is how many",
        "pairs would show a difference as large as that with 80% power.",
        *tables("Validation loss, nats per token", arms_of(records, loss), MARGINS["loss"], 4),
        *trend(arms_of(records, loss)),
        *tables("BLiMP, accuracy", arms_of(records, blimp), MARGINS["BLiMP"], 4),
        *benchmarks(records),
        *tables("Mean cosine of the middle layers", arms_of(records, middle_cosine), None, 3),
        *effective(records),
        *by_frequency([arms_of(records, loss_of(stratum)) for stratum in range(STRATA)]),
        *study_mechanism.correlations(records, "Validation loss", loss),
        *study_mechanism.correlations(records, "BLiMP accuracy", blimp),
        *study_mechanism.interaction(records),
        *study_mechanism.rivals(records),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    records = read_records()
    PAGE.write_text(page(records), encoding="utf-8")
    print(f"wrote {PAGE}")
    arms = arms_of(records, loss), arms_of(records, blimp)
    FIGURES.mkdir(exist_ok=True)
    for name, figure in study_figures.draw(records, *arms, study_mechanism.compared(records)).items():
        picture = FIGURES / f"{name}.png"
        figure.savefig(picture, dpi=STYLE["savefig.dpi"])
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
