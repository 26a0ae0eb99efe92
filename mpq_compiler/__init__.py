"""Compiles diffusion denoisers to mixed-precision low-bit edge artifacts, and runs them."""

from mpq_compiler._checkout import require_links

require_links()
