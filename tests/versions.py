"""What is known to fail with newer versions of JAX: results are right, but memory or a last digit is not as asked."""

import jax
import pytest

VERSION = tuple(map(int, jax.__version__.split(".")[:2]))
COPIES = pytest.mark.xfail(VERSION >= (0, 11), reason="XLA for CPUs copies what was given away", strict=True)
ROUNDS = pytest.mark.xfail(VERSION >= (0, 12), reason="1.03e-10 where 1e-10 is asked", strict=True)
