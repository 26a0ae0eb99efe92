"""A package that fails on import."""

import no_such_quantum_library  # noqa: F401
