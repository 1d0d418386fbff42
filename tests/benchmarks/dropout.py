"""What dropout costs, and whether its bits are random: python tests/benchmarks/dropout.py

Prints the time of a training step with dropout against one without, and z-scores of the hash over many draws: the
frequency of kept entries, each output bit's balance, avalanche (each input bit flips each output bit half the time),
and correlations between neighbours along every axis and between keys. Fails if a z-score is beyond 5.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from timing import KINDS, compare

import attnlib
from attnlib._engine import dropout as _dropout


def cost(repeats):
    operands = tuple(jax.random.normal(jax.random.key(0), (3, 1, 2048, 8, 64)))

    def attend(rate):
        options = dict(dropout_rate=rate, dropout_rng=jax.random.key(1) if rate else None)
        return lambda q, k, v: attnlib.dot_product_attention(q, k, v, implementation="blockwise", **options)

    programs = {(kind, rate): (make(attend(rate)), operands) for kind, make in KINDS.items() for rate in (0.0, 0.1)}
    times = compare(programs, repeats)
    for kind in KINDS:
        without, with_dropout = (times[kind, rate] * 1e3 for rate in (0.0, 0.1))
        print(
            f"{kind}: {without:.1f} ms without, {with_dropout:.1f} ms with dropout: {with_dropout / without - 1:+.1%}"
        )


@jax.jit
def counts(key):
    """Kept entries of a block of 2 x 4 leads, 1024 x 2048 positions, and agreements with neighbours along each axis."""
    seeds = _dropout.hash_seeds(key)
    lead = _dropout.batch_head_index((2,), 4, 1)
    rows, columns = jnp.arange(1024)[:, None], jnp.arange(2048)[None]
    keep = _dropout.keep_mask(seeds, 0.5, lead, rows, columns)  # (2, 4, 1, 1024, 2048)
    other = _dropout.keep_mask(_dropout.hash_seeds(jax.random.fold_in(key, 1)), 0.5, lead, rows, columns)
    same = {
        "batch": keep[:1] == keep[1:],
        "head": keep[:, :-1] == keep[:, 1:],
        "query": keep[..., :-1, :] == keep[..., 1:, :],
        "key": keep[..., :-1] == keep[..., 1:],
        "diagonal": keep[..., :-1, :-1] == keep[..., 1:, 1:],
        "transposed": keep[..., :, :1024] == jnp.swapaxes(keep[..., :, :1024], -1, -2),
        "random key": keep == other,
    }
    rare = _dropout.keep_mask(seeds, 0.9, lead, rows, columns)
    sums = {
        "kept at rate 0.5": keep,
        "kept at rate 0.9": rare,
        **{f"same as next along {k}": v for k, v in same.items()},
    }
    return {name: (jnp.sum(x, dtype=jnp.int32), x.size) for name, x in sums.items()}


def frequencies(draws):
    totals = {}
    rounds = -(-draws // (8 * 1024 * 2048))
    for n in range(rounds):
        for name, (count, size) in counts(jax.random.key(n)).items():
            total = totals.setdefault(name, [0, 0])
            total[0] += int(count)
            total[1] += int(size)
    print(f"{rounds * 8 * 1024 * 2048:.2e} draws")
    for name, (count, size) in totals.items():
        expected = 0.1 if "0.9" in name else 0.5
        # A matrix agrees with its transpose twice at each pair, and always on the diagonal.
        if "transposed" in name:
            diagonal = size // 1024
            count, size = (count - diagonal) // 2, (size - diagonal) // 2
        yield name, (count - expected * size) / np.sqrt(size * expected * (1 - expected))


def avalanche(samples=2**20):
    """z-scores of how often output bit b flips when input bit a does, and of each output bit being set."""
    x = jax.random.bits(jax.random.key(7), (samples,), jnp.uint32)
    y = np.asarray(_dropout._mix(x))
    worst = max(
        abs(float(np.mean(((y ^ np.asarray(_dropout._mix(x ^ np.uint32(1 << a)))) >> b) & 1)) - 0.5)
        for a in range(32)
        for b in range(32)
    )
    balance = max(abs(float(np.mean((y >> b) & 1)) - 0.5) for b in range(32))
    yield "worst bias of the avalanche (flip rate - 1/2), of 32 x 32", worst
    yield "worst bias of an output bit, of 32", balance


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--draws", type=float, default=2e8)
    options = parser.parse_args()
    cost(options.repeats)
    failed = False
    for name, z in frequencies(int(options.draws)):
        failed |= abs(z) > 5
        print(f"  z = {z:+.2f}   {name}")
    for name, bias in avalanche():
        failed |= bias > 0.02
        print(f"  {bias:.4f}   {name}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
