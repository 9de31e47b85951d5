"""`attach` adds exactly lambda * the mean dispersion of the hidden states, in whatever loop the model is trained.

Here with models in plain torch; `test_attach_transformers.py` has those of transformers, `test_attach_ranks.py` DDP.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodisp.dispersion import Attached, DispersionLoss, attach
from nanodisp.dispersion.placement import sample_positions, sample_slices

V, C, LAYERS = 17, 8, 3
LAMBDA = 0.7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.norm(x))
        return x + self.out(torch.tanh(mixed + mixed.cumsum(dim=1)))


class Decoder(nn.Module):
    """Logits [B, T, V]; `recompute` is None or checkpoint's use_reentrant."""

    def __init__(self, recompute: bool | None = None, blocks: Any = nn.ModuleList) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        made = [Block() for _ in range(LAYERS)]
        self.layers = blocks(made) if blocks is not nn.ModuleDict else blocks({str(i): b for i, b in enumerate(made)})
        self.norm, self.head, self.recompute = nn.LayerNorm(C), nn.Linear(C, V), recompute

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None, states: list[Tensor] | None = None) -> Tensor:
        x = self.embed(idx)
        passed = [x]
        for block in self.layers.children():
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
            passed.append(x)
        x = passed[-1] = self.norm(x)
        if states is not None:
            states.extend(passed)
        return self.head(x)


class WithLoss(nn.Module):
    """Returns its loss, as the models of transformers do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = Decoder(**settings)

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        return cross_entropy(self.model(idx), idx), None


def cross_entropy(logits: Tensor, idx: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


def made(kind: Callable[..., Any] = Decoder, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = kind(**settings).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def tokens(n: int = 4, length: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def dispersions(
    model: Decoder, idx: Tensor, variant: str = "angular", n_tokens: int = 0, step: int = 1
) -> list[Tensor]:
    """That of each layer, of all tokens or of those that the pass with this number draws."""
    states: list[Tensor] = []
    model(idx, states=states)
    layers = range(1, LAYERS + 1)
    positions = sample_positions(0, step, layers, idx.size(1), n_tokens or None)
    slices = sample_slices(variant, 0, step, C)
    drawn = () if slices is None else (slices,)
    return [DispersionLoss(variant)(states[i][:, positions[i - 1]], *drawn) for i in layers]


def explicit(idx: Tensor, *, times: float = 1.0, model: Any = None, **settings: Any) -> list[Tensor]:
    """The gradients of times * (cross-entropy + lambda * dispersion), written down."""
    model = model or made()
    dispersion = torch.stack(dispersions(model, idx, **settings)).mean()
    (times * (cross_entropy(model(idx), idx) + LAMBDA * dispersion)).backward()
    return gradients(model)


def assert_equal(found: list[Tensor], right: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_differ(found: list[Tensor], other: list[Tensor]) -> None:
    assert any(not torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, other, strict=True))


RECOMPUTED = pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])


# --- gradients and value -----------------------------------------------------------------------------


@RECOMPUTED
@pytest.mark.parametrize(("variant", "n_tokens"), [("angular", 0), ("angular", 5), ("condition", 5), ("sigreg", 5)])
def test_the_gradients_and_the_value_are_those_of_the_explicit_sum(
    variant: str, n_tokens: int, recompute: bool | None
) -> None:
    model, idx = made(recompute=recompute), tokens()
    handle = attach(model, variant=variant, lambda_disp=LAMBDA, max_tokens=n_tokens or None)
    for step in (1, 2):
        model.zero_grad()
        loss = cross_entropy(model(idx), idx)
        assert loss.item() == cross_entropy(made()(idx), idx).item(), "the loss that the loop sees stays as it is"
        loss.backward()
        assert_equal(gradients(model), explicit(idx, variant=variant, n_tokens=n_tokens, step=step))
        right = torch.stack(dispersions(made(), idx, variant, n_tokens, step)).mean().item()
        assert handle.value == pytest.approx(right, rel=1e-10)
    assert math.isnan(handle.value), "nothing since it was read"


def test_other_tokens_and_directions_are_drawn_in_each_pass() -> None:
    for variant, n_tokens in (("angular", 5), ("sigreg", 0)):
        first, second = (explicit(tokens(), variant=variant, n_tokens=n_tokens, step=step) for step in (1, 2))
        assert_differ(first, second)


def test_the_value_is_the_mean_since_it_was_last_read() -> None:
    model = made()
    handle = attach(model, lambda_disp=LAMBDA)
    right = []
    for seed in (1, 2, 3):
        cross_entropy(model(tokens(seed=seed)), tokens(seed=seed)).backward()
        right.append(torch.stack(dispersions(made(), tokens(seed=seed))).mean().item())
    assert handle.value == pytest.approx(sum(right) / 3, rel=1e-10)
    cross_entropy(model(tokens()), tokens()).backward()
    assert handle.value == pytest.approx(torch.stack(dispersions(made(), tokens())).mean().item(), rel=1e-10)


def test_float32_and_bfloat16_models_are_measured_in_float32() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-4)):
        model = made(dtype=dtype)
        handle = attach(model, lambda_disp=LAMBDA, backend="reference")
        cross_entropy(model(tokens()).float(), tokens()).backward()
        states: list[Tensor] = []
        made(dtype=dtype)(tokens(), states=states)
        right = sum(DispersionLoss(backend="reference")(state.float()).item() for state in states[1:]) / LAYERS
        assert handle.value == pytest.approx(right, rel=tolerance)
        assert all(p.grad.dtype == dtype for p in model.parameters())
    model = made(dtype=torch.float32)
    attach(model, lambda_disp=LAMBDA)
    cross_entropy(model(tokens()), tokens()).backward()
    assert_equal(gradients(model), explicit(tokens(), model=made(dtype=torch.float32)), 1e-5)


# --- how the loss is scaled -----------------------------------------------------------------------------


@RECOMPUTED
@pytest.mark.parametrize("kind", [Decoder, WithLoss])
def test_accumulation_and_the_scale_of_float16_reach_the_dispersion(kind: Any, recompute: bool | None) -> None:
    model, n, scaler = made(kind, recompute=recompute), 4, torch.amp.GradScaler("cpu", init_scale=2.0**14)
    handle = attach(model, lambda_disp=LAMBDA)
    right = [torch.zeros_like(p) for p in made().parameters()]
    for seed in range(n):
        idx = tokens(seed=seed)
        loss = model(idx)[0] if kind is WithLoss else handle.follow(cross_entropy(model(idx), idx))
        scaler.scale(loss / n).backward()
        right = [a + b for a, b in zip(right, explicit(idx, times=2.0**14 / n), strict=True)]
    assert_equal(gradients(model), right)


def test_a_loss_that_is_already_divided_has_a_share() -> None:
    model = made()
    handle = attach(model, lambda_disp=LAMBDA)
    (3 * handle.follow(cross_entropy(model(tokens()), tokens()) / 4, share=torch.tensor(0.25))).backward()
    assert_equal(gradients(model), explicit(tokens(), times=3 / 4))


def test_a_loss_that_is_followed_by_hand_and_by_itself_counts_once() -> None:
    model = made(WithLoss)
    handle = attach(model, lambda_disp=LAMBDA)
    for _ in range(3):
        model.zero_grad()
        (handle.follow(model(tokens())[0]) / 5).backward()
        assert_equal(gradients(model), explicit(tokens(), times=1 / 5))


def test_without_a_loss_to_follow_the_scale_is_given() -> None:
    model = made()
    handle = attach(model, lambda_disp=LAMBDA)
    handle.scale = 1 / 4
    for _ in range(2):
        model.zero_grad()
        (cross_entropy(model(tokens()), tokens()) / 4).backward()
        assert_equal(gradients(model), explicit(tokens(), times=1 / 4))
    handle.scale = 1
    model.zero_grad()
    cross_entropy(model(tokens()), tokens()).backward()
    assert_equal(gradients(model), explicit(tokens()))


@RECOMPUTED
def test_two_passes_before_one_backward(recompute: bool | None) -> None:
    """Of other lengths, weights and masks: a recomputed block must belong to its own pass."""
    batches = tokens(length=12), tokens(n=3, length=9, seed=1)
    masks = [torch.ones(batch.shape) for batch in batches]
    masks[0][:2, 5:] = 0
    masks[1][2, :4] = 0
    model = made(WithMask, recompute=recompute)
    attach(model, lambda_disp=LAMBDA, max_tokens=6)
    losses = [model(batch, mask)[0] for batch, mask in zip(batches, masks, strict=True)]
    (losses[0] / 2 + 3 * losses[1]).backward()
    right = made()
    for step, (batch, mask, times) in enumerate(zip(batches, masks, (1 / 2, 3), strict=True), start=1):
        (times * (cross_entropy(right(batch), batch) + LAMBDA * masked(right, batch, mask, 6, step))).backward()
    assert_equal(gradients(model), gradients(right))


class Recomputed(nn.Module):
    """Recomputes all of its model at once."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def forward(self, idx: Tensor) -> Tensor:
        return checkpoint(self.model, idx, use_reentrant=False)


def test_a_model_that_is_recomputed_as_a_whole() -> None:
    model, idx = made(Recomputed), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=5)
    for step in (1, 2):
        model.zero_grad()
        (handle.follow(cross_entropy(model(idx), idx)) / 3).backward()
        assert_equal(gradients(model), explicit(idx, times=1 / 3, n_tokens=5, step=step))
    assert handle.passes == 2


@RECOMPUTED
def test_one_loss_may_cover_two_passes(recompute: bool | None) -> None:
    batches = tokens(), tokens(seed=1)
    model = made(recompute=recompute)
    handle = attach(model, lambda_disp=LAMBDA)
    for _ in range(2):
        model.zero_grad()
        loss = sum(cross_entropy(model(batch), batch) for batch in batches)
        (handle.follow(loss) / 2).backward()
        right = [sum(pair) for pair in zip(*(explicit(batch, times=1 / 2) for batch in batches), strict=True)]
        assert_equal(gradients(model), right)


# --- padding ------------------------------------------------------------------------------------------------


class WithMask(WithLoss):
    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return cross_entropy(self.model(idx), idx), None


def masked(model: Decoder, idx: Tensor, mask: Tensor, n_tokens: int, step: int = 1) -> Tensor:
    """The mean over layers and sequences, each without its padding, its tokens the first of the drawn order."""
    states: list[Tensor] = []
    model(idx, states=states)
    values = []
    for layer in range(1, LAYERS + 1):
        allowed = [row.nonzero()[:, 0].tolist() for row in mask]
        sizes = range(2, idx.size(1) + 1)
        order = next_tokens(step, layer, idx.size(1), sizes, n_tokens)
        of_layer = []
        for row, kept in enumerate(allowed):
            chosen = sorted([place for place in order if place in kept][:n_tokens])
            if len(chosen) > 1:
                of_layer.append(DispersionLoss()(states[layer][row : row + 1, chosen]))
        values.append(torch.stack(of_layer).mean())
    return torch.stack(values).mean()


def next_tokens(step: int, layer: int, n: int, sizes: range, n_tokens: int) -> list[int]:
    """The order in which tokens are drawn: what each further one of `sample_positions` adds."""
    if n_tokens >= n:
        return list(range(n))
    order: list[int] = []
    for size in range(1, n):
        drawn = sample_positions(0, step, [layer], n, size)[0].tolist()
        order += [place for place in drawn if place not in order]
    return order + [place for place in range(n) if place not in order]


@RECOMPUTED
@pytest.mark.parametrize("n_tokens", [100, 6])
@pytest.mark.parametrize("given", ["argument", "keyword", "handle"])
def test_padding_is_left_out(given: str, n_tokens: int, recompute: bool | None) -> None:
    model, idx, mask = made(WithMask, recompute=recompute), tokens(n=5, length=12), torch.ones(5, 12)
    mask[0, 7:] = 0
    mask[1, :5] = 0
    mask[2, 4:] = 0
    mask[3, 1:] = 0  # one token is no pair
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=n_tokens)
    if given == "handle":
        handle.mask = mask.bool()
        loss, _ = model(idx, torch.ones(5, 12))
    else:
        loss, _ = model(idx, mask) if given == "argument" else model(idx, attention_mask=mask.long())
    loss.backward()
    right = made()
    dispersion = masked(right, idx, mask, n_tokens)
    (cross_entropy(right(idx), idx) + LAMBDA * dispersion).backward()
    assert_equal(gradients(model), gradients(right))
    assert handle.value == pytest.approx(dispersion.item(), rel=1e-10)
    assert_differ(gradients(model), explicit(idx))


def test_a_mask_holds_for_one_pass() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA)
    handle.mask = torch.arange(10).expand(4, 10) < 5
    for right in (torch.stack(dispersions(made(), idx[:, :5])).mean(), torch.stack(dispersions(made(), idx)).mean()):
        cross_entropy(model(idx), idx).backward()
        assert handle.value == pytest.approx(right.item(), rel=1e-10)


class Wrapped(nn.Module):
    """As DDP is: its arguments have no names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


class WithLabels(WithLoss):
    def forward(self, idx: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        return cross_entropy(self.model(idx), labels), None


def test_another_argument_is_no_mask() -> None:
    model, idx = Wrapped(made(WithLabels)), tokens()
    attach(model, lambda_disp=LAMBDA)
    model(idx, idx, torch.zeros(4, 10))[0].backward()
    assert_equal(gradients(model), explicit(idx))


def test_a_batch_of_padding_alone_adds_nothing() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA)
    handle.mask = torch.zeros(4, 10)
    cross_entropy(model(idx), idx).backward()
    right = made()
    cross_entropy(right(idx), idx).backward()
    assert_equal(gradients(model), gradients(right))
    assert math.isnan(handle.value)


def test_a_batch_of_single_tokens_adds_nothing() -> None:
    model, idx = made(), tokens(length=1)
    handle = attach(model, lambda_disp=LAMBDA)
    model(idx).square().sum().backward()
    right = made()
    right(idx).square().sum().backward()
    assert_equal(gradients(model), gradients(right))
    assert math.isnan(handle.value)


# --- when nothing is added ------------------------------------------------------------------------------------


def plain(idx: Tensor) -> list[Tensor]:
    model = made()
    cross_entropy(model(idx), idx).backward()
    return gradients(model)


def test_in_eval_mode_nothing_is_added() -> None:
    model, idx = made().eval(), tokens()
    handle = attach(model, lambda_disp=LAMBDA)
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), plain(idx))
    assert math.isnan(handle.value)


def test_without_gradients_nothing_is_computed_or_drawn() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=5)
    with torch.no_grad():
        assert torch.equal(model(idx), made()(idx))
    assert handle.passes == 0
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), explicit(idx, n_tokens=5, step=1))


def test_detached_the_model_is_as_before() -> None:
    model, idx = made(), tokens()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with attach(model, lambda_disp=LAMBDA, layers=[0, 1, 3]) as handle:
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] != before
    handle.detach()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), plain(idx))


def test_lambda_can_follow_a_schedule() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=0)
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), plain(idx))
    handle.lambda_disp = LAMBDA
    model.zero_grad()
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), explicit(idx))
    with pytest.raises(ValueError, match="lambda_disp=-1 must be"):
        handle.lambda_disp = -1
    assert handle.lambda_disp == LAMBDA


def test_the_global_generator_is_not_used_and_passes_can_be_resumed() -> None:
    model, idx = made(), tokens()
    handle = attach(model, lambda_disp=LAMBDA, max_tokens=5)
    handle.passes = 41
    before = torch.get_rng_state()
    cross_entropy(model(idx), idx).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert handle.passes == 42
    assert_equal(gradients(model), explicit(idx, n_tokens=5, step=42))


def test_a_pass_that_failed_does_not_disturb_the_next() -> None:
    def fail(*_: Any) -> None:
        raise ValueError("in the middle of a pass")

    model, idx = made(), tokens()
    last = attach(model, lambda_disp=LAMBDA, max_tokens=5).states[-1].module
    with pytest.raises(IndexError):
        model(tokens() + 100)
    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        model(idx)
    hook.remove()
    cross_entropy(model(idx), idx).backward()
    assert_equal(gradients(model), explicit(idx, n_tokens=5, step=3))


# --- which hidden states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [nn.ModuleList, nn.ModuleDict, lambda made: nn.Sequential(*made)])
def test_blocks_and_the_norm_after_them_are_found(blocks: Any) -> None:
    handle = attach(made(WithLoss, blocks=blocks))
    assert handle.names == ["model.layers.0", "model.layers.1", "model.norm"]
    assert repr(handle) == (
        "Attached(angular, lambda_disp=0.1, model.layers.0, model.layers.1, model.norm (3 hidden states))"
    )


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [1, 2, 3]),
        ("last", [3]),
        ("first_half", [1]),
        ([0, 2], [0, 2]),
        ([-1], [3]),
        (["layers.0", "norm"], [1, 3]),
    ],
)
def test_layers_are_chosen(layers: Any, numbers: list[int]) -> None:
    model, idx = made(), tokens()
    attach(model, lambda_disp=LAMBDA, layers=layers)
    cross_entropy(model(idx), idx).backward()
    right, states = made(), []
    loss = cross_entropy(right(idx, states=states), idx)
    (loss + LAMBDA * torch.stack([DispersionLoss()(states[i]) for i in numbers]).mean()).backward()
    assert_equal(gradients(model), gradients(right))


def test_modules_are_taken_as_they_are() -> None:
    model = made(WithLoss)
    handle = attach(model, layers=[model.model.layers[1], model.model.norm])
    assert handle.names == ["model.layers.1", "model.norm"]


class Experts(nn.Module):
    """Blocks with more experts than there are blocks, and one for the norm's place that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.word_norm = nn.LayerNorm(C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(C, C) for _ in range(5))}) for _ in "ab"
        )
        self.emb_norm = nn.LayerNorm(C)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Decoder(), Decoder()


def test_experts_are_no_blocks_and_the_norm_of_embeddings_is_not_the_last() -> None:
    assert attach(Experts()).names == ["blocks.0", "blocks.1"]


def test_mistakes_are_reported_in_one_line() -> None:
    mistakes: list[tuple[nn.Module, dict[str, Any], str]] = [
        (nn.Linear(2, 2), {}, r"no list of equal blocks found in Linear: give layers=\[…\]"),
        (Two(), {}, r"2 lists of 3 blocks each \(encoder.layers, decoder.layers\): give layers="),
        (made(), {"layers": [4]}, "layers names 4; the model has hidden states 0 to 3"),
        (made(), {"layers": "middle"}, "layers=middle is unknown; choose all, last"),
        (made(), {"layers": 3}, "layers=3 is unknown; choose all, last"),
        (made(), {"layers": ["layers.7"]}, "layers names 'layers.7', which the model does not have"),
        (made(), {"layers": [nn.Linear(2, 2)]}, "layers has Linear.*: give modules of the model"),
        (made(), {"variant": "angles"}, "variant=angles is unknown; choose one of angular"),
        (made(), {"lambda_disp": -0.1}, "lambda_disp=-0.1 must be 0"),
        (made(), {"lambda_disp": math.nan}, "lambda_disp=nan must be 0"),
        (made(), {"tau": 0}, "tau=0 must be a positive number"),
        (made(), {"max_tokens": 1}, "max_tokens=1: a pair needs 2 tokens"),
    ]
    for model, settings, message in mistakes:
        with pytest.raises(ValueError, match=message) as error:
            attach(model, **settings)
        assert "\n" not in str(error.value)
    model, idx = made(), tokens()
    for layers, mask, message in (
        (["head"], torch.ones(4, 3), r"mask \[4, 3\] does not fit the hidden states \[4, 10\] of head"),
        ([model.layers[0].out, nn.Identity()], None, "layers has Identity"),
    ):
        with pytest.raises(ValueError, match=message):
            handle = attach(model, layers=layers)
            handle.mask = mask
            model(idx)


def test_a_state_that_does_not_pass_once_is_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.final_norm = nn.LayerNorm(C)

        def forward(self, x: Tensor, again: bool) -> Tensor:
            x = self.layers[1](self.layers[0](x))
            return self.layers[1](x) if again else x

    x = torch.randn(2, 5, C, requires_grad=True)
    attached = Odd()
    attach(attached)
    with pytest.raises(ValueError, match=r"final_norm did not run in a forward pass: name others in layers=\[…\]"):
        attached(x, again=False)
    attached = Odd()
    attach(attached, layers=["layers.0", "layers.1"])
    with pytest.raises(ValueError, match=r"layers.1 ran twice in one forward pass"):
        attached(x, again=True)


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler takes a second per layer; with two, one is the last, which has the norm after it."""
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 2)


@pytest.fixture
def compiled(two_layers: None) -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    yield lambda module, **settings: torch.compile(module, backend="aot_eager", **settings)
    torch._dynamo.reset()


def steps(model: Any, handle: Attached, follow: bool, n: int = 3) -> None:
    for step in range(1, n + 1):
        model.zero_grad()
        idx = tokens(seed=step)
        loss = handle.follow(cross_entropy(model(idx), idx)) if follow else model(idx)[0]
        (loss / (step + 1)).backward()
        assert_equal(gradients(model), explicit(idx, times=1 / (step + 1), n_tokens=6, step=step))
        right = torch.stack(dispersions(made(), idx, n_tokens=6, step=step)).mean().item()
        assert handle.value == pytest.approx(right, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first", "recompute"),
    [(Decoder, "compile", None), (WithLoss, "attach", False), (WithLoss, "compile", None)],
)
def test_a_compiled_model_in_one_graph(compiled: Any, kind: Any, first: str, recompute: bool | None) -> None:
    model = made(kind, recompute=recompute)
    graph = compiled(model, fullgraph=True)
    handle = attach(model if first == "attach" else graph, lambda_disp=LAMBDA, max_tokens=6)
    steps(graph, handle, follow=kind is Decoder)
    assert len(handle.names) == LAYERS and handle.names[-1].endswith("norm")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_compiled_blocks(compiled: Any, recompute: bool | None) -> None:
    model = made(recompute=recompute)
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    steps(model, attach(model, lambda_disp=LAMBDA, max_tokens=6), follow=True)


@pytest.mark.slow
def test_a_schedule_of_lambda_compiles_no_second_graph(compiled: Any) -> None:
    model = made(WithLoss)
    graph = compiled(model)
    handle = attach(model, max_tokens=6)
    counters = torch._dynamo.utils.counters
    for step, lambda_disp in enumerate((0.1, 0.2, 0.3, 0.4)):
        handle.lambda_disp = lambda_disp
        graph(tokens(seed=step))[0].backward()
        if step == 1:
            counters.clear()
    assert not counters["stats"].get("unique_graphs")


@pytest.mark.slow
def test_a_detached_model_that_was_compiled(compiled: Any) -> None:
    model, idx = made(WithLoss), tokens()
    graph = compiled(model)
    with attach(model, lambda_disp=LAMBDA):
        graph(idx)[0].backward()
        assert_equal(gradients(model), explicit(idx))
    model.zero_grad()
    graph(idx)[0].backward()
    assert_equal(gradients(model), plain(idx))


@pytest.mark.slow
def test_padding_costs_a_compiled_model_one_break(compiled: Any) -> None:
    model, idx, mask = made(WithMask), tokens(n=5, length=12), torch.ones(5, 12)
    mask[:2, 7:] = 0
    graph = compiled(model)
    attach(model, lambda_disp=LAMBDA, max_tokens=6)
    torch._dynamo.utils.counters.clear()
    graph(idx, mask)[0].backward()
    right = made()
    (cross_entropy(right(idx), idx) + LAMBDA * masked(right, idx, mask, 6)).backward()
    assert_equal(gradients(model), gradients(right))
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("two_layers")
def test_a_model_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model = made(WithLoss)
    steps(torch.compile(model, fullgraph=True), attach(model, lambda_disp=LAMBDA, max_tokens=6), follow=False, n=2)
