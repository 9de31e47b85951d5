"""Where the hidden states of a model pass: its blocks, found by their structure or named by the user.

No model is known by name. A transformer keeps its blocks in one list, and the module with that list has the norm after
them, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import nn

from .placement import select_layers

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # compiled, DDP, recomputed


class State(NamedTuple):
    """A hidden state: the output of a module, or with `enters` its input. `number`: 0 is the first block's input."""

    name: str
    module: nn.Module
    number: int
    enters: bool = False


def find_states(model: nn.Module, layers: str | Sequence[int] | Sequence[str] | Sequence[nn.Module]) -> list[State]:
    """The hidden states that `layers` selects, in the order of the model.

    Of a model with n blocks these are numbered 0 (the first block's input) to n; the last is the output of the norm
    after the blocks if there is one, as in Hugging Face's `hidden_states`.

    Args:
        layers: "all" (1 to n), "last", "first_half", "last_half" or a list of numbers, as in `select_layers`; or a list
            of names of modules or of modules, whose outputs are taken.

    Raises:
        ValueError: no list of blocks, two of equal length, a block that is in the list twice, a module or a layer that
            the model does not have or that is named twice.
    """
    if (
        isinstance(layers, Sequence)
        and not isinstance(layers, str)
        and any(isinstance(layer, str | nn.Module) for layer in layers)
    ):
        states = [State(*_named(model, layer), number) for number, layer in enumerate(layers, start=1)]
        names = [state.name for state in states]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"layers names {twice[0]} twice: give each module once")
        return states
    name, blocks = _find_blocks(model)
    if len(blocks._modules) > len(list(blocks.children())):
        raise ValueError(
            f"{_clean(name)} has one block several times: give layers=[…], modules that run once in a pass"
        )
    passed = [(_clean(f"{name}.{key}"), block) for key, block in blocks.named_children()]
    entered = State(f"{passed[0][0]} (input)", passed[0][1], 0, enters=True)
    passed[-1] = _norm_after(model, name, blocks) or passed[-1]
    states = [entered, *(State(*each, number) for number, each in enumerate(passed, start=1))]
    return [states[layer] for layer in select_layers(cast("str | Sequence[int]", layers), len(passed))]


def ancestors(model: nn.Module, states: Sequence[State]) -> list[nn.Module]:
    """The modules around all states, from the model inwards: their forward pass is a pass of all states."""
    needed = {id(state.module) for state in states}
    around = [module for module in model.modules() if needed <= {id(part) for part in module.modules()} - {id(module)}]
    return [module for module in around if module is model or not isinstance(module, LISTS)] or [model]


def _find_blocks(model: nn.Module) -> tuple[str, nn.Module]:
    """The longest list of blocks that is not inside another one (as experts are); of one class if there is one."""
    lists = [(name, module) for name, module in model.named_modules() if _is_list(module, one_class=True)]
    lists = lists or [(name, module) for name, module in model.named_modules() if _is_list(module, one_class=False)]
    inner = {id(child) for _, outer in lists for child in outer.modules() if child is not outer}
    outermost = [(name, module) for name, module in lists if id(module) not in inner]
    if not outermost:
        raise ValueError(
            f"no list of equal blocks found in {type(model).__name__}: give layers=[…], the names of its blocks"
        )
    longest = max(len(list(module.children())) for _, module in outermost)
    best = [(name, module) for name, module in outermost if len(list(module.children())) == longest]
    if len(best) > 1:
        names = ", ".join(_clean(name) for name, _ in best)
        raise ValueError(f"{len(best)} lists of {longest} blocks each ({names}): give layers=[…], the names of blocks")
    return best[0]


def _is_list(module: nn.Module, one_class: bool) -> bool:
    """A list of modules with parameters, also of several classes (as in hybrids with attention and Mamba)."""
    children = list(module.children())
    classes = {type(_unwrapped(child)) for child in children}
    kind = isinstance(module, LISTS) and len(classes) == 1 if one_class else isinstance(module, nn.ModuleList)
    return kind and len(children) > 0 and all(any(True for _ in child.parameters()) for child in children)


def _norm_after(model: nn.Module, name: str, blocks: nn.Module) -> tuple[str, nn.Module] | None:
    """The norm beside the list of blocks, if there is one: behind it, or in front with "final" in its name."""
    owner = name.rpartition(".")[0]
    beside = list(model.get_submodule(owner).named_children())
    here = next(i for i, (_, module) in enumerate(beside) if module is blocks)
    for i, (key, module) in enumerate(beside):
        is_norm = "norm" in type(_unwrapped(module)).__name__.lower()
        of_embeddings = "emb" in key.lower() or key == "LayerNorm"  # DeBERTa's LayerNorm is that of relative positions
        if is_norm and not of_embeddings and (i > here or "final" in key):
            return _clean(f"{owner}.{key}"), module
    return None


def _named(model: nn.Module, layer: object) -> tuple[str, nn.Module]:
    """A module that is given itself or by its name, with or without the names of wrappers."""
    for name, module in model.named_modules():
        if module is layer or (isinstance(layer, str) and layer in (name, _clean(name))):
            return _clean(name), module
    if isinstance(layer, str):
        raise ValueError(f"layers names {layer!r}, which the model does not have; print(model) lists its modules")
    raise ValueError(f"layers has {layer!r:.60}: give modules of the model, their names, or numbers of hidden states")


def _unwrapped(module: nn.Module) -> nn.Module:
    for name in WRAPPERS:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return module


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part and part not in WRAPPERS)
