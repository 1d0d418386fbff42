"""The options of every attention function: names, types, defaults and documentation.

A new option is a field of `Options` with its check, a key of one of the dictionaries, and an entry in `supports` of
each implementation that computes it, which reads it from `problem.options`. All other implementations refuse it by
name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict, TypeVar, Unpack, cast

from attnlib._core.array_types import Array, Bias, BoolMask, MaskFunction, Rng, ScoreMod
from attnlib._core.context import Context, check_context
from attnlib._core.pytree import register_with_jax
from attnlib._core.suggestions import suggests_arguments
from attnlib._core.validation import check_bool

if TYPE_CHECKING:
    from attnlib.masks import Mask

F = TypeVar("F", bound=Callable[..., Any])


# Types of the options for type checkers, grouped by the functions that take them.


class MaskOptions(TypedDict, total=False):
    """Which pairs of positions attend."""

    mask: BoolMask | Mask | MaskFunction | None
    is_causal: bool
    query_positions: Array | None
    key_positions: Array | None


class AxesOptions(TypedDict, total=False):
    """The axes attended over."""

    attention_axes: int | Sequence[int] | None


class LogitOptions(TypedDict, total=False):
    """Changes of the logits."""

    bias: Bias | None
    logits_soft_cap: float | None
    score_mod: ScoreMod | None
    sink: float | Array | None


class WeightOptions(TypedDict, total=False):
    """What the weights of a query are."""

    normalize: bool


class ComputeOptions(TypedDict, total=False):
    """How attention is computed."""

    implementation: str | Sequence[str] | None
    block_sizes: tuple[int, int] | None
    precision: Any


class ContextOptions(TypedDict, total=False):
    """Over which devices the sequence is sharded."""

    context: str | Context | None


class DropoutOptions(TypedDict, total=False):
    """Which weights are dropped."""

    dropout_rate: float
    dropout_rng: Rng | None


class ResultOptions(TypedDict, total=False):
    """What is returned beside the output."""

    return_weights: bool
    return_lse: bool


class EntropyOptions(MaskOptions, AxesOptions, LogitOptions, ComputeOptions, total=False):
    """The options of `attnlib.inspect.attention_entropy`."""


class InspectionOptions(EntropyOptions, WeightOptions, total=False):
    """The options of all others of `attnlib.inspect`."""


class CacheOptions(LogitOptions, WeightOptions, ComputeOptions, DropoutOptions, ResultOptions, total=False):
    """The options of `KVCache`; its methods document the others themselves."""


class CallOptions(MaskOptions, LogitOptions, total=False):
    """The options in the call of a Flax module; the others are its fields."""

    dropout_rng: Rng | None
    return_weights: bool


class LayerOptions(CallOptions, WeightOptions, ComputeOptions, ContextOptions, total=False):
    """The options of `multi_head_attention`, which documents `attention_axes` itself."""

    dropout_rate: float


class SharedOptions(
    MaskOptions, AxesOptions, LogitOptions, WeightOptions, ComputeOptions, ContextOptions, DropoutOptions, total=False
):
    """The options of attention that do not change what is returned."""


class OutputOptions(SharedOptions, total=False):
    """Options of a call that returns the output alone."""

    return_weights: Literal[False]
    return_lse: Literal[False]


class WeightsOptions(SharedOptions, total=False):
    """Options of a call that returns (output, weights)."""

    return_weights: Required[Literal[True]]
    return_lse: Literal[False]


class LseOptions(SharedOptions, total=False):
    """Options of a call that returns (output, lse)."""

    return_weights: Literal[False]
    return_lse: Required[Literal[True]]


class AllResultsOptions(SharedOptions, total=False):
    """Options of a call that returns (output, weights, lse)."""

    return_weights: Required[Literal[True]]
    return_lse: Required[Literal[True]]


class AttentionOptions(SharedOptions, ResultOptions, total=False):
    """All options."""


# Values of the options.


def _option(
    default: Any,
    doc: str,
    *,
    static: bool = True,
    resolved: bool = False,
    check: Callable[[Any, str], Any] | None = None,
) -> Any:
    metadata = {"static": static, "resolved": resolved, "check": check, "doc": " ".join(doc.split())}
    return dataclasses.field(default=default, metadata=metadata)


_traced = functools.partial(_option, static=False)


@register_with_jax
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Options:
    """The options of one call.

    Metadata of a field: `static` options decide the program, the others may be traced; `resolved` options never reach
    an implementation, because the engine replaces or uses them first; `check` is a function of a value and a name that
    returns the value to use, for options that can be checked alone; `doc` is the documentation.
    """

    mask: BoolMask | Mask | MaskFunction | None = _traced(
        None,
        """bool, True = attend, of the weights' rank `(*batch, N, *query axes, *key axes)` with ones to broadcast, or
        of rank at most the number of query and key axes; a `masks.Mask`; or a function of one pair, as
        `masks.Function` takes it. Default: all pairs attend. A fully masked query is not an error; its output is 0 and
        its lse -inf. Pass a padding mask `(B, S)` as `masks.KeyPadding(mask)`: if B equals T, the array itself is read
        as `(T, S)`.""",
    )
    bias: Bias | None = _traced(None, "added to the scaled logits; shapes as for mask. Differentiable.")
    is_causal: bool = _option(
        False, "whether to mask keys after the query (flat row-major positions, aligned at 0).", resolved=True,
        check=check_bool,
    )  # fmt: skip
    attention_axes: int | Sequence[int] | None = _option(
        None,
        """the axes attended over, numbered in query, key and value as passed (the last sequence axis is -3). Default:
        all axes except the first, heads and features; for rank 3 (no batch axis) the first.""",
        resolved=True,
    )
    dropout_rate: float = _option(
        0.0, "fraction of weights to drop after softmax, in [0, 1); the others are scaled by 1 / (1 - rate)."
    )
    dropout_rng: Rng | None = _traced(
        None,
        """a JAX random key; required if dropout_rate > 0. Inside `jax.shard_map` over batch or heads, all shards drop
        the same entries unless their keys differ: `jax.random.fold_in(key, jax.lax.axis_index("data"))`.""",
        resolved=True,
    )
    logits_soft_cap: float | None = _option(
        None, "a positive number c: replaces logits x (after bias) by c * tanh(x / c). Default: none."
    )
    score_mod: ScoreMod | None = _traced(
        None,
        """`score_mod(logit, batch, head, query_position, key_position) -> logit`, all scalars, applied to every logit
        after bias and soft cap. batch is a tuple unless there is one batch axis; positions are tuples if there are
        several attention axes. Captured arrays are traced and differentiable. See `attnlib.modifiers`.""",
    )
    sink: float | Array | None = _traced(
        None,
        """scalar or `(N,)`, the logit of one more key without a value, which takes a share of the weight of every row
        and contributes to the lse. Differentiable; 0 gives softmax-off-by-one. Default: none.""",
    )
    normalize: bool = _option(
        True,
        """whether the weights of a query are divided by their sum, as in softmax. False leaves them exp(logit), for
        sigmoid attention and others with a `score_mod` such as `modifiers.LogSigmoid`. Weights above the largest
        number of the dtype are infinite.""",
        check=check_bool,
    )
    query_positions: Array | None = _traced(
        None,
        """ints `(*batch, length)` or `(length,)`, with one attention axis: positions of the queries for masks,
        is_causal and score_mod. Queries at negative positions attend nothing. Default: 0, 1, 2...""",
        resolved=True,
    )
    key_positions: Array | None = _traced(
        None, "positions of the keys, likewise. No query attends keys at negative positions.", resolved=True
    )
    return_weights: bool = _option(False, "whether to return the weights (after dropout) too.", check=check_bool)
    return_lse: bool = _option(
        False, "whether to return the log-sum-exp of the logits over the keys too.", check=check_bool
    )
    implementation: str | Sequence[str] | None = _option(
        None,
        """"blockwise" (tiles; memory linear in the lengths), "reference" (all pairs at once), "cudnn" (the fused
        kernel of NVIDIA GPUs, for half-precision operands and causal masks, windows and lengths), or several names in
        order of preference. Default: cudnn on a GPU if it supports the call, otherwise by size; see
        `attnlib.explain`.""",
        resolved=True,
    )
    block_sizes: tuple[int, int] | None = _option(
        None, """(queries, keys) of a tile of "blockwise"; default: by size."""
    )
    precision: Any = _option(None, "precision of matrix products, as in `jax.lax.Precision`.")
    context: str | Context | None = _option(
        None,
        """the mesh axis along which the sequence is sharded, or an `attnlib.Context` with its order and exchange.
        Inside `jax.shard_map` over this axis, operands are the parts of one device; elsewhere the call shards them over
        the current mesh. Positions are those in the whole sequence. Default: none.""",
        check=check_context,
    )

    def __init__(self, **options: Unpack[AttentionOptions]) -> None:
        vars(self).update(DEFAULTS, **options)  # every call comes here: setting fields one by one is slower

    def replace(self, **changes: Any) -> Options:
        """A copy with some options changed."""
        copy = object.__new__(Options)
        vars(copy).update(vars(self), **changes)
        return copy

    def to_support(self) -> tuple[str, ...]:
        """The names of the options that are set and that an implementation must support."""
        return tuple(
            name
            for name, option in FIELDS.items()
            if not option.metadata["resolved"] and _is_set(getattr(self, name), option)
        )


FIELDS = {option.name: option for option in dataclasses.fields(Options)}
CHECKS = {name: option.metadata["check"] for name, option in FIELDS.items() if option.metadata["check"] is not None}
DEFAULTS = {name: option.default for name, option in FIELDS.items()}


def _is_set(value: Any, option: dataclasses.Field[Any]) -> bool:
    return value is not None and (not option.metadata["static"] or value != option.default)


# Signatures and docstrings.


def shows_options(without: Collection[str] = ()) -> Callable[[F], F]:
    """A decorator of a function with `**options`: its signature and its docstring show the options.

    In the docstring, a line `{options}` becomes the documentation of each option. In a line `{names}: text`, the names
    of the options replace `{names}`.

    Args:
      without: the options that the function does not take. Parameters of the function itself need not be named.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        excluded = {*without, *(parameter.name for parameter in parameters)}
        options = [option for option in FIELDS.values() if option.name not in excluded]
        parameters += [
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type
            )
            for option in options
        ]
        setattr(function, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
        function.__doc__ = _with_options(function.__doc__ or "", options)
        return function

    return decorate


def takes_options(without: Mapping[str, str] | None = None, listed: Sequence[str] = ()) -> Callable[[F], F]:
    """`shows_options`, and the function refuses all other arguments.

    Args:
      without: the options that the function does not take, with the error for each ("": the usual error).
      listed: the parameters that an error lists, sorted, together with the options; default: all parameters, in order.
    """
    answers = {} if without is None else without

    def decorate(function: F) -> F:
        function = shows_options(answers)(function)
        options = FIELDS.keys() & inspect.signature(function).parameters.keys()
        known = sorted({*listed, *options}) if listed else ()
        return cast(F, suggests_arguments(function, listed=known, answers=answers))

    return decorate


def _with_options(doc: str, options: Sequence[dataclasses.Field[Any]]) -> str:
    def paragraphs(line: re.Match[str]) -> str:
        return "\n".join(_filled(f"{option.name}: {option.metadata['doc']}", line[1]) for option in options)

    def names(line: re.Match[str]) -> str:
        return _filled(", ".join(option.name for option in options) + line[2], line[1])

    doc = re.sub(r"^( *)\{options\}$", paragraphs, doc, flags=re.M)
    return re.sub(r"^( *)\{names\}(.*(?:\n\1 +.*)*)$", names, doc, flags=re.M)


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
