"""The libraries compared with: imported where they are installed, left out with a reason where they are not."""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from timing import KINDS, Program, jax_program
from tqdm import tqdm

import attnlib
from attnlib import masks

PACKAGES = {"keras": "keras", "flax": "flax", "tokamax": "tokamax", "torch": "torch"}  # module: name for pip


@functools.cache
def load(name):
    """The module, or None with a printed line that says what to install."""
    if name == "keras":
        os.environ["KERAS_BACKEND"] = "jax"  # read when it is imported
    try:
        if name == "tokamax":  # it reads absl's flags, which would take our options for its own
            importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
        module = importlib.import_module(name)
    except ImportError as error:
        tqdm.write(f"left out: {name} ({error}); to compare with it: pip install {PACKAGES[name]}")
        return None
    if name == "torch":
        module.set_num_threads(os.cpu_count())
    return module


def torch_program(function, operands, kind):
    """PyTorch's eager `function` of the operands, given as NumPy arrays or, in the half types, as JAX arrays."""
    torch = load("torch")
    tensors = [_tensor(torch, operand) for operand in operands]
    leaves = [tensor for tensor in tensors if tensor.is_floating_point()]

    def forward():
        with torch.inference_mode():
            return [function(*tensors)]

    def training():
        loss = (function(*tensors) ** 2).sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    if kind == "training":
        for leaf in leaves:
            leaf.requires_grad_()
    run = {"forward": forward, "training": training}[kind]
    return Program(run, lambda results: [result.float().numpy() for result in results])


def _tensor(torch, array):
    if jnp.issubdtype(array.dtype, jnp.floating):  # NumPy has no bfloat16 that PyTorch reads
        return torch.tensor(np.asarray(array, np.float32)).to(getattr(torch, array.dtype.name))
    return torch.tensor(np.asarray(array))


# Dot products. A row (dot.py) has `mask`: None, "causal", "lengths" (of the keys) or "dense" (every query its own).
# Operands are query, key, value and, for the last two, the mask's array, of which the compiler knows only the shape.


def dot_attnlib(row):
    if row.mask == "lengths":
        return lambda q, k, v, lengths: attnlib.dot_product_attention(q, k, v, mask=masks.Lengths(key=lengths))
    return lambda q, k, v, mask=None: attnlib.dot_product_attention(q, k, v, mask=mask, is_causal=row.mask == "causal")


def _jax_nn_like(function, row):
    """jax.nn's arguments, which tokamax has too."""
    if row.mask == "lengths":
        return lambda q, k, v, lengths: function(q, k, v, key_value_seq_lengths=lengths)
    if row.mask == "dense":
        return lambda q, k, v, mask: function(q, k, v, mask=mask[None, None])
    return lambda q, k, v: function(q, k, v, is_causal=row.mask == "causal")


def dot_jax_nn(row, implementation="xla"):
    from jax.nn import dot_product_attention

    return _jax_nn_like(functools.partial(dot_product_attention, implementation=implementation), row)


def dot_tokamax(row):
    function = load("tokamax").dot_product_attention
    return _jax_nn_like(functools.partial(function, implementation="xla_chunked"), row)


def dot_flax(row):
    from flax.linen import dot_product_attention

    if row.mask == "lengths":
        return lambda q, k, v, lengths: dot_product_attention(
            q, k, v, mask=(jnp.arange(row.keys) < lengths[:, None])[:, None, None]
        )
    return lambda q, k, v, mask=None: dot_product_attention(q, k, v, mask=mask)


def dot_torch(row):
    torch = load("torch")
    options = dict(is_causal=row.mask == "causal", enable_gqa=row.heads != row.kv_heads)

    def function(q, k, v, mask=None):
        if row.mask == "lengths":
            mask = (torch.arange(row.keys) < mask[:, None])[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    return function


def _torch_dot_program(row, operands, kind):
    """In PyTorch's own layout, heads before positions, contiguous: it need not pay for ours."""
    swapped = [jnp.swapaxes(operand, 1, 2) if operand.ndim == 4 else operand for operand in operands]
    program = torch_program(dot_torch(row), swapped, kind)
    return dataclasses.replace(
        program, read=lambda results: [np.swapaxes(x, 1, 2) if x.ndim == 4 else x for x in program.read(results)]
    )


def _flax_lacks(row):
    if row.mask == "causal":
        return "Flax's function has no causal option, only a mask as an array"
    return "Flax's function has no grouped heads" if row.heads != row.kv_heads else None


@dataclasses.dataclass(frozen=True)
class Contestant:
    module: str
    program: Callable  # (row, operands, kind) -> Program
    unsupported: Callable = lambda row: None  # what the row needs and it has not, in words

    def installed(self):
        return self.module not in PACKAGES or load(self.module) is not None


def _in_jax(make):
    return lambda row, operands, kind: jax_program(KINDS[kind](make(row)), *operands)


DOT = {
    "attnlib": Contestant("attnlib", _in_jax(dot_attnlib)),
    "jax.nn": Contestant("jax", _in_jax(dot_jax_nn)),
    "Flax": Contestant("flax", _in_jax(dot_flax), _flax_lacks),
    "tokamax": Contestant("tokamax", _in_jax(dot_tokamax)),
    "PyTorch": Contestant("torch", _torch_dot_program),
}
