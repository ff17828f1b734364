"""Results that are cheap to make are made again in the backward pass instead of being kept for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recompute:
    """Calls functions; inside `with`, the tensors they return are not kept by what saves them for its backward pass.

        with recompute:
            a, b = recompute(mix, x)
            y = linear(a) + other(b)       # keeps x and a way to mix again, neither a nor b

    A finer grain than activation checkpointing: matrix products are kept, the elementwise work between them is not,
    and nothing in between needs to know. Functions must be deterministic and free of side effects; they run again
    under the autocast state of their first run. Without `with` they are just called.
    """

    def __init__(self, spare: "Spare | None" = None) -> None:
        self._spare = spare
        if spare is not None:
            spare.begin()
        self._hooks: saved_tensors_hooks | None = None
        self._made: dict[int, tuple[_Recipe, int, Tensor]] = {}  # address → how to make it; held, so it stays its own

    def __enter__(self) -> "Recompute":
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)  # type: ignore[no-untyped-call]
            self._hooks = None
            self._made.clear()

    def __call__(self, function: Callable[..., Any], *inputs: Any, dear: bool = False) -> Any:
        """function(*inputs): a tensor or several. dear: it takes more time for the size of its results than most."""
        outputs = function(*inputs)
        self.remember(outputs, function, *inputs, dear=dear)
        return outputs

    def remember(self, outputs: Any, function: Callable[..., Any], *inputs: Any, dear: bool = False) -> None:
        """`outputs` already exist; function(*inputs) would make the same ones."""
        if self._hooks is None:
            return
        given = {x.data_ptr() for x in _tensors(inputs)}
        new = [
            (i, x)
            for i, x in enumerate(_tensors(outputs))
            if x.numel() and x.is_contiguous() and x.data_ptr() not in given
        ]
        if self._spare is not None and self._spare.takes(sum(x.nbytes for _, x in new), dear):
            return
        recipe = _Recipe(function, _map(self._pack, inputs), _tensors(inputs))
        for i, x in new:
            self._made[x.data_ptr()] = recipe, i, x

    def _pack(self, x: Tensor) -> "Tensor | _Kept":
        recipe, index, made = self._made.get(x.data_ptr(), (None, 0, x))
        if recipe is None or x.numel() != made.numel() or x.dtype != made.dtype or not x.is_contiguous():
            return x.detach()
        return _Kept(recipe, index, x.shape)


class Spare:
    """Memory to keep results in that would be made again: at most `limit` bytes a pass, dear ones first.

    A pass learns from the one before how many bytes are dear; the first keeps nothing.
    """

    def __init__(self) -> None:
        self.limit = 0
        self._left, self._wanted = [0, 0], [0, 0]  # of dear results and of others

    def begin(self) -> None:
        dear = min(self.limit, self._wanted[0])
        self._left = [dear, self.limit - dear] if any(self._wanted) else [0, 0]
        self._wanted = [0, 0]

    def takes(self, n_bytes: int, dear: bool) -> bool:
        """Whether results of so many bytes are kept."""
        kind = 0 if dear else 1
        self._wanted[kind] += n_bytes
        if n_bytes > self._left[kind]:
            return False
        self._left[kind] -= n_bytes
        return True


class _Recipe:
    """A call to repeat. Its results live from the first use until each tensor kept through it was asked for once."""

    def __init__(self, function: Callable[..., Any], inputs: Any, tensors: list[Tensor]):
        self.function, self.inputs = function, inputs
        self.device = tensors[0].device.type if tensors else "cpu"
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        self.n_kept = self.n_left = 0
        self.outputs: list[Tensor] | None = None

    def make(self, index: int) -> Tensor:
        if self.outputs is None:
            enabled, dtype = self.autocast
            with torch.no_grad(), torch.autocast(self.device, dtype, enabled=enabled, cache_enabled=False):
                self.outputs = _tensors(self.function(*_map(_unpack, self.inputs)))
            self.n_left = self.n_kept
        made = self.outputs[index]
        self.n_left -= 1
        if self.n_left <= 0:
            self.outputs = None
        return made


class _Kept:
    """Stands for a tensor: the recipe's result number `index`, seen in a shape."""

    def __init__(self, recipe: _Recipe, index: int, shape: torch.Size):
        self.recipe, self.index, self.shape = recipe, index, shape
        recipe.n_kept += 1


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept.recipe.make(kept.index).view(kept.shape) if isinstance(kept, _Kept) else kept


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    """Apply to every tensor (or what stands for one) in tuples and lists, keep the rest."""
    if isinstance(values, (tuple, list)):
        return [_map(function, value) for value in values]
    return function(values) if isinstance(values, (Tensor, _Kept)) else values


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, (tuple, list)):
        return [x for value in values for x in _tensors(value)]
    return [values] if isinstance(values, Tensor) else []
