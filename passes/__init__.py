"""The passes, one a file, in the order in which the default recipe runs them."""

PASSES: tuple[str, ...] = (
    "trace",
    "layout",
    "split-shortcut",
    "bos-split",
    "equalize",
    "calibrate",
    "time-groups",
    "time-gains",
    "sensitivity",
    "predict-scores",
    "orthogonality",
    "bit-allocation",
    "numerics",
    "insert-fake-quant",
    "residual-branch",
    "low-rank",
    "round-weights",
    "distill",
    "fold-fake-quant",
    "fuse-epilogues",
)
