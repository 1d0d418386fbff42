"""Bring your weights: parameters of other libraries' attention layers, for attnlib's, and back.

| library | from it | to it |
|---|---|---|
| keras.layers: MultiHeadAttention, GroupQueryAttention, Attention, AdditiveAttention | from_keras | to_keras |
| flax.linen.MultiHeadDotProductAttention, flax.nnx.MultiHeadAttention | from_flax | to_flax |
| torch.nn.MultiheadAttention; state dicts and safetensors files | from_torch | to_torch |
| any state dict of a fused projection or of three, grouped heads too | from_state_dict | to_state_dict |
| equinox.nn.MultiheadAttention | from_equinox | to_equinox |

All are relayouts without arithmetic: there and back gives the same bits, unless JAX rounds what it does not hold, which
is float64 where `jax_enable_x64` is off. Keras and PyTorch are never imported. An error lists all entries that are
missing, unexpected or misshapen; nothing is left out in silence. What is no parameter, such as dropout, masks and
attention axes, is for the caller to say again; `module_fields` reads off the parameters what they tell.
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
