"""Random configurations of the four Keras attention layers, each built in Keras and in attnlib with the same values.

Drawn where Keras is right or usable; what it does elsewhere is in test_keras_differences.py, test by test.
"""

import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np
import pytest
from covering import covering, pairs

import attnlib

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras", "3.15", reason="these tests know the layers and the bugs of Keras 3.15")
if keras.backend.backend() != "jax":
    pytest.skip("Keras was imported before with another backend than JAX", allow_module_level=True)

LAYERS = ("AdditiveAttention", "Attention", "MultiHeadAttention", "GroupQueryAttention")

# One size for each axis, for query and for key; the last is the features.  Batch axes take the query's size.
QUERY_SIZES, KEY_SIZES = (2, 3, 4, 5), (3, 4, 2, 3)
QUERY_FEATURES, KEY_FEATURES, VALUE_FEATURES = 6, 7, 8


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is asked of both libraries; equal configurations ask the same."""

    layer: str
    fields: tuple  # ((name, value), ...) of the layer, in Keras's words
    call: tuple  # ((name, value), ...) of the call: causal, weights returned
    rank: int
    axes: tuple  # attended, from 0
    inputs: str  # "self", "shared" (value is key) or "separate"
    masks: tuple  # kinds of masks given

    @property
    def averages_empty_rows(self):
        """Whether Keras gives a row that may attend nothing the mean of the values, not 0 (its three paths differ)."""
        simple = self.layer in ("AdditiveAttention", "Attention")
        return simple or (self.rank == 3 and not dict(self.call)["weights"])

    @property
    def keeps_float64(self):
        """Whether Keras computes in float64 throughout: its tanh and jax.nn's softmax are float32."""
        return dict(self.fields).get("score_mode", "dot") == "dot" and (
            self.layer == "Attention" or (self.layer != "AdditiveAttention" and not self.averages_empty_rows)
        )

    def __str__(self):
        parts = [f"{name}={value}" for name, value in self.fields + self.call if value is not None]
        return f"{self.layer}-r{self.rank}-{self.axes}-{self.inputs}-{'+'.join(self.masks)}-{','.join(parts)}"


def draw_simple(rng, layer):
    """A configuration of AdditiveAttention or Attention: one attended axis, the last, and no heads."""
    fields = {"use_scale": bool(rng.integers(2))}
    if layer == "Attention":
        fields["score_mode"] = str(rng.choice(["dot", "concat"]))
    call = {"causal": bool(rng.integers(2)), "weights": bool(rng.integers(2))}
    rank = int(rng.choice([3, 4]))
    masks = []
    if rng.random() < 0.5:
        masks.append("query")
    if rng.random() < 0.6 and (rank == 3 or call["causal"]):  # rank 4: Keras aligns the mask only beside a causal one
        masks.append("value")
    inputs = str(rng.choice(["self", "shared", "separate"]))
    return Configuration(layer, tuple(fields.items()), tuple(call.items()), rank, (rank - 2,), inputs, tuple(masks))


def draw_multi_head(rng, layer):
    grouped = layer == "GroupQueryAttention"
    rank = 3 if grouped else int(rng.choice([3, 4, 4, 5]))
    attention_axes, axes = (None, (1,)) if grouped else draw_axes(rng, rank)
    call = {"causal": False, "weights": bool(rng.integers(2))}
    # Without weights and at rank 3 Keras calls jax.nn, whatever attention_axes and value_dim say.
    if rank == 3 and axes != (1,):
        call["weights"] = True
    if grouped:
        heads, kv_heads = [(4, 2), (3, 1), (2, 2), (6, 3)][rng.integers(4)]
        fields = {"head_dim": 3, "num_query_heads": heads, "num_key_value_heads": kv_heads}
    else:
        value_dim = [None, 4][rng.integers(2)] if rank > 3 or call["weights"] else None
        fields = {"num_heads": int(rng.integers(1, 4)), "key_dim": 3, "value_dim": value_dim}
        fields |= {"output_shape": [None, 5, (2, 5)][rng.integers(3)], "attention_axes": attention_axes}
    fields |= {"use_bias": bool(rng.integers(2)), "use_gate": bool(rng.integers(2)), "sliding_window": None}
    if axes == (1,):  # Keras builds causal and sliding masks from axis 1, whatever is attended
        call["causal"] = bool(rng.integers(2))
        fields["sliding_window"] = [None, None, 1, 2, 3][rng.integers(5)]
    masks = []
    if axes == (rank - 2,):  # Keras aligns padding masks with the last sequence axis
        masks += [kind for kind in ("value", "key") if rng.random() < 0.35]
        if grouped and call["weights"] and rng.random() < 0.35:  # without weights a padded query attends to all keys
            masks.append("query")
    kinds = ["full", "broadcast", "pairs"] + ([] if masks else ["heads"])
    if rng.random() < 0.6:
        masks.append(str(rng.choice(kinds)))
    if rank == 3 and not call["weights"] and fields["sliding_window"]:
        masks = []  # a window and a mask may leave a row empty, which jax.nn averages
    inputs = str(rng.choice(["self", "shared", "separate"]))
    return Configuration(layer, tuple(fields.items()), tuple(call.items()), rank, axes, inputs, tuple(masks))


def draw_axes(rng, rank):
    """``attention_axes`` as a user passes it, and the same from 0: any axes but the features, in any order."""
    if rng.random() < 0.25:
        return None, tuple(range(1, rank - 1))
    axes = tuple(int(axis) for axis in rng.permutation(rank - 1)[: rng.integers(1, min(rank - 1, 3) + 1)])
    return tuple(axis - rank if rng.random() < 0.4 else axis for axis in axes), axes


def draw_many(layer, count, seed):
    """Configurations of a layer from that many draws, each one once."""
    rng = np.random.default_rng([seed, LAYERS.index(layer)])
    draw = draw_multi_head if layer in ("MultiHeadAttention", "GroupQueryAttention") else draw_simple
    return list(dict.fromkeys(draw(rng, layer) for _ in range(count)))


def options(configuration):
    """The options of a configuration as `(name, value)`s, without the axes that it attends."""
    c, found = configuration, dict(configuration.fields + configuration.call)
    asked = found.pop("attention_axes", None)
    found |= {"rank": c.rank, "inputs": c.inputs, "axes attended": len(c.axes), "last attended": c.rank - 2 in c.axes}
    found["axes swapped"] = list(c.axes) != sorted(c.axes)
    found["axes given"] = asked and ("from the end" if min(asked) < 0 else "from 0")
    found |= {f"{kind}_mask": kind in c.masks for kind in ("query", "value", "key")}
    found["mask"] = next((kind for kind in ("full", "broadcast", "pairs", "heads") if kind in c.masks), None)
    return list(found.items())


def option_pairs(configuration):
    """Every two options together, since bugs depend on two at most as a rule, and the attended axes alone."""
    return pairs(options(configuration)) | {("attended", tuple(sorted(configuration.axes)))}


# Few of a thousand draws have every pair that any of them has; these run by default. RANDOM runs in tests marked slow.
DRAWN = {layer: draw_many(layer, 1000, seed=0) for layer in LAYERS}
CONFIGURATIONS = [chosen for drawn in DRAWN.values() for chosen in covering(drawn, option_pairs)]
RANDOM = [c for layer in LAYERS for c in draw_many(layer, 190 if layer == "MultiHeadAttention" else 80, seed=1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Both libraries as functions of the same parameters and inputs, and the weights' rows that Keras defines."""

    parameters: list
    inputs: list
    run_keras: Callable  # (parameters, inputs) -> (output, weights | None)
    run_ours: Callable
    real_rows: np.ndarray
    pairs: int  # of a query and a key, over the whole batch


def build(configuration, seed, dtype="float32"):
    """The case of one configuration with seeded values."""
    rng = np.random.default_rng([2, seed])
    fields, call = dict(configuration.fields), dict(configuration.call)
    inputs = [x.astype(dtype) for x in draw_inputs(rng, configuration)]
    query, key = inputs[0], inputs[min(1, len(inputs) - 1)]
    masks = draw_masks(rng, configuration, query.shape, key.shape)
    # The shapes of the variables matter, and not their values: Keras would draw them with a program for each shape.
    zeros = {} if configuration.layer in ("AdditiveAttention", "Attention") else {"kernel_initializer": "zeros"}
    layer = getattr(keras.layers, configuration.layer)(**{**fields, **zeros}, dtype=dtype)
    simple = isinstance(layer, keras.layers.Attention)
    arguments = keras_arguments(inputs)
    shapes = [x.shape for x in arguments]
    layer.build(shapes) if simple else layer.build(*shapes)
    parameters = [(0.7 * rng.normal(size=variable.shape)).astype(dtype) for variable in layer.trainable_variables]
    keras_options = {"return_attention_scores": call["weights"], "use_causal_mask": call["causal"]}
    if simple:
        keras_options["mask"] = [masks.get("query_mask"), masks.get("value_mask")] if masks else None
    else:
        keras_options |= masks

    def run_keras(parameters, inputs):
        arguments = keras_arguments(inputs)
        outputs, _ = layer.stateless_call(parameters, [], *([arguments] if simple else arguments), **keras_options)
        return outputs if call["weights"] else (outputs, None)

    module = our_module(configuration.layer, fields)
    our_options = {"is_causal": call["causal"], "return_weights": call["weights"], "deterministic": True}
    attended = len(configuration.axes)
    our_options |= our_masks(masks, batch_axes=query.ndim - 1 - attended, attended=attended)

    def run_ours(parameters, inputs):
        outputs = module.apply({"params": parameters_of(layer, parameters)}, *inputs, **our_options)
        return outputs if call["weights"] else (outputs, None)

    # The two layers without heads give weights to a padded query too, although its output is zero.
    real_rows = masks["query_mask"][..., None] if simple and "query_mask" in masks else np.ones(())
    pairs = query[..., 0].size * math.prod(key.shape[axis] for axis in configuration.axes)
    return Case(parameters, inputs, run_keras, run_ours, real_rows, pairs)


def draw_inputs(rng, configuration):
    """[query], [query, key] or [query, key, value]."""
    rank = configuration.rank
    key_axes = [KEY_SIZES[a] if a in configuration.axes else QUERY_SIZES[a] for a in range(rank - 1)]
    query_shape = (*QUERY_SIZES[: rank - 1], QUERY_FEATURES)
    simple = configuration.layer in ("AdditiveAttention", "Attention")
    key_shape = (*key_axes, QUERY_FEATURES if simple else KEY_FEATURES)
    shapes = [query_shape, key_shape, (*key_axes, VALUE_FEATURES)]
    count = {"self": 1, "shared": 2, "separate": 3}[configuration.inputs]
    return [rng.normal(size=shape) for shape in shapes[:count]]


def keras_arguments(inputs):
    """Keras's order: query, value, key."""
    query, *rest = inputs
    return [query, *(reversed(rest) if rest else [query])]


def draw_masks(rng, configuration, query_shape, key_shape):
    """Keras's mask arguments, by name."""
    axes, fields = configuration.axes, dict(configuration.fields)
    batch = tuple(query_shape[a] for a in range(len(query_shape) - 1) if a not in axes)
    pairs = (*(query_shape[a] for a in axes), *(key_shape[a] for a in axes))
    heads = fields.get("num_heads") or fields.get("num_query_heads")
    masks = {}
    for kind in configuration.masks:
        if kind in ("query", "value", "key"):
            name, shape = f"{kind}_mask", (query_shape if kind == "query" else key_shape)[:-1]
        else:
            shape = {"pairs": pairs, "heads": (*batch, heads, *pairs)}.get(kind, (*batch, *pairs))
            shape = tuple(1 if kind == "broadcast" and rng.random() < 0.5 else size for size in shape)
            name = "attention_mask"
        mask = rng.random(shape) < 0.6
        if configuration.averages_empty_rows and kind != "query":
            mask[..., 0] = True
        masks[name] = mask
    return masks


def our_masks(masks, batch_axes, attended):
    """The same in attnlib's words: Keras has a mask for keys and one for values, and leaves the heads' axis out."""
    ours = {}
    if "query_mask" in masks:
        ours["query_mask"] = masks["query_mask"]
    if "key_mask" in masks or "value_mask" in masks:
        ours["key_mask"] = masks.get("key_mask", np.True_) & masks.get("value_mask", np.True_)
    if "attention_mask" in masks:
        mask = masks["attention_mask"]
        without_heads = batch_axes > 0 and mask.ndim == batch_axes + 2 * attended
        ours["mask"] = np.expand_dims(mask, batch_axes) if without_heads else mask
    return ours


def our_module(layer, fields):
    """attnlib's module with the fields of a Keras layer."""
    fields = dict(fields)
    if layer in ("AdditiveAttention", "Attention"):
        fields["attention_axes"] = -2  # Keras takes the axes before it for batch
    if layer == "AdditiveAttention":
        return attnlib.AdditiveAttention(**fields)
    if layer == "Attention":
        return attnlib.DotProductAttention(**fields)
    if layer == "GroupQueryAttention":
        fields["num_heads"] = fields.pop("num_query_heads")
        fields["num_kv_heads"] = fields.pop("num_key_value_heads")
        fields["key_dim"] = fields.pop("head_dim")
    return attnlib.MultiHeadAttention(**fields)


def parameters_of(layer, values):
    """attnlib's tree of parameters from the values of a Keras layer's variables."""
    tree = {}
    for variable, value in zip(layer.trainable_variables, values, strict=True):
        *modules, name = variable.path.split("/")[1:]
        node = tree
        for module in modules:
            node = node.setdefault("out" if module == "attention_output" else module, {})
        node[name] = value
    return tree
