"""A jitted optax training loop with a progress bar, and the saving of pictures, for both tasks."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Params = Any
Batch = tuple[np.ndarray, ...]
Loss = Callable[..., jax.Array]  # loss(params, rng, *batch) -> scalar

STEPS_BETWEEN_READINGS = 10  # reading the loss waits for the device


def fit(
    loss: Loss, params: Params, batches: Sequence[Batch], *, learning_rate: float, seed: int
) -> tuple[Params, np.ndarray]:
    """Trains `params` with one Adam step for each batch, and shows a progress bar.

    Args:
      loss: ``loss(params, rng, *batch)``, a scalar; `rng` is for dropout.
      params: the initial parameters.
      batches: the batches in order, with equal shapes, so that the step compiles once.
      learning_rate: the peak learning rate, after a warmup of a tenth of the steps and before a cosine decay to zero.
      seed: the seed of `rng`.

    Returns:
      The trained parameters and the loss of each step.
    """
    from tqdm import tqdm

    steps = len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps=steps // 10, decay_steps=steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def train_step(params: Params, state: optax.OptState, rng: jax.Array, batch: Batch) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, rng, *batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    rngs = jax.random.split(jax.random.key(seed), steps)
    losses = []
    wall, cpu = time.perf_counter(), time.process_time()
    with tqdm(batches, desc="training", unit="step") as bar:
        for rng, batch in zip(rngs, bar, strict=True):
            params, state, value = train_step(params, state, rng, batch)
            losses.append(value)
            if len(losses) % STEPS_BETWEEN_READINGS == 0 or len(losses) == steps:
                bar.set_postfix(loss=f"{float(value):.4f}", refresh=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"trained {steps} steps in {wall:.0f} s ({cpu:.0f} s of CPU time)")
    return params, np.asarray(jnp.stack(losses))


def parameter_count(params: Params) -> int:
    """Returns the number of entries of all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def save_picture(figure: Figure, path: Path) -> None:
    """Writes the picture with 256 colours, for a small file, and prints its path."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"picture: {path}")
