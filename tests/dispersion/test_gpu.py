"""How the Triton path is launched, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanodisp.dispersion import kernels

pytest.importorskip("triton")
import triton.language as tl

from nanodisp.dispersion.kernels import gpu, triton_kernels


class Launches(TorchDispatchMode):
    """Records kernels that would run on the GPU: PyTorch's operators, and stubs in place of the Triton kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in ("prepare", "pairs", "gradient", "mean_loss"):
            monkeypatch.setattr(triton_kernels, name, Stub(name, self.names))

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = operator.name()
        if (
            name.startswith("aten::")
            and not operator.is_view
            and not name.startswith(("aten::empty", "aten::new_empty"))
        ):
            self.names.append(name)
        return operator(*arguments, **(keywords or {}))


class Stub:
    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        (n_programs,) = grid({"BLOCK_I": 128, "BLOCK_F": 128}) if callable(grid) else grid
        assert 0 < n_programs < 2**31
        return lambda *_, **__: self.launched.append(self.name)


@pytest.mark.parametrize(("n_tokens", "groups"), [(256, 1), (1024, 2)])
def test_all_layers_of_a_step_take_at_most_eight_launches(
    n_tokens: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 layers x 16 sequences, on tensors that are nowhere: they would raise if a value were read on the host."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    monkeypatch.setattr(triton_kernels, "INTERPRETED", tl.constexpr(False))
    with FakeTensorMode(), Launches(monkeypatch) as launches:
        z = torch.empty(12 * 16, n_tokens, 768, device="cuda")
        loss, dz = gpu.pairwise_cosine(z, "angular", 1.0, 0.25, torch.bfloat16, True)
        kernels._backward(SimpleNamespace(saved_tensors=(dz,), z_dtype=z.dtype), loss, None)
    assert launches.names == ["prepare", *["pairs", "gradient"] * groups, "mean_loss", "aten::mul.Tensor"]
    assert dz.shape == z.shape
