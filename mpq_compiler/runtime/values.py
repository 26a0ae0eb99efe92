"""Values of calls: NumPy arrays, and torch tensors where the process has loaded torch, which the runtime never does."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import numpy as np

from mpq_compiler.artifact.manifest import Value as InputValue
from mpq_compiler.sampling.call_tree import Value
from mpq_compiler.support.errors import UserError


def loaded_torch() -> Value:
    """The torch module if the process has loaded it; the runtime itself never does."""
    return sys.modules.get("torch")


def is_torch(value: Value) -> bool:
    """Whether a value is a torch tensor."""
    module = loaded_torch()
    return module is not None and isinstance(value, module.Tensor)


def is_half(value: Value) -> bool:
    """Whether a value is a torch tensor of bfloat16 or float16."""
    return is_torch(value) and str(value.dtype) in ("torch.bfloat16", "torch.float16")


def is_traced() -> bool:
    """Whether torch.compile follows what is called."""
    module = loaded_torch()
    return module is not None and module.compiler.is_compiling()


def stacked(values: Sequence[Value]) -> Value:
    """One array or tensor of equal ones."""
    module = loaded_torch() if is_torch(values[0]) else None
    return module.stack(list(values)) if module else np.stack(list(values))


def as_array(value: Value) -> np.ndarray:
    """A tensor's values as an array, in float32 where NumPy has no type for them."""
    if is_torch(value):
        value = (value.float() if is_half(value) else value).detach().resolve_conj().cpu().numpy()
    return np.asarray(value)


def converted(name: str, value: Value, expected: InputValue, devices: Collection[str]) -> np.ndarray:
    """Converts `value` to an array of the expected type. UserError: it is something else, or on another device."""
    dtype, scalar = np.dtype(expected["dtype"]), len(expected["shape"]) == 1
    if is_torch(value):
        if value.device.type not in devices:
            raise UserError(f"input '{name}' is on {value.device}; this artifact takes it on the CPU: .cpu()")
        stated = str(value.dtype).removeprefix("torch.")
        if stated in ("bfloat16", "complex32") or stated.startswith("float8"):
            raise UserError(f"input '{name}' is {stated}; this artifact takes {dtype}")
        value = value.detach().cpu().numpy()
    elif scalar and isinstance(value, int | float):
        value = np.asarray(value)
    elif not isinstance(value, np.ndarray | np.generic):
        kind = type(value).__name__
        raise UserError(f"input '{name}' is a {kind}; this artifact takes arrays or torch tensors of {dtype}")
    array: np.ndarray = np.asanyarray(value)
    if array.dtype == dtype:
        return array
    # One number a sample may come in any type that holds it exactly: schedulers differ in the type of
    # timesteps.
    if scalar and array.dtype.kind in "iuf":
        with np.errstate(invalid="ignore", over="ignore"):
            converted = array.astype(dtype)
            if (converted == array).all():
                return converted
        raise UserError(f"input '{name}' holds a value that {dtype} cannot; this artifact takes {dtype}")
    if array.dtype.kind in "iub" and dtype.kind == "f" and array.ndim <= 2:  # masks of tokens, as tokenizers make them
        return array.astype(dtype)
    raise UserError(f"input '{name}' is {array.dtype}; this artifact takes {dtype}")
