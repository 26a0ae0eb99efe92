"""torch's `flex_attention` as dense attention with a mask, which a trace can follow."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from mpq_compiler.support.errors import UserError

Mod = Callable[..., Tensor]

_lock = threading.Lock()
_inside = 0
_replaced: list[tuple[ModuleType | type, str, object]] = []


@contextmanager
def dense() -> Iterator[None]:
    """Replaces `flex_attention` by dense attention, everywhere, while any thread is inside.

    torch's own compiles a graph of its own for each call, which no trace takes. Without a GPU it computes densely, too,
    but reads of a `BlockMask` only its function; a GPU leaves out the blocks that are not listed, as this does.
    """
    global _inside
    with _lock:
        if not _inside:
            _replace()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                while _replaced:
                    holder, name, value = _replaced.pop()
                    setattr(holder, name, value)


def _replace() -> None:
    for name, made in (("flex_attention", attention), ("create_mask", mask_of)):
        own = getattr(torchs, name)
        # models import the function by its name, too
        for module in [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is own]:
            _replaced.append((module, name, own))
            setattr(module, name, made)
    own = vars(BlockMask)["from_kv_blocks"]
    _replaced.append((BlockMask, "from_kv_blocks", own))
    setattr(BlockMask, "from_kv_blocks", classmethod(_from_kv_blocks(own.__func__)))  # noqa: B010


def _from_kv_blocks(own: Callable[..., BlockMask]) -> Callable[..., BlockMask]:
    """`BlockMask.from_kv_blocks` without what only gradients read: no trace follows how it is sorted."""

    def without_queries(*args: object, **kwargs: object) -> BlockMask:
        return own(*args, **{**kwargs, "compute_q_blocks": False})

    return without_queries


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Mod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: object = None,
    *,
    return_aux: object = None,
) -> Tensor:
    """Computes what `flex_attention` does, by all scores and a mask.

    Args:
        query: [B, heads, L, E].
        key: [B, heads (or a divisor of them with ``enable_gqa``), S, E].
        value: [B, as many heads as the keys', S, E'].
        score_mod: makes of a score and its places (sample, head, query, key) another.
        block_mask: which keys a query sees, a `BlockMask`.
        scale: the factor of the scores; None: 1 / sqrt(E).
        enable_gqa: whether heads share keys.
        return_lse: must be False.
        kernel_options: those of a GPU, of no effect here.
        return_aux: must be None.

    Returns:
        The output, [B, heads, L, E'].

    Raises:
        UserError: results beside the output are asked for.
    """
    if return_lse or return_aux is not None:
        raise UserError("flex_attention is compiled for its output alone: call it without return_lse and return_aux")
    mask = None if block_mask is None else dense_mask(block_mask, query.shape[-2], key.shape[-2])
    if score_mod is None:
        return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = score_mod(scores, *_places(scores.shape, scores.device))
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    return torch.softmax(scores, -1) @ value


def dense_mask(block_mask: BlockMask, queries: int, keys: int) -> Tensor:
    """Which of the keys each query sees, booleans [B or 1, heads or 1, queries, keys]."""
    samples, heads = block_mask.kv_num_blocks.shape[:2]
    mod, rows = block_mask.mask_mod, block_mask.BLOCK_SIZE
    seen = _elements(block_mask.kv_num_blocks, block_mask.kv_indices, rows)[..., :queries, :keys]
    if mod is not torchs.noop_mask:
        seen = seen & mask_of(mod, samples, heads, queries, keys, seen.device)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        whole = _elements(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, rows)
        seen = seen | whole[..., :queries, :keys]
    return seen


def _elements(numbers: Tensor, indices: Tensor, block: tuple[int, int]) -> Tensor:
    """Booleans for elements, of how many blocks each row of blocks has, and of which: the first of ``indices``."""
    places = torch.arange(indices.shape[-1], device=indices.device)
    listed = places < numbers.unsqueeze(-1)
    blocks = ((indices.unsqueeze(-1) == places) & listed.unsqueeze(-1)).any(-2)
    return blocks.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)


def mask_of(
    mod_fn: Mod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, device: torch.device | str | None = None
) -> Tensor:
    """What a function of places says of each, [B, H, Q_LEN, KV_LEN]; the names are those of torch's `create_mask`."""
    shape = (B or 1, H or 1, Q_LEN, KV_LEN)
    return mod_fn(*_places(shape, device or "cpu")).expand(shape)


def _places(shape: tuple[int, ...], device: torch.device | str) -> list[Tensor]:
    """The numbers of samples, heads, queries and keys, each along its own dimension."""
    return [
        torch.arange(size, device=device).reshape([-1 if axis == at else 1 for at in range(len(shape))])
        for axis, size in enumerate(shape)
    ]
