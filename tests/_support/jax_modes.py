"""Every mode of JAX that runs on one device: settings, and transformations of a function and of its derivative.

A new mode is a new row of MODES; tests/contract/test_modes.py tries each with the cases of every catalogue. Promotion
of ranks and dtypes is an error in all tests (conftest.py).
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from conftest import x64
from jax.experimental import checkify

Function = Callable[[Any], Any]  # of operands, which can be differentiated
Derivative = Callable[[Any, Any], tuple[Any, Any]]  # of (operands, cotangents): the results, and the gradients


def derivative(function: Function) -> Derivative:
    """Without any mode."""

    def values_and_gradients(operands: Any, cotangents: Any) -> tuple[Any, Any]:
        results, pullback = jax.vjp(function, operands)
        return results, pullback(cotangents)[0]

    return values_and_gradients


@dataclasses.dataclass(frozen=True)
class Mode:
    """A mode.

    Attributes:
      derivative: of a function of operands, the results and the gradients under the mode; where it has those of some
        operands alone, a dictionary of these.
      setting: what makes a context of the mode.
      jit: whether the whole is compiled as one program.
      op_by_op: whether no operation is compiled with another one, so that loops take long.
      needs_values: whether tracing alone says nothing about it.
      traced_only: whether running says nothing more than tracing.
      of_value: whether it is for functions of the value alone.
    """

    derivative: Callable[[Function], Derivative] = derivative
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    jit: bool = True
    op_by_op: bool = False
    needs_values: bool = False
    traced_only: bool = False
    of_value: bool = False


def _of(transform: Callable[[Function], Function]) -> Callable[[Function], Derivative]:
    return lambda function: derivative(transform(function))


def _all_of_two(run: Callable[[Function, Any], Any]) -> Callable[[Function], Derivative]:
    """Runs the function on the operands stacked twice; the first of the results."""

    def transform(function: Function) -> Function:
        def first(operands: Any) -> Any:
            both = run(function, jax.tree.map(lambda x: jnp.stack([x, x]), operands))
            return jax.tree.map(lambda x: x[0], both)

        return first

    return _of(transform)


def _vmap(function: Function, operands: Any) -> Any:
    return jax.vmap(function, spmd_axis_name="data")(operands)


def _scan(function: Function, operands: Any) -> Any:
    """As over layers whose activations are recomputed."""
    return jax.lax.scan(lambda carry, x: (carry, jax.checkpoint(function)(x)), None, operands)[1]


def _pmap(function: Function, operands: Any) -> Any:
    """On one device."""
    return jax.pmap(function)(jax.tree.map(lambda x: x[:1], operands))


def _remat(function: Function) -> Function:
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_saveable)


def _custom_jvp(function: Function) -> Function:
    called = jax.custom_jvp(function)
    called.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return called


def _linearize(function: Function) -> Derivative:
    def values_and_gradients(operands: Any, cotangents: Any) -> tuple[Any, Any]:
        results, tangent = jax.linearize(function, operands)
        return results, jax.linear_transpose(tangent, operands)(cotangents)[0]

    return values_and_gradients


def _linear_transpose(function: Function) -> Derivative:
    """In the value alone, in which attention is linear."""

    def values_and_gradients(operands: Any, cotangents: Any) -> tuple[Any, Any]:
        def of_value(value: Any) -> Any:
            return function({**operands, "value": value})

        (gradient,) = jax.linear_transpose(of_value, operands["value"])(cotangents)
        return function(operands), {"value": gradient}

    return values_and_gradients


def _checkify(function: Function) -> Derivative:
    # Without checks of indices, which fail in JAX itself on gathers and scatters with batch axes.
    checked = jax.jit(checkify.checkify(derivative(function), errors=checkify.float_checks))

    def values_and_gradients(operands: Any, cotangents: Any) -> tuple[Any, Any]:
        error, results = checked(operands, cotangents)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(error)):
            error.throw()
        return results

    return values_and_gradients


@contextlib.contextmanager
def _leaks() -> Iterator[None]:
    gc.freeze()  # JAX collects garbage after each trace: only what the trace made, since all else takes seconds
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _nans_op_by_op() -> Iterator[None]:
    with jax.debug_nans(True), jax.disable_jit():
        yield


MODES = {
    "x64": Mode(setting=x64),
    "tracer leaks": Mode(setting=_leaks, traced_only=True),
    "debug_nans": Mode(setting=lambda: jax.debug_nans(True), jit=False, needs_values=True),
    "debug_nans, disable_jit": Mode(setting=_nans_op_by_op, jit=False, op_by_op=True, needs_values=True),
    "debug_infs": Mode(setting=lambda: jax.debug_infs(True), needs_values=True),
    "vmap, spmd_axis_name": Mode(_all_of_two(_vmap)),
    "pmap": Mode(_all_of_two(_pmap)),
    "scan of checkpoint": Mode(_all_of_two(_scan)),
    "remat with a policy": Mode(_of(_remat)),
    "custom_jvp": Mode(_of(_custom_jvp)),
    "linearize": Mode(_linearize),
    "linear_transpose": Mode(_linear_transpose, of_value=True),
    "checkify": Mode(_checkify, jit=False),
}
