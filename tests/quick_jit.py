"""`jax.jit` for tests of many small configurations, where nearly all the time is compilation."""

import functools

import jax

# Measured on 2 CPU cores, for Keras and attnlib together with gradients: 1.7 s to compile by default, 0.9 s without
# LLVM's optimisations, 0.26 s without XLA's emitters of fusions too.
_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def quick_jit(function, **kwargs):
    return jax.jit(function, compiler_options=_options(), **kwargs)


@functools.cache
def _options():
    """The options, or none where this version of XLA has dropped one of them."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=_OPTIONS).lower(1.0).compile()
    except Exception as error:  # whatever XLA raises: the tests are only slower
        if "xla_" not in str(error):
            raise
        return None
    return _OPTIONS
