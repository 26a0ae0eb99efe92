"""Names of the pointwise operations of epilogues and programs; `common.vmath` has their arithmetic."""

from __future__ import annotations

UNARY = {
    "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "relu", "exp", "log", "erf", "sin", "cos", "sqrt", "rsqrt", "neg",
    "square", "binade",
}  # fmt: skip
BINARY = {"add", "sub", "rsub", "mul", "div", "rdiv", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"}
"""``rsub(a, b) = b - a`` and ``rdiv(a, b) = b / a``; what compares gives 1 or 0."""
TERNARY = {"where"}
