"""The device where torch runs a model while it is compiled: the CPU, or a GPU."""

from __future__ import annotations

import torch

from mpq_compiler.support.errors import UserError

CPU = "cpu"


def require(name: str) -> str:
    """The whole name of a device, "cpu" or "cuda:0"; products on it are those of f32 from then on.

    Raises:
        UserError: torch sees no such device here.
    """
    kind, _, number = name.partition(":")
    if name == CPU:
        return CPU
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UserError(f"--device '{name}' is not known: it is 'cpu', 'cuda' or 'cuda:1'")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        seen = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
        raise UserError(f"--device {name}: torch sees {seen} here; leave it out to compile on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # has the mantissa of f16
    return f"{kind}:{int(number or 0)}"
