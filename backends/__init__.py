"""What turns a packed program into something that runs: one package a kind of target, each with ``build``."""
