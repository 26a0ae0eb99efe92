from __future__ import annotations

import pytest

from mpq_compiler.allocation.ends import ends
from tests.allocation.test_mixdq_groups import laid_out

TIME = ["linear_1.weight", "linear_2.weight"]
FIRST_AND_LAST = {
    **dict.fromkeys(("unet2d", "sd15", "sdxl"), ("conv_in.weight", "conv_out.weight")),
    **dict.fromkeys(("pixart", "hunyuan", "sd3"), ("pos_embed.proj.weight", "proj_out.weight")),
    "dit": ("pos_embed.proj.weight", "proj_out_2.weight"),
}
EMBEDDING = {
    **dict.fromkeys(("unet2d", "sd15", "sdxl"), "time_embedding"),
    "sd3": "time_text_embed.timestep_embedder",
    "hunyuan": "time_extra_emb.timestep_embedder",
    "dit": "transformer_blocks.0.norm1.emb.timestep_embedder",  # of the first block, which the last layer reads too
}


@pytest.mark.parametrize("model", FIRST_AND_LAST)
def test_structure_finds_the_ends(model):
    """The embedding of `pixart` is read by one layer alone, which makes what all blocks read: it is none."""
    wanted = [f"{EMBEDDING[model]}.{name}" for name in TIME] if model in EMBEDDING else []
    assert ends(laid_out(model)) == {*FIRST_AND_LAST[model], *wanted}
