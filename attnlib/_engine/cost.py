"""The number of operations of a function, counted in its jaxpr without compiling or running it.

The count follows XLA's (`jax.jit(f).lower(...).cost_analysis()`), except that XLA counts the body of a loop once, and
here it counts as often as it runs. Each number that an elementwise operation computes is one operation. A matrix
product has two for each pair of numbers that it multiplies and adds. Operations that only move numbers have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal

from attnlib._autodiff.custom_rule import inner_jaxpr

_MOVES = frozenset(
    "broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice concatenate pad "
    "gather split rev iota copy copy_p optimization_barrier stop_gradient platform_index sharding_constraint reshard "
    "mesh_cast pvary pcast attnlib_pin_layout".split()
)
# Each reduces n numbers to one by n - 1 operations.
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)


def operations(function: Callable[..., Any], *args: Any) -> int:
    """The number of operations of `function(*args)`; arguments may be `jax.ShapeDtypeStruct`s.

    A while loop counts as one step, and a choice between programs counts as the longest of them.

    >>> import jax, jax.numpy as jnp
    >>> from attnlib._engine.cost import operations
    >>> operations(lambda x: jnp.tanh(x @ x), jax.ShapeDtypeStruct((10, 10), jnp.float32))
    2100
    """
    program = jax.make_jaxpr(function)(*args).jaxpr
    return _of_program(program, program.outvars)


def _of_program(program: Any, results: Iterable[Any]) -> int:
    """The operations that these results need; compilers leave out all others."""
    total, wanted = 0, set(_variables(results))
    for equation in reversed(program.eqns):
        if not wanted.isdisjoint(equation.outvars):
            total += _of_equation(equation, wanted)
            wanted.update(_variables(equation.invars))
    return total


def _variables(atoms: Iterable[Any]) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, Literal))


def _of_equation(equation: Any, wanted: Container[Any]) -> int:
    name, params = equation.primitive.name, equation.params
    outputs = sum(_size(variable) for variable in equation.outvars)
    if name in _MOVES or _keeps_type(equation):
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name in _REDUCTIONS:
        return max(_size(equation.invars[0]) - outputs, 0)

    if name == "scan":
        body = params["jaxpr"].jaxpr
        return int(params["length"]) * _of_program(body, body.outvars)
    if name == "while":
        return sum(_of_program(inside, inside.outvars) for inside in _programs(params))
    ruled = inner_jaxpr(equation)
    programs = list(_programs(params)) if ruled is None else [ruled]
    costs = [
        _of_program(one, [inner for inner, outer in zip(one.outvars, equation.outvars, strict=True) if outer in wanted])
        for one in programs
        if len(one.outvars) == len(equation.outvars)
    ]
    return max(costs, default=outputs)  # the branches of a choice, or one program, or else an elementwise operation


def _keeps_type(equation: Any) -> bool:
    """Whether it converts numbers to the type that they have, as from a weak type while tracing."""
    return equation.primitive.name == "convert_element_type" and (
        equation.invars[0].aval.dtype == equation.outvars[0].aval.dtype
    )


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation: the body of a loop or call, or the branches of a choice."""
    for value in params.values():
        for one in value if isinstance(value, tuple) else (value,):
            inside = getattr(one, "jaxpr", one)  # closed, or open
            if hasattr(inside, "eqns"):
                yield inside


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))
