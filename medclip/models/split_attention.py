"""torch's multi-head attention as two linear layers around the product, for adapters, which attach to layers.

`nn.MultiheadAttention` holds one matrix for query, key and value, and reads its `out_proj` without calling it. peft
0.21 adapts it by adding the factors' product to the frozen weights before each call and subtracting it after: they
drift by rounding from step to step, the product of `out_proj` is counted twice, and dropout is left out.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

IN_PROJ = "fused_in_proj"  # its weight is `in_proj_weight` in torch's names, and in open_clip's


class SplitAttention(nn.Module):
    """Self-attention of the same function and the same parameters as `source`, which must have batches first.

    In the state dict, `fused_in_proj.weight` and `fused_in_proj.bias` stand for `in_proj_weight` and `in_proj_bias`.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        assert source.in_proj_weight is not None and source.in_proj_bias is not None and source.batch_first
        assert source.bias_k is None and not source.add_zero_attn
        self.heads = source.num_heads
        self.dropout = source.dropout
        # The parameters themselves move over, no copies.
        self.fused_in_proj = nn.Linear(source.embed_dim, 3 * source.embed_dim, device="meta")
        self.fused_in_proj.weight, self.fused_in_proj.bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj = source.out_proj

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b n d"],
        value: Float[Tensor, "b n d"],
        need_weights: bool = False,
        attn_mask: Float[Tensor, "n n"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], None]:
        assert query is key is value and not need_weights
        b, n, d = query.shape
        q, k, v = self.fused_in_proj(query).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
            if attn_mask.ndim == 3:  # (b * heads, n, n), as torch's has it
                attn_mask = attn_mask.view(b, self.heads, n, n)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(mixed.transpose(1, 2).reshape(b, n, d)), None
