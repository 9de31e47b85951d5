"""The tables and figures of the study, from docs/study/records/ alone: `make study-report` writes docs/study/results.md
and docs/study/figures/. The tests are in `pairs.py`, correlations and losses of others in `mechanism.py`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from bench.study import figures, mechanism
from bench.study.pairs import (
    FEWEST,
    WITHOUT_LAMBDA,
    Arms,
    arm_and_seed,
    arms_of,
    baseline_of,
    detectable,
    difference,
    gaps_of,
    holm,
    number,
    paired,
    pairs_needed,
    probability,
    slopes,
)
from bench.study.plan import SIZES
from bench.study.records import RECORDS, recorded
from bench.study.tokens import CONTEXTS, at_step, of_group
from nanodisp.condensation.figures import STYLE
from nanodisp.errors import UserError
from nanodisp.report.scaling import effective_interval, effective_parameters, fit, resampled
from nanodisp.report.tables import NOTHING

PAGE, FIGURES = RECORDS.parent / "results.md", RECORDS.parent / "figures"
MARGINS = {"loss": 0.01, "BLiMP": 0.005}  # of equivalence
RESAMPLES = 100  # of the scaling law
PLANNED = {"77k": 30, "150k": 30, "312k": 16, "671k": 8, "1.19M": 4, "2.47M": 3}  # pairs at lambda 0.1
TWICE = "c-77k-late"  # of two layers the late half is the last one: the same runs as c-77k-last
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


def compared_runs(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The records of all runs but those of the search for a rate, each once."""
    return [r for r in recorded(folder) if r["design"] != "lr" and not r["name"].startswith(TWICE)]


def loss(record: dict[str, Any]) -> float | None:
    return record["loss"]


def score(task: str, metric: str) -> Callable[[dict[str, Any]], float | None]:
    """A benchmark's figure; the logarithm of a perplexity, which scatters by factors."""

    def of(record: dict[str, Any]) -> float | None:
        value = record.get("tasks", {}).get(task, {}).get(metric)
        return math.log(value) if value and metric == "perplexity" else value

    return of


blimp = score("blimp", "acc")


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
    plain = [r for r in records if arm_and_seed(r)[0].endswith("lam0") and r["design"] in ("a", "b")]
    n, d, losses = zip(*((r["non_embedding"], r["config"]["train"]["tokens"], r["loss"]) for r in plain), strict=True)
    yield "\n### Effective parameters\n"
    try:
        law = fit(n, d, losses)
    except UserError as error:
        yield f"Not known yet: {error}."
        return
    laws = resampled(law, n, d, losses, RESAMPLES)
    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["design"] == "a":
            by_arm[arm_and_seed(record)[0]].append(record)
    rows, misses = [], []
    for arm, runs in by_arm.items():
        mean, tokens = statistics.fmean(r["loss"] for r in runs), runs[0]["config"]["train"]["tokens"]
        times = effective_parameters(law, runs[0]["non_embedding"], tokens, mean)
        low, high = effective_interval(laws, runs[0]["non_embedding"], tokens, [r["loss"] for r in runs])
        rows.append(f"| {arm} | {len(runs)} | {times:.2f} [{low:.2f}, {high:.2f}] |")
        if arm.endswith("-lam0") and not round(low, 2) <= 1 <= round(high, 2):
            misses.append(f"{arm} {times:.2f} [{low:.2f}, {high:.2f}]")
    yield f"Without dispersion L = {law.E:.3f} + {law.A:.4g} N^-{law.alpha:.3f} + {law.B:.4g} D^-{law.beta:.3f}.\n"
    if misses:
        yield f"It misses its own runs, whose factor should be 1: {', '.join(misses)}. So no other factor is given."
        return
    yield (
        "An arm's loss is that of a model without dispersion with so many times its parameters, on the same tokens,"
        f" with the 95% interval of {RESAMPLES} resamplings of all runs:\n"
    )
    yield "| arm | runs | times |"
    yield "| --- | --- | --- |"
    yield from rows


def by_token(title: str, groups: Sequence[str], arms: Sequence[Arms]) -> Iterator[str]:
    """A line per arm, a column per group of tokens: in nats, and in percent of the loss without; and one per baseline.

    arms: of each group, with the mean loss of its tokens.
    """
    yield f"\n### Validation loss by {title}, nats per token\n"
    measured = families(arms[0])
    if not measured:
        yield "Not known yet: no pair has been measured."
        return
    yield f"| arm | pairs | {' | '.join(groups)} |"
    yield "| --- | --- |" + " --- |" * len(groups)
    every = [arm for members in measured.values() for arm in members]
    for arm in dict.fromkeys(map(baseline_of, every)):
        means = [statistics.fmean(of[arm].values()) for of in arms]
        yield f"| {arm}: the loss itself | {len(arms[0][arm])} runs | {' | '.join(f'{mean:.4f}' for mean in means)} |"
    for arm in every:
        found = [paired(of[arm], of[baseline_of(arm)], 0.0) for of in arms]
        shares = [each.mean / base_of(of, arm) for each, of in zip(found, arms, strict=True)]
        cells = [f"{difference(each, 4)}, {share:+.1%}" for each, share in zip(found, shares, strict=True)]
        yield f"| {arm} | {found[0].n} | {' | '.join(cells)} |"


def of_tokens(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The tables of `tokens.py`."""
    quarters = ("most frequent quarter", "frequent", "rare", "rarest quarter")
    arms = [arms_of(records, of_group("by_frequency", number)) for number in range(len(quarters))]
    yield from by_token("frequency of the predicted token", quarters, arms)
    shares = next((r["by_context"]["shares"] for r in records if "by_context" in r), [math.nan] * len(CONTEXTS))
    heads = [f"{name} ({share:.1%} of the text)" for name, share in zip(CONTEXTS, shares, strict=True)]
    arms = [arms_of(records, of_group("by_context", number)) for number in range(len(CONTEXTS))]
    yield from by_token("what the context holds", heads, arms)
    for arm in (arm for members in families(arms[0]).values() for arm in members):
        found = [paired(of[arm], of[baseline_of(arm)], 0.0) for of in arms]
        parts = [f"{share * each.mean:+.4f}" for share, each in zip(shares, found, strict=True)]
        yield f"| {arm}, times the share | {found[0].n} | {' | '.join(parts)} |"
    yield "\nCopied: the token that followed the last earlier occurrence, in the window, of the token just read. Seen:"
    yield "another one that occurs earlier in the window. The shares are those of the first run that is measured."
    yield from over_steps(records)


def over_steps(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of the losses by context after each checkpoint of the runs that have kept several."""
    yield "\n### Validation loss by what the context holds, over the steps of training\n"
    kept = [r for r in records if len(r.get("context_over_steps", ())) > 1]
    members = [arm for family in families(arms_of(kept, loss)).values() for arm in family]
    if not members:
        yield "Not known yet: no pair has kept several checkpoints."
        return
    yield f"| arm | steps | pairs | {' | '.join(f'{name}: without, difference' for name in CONTEXTS)} |"
    yield "| --- | --- | --- |" + " --- |" * len(CONTEXTS)
    for arm in members:
        steps = {row[0] for r in kept if arm_and_seed(r)[0] == arm for row in r["context_over_steps"]}
        for step in sorted(steps):
            every = [arms_of(kept, at_step(step, number)) for number in range(len(CONTEXTS))]
            if not gaps_of(every[0][arm], every[0].get(baseline_of(arm), {})):
                continue
            found = [paired(of[arm], of[baseline_of(arm)], 0.0) for of in every]
            cells = [f"{base_of(of, arm):.4f}, {difference(each, 4)}" for each, of in zip(found, every, strict=True)]
            yield f"| {arm} | {step:,} | {found[0].n} | {' | '.join(cells)} |"


# --- the page ------------------------------------------------------------------------------------


def tables(title: str, hypothesis: str, arms: Arms, margin: float | None, digits: int) -> Iterator[str]:
    """A table for each family; lambda 0.1 of (a) is the test of a hypothesis of the plan."""
    for family, members in families(arms).items():
        name = f"{family} ({hypothesis})" if family == "(a) lambda 0.1" else family
        yield from table(f"{title}, {name}", arms, members, margin, digits)


def table(
    title: str,
    arms: Arms,
    members: Sequence[str],
    margin: float | None,
    digits: int,
    baseline: Callable[[str], str] = baseline_of,
) -> Iterator[str]:
    """A Markdown table of arms that are corrected together; without a margin no columns about equivalence."""
    heads = ["arm", "pairs", "baseline", "difference, 95%", "median", "deviation", "p (Holm)"]
    heads += ["within", "pairs for it"] if margin else []
    found = [paired(arms[arm], arms[baseline(arm)], margin or 0.0) for arm in members]
    yield f"\n### {title}\n"
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(['---'] * len(heads))} |"
    for arm, of, adjusted in zip(members, found, holm([each.p for each in found]), strict=True):
        cells = [arm, str(of.n), number(base_of(arms, arm, baseline), digits), difference(of, digits)]
        cells += [f"{of.median:+.{digits}f}", number(of.deviation, digits), probability(adjusted)]
        if margin:
            needed = str(pairs_needed(margin, of.deviation)) if of.deviation > 0 else NOTHING
            cells += [probability(of.equivalent), needed]
        yield f"| {' | '.join(cells)} |"


def base_of(arms: Arms, arm: str, baseline: Callable[[str], str] = baseline_of) -> float:
    """The mean of an arm's baseline over the seeds that both have."""
    of = arms[baseline(arm)]
    return statistics.fmean(of[seed] for seed in arms[arm].keys() & of.keys())


def against_lambda(arms: Arms) -> Iterator[str]:
    """Other schedules, layers, rates and weights against plain lambda 0.1 with the same seeds, not against none."""
    plain = lambda arm: f"a-{arm.split('-')[1]}-lam0.1"  # noqa: E731
    others = sorted(arm for arm in arms if arm.partition("-")[0] in ("c", "strong", "tuned"))
    members = [arm for arm in others if arms[arm].keys() & arms.get(plain(arm), {}).keys()]
    if members:
        yield from table("Validation loss against lambda 0.1, nats per token", arms, members, None, 4, plain)


def scatter(arms: Arms) -> Iterator[str]:
    """How far seeds and pairs scatter at lambda 0.1, and what the planned pairs could show with that."""
    yield "\n### Scatter and power, lambda 0.1, nats per token\n"
    yield "Deviations between seeds without and with, and of pairs. With the planned pairs: half the width of the"
    yield "interval, and the difference that is found with 80% power.\n"
    yield "| size | without | with | pairs | of pairs | planned | interval then | found then | pairs for ±0.01 |"
    yield "| --- |" + " --- |" * 8
    for size, planned in PLANNED.items():
        without, treated = (arms.get(f"a-{size}-lam{lam}", {}) for lam in ("0", "0.1"))
        of = paired(treated, without, MARGINS["loss"])
        if of.n >= FEWEST:
            cells = [statistics.stdev(each.values()) for each in (without, treated)]
            row = [size, *(number(each, 4) for each in cells), str(of.n), number(of.deviation, 4), str(planned)]
            half = float(stats.t(planned - 1).ppf(0.975)) * of.deviation / math.sqrt(planned)
            row += [f"±{half:.4f}", number(detectable(planned, of.deviation), 4)]
            yield f"| {' | '.join([*row, str(pairs_needed(MARGINS['loss'], of.deviation))])} |"


def trend(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Hypothesis H2: does the difference at lambda 0.1 depend on size? Steps grow with it: see `beginnings`."""
    yield "\n### Does the difference depend on size? (H2)\n"
    runs = [r for r in records if r["design"] in ("a", "b")]
    ends, middles = arms_of(runs, loss), arms_of(runs, lambda record: record["val"][-2]["loss"])
    about = {arm_and_seed(r)[0]: (math.log2(r["non_embedding"]), r["val"][-1]["step"]) for r in runs}
    treated = [arm for arm in ends if arm.endswith("-lam0.1") and baseline_of(arm) in ends]
    gaps = {arm: [*gaps_of(ends[arm], ends[baseline_of(arm)]).values()] for arm in treated}
    of_size = slopes(((about[arm][0],), of) for arm, of in gaps.items() if arm.startswith("a"))
    if not of_size:
        yield f"Not known yet: fewer than two sizes have {FEWEST} pairs."
        return
    change, low, high = of_size[0]
    yield "At 20 tokens per parameter each doubling of the parameters, and with it of the steps, changes it by"
    yield f"{change:+.4f} [{low:+.4f}, {high:+.4f}] nats: weighted least squares over arms of {FEWEST} pairs or more,"
    yield "95% interval of resampled pairs, which is too narrow where these are few. Means halfway and at the end:\n"
    yield "| arm | steps | pairs | halfway | at the end |"
    yield "| --- | --- | --- | --- | --- |"
    for arm in sorted(gaps, key=lambda arm: about[arm][1]):
        half = paired(middles[arm], middles[baseline_of(arm)], 0.0)
        yield f"| {arm} | {about[arm][1]:,} | {half.n} | {half.mean:+.4f} | {statistics.fmean(gaps[arm]):+.4f} |"


def interactions(arms: Arms) -> Iterator[str]:
    """Is the effect of lambda 0.1 another one in a setting than in design (a), with the same seeds?"""
    effects = {
        arm: gaps_of(arms[arm], arms[baseline_of(arm)])
        for arm in arms
        if arm.endswith("-lam0.1") and arm.partition("-")[0] not in WITHOUT_LAMBDA and baseline_of(arm) in arms
    }
    plain = {arm: effects.get(f"a-{arm.split('-')[1]}-lam0.1", {}) for arm in effects}
    compared = sorted(arm for arm in effects if arm[:2] != "a-" and plain[arm].keys() & effects[arm].keys())
    yield "\n### Interactions: the effect of lambda 0.1 in other settings, nats per token\n"
    if not compared:
        yield "Not known yet: no pair of another setting is finished."
        return
    yield "Paired by seed: the effect in the setting minus that in design (a), of the seeds that both have; of (early),"
    yield "the effect after 500 steps minus that at the end of (a). p is corrected for the whole table.\n"
    yield "| arm | pairs | effect in (a) | effect here | interaction, 95% | p (Holm) |"
    yield "| --- |" + " --- |" * 5
    found = [paired(effects[arm], plain[arm], 0.0) for arm in compared]
    for arm, of, adjusted in zip(compared, found, holm([each.p for each in found]), strict=True):
        shared = effects[arm].keys() & plain[arm].keys()
        here, there = (statistics.fmean(each[seed] for seed in shared) for each in (effects[arm], plain[arm]))
        yield f"| {arm} | {of.n} | {there:+.4f} | {here:+.4f} | {difference(of, 4)} | {probability(adjusted)} |"


def benchmarks(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for each of `BENCHMARKS`, with all arms that were evaluated."""
    for title, (task, metric) in BENCHMARKS.items():
        arms = arms_of(records, score(task, metric))
        if members := [arm for family in families(arms).values() for arm in family]:
            yield from table(title, arms, members, None, 4)


def page(every: Sequence[dict[str, Any]]) -> str:
    records = [record for record in every if record["loss"] is not None]
    n = {name: sum(record["design"] == name for record in records) for name in {r["design"] for r in records}}
    counted = ", ".join(f"({name}) {count}" for name, count in sorted(n.items()))
    cone = arms_of(records, mechanism.time_in_cone)
    others = [arm for of in families(cone).values() for arm in of if not arm.startswith(("rivals", "early"))]
    lines = [
        "# Results of the study",
        "",
        "Written by `make study-report` from the records; do not edit. [plan.md](plan.md) says what is compared.",
        "",
        f"{len(records)} runs beside the search for learning rates: {counted}. {len(every) - len(records)} others",
        "failed: their loss was not finite. Until the plan's numbers of pairs are reached, this is an interim look.",
        "",
        "A difference is arm minus its baseline without dispersion, of pairs with the same seed; of an arm without",
        "dispersion, minus lambda 0 of design (a). Its 95% interval is that of a paired t test, over seeds alone: the",
        "validation text is always the same. `p` is the test's, corrected by Holm within the table. `within` is the p",
        f"value of equivalence, not corrected: below 0.05 the difference lies within ±{MARGINS['loss']} nats (BLiMP",
        f"±{MARGINS['BLiMP']}). The last column is how many pairs show a difference of that margin with 80% power.",
        "Only H1 to H4 at lambda 0.1 in (a) are tests that were planned; all else is secondary or exploratory.",
        *tables("Validation loss, nats per token", "H1", arms_of(records, loss), MARGINS["loss"], 4),
        *against_lambda(arms_of(records, loss)),
        *scatter(arms_of(records, loss)),
        *trend(records),
        *interactions(arms_of(records, loss)),
        *tables("BLiMP, accuracy", "H3", arms_of(records, blimp), MARGINS["BLiMP"], 4),
        *benchmarks(records),
        *tables("Mean cosine of the middle layers", "H4", arms_of(records, mechanism.middle), None, 3),
        *effective(records),
        *of_tokens(records),
        *mechanism.correlations(records, "Validation loss", loss),
        *mechanism.correlations(records, "BLiMP accuracy", blimp),
        *table(f"Share of training in the cone (last layer's cosine above {mechanism.HIGH})", cone, others, None, 3),
        "\nThe cosine is measured at every twentieth of a run. In runs of 3,000 steps or more that is after 150 steps",
        "at the earliest, when the cone is over: a share of 0 there does not say that there was none. The first steps",
        "of such runs, measured more often:",
        *mechanism.beginnings(records),
        *mechanism.rivals(records),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    every = compared_runs()
    PAGE.write_text(page(every), encoding="utf-8")
    print(f"wrote {PAGE}")
    records = [record for record in every if record["loss"] is not None]
    arms = arms_of(records, loss), arms_of(records, blimp)
    FIGURES.mkdir(exist_ok=True)
    for name, figure in figures.draw(records, *arms, mechanism.compared(records)).items():
        picture = FIGURES / f"{name}.png"
        figure.savefig(picture, dpi=STYLE["savefig.dpi"])
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
