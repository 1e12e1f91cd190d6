"""Eight virtual CPU devices, strict JAX settings and reproducible property tests for the whole suite."""

import gc
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A loaded machine must not turn into a failure; the same examples every time make one reproducible.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


# Every compiled program takes some mappings of memory; Linux allows a process 65,530, and the compiler crashes beyond.
MAPPINGS = 16_000


def mappings():
    """Returns how many mappings of memory this process has; 0 where that is not told."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled(request):
    """Compiles with little optimisation, which saves most of the time, unless a module says QUICK = False."""
    quick = getattr(request.module, "QUICK", True)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    if mappings() > MAPPINGS:
        jax.clear_caches()
        gc.collect()
