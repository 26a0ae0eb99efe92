"""Attention on quantized operands: simulated in floats, and on codes."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq_compiler.ir.ops.activations import fake_quantize, per_sample, quantize
from mpq_compiler.ir.ops.attention import attention_probabilities, attention_scale, join_heads, split_heads
from mpq_compiler.ir.ops.registry import op


@op("fake_quantize_attention")
def fake_quantize_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    p_scale: Tensor,
    p_zero: Tensor,
    heads: int,
    scale: float | None,
    mask: Tensor | None,
    bits: int,
) -> Tensor:
    """`attention` with its probabilities fake-quantized; straight-through gradients. p_scale, p_zero [G]."""
    p = attention_probabilities(q, k, heads, scale, mask)
    return join_heads(fake_quantize(p, p_scale, p_zero, group, bits) @ split_heads(v, heads))


@op("quant_attention", bound=1e-6)
def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    q_scale: Tensor,
    q_zero: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    p_scale: Tensor,
    p_zero: Tensor,
    heads: int,
    scale: float | None,
    mask: Tensor | None,
    bits: int,
) -> Tensor:
    """`attention` on codes u8: q [B, Tq, H*D], k and v [B, Tk, H*D]; tables [G], chosen by group i64 [B] -> f32.

    In this order, with integer sums exact and everything else f32:

    1. ``S = sum_d (q - q_zero) * (k - k_zero)``, ``l = f32(S) * ((q_scale * k_scale) * scale)``, + mask
    2. ``e = exp(l - max_k l)``, ``p = e / f32(sum_k e)``, the sum in f64
    3. P, the codes of p by `quantize` with p_scale, p_zero and ``bits``
    4. ``y = f32(sum_k (P - p_zero) * (v - v_zero)) * (p_scale * v_scale)``
    """
    if mask is not None:
        mask = mask.expand(len(q), heads, q.shape[1], k.shape[1])

    def attend(b: slice) -> Tensor:
        def centred(x: Tensor, zero: Tensor) -> Tensor:
            return split_heads(x[b].to(torch.float64) - per_sample(zero.to(torch.float64), group[b], x[b]), heads)

        def scale_of(table: Tensor) -> Tensor:
            return per_sample(table.to(torch.float32), group[b], query)

        query, key, value = centred(q, q_zero), centred(k, k_zero), centred(v, v_zero)
        factor = scale_of(q_scale) * scale_of(k_scale)
        factor = factor * torch.tensor(attention_scale(query, scale), dtype=torch.float32)
        logits = (query @ key.transpose(-1, -2)).to(torch.float32) * factor
        if mask is not None:
            logits = logits + mask[b]
        e = torch.exp(logits - logits.amax(-1, keepdim=True))
        p = e / e.sum(-1, keepdim=True, dtype=torch.float64).to(torch.float32)
        codes = quantize(p, p_scale, p_zero, group[b], bits).to(torch.float64)
        y = (codes - per_sample(p_zero.to(torch.float64), group[b], codes)) @ value
        return join_heads(y.to(torch.float32) * (scale_of(p_scale) * scale_of(v_scale)))

    return torch.cat([attend(slice(b, b + 1)) for b in range(len(q))])  # one sample at a time: the products are large
