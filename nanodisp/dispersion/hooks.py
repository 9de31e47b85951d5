"""`attach`: the dispersion loss of any model, added where its hidden states pass.

Hooks compute the loss of a hidden state when it passes, and an identity function, through which the state goes on, adds
the gradient of lambda * loss when the state's own gradient comes back (as torchtitan's AuxLoss does). Nothing is
collected and no loss is changed, so it does not matter whether blocks are recomputed or where the model's loss is
computed.

What the training loop multiplies its loss with (1 / accumulation steps, the scale of float16) must reach that gradient
too. It is read where it passes: a second identity function, on the model's loss, sees the gradient of that loss before
the blocks see theirs, and leaves it in a tensor, the pass's `scale`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import State, ancestors, find_states
from .formulas import CLAMP, SLICED
from .inject import AddGradient, RecordScale, draw_positions, draw_slices
from .loss import DispersionLoss
from .placement import DispersionConfig, sample_unmasked

KEPT_PASSES = 64  # as many forward passes may come before the backward that recomputes the first
log = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    variant: str = "angular",
    lambda_disp: float = 0.1,
    layers: str | Sequence[int] | Sequence[str] | Sequence[nn.Module] = "all",
    max_tokens: int | None = 256,
    tau: float = 1.0,
    *,
    clamp: float = CLAMP,
    backend: str = "auto",
    seed: int = 0,
) -> Attached:
    """Add lambda_disp * (mean over layers of the dispersion of their hidden states) to what `model` is trained on.

    From here on every backward pass also adds the gradient of that term; the value of the model's loss does not change.
    In eval mode, without gradients and after `detach()` nothing is added.

    Args:
        model: any module whose hidden states are floating point [B, N, F]. Compile or wrap it (DDP) before or after.
        layers: which hidden states: "all" after the embedding, "last", "first_half", "last_half", numbers (0 is the
            first block's input, n the last block's output after the final norm), or names of modules or modules, whose
            outputs are taken. Blocks are found by themselves, see `find_states`; the result's `names` says which.
        max_tokens: tokens of a sequence that are used, drawn again for each layer and forward pass from (seed, pass,
            layer), at the same positions in all sequences; None for all.
        variant, lambda_disp, tau, clamp, backend: see `DispersionConfig`.

    Raises:
        ValueError: no blocks found, an unknown layer, variant or backend, a lambda that is negative or not finite.
    """
    config = DispersionConfig(variant, lambda_disp, tau, "all", max_tokens, backend=backend, clamp=clamp)
    return Attached(model, find_states(model, layers), config, seed)


@dataclass
class Pass:
    """One forward pass, from which what its backward pass adds follows.

    key: int64 [2] on the CPU, the seed and the number of the pass.
    scale: scalar, the gradient of the loss, which is known when backward begins.
    first_node: number of autograd nodes before it: a recomputed block belongs to the pass of the node that is due.
    has_loss: its loss is followed.
    mask_shape: shape of the mask, [B, N], once one is found.
    tokens: the tokens to use of each state (see `sample_unmasked`) if it leaves some out.
    """

    key: Tensor
    scale: Tensor
    first_node: int = 0
    has_loss: bool = False
    mask_shape: torch.Size | None = None
    tokens: list[list[Tensor]] | None = None


class Attached:
    """A dispersion loss at work in a model: what `attach` returns. As a context manager it detaches at the end.

    names: the modules whose hidden states are dispersed.
    mask: [B, N], 0 for tokens to leave out of the next forward pass. Without one, the `attention_mask` of the model's
        call is taken, if it is [B, N].
    """

    def __init__(self, model: nn.Module, states: list[State], config: DispersionConfig, seed: int) -> None:
        self.config, self.states = config, states
        self.names = [state.name for state in states]
        self.disperse = DispersionLoss(config.variant, config.tau, config.backend, config.clamp)
        self.mask: Tensor | None = None
        self.lambda_disp = config.lambda_disp
        self._attached, self._follows = True, False
        self._key, self._next = torch.tensor([seed, 0]), torch.tensor([0, 1])
        self._constant, self._scale, self._total = 1.0, torch.ones(0), torch.zeros(2, dtype=torch.float64)
        self._pass: Any = None  # a Pass, once there is one
        self._earlier: deque[Pass] = deque(maxlen=KEPT_PASSES)
        # of the modules around the blocks, the number of the outermost one whose forward pass is under way
        self._inside: int | None = None
        self._seen: set[int] = set()
        self._undo: list[Any] = []
        # outside of graphs; not as a decorator, which loads torch._dynamo: two seconds of every command's start
        self._choose_eagerly = torch.compiler.disable(self._choose)
        for i, state in enumerate(states):
            if state.enters:
                hook = state.module.register_forward_pre_hook(functools.partial(self._enters, i), with_kwargs=True)
            else:
                hook = state.module.register_forward_hook(functools.partial(self._leaves, i))
            self._undo.append(hook.remove)
        for depth, module in enumerate(ancestors(model, states)):
            names = list(inspect.signature(module.forward).parameters)
            place = names.index("attention_mask") if "attention_mask" in names else None
            begins, ends = functools.partial(self._begins, depth, place), functools.partial(self._ends, depth)
            self._undo.append(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(ends, with_kwargs=True).remove)
        log.info("%s", self)

    def __repr__(self) -> str:
        shown = self.names if len(self.names) < 5 else [*self.names[:2], "…", *self.names[-2:]]
        where = f"{', '.join(shown)} ({len(self.names)} hidden states)"
        return f"Attached({self.config.variant}, lambda_disp={self.lambda_disp}, {where})"

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the model as it was."""
        self._attached = False  # also in graphs that are compiled with the hooks
        while self._undo:
            self._undo.pop()()

    @property
    def value(self) -> float:
        """The dispersion since this was last read: the mean over layers and passes whose gradient was taken.

        NaN if there were none. The only moment that waits for the device.
        """
        total, n = self._total.tolist()
        self._total.zero_()
        return total / n if n else math.nan

    @property
    def lambda_disp(self) -> float:
        """The weight of the loss, from the next forward pass on; 0 for none."""
        return self._lambda_disp

    @lambda_disp.setter
    def lambda_disp(self, lambda_disp: float) -> None:
        dataclasses.replace(self.config, lambda_disp=lambda_disp)  # raises ValueError for a wrong one
        self._lambda_disp, self._is_on = lambda_disp, lambda_disp > 0
        # a tensor, as a graph compiled with a number would be compiled again for the next
        self._weight = torch.tensor(lambda_disp / len(self.states), dtype=torch.float64)

    @property
    def passes(self) -> int:
        """Forward passes in training so far, which decide the tokens that are drawn; set it where a run resumes."""
        return int(self._key[1])

    @passes.setter
    def passes(self, passes: int) -> None:
        self._key = torch.tensor([int(self._key[0]), passes])

    @property
    def scale(self) -> float:
        """What the training loop multiplies its loss with, 1 at first; read only where no loss can be followed."""
        return self._constant

    @scale.setter
    def scale(self, scale: float) -> None:
        self._constant, self._scale = scale, torch.ones(0)

    def follow(self, loss: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """The same loss; what it is multiplied with from here on, the dispersion is multiplied with, too.

        A loss in the output of the model is followed by itself. Pass another one through here, before it is divided by
        the accumulation steps or scaled. It covers all forward passes since the last loss.

        Args:
            loss: scalar.
            share: the dispersion's further factor. 1 / accumulation steps if `loss` is already divided: by these or by
                the number of tokens in all micro-batches.
        """
        self._follows = True
        return self._follow_loss(loss, share)

    def follow_trainer(self, trainer: Any) -> None:
        """Follow the loss of a Hugging Face Trainer, or of one derived from it, wherever it computes it.

        For trainers that do not use the model's own loss, as TRL's, or that replace it (`compute_loss_func`). The
        dispersion of a batch is the mean over its micro-batches. `detach` undoes it.
        """
        compute_loss = trainer.compute_loss

        def followed(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            if not trainer.model.training:
                return result
            n_items = args[3] if len(args) > 3 else kwargs.get("num_items_in_batch")
            divided = getattr(trainer, "loss_is_scaled_for_ga", None)
            if divided is None:  # as the Trainer decides it
                divided = trainer.compute_loss_func is not None or (
                    trainer.model_accepts_loss_kwargs and n_items is not None
                )
            share = 1 / trainer.current_gradient_accumulation_steps if divided else 1.0
            if isinstance(result, tuple):
                return self.follow(result[0], share), *result[1:]
            return self.follow(result, share)

        self._follows, trainer.compute_loss = True, followed
        self._undo.append(lambda: delattr(trainer, "compute_loss"))

    # --- hooks ---------------------------------------------------------------------------------------

    def _on(self, module: nn.Module) -> bool:
        return self._attached and self._is_on and module.training and torch.is_grad_enabled()

    def _begins(self, depth: int, place: int | None, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward pass of a module around the blocks: a new pass, unless one is under way."""
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_autograd_node() is not None:
            return  # recomputed in backward
        if not self._on(module):
            self._inside = None
            return
        if self._inside is None or self._inside == depth:  # itself: its last pass ended with an exception
            self._inside = depth
            device = next(module.parameters()).device
            if self._scale.numel() == 0 or self._scale.device != device:
                self._scale = torch.full((), self._constant, dtype=torch.float64, device=device)
            self._key = self._key + self._next
            current = self._pass = Pass(self._key, self._scale)
            if not compiling:
                current.first_node = torch.autograd._get_sequence_nr()
                self._earlier.append(current)
                self._seen = set()
        else:
            current = self._pass
        mask, self.mask = self.mask, None
        if mask is None and current.mask_shape is None:
            positional = place is not None and place < len(args)
            mask = args[place] if positional else kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            current.mask_shape, current.tokens = mask.shape, self._choose_eagerly(mask)

    def _choose(self, mask: Tensor) -> list[list[Tensor]] | None:
        """The tokens to use of each state, on the device of the mask; None if it leaves none out."""
        here = mask.cpu()
        if here.all():
            return None
        seed, step = self._key.tolist()
        draw = functools.partial(sample_unmasked, mask=here, max_tokens=self.config.max_tokens)
        drawn = (draw(seed, step, state.number) for state in self.states)
        return [[places.to(mask.device, non_blocking=True) for places in groups] for groups in drawn]

    def _enters(self, i: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (self._passes(i, module, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._passes(i, module, kwargs[name])}

    def _leaves(self, i: int, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return self._passes(i, module, output[0]), *output[1:]
        return self._passes(i, module, output)

    def _passes(self, i: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """A hidden state passes: the same, with the dispersion's gradient to come."""
        current = self._pass
        if not torch.compiler.is_compiling():
            node = torch._C._current_autograd_node()
            if node is not None:  # recomputed
                earlier = (each for each in reversed(self._earlier) if each.first_node <= node._sequence_nr())
                current = next(earlier, None)
            elif self._inside is not None:
                if i in self._seen:
                    raise ValueError(
                        f"{self.names[i]} ran twice in one forward pass: attach to the module that runs it once"
                    )
                self._seen.add(i)
        if current is None or not self._on(module) or not hidden.requires_grad:
            return hidden
        dispersion = self._measure(i, hidden, current)
        if dispersion is None:
            return hidden
        if self._total.device != hidden.device:
            self._total = self._total.to(hidden.device)
        return AddGradient.apply(hidden, dispersion, self._weight, current.scale, self._total)

    def _measure(self, i: int, hidden: Tensor, current: Pass) -> Tensor | None:
        """The dispersion of state i, [B, N, F] -> scalar; None if no sequence has two tokens that are not padding."""
        variant, n_most = self.config.variant, self.config.max_tokens
        if hidden.dim() != 3:
            raise ValueError(
                f"{self.names[i]} gives {list(hidden.shape)}, not hidden states [B, N, F]: name others in layers=[…]"
            )
        if current.mask_shape is not None and current.mask_shape != hidden.shape[:2]:
            shapes = f"{list(current.mask_shape)} does not fit the hidden states {list(hidden.shape[:2])}"
            raise ValueError(f"the mask {shapes} of {self.names[i]}: set `mask` before each forward pass")
        if hidden.size(1) < 2:
            return None  # no pairs, as in a sequence of padding
        slices = draw_slices(hidden.detach(), current.key) if variant in SLICED else None
        if current.tokens is None:
            if n_most is not None and n_most < hidden.size(1):
                number = self.states[i].number
                hidden = hidden.index_select(1, draw_positions(hidden.detach(), current.key, number, n_most))
            return self.disperse(hidden, slices)
        tokens, total, n = hidden.flatten(0, 1), None, 0
        for places in current.tokens[i]:
            chosen = tokens.index_select(0, places.flatten().to(hidden.device)).unflatten(0, places.shape)
            part = self.disperse(chosen, slices) * len(places)
            total, n = part if total is None else total + part, n + len(places)
        return None if total is None else total / n

    def _ends(self, depth: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After the forward pass of a module around the blocks: its loss, if it returns one, is followed."""
        if self._inside is None or not self._on(module):
            return output
        if self._inside == depth:
            self._inside = None
            if not torch.compiler.is_compiling():
                self._check_seen()
        if self._follows or self._pass is None or self._pass.has_loss:
            return output
        loss = (
            output[0]
            if type(output) is tuple
            else output
            if isinstance(output, Tensor)
            else getattr(output, "loss", None)
        )
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            return output
        loss = self._follow_loss(loss, _share(module, kwargs))
        if isinstance(output, Tensor):
            return loss
        if type(output) is tuple:
            return loss, *output[1:]
        if isinstance(output, tuple):
            return output._replace(loss=loss)  # type: ignore[attr-defined]
        output.loss = loss
        return output

    def _check_seen(self) -> None:
        missing = [state for i, state in enumerate(self.states) if i not in self._seen]
        # what is compiled passes unseen
        if self._seen and any(state.module._compiled_call_impl is None for state in missing):
            names = ", ".join(state.name for state in missing)
            raise ValueError(f"{names} did not run in a forward pass: name others in layers=[…]")

    def _follow_loss(self, loss: Tensor, share: float | Tensor) -> Tensor:
        if self._pass is None or not self._attached or not torch.is_grad_enabled():
            return loss
        self._pass.has_loss = True
        scale, self._scale = self._scale, torch.full_like(self._scale, self._constant)
        share = share if isinstance(share, Tensor) else torch.tensor(share, dtype=torch.float64)
        return RecordScale.apply(loss, share, scale)


def _share(module: nn.Module, kwargs: dict[str, Any]) -> float | Tensor:
    """Of the tokens that the loss is divided by (`num_items_in_batch` of a Trainer), those of this forward pass."""
    n_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels", kwargs.get("labels"))
    if n_items is None or not isinstance(labels, Tensor):
        return 1.0
    if "shift_labels" not in kwargs and getattr(module, "loss_type", None) == "ForCausalLM":
        labels = labels[..., 1:]
    return (labels != -100).sum() / n_items
