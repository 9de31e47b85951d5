"""The jobs of the study: rates are chosen before they are used, and pairs differ in lambda alone."""

import math
import re

import pytest
from conftest import compose

from bench.study.plan import FURTHER, SIZES, Job, gpu_jobs, jobs, search
from nanodisp.overrides import without_unused
from nanodisp.training.optim import lr_scale


def every_job(losses):
    return [*jobs(losses), *gpu_jobs(losses)]


def run_all(loss_of):
    """Finish all jobs, each with the loss that `loss_of` gives it, until they name no further ones; jobs and losses."""
    losses, done = {}, {}
    while todo := [job for job in every_job(losses) if job.name not in losses]:
        done |= {job.name: job for job in todo}
        losses |= {job.name: loss_of(job) for job in todo}
        assert len(done) < 1000
    return done, losses


def value(job, key):
    return next(o.partition("=")[2] for o in job.overrides if o.partition("=")[0] == key)


@pytest.mark.parametrize(("best", "chosen"), [(0.024, 4.0), (0.0015, 0.25)])
def test_the_rate_is_searched_beyond_the_grid_and_then_used(best, chosen):
    def loss(job):
        rate = value(job, "optim.lr")
        return 5.0 if rate == "null" else 5 + abs(math.log(float(rate) / best))

    done, losses = run_all(loss)
    assert search("150k", 0.0, losses)[1] == chosen
    assert float(value(done["a-150k-lam0.1-s7"], "optim.lr")) == pytest.approx(chosen * 0.384 / 64)
    assert not any(name.startswith("tuned") for name in done)  # the same rate is the best for both lambdas


def test_a_loss_gets_more_weights_as_long_as_the_largest_is_the_best():
    better_with_more = ("rivals-77k-simctg", "rivals-77k-istar_", "a-77k-lam")
    done, _ = run_all(
        lambda job: 5 - min(1, float(value(job, "dispersion.lambda_disp"))) * job.name.startswith(better_with_more)
    )
    more = tuple(f"rivals-77k-{of}-{weight}-s" for of, weights in FURTHER.items() for weight in weights)
    expected = ("angular-1", "simctg-1", "simctg-3", "istar_reversed-0.3")
    found = {name for name in done if name.startswith(more)}
    assert found == {f"rivals-77k-{name}-s{seed}" for name in expected for seed in (1, 2, 3)}

    done, _ = run_all(lambda job: 5 + (float(value(job, "dispersion.lambda_disp")) - 1) ** 2)
    assert "rivals-77k-simctg-3-s1" in done  # 1 is the best of four
    done, _ = run_all(lambda job: 5 + (float(value(job, "dispersion.lambda_disp")) - 0.3) ** 2)
    assert "rivals-77k-simctg-1-s1" in done
    assert "rivals-77k-simctg-3-s1" not in done  # 0.3 is


def test_the_runs_of_a_pair_differ_in_lambda_alone():
    done, _ = run_all(lambda job: 5.0)
    treated = {name: job for name, job in done.items() if "lam0.1" in name and not name.startswith(("lr", "tuned"))}
    assert len(treated) > 150
    for name, job in treated.items():
        pair = done[name.replace("lam0.1", "lam0")]
        assert {o for o in job.overrides if o not in pair.overrides} == {"dispersion.lambda_disp=0.1"}
        assert value(job, "seed") == value(pair, "seed")


def test_the_first_steps_have_the_rate_of_the_whole_training_or_the_other_warmup():
    done, _ = run_all(lambda job: 5.0)

    def rates(name, total):
        config = compose(*done[name].overrides, "data.path=a").optim
        return [lr_scale(config, step, total) for step in (0, 20, 37, 100, 300, 330, 499)]

    for size in ("77k", "150k", "312k", "671k"):
        total = SIZES[size].steps(20 * SIZES[size].non_embedding)
        whole, early = rates(f"a-{size}-lam0-s1", total), rates(f"early-{size}-lam0-s1", 500)
        warm = [k for k, step in enumerate((0, 20, 37, 100, 300, 330, 499)) if step < 0.05 * total - 1]
        assert [early[k] for k in warm] == pytest.approx([whole[k] for k in warm], rel=0.01)
        assert early[-2:] == [1.0, 1.0] and int(value(done[f"early-{size}-lam0-s1"], "train.tokens")) == 500 * 2048
    for swapped, other in (("77k-warm328", "671k"), ("671k-warm38", "77k")):
        assert rates(f"early-{swapped}-lam0-s1", 500) == pytest.approx(rates(f"early-{other}-lam0-s1", 500), rel=0.01)


def test_a_name_means_one_configuration():
    seen: dict[str, Job] = {}
    _, losses = run_all(lambda job: 5.0)
    for known in ({}, losses):
        for job in every_job(known):
            assert seen.setdefault(job.name, job) == job


def test_every_kind_of_job_is_a_configuration_whose_keys_have_an_effect():
    done, _ = run_all(lambda job: 5.0)
    kinds = {tuple(re.sub(r"=[\d.e-]+$", "", override) for override in job.overrides): job for job in done.values()}
    assert len(kinds) > 15
    for job in kinds.values():
        path = ["data.path=a"] if "data=english" in job.overrides else []
        typed = [*(override.replace("<corpus>", "a") for override in job.overrides), *path]
        without_unused(compose(*typed), typed, frozenset())


def test_sizes_are_named_by_their_parameters_and_pieces_of_data_are_small():
    for name, size in SIZES.items():
        number = float(name[:-1]) * {"k": 1e3, "M": 1e6}[name[-1]]
        assert size.non_embedding == pytest.approx(number, rel=0.02)
    for job in gpu_jobs({}):
        assert 2 * int(value(job, "data.shard_tokens")) < 60e6
        assert value(job, "device") == "cuda"
