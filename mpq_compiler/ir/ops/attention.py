"""Attention on floats, in float32 and in the reduced numerics "bf16" and "int8"."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_compiler.ir.ops.floating import fma
from mpq_compiler.ir.ops.registry import op
from mpq_compiler.targets.numerics import EXP2_COARSE, F32, KEY_BLOCK, NUMERICS, SMALLEST

LOG2_E = 1.4426950408889634

LOWEST = -1e30
"""Finite value below any logit."""


@op("attention", bound=1e-5)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    numerics: str = F32,
) -> Tensor:
    """softmax(q k^T * scale + mask) v per head, token-major.

    q [B, Tq, H*D], k and v [B, Tk, H*D], additive mask broadcast to [B, H, Tq, Tk]; scale is 1/sqrt(D) by default.
    ``numerics`` "bf16" and "int8" are approximations with a meaning of their own (`fast_attention`); gradients are
    those of "f32". The bounds of kernels are `numerics.BOUNDS`.
    """
    query, key, value = (split_heads(t, heads) for t in (q, k, v))
    if numerics == F32:
        return join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
    fast = join_heads(fast_attention(query, key, value, scale, mask, numerics))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        exact = attention(q, k, v, heads, scale, mask)
        return exact + (fast - exact).detach()
    return fast


@torch.no_grad()
def fast_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, kind: str) -> Tensor:
    """`attention` of heads, q [B, H, Tq, D], k and v [B, H, Tk, D], with the numerics "bf16" or "int8".

    Both: ``l = (q * f32(scale * log2 e)) k^T + mask * log2 e``, so that the softmax is one of powers of two.

    bf16: q (scaled), k, v and the weights of the products, ``p = 2^(l - max_k l)``, rounded to bfloat16; products and
    sums in float32; ``y = (p v) / sum_k p`` with the weights of the sum as they were.

    int8 (after SageAttention, arXiv 2410.02367), with integer sums exact and everything else f32 unless said:

    1. ``k' = k - c``, c the mean of k over all keys, its sum taken key by key in ascending order, times f32(1/Tk)
    2. codes of a set of values x: ``s = m * f32(1/127)``, ``rint(x * (127/m))``, m its largest magnitude, at least
       1e-20; a set for each query (of q, scaled), each block of `KEY_BLOCK` keys (of k') and each dimension (of v)
    3. ``l = f32(Q K^T) * (s_q * s_k)``, + mask * log2 e by `fma`
    4. by block j: ``m_j = max l``, ``P_j = rint(2^(l - (m_j - f32(log2 255))))``, the power by `_exp2_coarse`
    5. ``y = (sum_j w_j (P_j V_j)) / (sum_j w_j sum P_j) * s_v`` with ``w_j = 2^(m_j - max_j m_j)``, in f64
    """
    factor = torch.tensor(attention_scale(q, scale) * LOG2_E, dtype=torch.float32, device=q.device)
    bias = None if mask is None else mask.to(torch.float32)
    if kind == "bf16":
        query, key, value = (x.bfloat16().float() for x in (q * factor, k, v))
        logits = query @ key.transpose(-1, -2)
        if bias is not None:
            logits = (logits + bias * LOG2_E).clamp_min(LOWEST)
        weights = torch.exp2(logits - logits.amax(-1, keepdim=True))
        return weights.bfloat16().float() @ value / weights.sum(-1, keepdim=True)
    if kind != "int8":
        raise ValueError(f"attention has the numerics {', '.join(NUMERICS)}, not '{kind}'")
    total = torch.zeros_like(k[..., 0, :])
    for row in k.unbind(-2):
        total = total + row
    k = k - (total * torch.tensor(1 / k.shape[-2], dtype=torch.float32))[..., None, :]
    q_codes, q_scale = _codes(q * factor, -1)
    v_codes, v_scale = _codes(v, -2)
    shift = torch.tensor(math.log2(255), dtype=torch.float32)
    blocks = []
    for start in range(0, k.shape[-2], KEY_BLOCK):
        keys = slice(start, start + KEY_BLOCK)
        k_codes, k_scale = _codes(k[..., keys, :], (-2, -1))
        logits = (q_codes @ k_codes.transpose(-1, -2)) * (q_scale * k_scale)  # the product is exact in f32
        if bias is not None:
            part = bias if bias.shape[-1] == 1 else bias[..., keys]
            logits = fma(part.expand_as(logits), torch.tensor(LOG2_E, dtype=torch.float32), logits).clamp_min(LOWEST)
        highest = logits.amax(-1, keepdim=True).clamp_min(LOWEST)
        weights = torch.round(_exp2_coarse(logits - (highest - shift)))
        blocks.append((highest, (weights @ v_codes[..., keys, :]).double(), weights.sum(-1, keepdim=True).double()))
    highest, products, sums = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    share = torch.exp2((highest - highest.amax(0)).double())
    return ((share * products).sum(0) / (share * sums).sum(0)).to(torch.float32) * v_scale


def _codes(x: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes of -127..127 as f32, and their scale: a set of values over ``dims`` shares one (`fast_attention`)."""
    most = x.abs().amax(dims, keepdim=True).clamp_min(SMALLEST)
    return torch.round(x * (127 / most)), most * torch.tensor(1 / 127, dtype=torch.float32)


def _exp2_coarse(x: Tensor) -> Tensor:
    """2^x for -126 <= x <= 126, as kernels compute it: 2^-126 below. `numerics.EXP2_COARSE` by Horner's rule and fma.

    (In f64 the products are exact and the sums rounded once more than in a fma, which matters once in 2^29.)
    """
    x = x.clamp_min(-126.0)
    whole = torch.round(x)
    rest = (x - whole).double()
    power = torch.full_like(x, EXP2_COARSE[0])
    for coefficient in EXP2_COARSE[1:]:
        power = (power.double() * rest + torch.tensor(coefficient, dtype=torch.float32)).to(torch.float32)
    return torch.ldexp(power, whole)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] as [B, H, T, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H*D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1).contiguous()


def attention_probabilities(
    q: Tensor, k: Tensor, heads: int, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale + mask) of `attention`, [B, H, Tq, Tk]."""
    query, key = split_heads(q, heads), split_heads(k, heads)
    logits = query @ key.transpose(-1, -2) * attention_scale(query, scale)
    return torch.softmax(logits if mask is None else logits + mask, -1)


def attention_scale(query: Tensor, scale: float | None) -> float:
    """Factor of the logits: ``scale``, by default 1/sqrt(D) of query [..., D]."""
    return query.shape[-1] ** -0.5 if scale is None else scale
