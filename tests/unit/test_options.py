"""The options are stated once: what type checkers, users and implementations see of them agrees."""

import dataclasses
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import option_catalogue
import pytest
from cases import NAMES, by_name, unsupported
from conftest import assert_close
from documents import ROOT
from flax import nnx

import attnlib
from attnlib import scores
from attnlib._core import options
from attnlib._core.options import FIELDS, AttentionOptions, Options
from attnlib._engine import call as _call
from attnlib._engine import dispatch as _choose
from attnlib._engine.reference import reference
from attnlib.linen._base import AttentionModule


class NnxOptions(options.MaskOptions, options.LogitOptions):
    """The options in the call of an NNX module: `rngs` has the place of dropout_rng."""

    return_weights: bool


ONE = jnp.ones((1, 3, 1, 2))
RESULTS = {"return_weights", "return_lse"}
DROPOUT = {"dropout_rate", "dropout_rng"}
POSITIONS = {"query_positions", "key_positions"}
HOW = {"normalize", "implementation", "block_sizes", "precision", "context"}


def hints(kind):
    """The annotations of a class and its bases, as they are written."""
    found = {}
    for base in reversed(kind.__mro__):
        found |= inspect.get_annotations(base)
    return {name: getattr(hint, "__forward_arg__", hint) for name, hint in found.items()}


def test_type_checkers_see_the_fields():
    assert hints(AttentionOptions) == {name: field.type for name, field in FIELDS.items()}


@pytest.mark.parametrize("kind", [options.OutputOptions, options.WeightsOptions, options.LseOptions,
                                  options.AllResultsOptions], ids=lambda kind: kind.__name__)  # fmt: skip
def test_every_kind_of_result_takes_all_options(kind):
    assert hints(kind).keys() == FIELDS.keys()
    shared = {name: hint for name, hint in hints(kind).items() if name not in RESULTS}
    assert shared.items() <= hints(AttentionOptions).items()


@pytest.mark.parametrize(
    ("function", "without", "kind"),
    [
        (attnlib.dot_product_attention, (), AttentionOptions),
        (attnlib.additive_attention, (), AttentionOptions),
        (attnlib.attention, (), AttentionOptions),
        (attnlib.explain, (), AttentionOptions),
        *((getattr(attnlib.inspect, name), RESULTS | DROPOUT | {"context"}, options.InspectionOptions)
          for name in attnlib.inspect.__all__ if name != "attention_entropy"),
        (attnlib.inspect.attention_entropy, RESULTS | DROPOUT | {"context", "normalize"}, options.EntropyOptions),
        *((method, POSITIONS | {"context"}, options.CacheOptions)
          for cache in (attnlib.KVCache, attnlib.PagedKVCache) for method in (cache.attend, cache.decode)),
        (attnlib.multi_head_attention, {"return_lse"}, options.LayerOptions),
        *((layer.__call__, {"return_lse", "attention_axes", "dropout_rate", *HOW}, options.CallOptions)
          for layer in (attnlib.MultiHeadAttention, attnlib.AdditiveAttention, attnlib.DotProductAttention)),
        *((layer.__call__, {"return_lse", "attention_axes", "dropout_rate", "dropout_rng", *HOW}, NnxOptions)
          for layer in (attnlib.nnx.MultiHeadAttention, attnlib.nnx.AdditiveAttention)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_functions_show_their_options(function, without, kind):
    parameters = inspect.signature(function).parameters
    assert [name for name in FIELDS if name not in without] == sorted(
        FIELDS.keys() & parameters.keys(), key=list(FIELDS).index
    )
    for name in hints(kind):
        assert parameters[name].default is FIELDS[name].default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert name in function.__doc__
    assert "{" not in (function.__doc__ or "").split("Returns:")[0]


@pytest.mark.parametrize("layer", [attnlib.MultiHeadAttention(1), attnlib.AdditiveAttention(),
                                   attnlib.DotProductAttention()], ids=lambda layer: type(layer).__name__)  # fmt: skip
def test_a_new_option_reaches_attention_through_a_layer(layer):
    with pytest.raises(TypeError, match="attention takes no 'colour'"):
        layer.init(jax.random.key(0), ONE[..., 0, :], colour="red", method=AttentionModule.__call__)


@pytest.mark.parametrize(
    "layer", [attnlib.nnx.MultiHeadAttention(1, 2, rngs=nnx.Rngs(0)), attnlib.nnx.DotProductAttention()],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_new_option_reaches_attention_through_an_nnx_layer(layer):
    with pytest.raises(TypeError, match="attention takes no 'colour'"):
        type(layer).__call__.__wrapped__(layer, ONE[..., 0, :], colour="red")


def test_options_have_their_defaults_and_change():
    assert vars(Options()) == {name: field.default for name, field in FIELDS.items()}
    changed = Options(bias=ONE).replace(is_causal=True)
    assert changed.bias is ONE and changed.is_causal and not Options().is_causal
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.is_causal = False


# What implementations support


def problem_of(**given):
    return _call.canonicalize(_call.arguments(ONE, ONE, ONE, scores.Dot(), Options(**given)))[0]


def test_implementations_list_options_that_they_see():
    seen = {name for name, field in FIELDS.items() if not field.metadata["resolved"]}
    every = (*_choose.IMPLEMENTATIONS, _choose.in_context)
    for each in every:
        assert each.supports | each.reasons.keys() <= seen
        assert not each.supports & each.reasons.keys()
    assert set().union(*(each.supports for each in every)) == seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "same"), [pair for row in option_catalogue.ROWS for pair in row.same],
    ids=lambda options: ", ".join(options),
)  # fmt: skip
def test_options_that_mean_the_same_give_the_same(name, options, same, keys):
    query, key, value = keys.normal(2, 5, 4, 3), keys.normal(2, 7, 2, 3), keys.normal(2, 7, 2, 6)
    reason = unsupported(name, query, key, value, **options) or unsupported(name, query, key, value, **same)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    every = dict(return_weights=True, return_lse=True, **by_name(name))
    made, expected = (attnlib.dot_product_attention(query, key, value, **each, **every) for each in (options, same))
    assert_close(made, expected, length=7)


def test_a_new_option_is_refused_by_name(monkeypatch):
    """Where no implementation lists it, none ignores it."""
    made_up = dataclasses.field(default=None, metadata={"static": True, "resolved": False, "doc": "of the output."})
    assert problem_of(colour="red", bias=jnp.ones(3)).to_support == ("bias",)
    monkeypatch.setitem(FIELDS, "colour", made_up)
    assert problem_of(colour=None).to_support == ()
    problem = problem_of(colour="red", bias=jnp.ones(3))
    assert problem.to_support == ("bias", "colour")
    for each in _choose.IMPLEMENTATIONS[:2]:
        assert each.refusal(problem) == "it does not support colour; leave colour=None"
    with pytest.raises(ValueError, match=r"no implementation can compute this .*\n.*it does not support colour"):
        _choose.choose(problem, None)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(bias=jnp.ones(3)), "it does not support bias; leave bias=None"),
        (dict(dropout_rate=0.5, dropout_rng=jnp.zeros(2, jnp.uint32)),
         "it does not support dropout_rate; leave dropout_rate=0.0"),
        (dict(return_lse=True), "it does not support return_lse; leave return_lse=False"),
        (dict(sink=0.0), "it does not support sink; leave sink=None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_supports_nothing_takes_defaults_alone(given, text):
    bare = dataclasses.replace(reference, name="bare", supports=frozenset(), reasons={})
    with pytest.raises(ValueError, match=text):
        attnlib.dot_product_attention(ONE, ONE, ONE, implementation=bare, **given)
    plain = dict(is_causal=True, dropout_rate=0.0, return_lse=False, attention_axes=1)
    output = attnlib.dot_product_attention(ONE, ONE, ONE, implementation=bare, **plain)
    assert output.shape == ONE.shape


def test_weights_of_a_few_queries_need_support():
    """`attention_rows` asks an implementation for weights, though its user does not."""
    blind = dataclasses.replace(reference, name="blind", supports=reference.supports - {"return_weights"})
    with pytest.raises(ValueError, match="it does not support return_weights"):
        attnlib.inspect.attention_rows(ONE, ONE, rows=0, implementation=blind)


TYPED = """
from typing import assert_type

import jax

import attnlib


def check(x: jax.Array) -> None:
    for function in (attnlib.dot_product_attention, attnlib.additive_attention):
        assert_type(function(x, x, x, is_causal=True), jax.Array)
    assert_type(attnlib.dot_product_attention(x, x, x, return_weights=True), tuple[jax.Array, jax.Array])
    assert_type(attnlib.additive_attention(x, x, x, return_lse=True), tuple[jax.Array, jax.Array])
    dot = attnlib.scores.Dot()
    results = attnlib.attention(x, x, x, score=dot, return_weights=True, return_lse=True)
    assert_type(results, tuple[jax.Array, jax.Array, jax.Array])
    attnlib.dot_product_attention(x, x, x, is_casual=True)  # type: ignore[call-overload]
    attnlib.dot_product_attention(x, x, x, is_causal=1)  # type: ignore[call-overload]
    attnlib.explain(x, x, x, block_size=(4, 4))  # type: ignore[call-arg]
"""


@pytest.mark.slow
def test_type_checkers_know_the_options_and_the_results(tmp_path):
    """An ignored error that is none is an error, too."""
    program = tmp_path / "program.py"
    program.write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
