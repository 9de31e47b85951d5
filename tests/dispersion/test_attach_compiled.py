"""`attach` to models that torch.compile compiles, before or after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attach_models
import pytest
import torch
from attach_models import (
    LAMBDA,
    Decoder,
    WithLoss,
    WithMask,
    assert_equal,
    cross_entropy,
    dispersions,
    explicit,
    gradients,
    made,
    masked,
    plain,
    tokens,
)

from nanodisp.dispersion import Attached, attach


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler takes a second per layer; with two, one is the last, which has the norm after it."""
    monkeypatch.setattr(attach_models, "LAYERS", 2)


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
    assert len(handle.names) == attach_models.LAYERS and handle.names[-1].endswith("norm")


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
