"""Eight virtual CPU devices and strict JAX settings for the whole suite."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from hypothesis import HealthCheck, settings

# A loaded machine must not turn into a failure; the same examples every time make one reproducible.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")
