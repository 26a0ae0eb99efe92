"""The passes, one a file; `plugins.toml` lists them in the order in which the default recipe runs them."""
