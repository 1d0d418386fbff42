"""Conversion of parameters between attention layers of other libraries and of attnlib.

| library | from the library | to the library |
|---|---|---|
| keras.layers: MultiHeadAttention, GroupQueryAttention, Attention, AdditiveAttention | from_keras | to_keras |
| flax.linen.MultiHeadDotProductAttention, flax.nnx.MultiHeadAttention | from_flax | to_flax |
| torch.nn.MultiheadAttention; state dicts and safetensors files | from_torch | to_torch |
| any state dict of one fused or three separate projections, with grouped heads | from_state_dict | to_state_dict |
| equinox.nn.MultiheadAttention | from_equinox | to_equinox |

Conversion changes the layout only. A round trip returns the same bits, except that JAX rounds float64 unless
`jax_enable_x64` is on. Keras and PyTorch are never imported. An error lists all entries that are missing, unexpected or
misshapen; no entry is dropped silently. `module_fields` infers the fields of a module from its parameters, which do not
determine dropout, masks and attention axes.
"""

from attnlib.convert._equinox import from_equinox, to_equinox
from attnlib.convert._flax import from_flax, to_flax
from attnlib.convert._keras import from_keras, to_keras
from attnlib.convert._module_fields import module_fields
from attnlib.convert._state_dict import from_state_dict, to_state_dict
from attnlib.convert._torch import from_torch, to_torch

__all__ = [
    "from_equinox",
    "from_flax",
    "from_keras",
    "from_state_dict",
    "from_torch",
    "module_fields",
    "to_equinox",
    "to_flax",
    "to_keras",
    "to_state_dict",
    "to_torch",
]
