"""Reports what a worker is given: its arguments, what jax read of the environment, and how it hashes a text."""

import os
import sys

import jax
import processes

found = {
    "arguments": sys.argv[1:],
    "hash": hash("a text"),
    "quick": jax.config.values["jax_disable_most_optimizations"],
    "cache": jax.config.values["jax_compilation_cache_dir"],
    "least": jax.config.values["jax_persistent_cache_min_compile_time_secs"],
    "given": os.environ.get("JAXCL_GIVEN"),
    "process": int(os.environ["JAX_PROCESS_ID"]),
}
print("to stderr", file=sys.stderr)
processes.report(found)
sys.exit(3 if "fail" in sys.argv else 0)
