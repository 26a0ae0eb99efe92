"""The composition root: from options to passes, backend, artifact and report."""
