"""The jobs of docs/study/plan.md, in order of priority; `bench.study` runs them.

Learning rates are chosen by earlier runs, so the list is computed from the losses of what is finished. A job whose
rate is not known yet is not listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLOCK_SIZE, VOCABULARY, TOKENS_PER_PARAMETER = 256, 4096, 20
EARLY_STEPS = 500  # of runs that look at the start of training
PRIMARY = (0.0, 0.1)  # lambda
SECONDARY = (0.03, 0.3)
RIVALS = {
    **dict.fromkeys(("cosreg", "simctg"), ("0.03", "0.1", "0.3")),
    "sigreg": ("3e-4", "1e-3", "3e-3"),
    "feature_decorrelation": ("1e-4", "3e-4", "1e-3"),
    **dict.fromkeys(("feature_correlation", "condition"), ("1e-3", "3e-3", "1e-2")),
    **dict.fromkeys(("istar", "istar_reversed"), ("0.01", "0.03", "0.1")),
}
FURTHER = {  # more weights, each where the largest so far is the best
    **dict.fromkeys(("angular", "cosreg", "simctg"), ("1", "3")),
    **dict.fromkeys(("feature_correlation", "condition"), ("3e-2",)),
    **dict.fromkeys(("istar", "istar_reversed"), ("0.3",)),
    "sigreg": ("1e-2",),
    "feature_decorrelation": ("3e-3",),
}
STRONG = ("angular", "simctg")  # with more weights and at more sizes than the other losses
MUON_RATES = ("1e-3", "3e-3", "1e-2")
QWEN3 = ("bias=false", "norm=rmsnorm", "position=rotary", "mlp=swiglu", "qk_norm=true")
FIRST_GRID, SMALLEST, LARGEST = (0.5, 1.0, 2.0, 4.0), 0.25, 16.0  # multiples of 0.384 / width


ON_CPU = ("device=cpu", "train.dtype=float32", "train.compile=false")
ON_GPU = ("device=cuda", "train.dtype=bfloat16", "train.compile=true", "data.shard_tokens=25000000")  # files of 50 MB


@dataclass(frozen=True)
class Size:
    """Layers, width, heads, sequences per step and their length of one rung of the ladder; and what it runs on."""

    n_layer: int
    n_embd: int
    n_head: int
    batch_size: int = 8
    block_size: int = BLOCK_SIZE
    machine: tuple[str, ...] = ON_CPU

    def steps(self, tokens: int) -> int:
        return math.ceil(tokens / (self.batch_size * self.block_size))

    @property
    def non_embedding(self) -> int:
        """Parameters but the token and position embeddings: matrices, biases, LayerNorms."""
        return self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd) + 2 * self.n_embd

    def total(self, vocab_size: int) -> int:
        return self.non_embedding + (vocab_size + self.block_size) * self.n_embd


SIZES = {
    "77k": Size(2, 56, 2),
    "150k": Size(3, 64, 2),
    "312k": Size(4, 80, 2),
    "671k": Size(6, 96, 3),
    "1.19M": Size(6, 128, 4, batch_size=16),
    "2.47M": Size(8, 160, 5, batch_size=16),
    "10.6M": Size(6, 384, 6, 32, 1024, ON_GPU),
    "25.2M": Size(8, 512, 8, 32, 1024, ON_GPU),
    "49.2M": Size(10, 640, 10, 64, 1024, ON_GPU),
    "85.1M": Size(12, 768, 12, 64, 1024, ON_GPU),  # GPT-2 small: 124M with its own vocabulary
}
LARGER = {  # sizes -> the one whose learning rate they take, by width
    **dict.fromkeys(("312k", "671k", "1.19M", "2.47M"), "150k"),
    **dict.fromkeys(("25.2M", "49.2M", "85.1M"), "10.6M"),
}


@dataclass(frozen=True)
class Job:
    """A run: its name (design-size-arm-seed), its overrides of train.py, and a run whose weights it begins with."""

    name: str
    overrides: tuple[str, ...]
    needs: str | None = None


Losses = dict[str, float]  # name of a finished run -> its last validation loss; infinite for a run that diverged


def jobs(losses: Losses, corpus: str = "<corpus>") -> Iterator[Job]:
    """All jobs that can be named now, most important first; a job may be named twice."""
    yield from search("77k", 0.0, losses)[0]
    yield from ladder("77k", PRIMARY, 1, 4, losses)
    yield from search("150k", 0.0, losses)[0]
    yield from ladder("150k", PRIMARY, 1, 4, losses)
    yield from ladder("77k", SECONDARY, 1, 3, losses)
    yield from placements("77k", 1, 3, losses)
    yield from search("77k", 0.1, losses)[0]
    yield from ladder("150k", SECONDARY, 1, 3, losses)
    yield from ladder("77k", PRIMARY, 5, 10, losses)
    yield from muon("77k", 1, 3, losses)
    yield from starts("77k", 1, 3, losses)
    yield from rivals("77k", 1, 1, losses)
    yield from ladder("150k", PRIMARY, 5, 8, losses)
    yield from rivals("77k", 2, 3, losses)
    yield from ladder("312k", PRIMARY, 1, 3, losses)
    yield from tuned(losses)
    yield from arms("repeat", "77k", {"lam0": at(0.0)}, 1, 3, losses)  # of (a), on another machine
    yield from strong("150k", "1", 1, 3, losses)
    yield from strong("77k", "3", 5, 7, losses)
    yield from muon("77k", 5, 7, losses)
    yield from strong("312k", "1", 1, 2, losses)
    for size in ("312k", "671k", "150k", "77k"):
        yield from beginnings(size, 1, 3, losses)
    yield from beginnings("77k", 1, 3, losses, warmup=328)  # that of 671k, and the other way round
    yield from beginnings("671k", 1, 3, losses, warmup=38)
    yield from mid_training("77k", 5, 10, losses)
    yield from text_and_tokenizer("77k", 1, 3, losses, corpus)
    yield from regularisers("77k", 1, 3, losses)
    yield from distillation("312k", "77k", 1, 3, losses)
    yield from ladder("150k", PRIMARY, 9, 10, losses)
    yield from search("150k", 0.1, losses)[0]
    yield from ladder("312k", PRIMARY, 4, 6, losses)
    yield from ladder("671k", PRIMARY, 1, 2, losses)
    yield from placements("150k", 1, 5, losses)
    yield from text_and_tokenizer("150k", 1, 3, losses, corpus)
    for size in ("77k", "150k"):
        yield from ladder(size, PRIMARY, 11, 20, losses)
        yield from ladder(size, SECONDARY, 4, 8, losses)
    yield from budgets("150k", 1, 6, losses)
    yield from budgets("77k", 1, 4, losses)
    yield from regularisers("150k", 1, 6, losses)
    yield from ladder("312k", PRIMARY, 7, 10, losses)
    yield from ladder("312k", SECONDARY, 1, 3, losses)
    yield from ladder("1.19M", PRIMARY, 1, 1, losses)
    yield from ladder("671k", PRIMARY, 3, 5, losses)
    yield from mid_training("312k", 1, 6, losses)
    yield from distillation("671k", "150k", 1, 4, losses)
    for size, primary, secondary in (("77k", 30, 12), ("150k", 30, 12), ("312k", 16, 6), ("671k", 8, 3)):
        yield from ladder(size, PRIMARY, 1, primary, losses)
        yield from ladder(size, SECONDARY, 1, secondary, losses)
    yield from placements("150k", 6, 10, losses)
    yield from text_and_tokenizer("150k", 4, 6, losses, corpus)
    yield from budgets("150k", 7, 12, losses)
    yield from ladder("1.19M", PRIMARY, 2, 3, losses)
    yield from placements("1.19M", 1, 2, losses)  # does one of these keep what (a) loses in copying?
    yield from strong("1.19M", "1", 1, 2, losses)
    yield from ladder("1.19M", PRIMARY, 4, 4, losses)
    yield from ladder("2.47M", PRIMARY, 1, 3, losses)


def gpu_jobs(losses: Losses) -> Iterator[Job]:
    """Design (a) at sizes for one GPU, those with the largest expected effect first."""
    yield from search("10.6M", 0.0, losses)[0]
    yield from ladder("10.6M", PRIMARY, 1, 3, losses)
    yield from ladder("25.2M", PRIMARY, 1, 3, losses)
    yield from ladder("10.6M", SECONDARY, 1, 3, losses)
    yield from ladder("49.2M", PRIMARY, 1, 3, losses)
    yield from ladder("10.6M", PRIMARY, 4, 8, losses)
    yield from ladder("85.1M", PRIMARY, 1, 3, losses)


def search(size: str, lam: float, losses: Losses) -> tuple[list[Job], float | None]:
    """The search for a size's learning rate: runs that are still missing now, and the multiple once it is known."""

    def run(multiple: float, seed: int) -> Job:
        return job(f"lr-{size}-lam{lam:g}-x{multiple:g}", size, seed, multiple, [f"dispersion.lambda_disp={lam:g}"])

    def missing(multiples: Iterable[float], seed: int) -> list[Job]:
        return [run(m, seed) for m in multiples if run(m, seed).name not in losses]

    def mean_loss(multiple: float, seeds: tuple[int, ...]) -> float:
        return sum(losses[run(multiple, seed).name] for seed in seeds) / len(seeds)

    if size in LARGER:
        return [], search(LARGER[size], lam, losses)[1]
    grid = list(FIRST_GRID)
    while not (wanted := missing(grid, 101)):
        best = min(grid, key=lambda m: mean_loss(m, (101,)))
        if best == grid[0] and best > SMALLEST:
            grid.insert(0, best / 2)
        elif best == grid[-1] and best < LARGEST:
            grid.append(best * 2)
        else:
            break
    if wanted:
        return wanted, None
    two = sorted(grid, key=lambda m: mean_loss(m, (101,)))[:2]
    wanted = missing(two, 102)
    return wanted, None if wanted else min(two, key=lambda m: mean_loss(m, (101, 102)))


def job(arm: str, size: str, seed: int, multiple: float, extra: list[str], budget: float = TOKENS_PER_PARAMETER) -> Job:
    """A run of `budget` tokens per non-embedding parameter; `extra` overrides come last and win."""
    s = SIZES[size]
    tokens = round(budget * s.non_embedding)
    steps = s.steps(tokens)
    overrides = (
        *("data=english", "model=nano", "optim=adamw", "out_dir=out/study", *s.machine),
        *(f"seed={seed}", f"optim.lr={multiple * 0.384 / s.n_embd:.6g}"),
        *(f"model.n_layer={s.n_layer}", f"model.n_embd={s.n_embd}", f"model.n_head={s.n_head}"),
        *(f"model.block_size={s.block_size}", "optim.warmup_fraction=0.05"),
        *(f"train.tokens={tokens}", f"train.batch_size={s.batch_size}"),
        *("train.eval_windows=1024", f"train.eval_interval={math.ceil(steps / 2)}", "train.sample_tokens=0"),
        *(f"train.condensation_interval={math.ceil(steps / 20)}", f"train.log_interval={math.ceil(steps / 20)}"),
        *("train.checkpoint_interval=500", "train.keep_last=1"),
        *(["train.keep_every=500"] if size == "1.19M" else []),  # when does it learn to copy?
    )
    kept = [o for o in overrides if o.partition("=")[0] not in {e.partition("=")[0] for e in extra}]
    return Job(f"{arm}-s{seed}", (*kept, *extra))


def arms(
    design: str, size: str, settings: dict[str, list[str]], first: int, last: int, losses: Losses, budget: float = 20
) -> Iterator[Job]:
    """Every arm with the seeds first to last, seed by seed, at the rate found for lambda 0; none before it is known."""
    multiple = search(size, 0.0, losses)[1]
    for seed in range(first, last + 1) if multiple else ():
        for arm, extra in settings.items():
            yield job(f"{design}-{size}-{arm}", size, seed, multiple or 1.0, extra, budget)


def at(lam: float, *others: str) -> list[str]:
    return [f"dispersion.lambda_disp={lam:g}", *others]


def ladder(size: str, lambdas: tuple[float, ...], first: int, last: int, losses: Losses) -> Iterator[Job]:
    yield from arms("a", size, {f"lam{lam:g}": at(lam) for lam in lambdas}, first, last, losses)


def beginnings(size: str, first: int, last: int, losses: Losses, warmup: int | None = None) -> Iterator[Job]:
    """The first steps of design (a), with the cosine of each layer every 5: how long is the cone of the start?

    The warm-up is as long as in design (a), or of so many steps; after it the rate stays, while in design (a) it has
    fallen to 0.35 of its peak at 77k by the last of these steps, to 0.81 at 150k, and hardly at all above.
    """
    s = SIZES[size]
    steps = warmup or 0.05 * s.steps(TOKENS_PER_PARAMETER * s.non_embedding)
    extra = [
        f"train.tokens={EARLY_STEPS * s.batch_size * s.block_size}",
        *("optim.schedule=constant", f"optim.warmup_fraction={steps / EARLY_STEPS:.4f}"),
        *("train.condensation_interval=5", "train.log_interval=25", f"train.eval_interval={EARLY_STEPS // 2}"),
    ]
    kind = f"warm{warmup}-" if warmup else ""
    yield from arms("early", size, {f"{kind}lam{lam:g}": at(lam, *extra) for lam in PRIMARY}, first, last, losses)


def tuned(losses: Losses) -> Iterator[Job]:
    """Lambda 0.1 at its own learning rate, where that is another one than lambda 0's."""
    for size in ("77k", "150k"):
        multiple = search(size, 0.1, losses)[1]
        if multiple and multiple != search(size, 0.0, losses)[1]:
            yield from (job(f"tuned-{size}-lam0.1", size, seed, multiple, at(0.1)) for seed in range(1, 9))


def budgets(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    for tokens in (5, 80):
        stop = last if tokens == 5 else min(last, 6)
        settings = {f"{tokens}x-lam{lam:g}": at(lam) for lam in PRIMARY}
        yield from arms("b", size, settings, first, stop, losses, tokens)


def placements(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    settings = {
        "late": at(0.1, "dispersion.layers=last_half"),
        "last": at(0.1, "dispersion.layers=last"),
        "warmup": at(0.1, "dispersion.schedule=warmup"),
        "decay": at(0.1, "dispersion.schedule=cosine"),
    }
    yield from arms("c", size, settings, first, last, losses)


def rivals(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """Every loss of conf/dispersion/ that others have proposed, at three weights, and perhaps at more (`FURTHER`).

    It gets those, one after another, where its largest so far, of angular 0.03, 0.1 and 0.3, has the lowest loss with
    seed 1.
    """

    def settings(name: str, *weights: str) -> dict[str, list[str]]:
        return {f"{name}-{each}": [f"dispersion={name}", f"dispersion.lambda_disp={each}"] for each in weights}

    three = {arm: extra for name, weights in RIVALS.items() for arm, extra in settings(name, *weights).items()}
    yield from arms("rivals", size, three, first, last, losses)
    tried = {name: [f"rivals-{size}-{name}-{weight}-s1" for weight in weights] for name, weights in RIVALS.items()}
    tried["angular"] = [f"a-{size}-lam{lam}-s1" for lam in ("0.03", "0.1", "0.3")]
    for name, runs in tried.items():
        for weight in FURTHER[name]:
            if not all(run in losses for run in runs) or min(runs, key=lambda run: losses[run]) != runs[-1]:
                break
            yield from arms("rivals", size, settings(name, weight), first, last, losses)
            runs.append(f"rivals-{size}-{name}-{weight}-s1")


def strong(size: str, weight: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """The two losses that gain most at 77k, at ten or more times lambda 0.1: at other sizes, and with new seeds."""
    settings = {f"{name}-{weight}": [f"dispersion={name}", f"dispersion.lambda_disp={weight}"] for name in STRONG}
    yield from arms("strong", size, settings, first, last, losses)


def muon(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """Lambda 0 and 0.1, and `simctg` at 1, with Muon, its rate the best at lambda 0 with one seed."""

    def settings(rate: str, lam: float, *others: str) -> list[str]:
        return at(lam, "optim=muon", "optim.lr=null", f"optim.muon_lr={rate}", *others)

    tried = {rate: job(f"lr-{size}-muon-{rate}", size, 101, 1.0, settings(rate, 0.0)) for rate in MUON_RATES}
    if missing := [each for each in tried.values() if each.name not in losses]:
        yield from missing
        return
    best = min(MUON_RATES, key=lambda rate: losses[tried[rate].name])
    kinds = {f"muon-lam{lam:g}": settings(best, lam) for lam in PRIMARY}
    kinds["muon-simctg1"] = settings(best, 1, "dispersion=simctg")
    yield from arms("e", size, kinds, first, last, losses)


def starts(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """Another start of training, and Qwen3's parts: is it condensation early in training that costs loss?"""
    kinds = {
        "init0.06": ["model.init_std=0.06"],
        "slowrise": ["optim.warmup_fraction=0.2"],
        "qwen3": [f"model.{key}" for key in QWEN3],
    }
    settings = {f"{name}-lam{lam:g}": at(lam, *extra) for name, extra in kinds.items() for lam in PRIMARY}
    yield from arms("s", size, settings, first, last, losses)


def regularisers(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """Dropout and weight decay, alone and with dispersion."""
    plain = {"dropout": "model.dropout=0.1", "decay0.3": "optim.weight_decay=0.3"}
    settings = {f"{name}-lam{lam:g}": at(lam, override) for name, override in plain.items() for lam in PRIMARY}
    yield from arms("f", size, settings, first, last, losses)


def text_and_tokenizer(size: str, first: int, last: int, losses: Losses, corpus: str) -> Iterator[Job]:
    """English by bytes, Python's standard library by bytes and by the vocabulary; English by it is design (a)."""
    texts = {
        "english-bytes": ["data.tokenizer=byte"],
        "python-bytes": ["data=pystdlib_bytes"],
        "python-bpe": ["data=pystdlib", f"data.tokenizer={corpus}/bpe4096.tiktoken"],
    }
    settings = {f"{name}-lam{lam:g}": at(lam, *extra) for name, extra in texts.items() for lam in PRIMARY}
    yield from arms("i", size, settings, first, last, losses)


def mid_training(size: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """Models of design (a) without dispersion, trained further with and without, at a third of the rate."""
    multiple = search(size, 0.0, losses)[1]
    for seed in range(first, last + 1) if multiple else ():
        source = f"a-{size}-lam0-s{seed}"
        for lam in PRIMARY:
            extra = at(lam, f"init_from=out/study/{source}")
            further = job(f"g-{size}-lam{lam:g}", size, seed + 1000, (multiple or 1.0) / 3, extra, budget=5)
            yield Job(further.name, further.overrides, needs=source)


def distillation(teacher: str, student: str, first: int, last: int, losses: Losses) -> Iterator[Job]:
    """Teachers of design (a) with and without dispersion, students with and without."""
    for of_teacher in PRIMARY:
        for lam in PRIMARY:
            extra = at(lam, "intervention=distillation")
            name = f"teacher{of_teacher:g}-lam{lam:g}"
            for one in arms("h", student, {name: extra}, first, last, losses):
                source = f"a-{teacher}-lam{of_teacher:g}-s{one.name.rpartition('-s')[2]}"
                yield Job(one.name, (*one.overrides, f"intervention.teacher=out/study/{source}"), needs=source)
