"""Prints what calls lower to on CUDA, as JSON: for each program, the cuDNN calls in it; run by test_cudnn in a process
of its own, in which JAX finds a package that names a version of cuDNN, and so lowers for it from a machine without one.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp

import attnlib
from attnlib import masks
from attnlib._engine import dispatch as _choose

CALL = re.compile(r'custom_call @(__cudnn\S+?)\(.*?backend_config = "((?:[^"\\]|\\.)*)".*? : \((.*?)\) ->')


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def cudnn_calls(function, *arguments, platform="cuda"):
    """(target, what its configuration says, the shapes of its operands) of each call in the lowered program."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    calls = []
    for target, config, operands in CALL.findall(text):
        config = json.loads(config.replace("\\22", '"').replace('\\"', '"'))["cudnn_fmha_backend_config"]
        names = ("fmha_scale", "mask_type", "sliding_window_length", "dropout_rate")
        dimensions = [int(size) for size in config["intermediate_tensor_shape"]["dimensions"]]
        calls.append([target, *(config[name] for name in names), dimensions, re.findall(r"tensor<(.*?)>", operands)])
    return calls


def ours(*args, **kwargs):
    return attnlib.dot_product_attention(*args, **kwargs, implementation="cudnn")


def theirs(*args, **kwargs):
    return jax.nn.dot_product_attention(*args, **kwargs, implementation="cudnn")


def loss(function):
    return lambda *args: jnp.sum(function(*args).astype(jnp.float32) ** 2)


QUERY, KEY, LONGER, COUNTS = array(2, 64, 8, 32), array(2, 64, 2, 32), array(2, 48, 2, 32), array(2, dtype="int32")
PAIRS = {  # name: (arguments, ours, theirs)
    "plain": ((QUERY, KEY, KEY), ours, theirs),
    "other lengths": ((QUERY, LONGER, LONGER), ours, theirs),
    "float16": ((array(2, 64, 8, 32, dtype="float16"),) * 3, ours, theirs),
    "causal": ((QUERY, KEY, KEY), lambda *x: ours(*x, is_causal=True), lambda *x: theirs(*x, is_causal=True)),
    "causal mask": (
        (QUERY, KEY, KEY),
        lambda *x: ours(*x, mask=masks.Causal()),
        lambda *x: theirs(*x, is_causal=True),
    ),
    "window": (
        (QUERY, KEY, KEY),
        lambda *x: ours(*x, mask=masks.SlidingWindow(7, 0)),
        lambda *x: theirs(*x, is_causal=True, local_window_size=(7, 0)),
    ),
    "window and causal": (
        (QUERY, KEY, KEY),
        lambda *x: ours(*x, mask=masks.SlidingWindow(7, None), is_causal=True),
        lambda *x: theirs(*x, is_causal=True, local_window_size=(7, 0)),
    ),
    "window of everything": (
        (QUERY, KEY, KEY),
        lambda *x: ours(*x, mask=masks.SlidingWindow(63, 0)),
        lambda *x: theirs(*x, is_causal=True),
    ),
    "lengths": (
        (QUERY, KEY, KEY, COUNTS),
        lambda q, k, v, n: ours(q, k, v, mask=masks.Lengths(n, n)),
        lambda q, k, v, n: theirs(q, k, v, query_seq_lengths=n, key_value_seq_lengths=n),
    ),
    "key lengths": (
        (QUERY, KEY, KEY, COUNTS),
        lambda q, k, v, n: ours(q, k, v, mask=masks.Lengths(key=n)),
        lambda q, k, v, n: theirs(q, k, v, key_value_seq_lengths=n),
    ),
    "query lengths, causal": (
        (QUERY, KEY, KEY, COUNTS),
        lambda q, k, v, n: ours(q, k, v, mask=masks.Lengths(query=n), is_causal=True),
        lambda q, k, v, n: theirs(q, k, v, query_seq_lengths=n, is_causal=True),
    ),
    "prefix": (
        (QUERY, KEY, KEY, COUNTS),
        lambda q, k, v, n: ours(q, k, v, mask=masks.Prefix(n)),
        lambda q, k, v, n: theirs(q, k, v, key_value_seq_lengths=n),
    ),
    "two axes": (
        (array(2, 4, 16, 8, 32), array(2, 8, 8, 2, 32), array(2, 8, 8, 2, 32)),
        lambda *x: ours(*x, is_causal=True),
        lambda *x: theirs(*(y.reshape(2, 64, *y.shape[3:]) for y in x), is_causal=True),
    ),
    "two batch axes": (
        (array(2, 3, 64, 8, 32), array(2, 3, 64, 2, 32), array(2, 3, 64, 2, 32)),
        lambda *x: ours(*x, attention_axes=2),
        lambda *x: theirs(*(y.reshape(6, *y.shape[2:]) for y in x)),
    ),
    "no batch axis": ((array(64, 8, 32),) * 3, ours, theirs),
    "vmap of all": ((array(3, 2, 64, 8, 32),) * 3, jax.vmap(ours), jax.vmap(theirs)),
}


def main():
    found = {"pairs": {}}
    for name, (arguments, *functions) in PAIRS.items():
        found["pairs"][name] = {
            "forward": [cudnn_calls(function, *arguments) for function in functions],
            "gradient": [cudnn_calls(jax.grad(loss(function), (0, 1, 2)), *arguments) for function in functions],
        }

    three = (QUERY, KEY, KEY)
    mapped = (array(3, 2, 64, 8, 32), KEY, KEY)
    some = jax.vmap(jax.grad(loss(ours), (0, 1, 2)), (0, None, None))
    found["scale traced"] = cudnn_calls(lambda *x: ours(*x, scale=0.5), *three)
    found["vmap of some: gradient"] = cudnn_calls(some, *mapped)
    found["jvp"] = cudnn_calls(lambda *x: jax.jvp(loss(ours), x, x), *three)
    found["gradient without its value"] = cudnn_calls(jax.grad(lambda *x: jnp.sum(ours(*x))), *three)
    found["jvp of gradient"] = cudnn_calls(lambda *x: jax.jvp(jax.grad(loss(ours)), x, x), *three)
    found["128 features"] = cudnn_calls(ours, *(array(2, 64, 8, 128),) * 3)
    try:
        cudnn_calls(ours, *(array(2, 64, 8, 136),) * 3)
    except ValueError as error:
        found["136 features"] = str(error)
    try:
        cudnn_calls(ours, *three, platform="cpu")
    except NotImplementedError as error:
        found["by name on CPU"] = str(error)

    # What a GPU would choose for itself, since this process has none to ask
    automatic, refused = _choose._CUDNN_OR_BLOCKWISE, str(attnlib.explain(*three))
    _choose.preferred = lambda problem: (automatic,)
    chosen = jax.grad(loss(attnlib.dot_product_attention), (0, 1, 2))
    found["explained"] = [refused, str(attnlib.explain(*three))]
    found["automatic: gradient"] = [cudnn_calls(chosen, *three, platform=platform) for platform in ("cuda", "cpu")]
    json.dump(found, sys.stdout)


main()
