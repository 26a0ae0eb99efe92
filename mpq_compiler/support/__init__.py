"""No domain, no torch: errors, files, caches, plugins, the terminal."""
