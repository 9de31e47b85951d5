"""The statistics of the study, and that its page is what its records give."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.study import report
from bench.study.pairs import baseline_of, detectable, holm, paired, pairs_needed, slopes
from bench.study.report import (
    PAGE,
    against_lambda,
    benchmarks,
    compared_runs,
    effective,
    families,
    interactions,
    page,
    trend,
)
from nanodisp.report.scaling import Law


def pairs(gaps: list[float], base: float = 5.0) -> tuple[dict[int, float], dict[int, float]]:
    baseline = {seed: base + 0.1 * seed for seed in range(len(gaps))}
    return {seed: baseline[seed] + gap for seed, gap in enumerate(gaps)}, baseline


@given(st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=20).filter(lambda gaps: np.std(gaps) > 1e-6))
def test_the_difference_is_that_of_a_paired_t_test(gaps: list[float]) -> None:
    values, baseline = pairs(gaps)
    of = paired(values | {99: 7.0}, baseline | {98: 1.0}, margin=0.01)  # seeds without a partner do not count
    theirs = stats.ttest_rel([*values.values()], [*baseline.values()])
    low, high = theirs.confidence_interval(0.95)
    assert of.n == len(gaps)
    assert of.p == pytest.approx(theirs.pvalue, rel=1e-5)
    assert (of.mean - of.half, of.mean + of.half) == pytest.approx((low, high), rel=1e-5, abs=1e-9)
    lower = stats.ttest_1samp(gaps, -0.01, alternative="greater").pvalue
    upper = stats.ttest_1samp(gaps, 0.01, alternative="less").pvalue
    assert of.equivalent == pytest.approx(max(lower, upper), rel=1e-5, abs=1e-12)


def test_two_pairs_have_a_mean_and_no_test() -> None:
    of = paired(*pairs([0.02, 0.04]), margin=0.01)
    assert of.mean == pytest.approx(0.03)
    assert math.isnan(of.p) and math.isnan(of.half) and math.isnan(of.equivalent)
    assert math.isnan(paired({1: 2.0}, {2: 2.0}, margin=0.01).mean)


def test_equal_runs_are_no_finding() -> None:
    of = paired(*pairs([0.0, 0.0, 0.0]), margin=0.01)
    assert of.p == 1.0 and of.equivalent == 0.0 and of.median == 0.0
    assert paired(*pairs([0.25, 0.25, 0.25]), margin=0.01).p == 0.0


def test_holm_multiplies_the_smallest_most_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    adjusted = holm([0.02, math.nan, 0.01])
    assert adjusted[2] == pytest.approx(0.02) and adjusted[0] == pytest.approx(0.02) and math.isnan(adjusted[1])


def test_power_is_that_of_the_plan_and_of_a_simulation() -> None:
    assert pairs_needed(0.005, 0.014) == 64  # the plan's normal approximation says 62
    n = pairs_needed(0.01, 0.014)
    random = np.random.default_rng(0)
    for size, above in ((n, True), (n - 2, False)):
        p = stats.ttest_1samp(random.normal(0.01, 0.014, (20_000, size)), 0.0, axis=1).pvalue
        assert ((p < 0.05).mean() >= 0.795) == above


def test_slopes_are_those_of_weighted_least_squares_with_intervals_that_cover() -> None:
    random = np.random.default_rng(0)
    groups = {(1.0, 2.0): (30, 0.1), (2.0, 2.0): (12, 0.02), (4.0, 3.0): (6, 0.01), (4.0, 5.0): (8, 0.02)}

    def draw() -> list[tuple[tuple[float, float], list[float]]]:
        return [((x, z), (0.03 * x - 0.1 * z + random.normal(0, s, n)).tolist()) for (x, z), (n, s) in groups.items()]

    found = draw()
    rows = np.array([(1.0, *x) for x, gaps in found for _ in gaps])
    weight = np.concatenate([np.full(len(gaps), 1 / np.std(gaps, ddof=1)) for _, gaps in found])
    y = np.concatenate([gaps for _, gaps in found])
    expected = np.linalg.lstsq(rows * weight[:, None], y * weight, rcond=None)[0][1:]
    assert [slope for slope, *_ in slopes([*found, ((9.0, 9.0), [9.0, 8.0])])] == pytest.approx(expected), "two are few"
    covered = [
        [low <= true <= high for (_, low, high), true in zip(slopes(draw()), (0.03, -0.1), strict=True)]
        for _ in range(30)
    ]
    assert np.mean(covered) >= 0.75, "of few pairs, resampling finds too narrow intervals, but not by much"
    assert slopes([((1.0, 2.0), [0.1, 0.2, 0.3]), ((2.0, 4.0), [0.1, 0.2, 0.4]), ((3.0, 6.0), [0.1, 0.3, 0.3])]) == []


def test_the_effect_that_the_planned_pairs_find_needs_so_many_pairs() -> None:
    for pairs_planned, deviation in ((30, 0.08), (8, 0.014), (3, 0.01)):
        assert pairs_needed(detectable(pairs_planned, deviation) * 1.001, deviation) == pairs_planned


def test_the_difference_of_a_size_is_a_line_of_its_logarithm() -> None:
    def run(name: str, n: float, steps: int, loss: float, halfway: float) -> dict[str, object]:
        val = [{"step": at, "loss": each} for at, each in ((0, 8.0), (steps // 2, halfway), (steps, loss))]
        return {"name": name, "design": name[0], "non_embedding": n, "val": val, "loss": loss}

    runs = []
    for arm, n in (("a-1", 8e4), ("a-2", 1.6e5), ("a-3", 3.2e5), ("b-1-80x", 8e4)):
        for seed in range(1, 5):
            gap = 0.05 * math.log2(n / 8e4) - 0.6 + 0.001 * (seed % 3)
            runs += [run(f"{arm}-lam0-s{seed}", n, int(n / 100), 5.0 + seed, 6.0)]
            runs += [run(f"{arm}-lam0.1-s{seed}", n, int(n / 100), 5.0 + seed + gap, 5.9)]
    text = "\n".join(trend(runs))
    assert "changes it by\n+0.0500 [" in text
    assert "| a-2-lam0.1 | 1,600 | 4 | -0.1000 | -0.5490 |" in text and "| b-1-80x-lam0.1 | 800 | 4 |" in text
    assert "Not known yet" in "".join(trend(runs[:8]))


def test_interactions_are_paired_by_seed() -> None:
    arms = {"a-77k-lam0": {1: 5.0, 2: 5.1, 3: 5.2, 4: 9.0}, "a-77k-lam0.1": {1: 4.9, 2: 4.9, 3: 4.9, 4: 1.0}}
    arms |= {"e-77k-muon-lam0": {1: 4.0, 2: 4.1, 3: 4.2}, "e-77k-muon-lam0.1": {1: 3.98, 2: 4.0, 3: 4.02}}
    (line,) = (line for line in interactions(arms) if line.startswith("| e"))
    assert line.startswith("| e-77k-muon-lam0.1 | 3 | -0.2000 | -0.1000 | +0.1000 [+0.0503, +0.1497] |")
    assert "Not known yet" in "".join(interactions({arm: of for arm, of in arms.items() if arm[0] == "a"}))

    lines = list(against_lambda(arms | {"c-77k-decay": {1: 5.0, 2: 4.95, 3: 5.0}, "strong-150k-simctg-1": {1: 4.0}}))
    assert lines[-1].startswith("| c-77k-decay | 3 | 4.9000 | +0.0833 ["), "150k has no lambda 0.1 to compare with"


def test_every_arm_is_compared_with_lambda_0_of_its_own_design() -> None:
    assert baseline_of("a-77k-lam0.1") == "a-77k-lam0"
    assert baseline_of("f-150k-dropout-lam0.1") == "f-150k-dropout-lam0"
    assert baseline_of("h-150k-teacher0.1-lam0.1") == "h-150k-teacher0.1-lam0"
    assert baseline_of("c-150k-late") == baseline_of("tuned-150k-lam0.1") == "a-150k-lam0"
    assert baseline_of("f-150k-dropout-lam0") == baseline_of("h-150k-teacher0.1-lam0") == "a-150k-lam0"
    assert baseline_of("i-150k-python-bytes-lam0") == "i-150k-python-bytes-lam0", "another text has another loss"
    assert baseline_of("a-150k-lam0") == "a-150k-lam0"
    names = [
        "a-150k-lam0",
        "a-150k-lam0.1",
        "a-77k-lam0",
        "a-77k-lam0.1",
        "a-77k-lam0.3",
        "c-77k-late",
        "b-77k-5x-lam0.1",
        "s-77k-init0.06-lam0",
        "s-77k-init0.06-lam0.1",
    ]
    assert families({name: {1: 0.0} for name in names}) == {
        "(a) lambda 0.1": ["a-77k-lam0.1", "a-150k-lam0.1"],
        "(a) lambda 0.3": ["a-77k-lam0.3"],
        "(c)": ["c-77k-late"],
        "(s)": ["s-77k-init0.06-lam0.1"],
        "(s) without dispersion, against (a)": ["s-77k-init0.06-lam0"],
    }, "without a baseline there is no comparison"
    assert families({"a-77k-lam0": {1: 5.0}, "a-77k-lam0.1": {2: 5.0}}) == {}, "nor without a seed that both have"


def test_arms_are_worth_the_parameters_of_the_law_without_dispersion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 10)
    law = Law(E=2.0, A=60.0, B=300.0, alpha=0.3, beta=0.35)
    runs, sizes = [], (8e4, 1.5e5, 3e5, 6e5)
    for n, times in itertools.product(sizes, (5, 20, 80)):
        config = {"train": {"tokens": times * n}}
        for lam, factor in ((0, 1.0), (0.1, 1.5)):
            name = f"{'a' if times == 20 else 'b'}-{n:g}-lam{lam}-s1"
            loss = float(law.loss(n * factor, times * n))
            runs.append({"name": name, "design": name[0], "non_embedding": n, "config": config, "loss": loss})
    lines = list(effective(runs))
    assert [line for line in lines if "lam0.1" in line] == [
        f"| a-{n:g}-lam0.1 | 1 | 1.50 [1.50, 1.50] |" for n in (8e4, 1.5e5, 3e5, 6e5)
    ]
    assert "| a-80000-lam0 | 1 | 1.00 [1.00, 1.00] |" in lines
    assert "Not known yet" in "".join(effective([run for run in runs if run["design"] == "a"]))
    missed = [run | {"loss": 1.2 * run["loss"]} if run["name"] == "a-150000-lam0-s1" else run for run in runs]
    (line,) = (line for line in effective(missed) if "150000" in line)
    assert line.startswith("It misses its own runs") and "a-150000-lam0 0." in line


def test_benchmarks_have_a_table_each_of_the_runs_that_were_evaluated_on_them() -> None:
    def run(name: str, perplexity: float | None) -> dict[str, object]:
        return {"name": name, "tasks": {} if perplexity is None else {"lambada": {"perplexity": perplexity}}}

    runs = [run(f"a-77k-lam0-s{seed}", math.exp(of)) for seed, of in ((1, 8), (2, 5), (3, 4))]
    runs += [run("a-77k-lam0-s4", None), *(run(f"strong-77k-simctg-3-s{seed}", math.exp(3)) for seed in (1, 2, 3, 4))]
    lines = list(benchmarks(runs))
    assert [line for line in lines if "###" in line] == ["\n### LAMBADA, perplexity of the last word, as a logarithm\n"]
    assert lines[-1].startswith("| strong-77k-simctg-3 | 3 | 5.6667 | -2.6667 ["), "not seed 4"


@pytest.mark.slow
def test_the_page_is_what_the_records_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(compared_runs()), "run make study-report"


def test_every_number_of_the_pages_and_of_the_readme_stands_in_the_results() -> None:
    known = PAGE.read_text(encoding="utf-8")  # which is what the records give, as the test above says
    pages = [(PAGE.parent / name).read_text(encoding="utf-8") for name in ("index.md", "findings.md")]
    start_of_readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    for text, least in ((pages[0], 15), (pages[1], 60), (start_of_readme, 2)):
        numbers = re.findall(r"(?<!\d)[+-]?\d{1,2}\.\d{3,}", text)
        intervals = re.findall(r"[+-]?\d+\.\d+ \[[^\]]+\]", " ".join(text.split()))
        assert len(numbers) >= least and intervals
        assert [each for each in (*numbers, *intervals) if each not in known] == []
