"""One MLIR context for many programs, instead of one for each.

JAX makes a context whenever it lowers a program. To make and free one takes some milliseconds, as long as the rest for
an operation outside of `jax.jit`, and the suite lowers ten thousand programs. The programs stay the same.
"""

import itertools

from jax._src.interpreters import mlir  # JAX has no option for this

PROGRAMS = 50  # of a context: it keeps the types, locations and constants of all


def share():
    """Lets JAX take the same context for `PROGRAMS` programs, then another one."""
    make, numbers = mlir.make_ir_context, itertools.count(1)
    context = make()  # threads may ask for it at once

    def shared():
        nonlocal context
        if next(numbers) % PROGRAMS == 0:
            context = make()
        return context

    mlir.make_ir_context = shared
