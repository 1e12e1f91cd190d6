"""Eight virtual CPU devices, strict JAX settings and reproducible property tests for the whole suite."""

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A loaded machine must not turn into a failure; the same examples every time make one reproducible.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled(request):
    """Compiles with little optimisation, which saves most of the time, unless a module says QUICK = False."""
    quick = getattr(request.module, "QUICK", True)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
