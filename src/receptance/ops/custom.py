"""An operator of torch.library out of two functions: torch.compile takes it whole, with its gradient."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Outputs = tuple[Tensor, ...]


def custom_operator(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Outputs],
    fake: Callable[..., Any],
    *,
    n_inputs: int,
    n_outputs: int,
    fills: bool = True,
) -> Callable[..., Outputs]:
    """`receptance::NAME` and `receptance::NAME_backward`; returns a function of forward's arguments.

    It calls the first operator, but on a GPU where no compiler looks on the two functions themselves: going through an
    operator costs some 60 µs a call, as long as a kernel.

    forward(*inputs, *others, is_saving) → (*outputs, *kept): gradients are for the first n_inputs arguments, which are
    tensors; others are tensors, None, numbers and strings; is_saving, which callers leave out: a backward pass follows.
    The first n_outputs results have gradients, what is kept has none: it is for the backward pass, and what no caller
    reads may be empty unless is_saving.
    backward(gradients, inputs, others, kept) → the gradient of each input, contiguous and of its dtype; all are tuples.
    The gradient of a result that nothing depends on is zeros; of the second and later ones None, unless `fills`.
    fake(as forward) → results of the right shapes, strides and dtypes, whatever their values.

    forward's annotations are the schema. Results may share no memory with each other or with an argument. Both
    functions run on the device of the first input and outside of autograd.
    """
    schema = torch.library.infer_schema(forward, mutates_args=())
    parameters, results = schema[1:].split(") -> ")
    declared = parameters.split(", ")
    n_kept = results.count("Tensor") - n_outputs
    given = (
        [f"Tensor{'' if fills or i == 0 else '?'} g{i}" for i in range(n_outputs)]
        + declared[:-1]
        + [f"Tensor kept{i}" for i in range(n_kept)]
    )
    n_others = len(declared) - n_inputs - 1

    def run(*arguments: Any) -> Outputs:
        with _device_of(arguments[0]):
            return forward(*arguments)  # type: ignore[no-any-return]

    def run_backward(*arguments: Any) -> Outputs:
        ends = n_outputs, n_outputs + n_inputs, n_outputs + n_inputs + n_others
        gradients, inputs = arguments[: ends[0]], arguments[ends[0] : ends[1]]
        with _device_of(inputs[0]):
            return backward(gradients, inputs, arguments[ends[1] : ends[2]], arguments[ends[2] :])

    def fake_backward(*arguments: Any) -> Outputs:
        inputs = arguments[n_outputs : n_outputs + n_inputs]
        return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)

    gradient_of_inputs = ", ".join(["Tensor"] * n_inputs)
    operator = torch.library.custom_op(f"receptance::{name}", run, mutates_args=(), schema=schema)
    operator_backward = torch.library.custom_op(
        f"receptance::{name}_backward", run_backward, mutates_args=(),
        schema=f"({', '.join(given)}) -> ({gradient_of_inputs})",
    )  # fmt: skip
    operator.register_fake(fake)
    operator_backward.register_fake(fake_backward)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.set_materialize_grads(False)  # what is kept can be large, and so would its zeros
        ctx.mark_non_differentiable(*output[n_outputs:])
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in tensors), *output[n_outputs:])
        ctx.tensors, ctx.others = tensors, [None if isinstance(x, Tensor) else x for x in inputs[:-1]]
        ctx.like = [(x.shape, x.dtype) for x in output[:n_outputs]]

    def differentiate(through: Callable[..., Outputs], ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        arguments, saved = list(ctx.others), ctx.saved_tensors
        for i, x in zip(ctx.tensors, saved):
            arguments[i] = x
        given = [None if g is None else g.contiguous() for g in gradients[:n_outputs]]
        for i, (shape, dtype) in enumerate(ctx.like if fills else ctx.like[:1]):
            if given[i] is None:
                given[i] = saved[0].new_zeros(shape, dtype=dtype)
        return *through(*given, *arguments, *saved[len(ctx.tensors) :]), *[None] * (n_others + 1)

    def differentiate_directly(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        # the operator knows that it has no gradient of its own, and says so where somebody wants one
        return differentiate(operator_backward if torch.is_grad_enabled() else run_backward, ctx, *gradients)

    operator.register_autograd(partial(differentiate, operator_backward), setup_context=keep)

    members: dict[str, Any] = {}
    for method, function in (("forward", run), ("setup_context", keep), ("backward", differentiate_directly)):
        members[method] = staticmethod(function)  # type: ignore[arg-type]
    direct = type(f"{name}_direct", (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Outputs:
        is_saving = torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:n_inputs])
        is_plain = all(type(x) in (Tensor, Parameter) for x in arguments if isinstance(x, Tensor))  # FakeTensor is none
        if torch.compiler.is_compiling() or not is_plain or not arguments[0].is_cuda:
            return operator(*arguments, is_saving)  # type: ignore[no-any-return]
        return direct.apply(*arguments, is_saving)  # type: ignore[attr-defined,no-any-return]

    return call


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
