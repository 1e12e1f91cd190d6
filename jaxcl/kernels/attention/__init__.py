"""Grouped-query attention over packed rows."""

from jaxcl.kernels.attention.reference import attention as attention
