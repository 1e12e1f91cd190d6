"""jaxcl: a functional training framework for continual learning in JAX."""

__version__ = "0.1.0"
