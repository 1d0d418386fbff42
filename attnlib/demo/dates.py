"""Translates dates in many languages into ISO 8601 with additive attention.

The model is a small version of Bahdanau, Cho and Bengio (2014, arXiv:1409.0473). A bidirectional GRU encodes the
characters of the source. A GRU decodes the ten characters of the answer, and attends over the source before each
character. Accuracy is the fraction of correct dates among held-out calendar dates, decoded greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import attnlib
from attnlib import plot
from attnlib.demo import _dates_data as data
from attnlib.demo._training import Batch, Loss, Params, fit, parameter_count, save_picture

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
HELD_OUT_EXAMPLES = 2000
PRINTED_EXAMPLES = 8
PICTURE = "attention_dates.png"
PICTURE_LOCALES = ("pt", "el", "uk", "hu")  # the default font of matplotlib has no Chinese and no Indic characters
START = len(data.ISO_CHARACTERS)  # the previous character of the first step


class Reader(nn.Module):
    """The encoder: codes (B, S) -> features of both directions (B, S, 2 * features)."""

    alphabet_size: int
    features: int

    @nn.compact
    def __call__(self, source: jax.Array) -> jax.Array:
        characters = nn.Embed(self.alphabet_size, self.features)(source)
        forward, backward = nn.RNN(nn.GRUCell(self.features)), nn.RNN(nn.GRUCell(self.features))
        lengths = (source != data.PADDING).sum(-1)
        return cast(jax.Array, nn.Bidirectional(forward, backward)(characters, seq_lengths=lengths))


class Source(NamedTuple):
    """The encoded source: keys (B, S, D), values (B, S, E), and whether characters are real (B, S)."""

    keys: jax.Array
    values: jax.Array
    is_real: jax.Array


class Writer(nn.Module):
    """One step of the decoder: attention over the source, then a GRU. `Translator` scans it over the answer."""

    features: int
    teacher_forced: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], answer: jax.Array, source: Source
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        state, previous = carry  # (B, features), (B,)
        query = nn.Dense(source.keys.shape[-1])(state)[:, None]  # (B, 1, D)
        context, weights = attnlib.AdditiveAttention(name="attention")(
            query, source.keys, source.values, key_mask=source.is_real, return_weights=True
        )  # (B, 1, E), (B, 1, S)
        embedded = nn.Embed(START + 1, 16)(previous)
        state, output = nn.GRUCell(self.features)(state, jnp.concatenate([embedded, context[:, 0]], axis=-1))
        logits = nn.Dense(len(data.ISO_CHARACTERS))(jnp.concatenate([output, context[:, 0]], axis=-1))
        previous = answer if self.teacher_forced else logits.argmax(-1)
        return (state, previous), (logits, weights[:, 0])


class Translator(nn.Module):
    """The model: codes (B, S) -> logits (B, 10, 11) of the ISO characters, and attention weights (B, 10, S).

    With an answer (B, 10), each step gets the previous character of the answer (teacher forcing, for training);
    otherwise it gets the previous prediction.
    """

    alphabet_size: int
    features: int = 64

    @nn.compact
    def __call__(self, source: jax.Array, answer: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        batch = source.shape[0]
        values = Reader(self.alphabet_size, self.features)(source)
        encoded = Source(nn.Dense(self.features)(values), values, source != data.PADDING)
        write = nn.scan(
            Writer, variable_broadcast="params", split_rngs={"params": False}, in_axes=(1, nn.broadcast), out_axes=1
        )(2 * self.features, teacher_forced=answer is not None, name="writer")
        if answer is None:
            answer = jnp.zeros((batch, data.ISO_LENGTH), jnp.int32)  # only the length matters
        start = jnp.zeros((batch, 2 * self.features)), jnp.full((batch,), START)
        _, logits_and_weights = write(start, answer, encoded)
        return logits_and_weights


def run(*, steps: int, seed: int, out: Path) -> np.ndarray:
    """Trains, prints the accuracy and some translations, saves the picture in `out`; returns the loss of each step."""
    forms = data.written_forms()
    training_dates, held_out_dates = data.split_dates(seed)
    print(
        f"{len(forms)} ways to write a date in {len(data.LOCALES)} locales, years {data.FIRST_DATE.year} to"
        f" {data.LAST_DATE.year}; {len(training_dates):,} dates to train on, {len(held_out_dates):,} others held out"
    )
    rng = np.random.default_rng([seed, 1])
    training = data.write_examples(rng.choice(training_dates, steps * BATCH_SIZE), forms, rng)
    held_out = data.write_examples(held_out_dates[:HELD_OUT_EXAMPLES], forms, rng)
    pictured = [
        data.write_example(int(date), next(form for form in forms if form.locale == locale and "EEEE" in form.pattern))
        for locale, date in zip(PICTURE_LOCALES, held_out_dates[HELD_OUT_EXAMPLES:], strict=False)
    ]
    alphabet = data.Alphabet([example.source for example in training])
    width = max(len(example.source) for example in training + held_out + pictured)

    model = Translator(len(alphabet))
    batches = make_batches(training, alphabet, width)
    params = jax.jit(model.init)(jax.random.key(seed), *batches[0])
    print(f"a GRU encoder and decoder with additive attention, {parameter_count(params):,} parameters")
    params, losses = fit(make_loss(model), params, batches, learning_rate=LEARNING_RATE, seed=seed)

    translations, weights = translate(model, params, held_out + pictured, alphabet, width)  # one call compiles once
    report(held_out, translations[:HELD_OUT_EXAMPLES])
    save_alignment(pictured, translations[HELD_OUT_EXAMPLES:], weights[HELD_OUT_EXAMPLES:], out / PICTURE)
    return losses


def make_batches(examples: Sequence[data.Example], alphabet: data.Alphabet, width: int) -> list[Batch]:
    """Returns batches of sources and answers."""
    sources = alphabet.encode([example.source for example in examples], width)
    answers = data.encode_iso([example.date for example in examples])
    starts = range(0, len(examples), BATCH_SIZE)
    return [(sources[start : start + BATCH_SIZE], answers[start : start + BATCH_SIZE]) for start in starts]


def make_loss(model: Translator) -> Loss:
    """Returns the loss: the mean cross-entropy of the characters, with teacher forcing."""

    def loss(params: Params, rng: jax.Array, source: jax.Array, answer: jax.Array) -> jax.Array:
        del rng  # no dropout: every batch is new
        logits, _ = model.apply(params, source, answer)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()

    return loss


def translate(
    model: Translator, params: Params, examples: Sequence[data.Example], alphabet: data.Alphabet, width: int
) -> tuple[list[str], np.ndarray]:
    """Returns the greedy translation of each example, and the attention weights (examples, 10, width)."""
    logits, weights = jax.jit(model.apply)(params, alphabet.encode([example.source for example in examples], width))
    return [data.decode_iso(codes) for codes in np.asarray(logits.argmax(-1))], np.asarray(weights)


def report(examples: Sequence[data.Example], translations: Sequence[str]) -> None:
    """Prints some translations, and the fraction of correct ones."""
    right = [example.iso == translation for example, translation in zip(examples, translations, strict=True)]
    print("held-out dates, decoded greedily:")
    for example, translation, is_right in list(zip(examples, translations, right, strict=True))[:PRINTED_EXAMPLES]:
        mark = "right" if is_right else f"WRONG, {example.iso} was meant"
        print(f"  {example.source} -> {translation}  ({example.form.locale}, {mark})")
    print(f"exact match: {sum(right):,} of {len(right):,} held-out dates, {sum(right) / len(right):.2%}")


def save_alignment(
    examples: Sequence[data.Example], translations: Sequence[str], weights: np.ndarray, path: Path
) -> None:
    """Saves a picture of the attention weights for each character of some answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    axes = figure.subplots(2, -(-len(examples) // 2)).flat
    for example, translation, alignment, ax in zip(examples, translations, weights, axes, strict=True):
        mark = "right" if example.iso == translation else f"wrong, {example.iso} was meant"
        title = f"{data.language(example.form.locale)}: {translation} ({mark})"
        plot.attention_map(alignment[:, : len(example.source)], translation, example.source, ax=ax, title=title)
        ax.set(xlabel="date as written", ylabel="ISO 8601, as decoded")
    figure.suptitle("Where additive attention looks while it writes each character")
    save_picture(figure, path)
