"""Llama with LLaVA's projector as this training runs them, several questions to a picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.models import State

THETA = 10000.0
HIDDEN = -30000.0  # added to the score of a key that a query must not see


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
        return (exact * scale).to(x.dtype) * self.weight


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qkv, self.out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.out, self.down):
            linear.weight.data *= (2 * depth) ** -0.5

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor, last: bool) -> Tensor:
        """The tokens before those that `mask` has rows for are causal, and end before the last."""
        start = x.shape[1] - mask.shape[2]
        normal = self.norm1(x)
        batch, length, _ = x.shape
        qkv = self.qkv(normal).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, rotary) * q.shape[-1] ** -0.5, _rotate(k, rotary)
        mixed = (q[:, :, start:] @ k.transpose(-1, -2) + mask).softmax(-1) @ v
        if last:
            x = x[:, start:]
        elif start:
            # Two parts, for the second's mask is its own and the first never sees the second.
            causal = torch.full((start, start), HIDDEN, dtype=x.dtype, device=x.device).triu(1)
            scores = q[:, :, :start] @ k[:, :, :start].transpose(-1, -2) + causal
            mixed = torch.cat((scores.softmax(-1) @ v[:, :, :start], mixed), 2)
        x = x + self.out(mixed.transpose(1, 2).reshape(*x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Language(nn.Module):
    """Llama and the projector in front of it."""

    def __init__(
        self, vocabulary: int, tower: int, width: int, heads: int, inner: int, layers: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.randn(vocabulary, width) * 0.5)
        self.layers = nn.ModuleList(Layer(width, heads, inner, layers) for _ in range(layers))
        self.norm = Norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.5 * width**-0.5)
        self.projector = nn.Sequential(nn.Linear(tower, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.randn(width) * 0.5)

    def picture(self, features: Tensor) -> Tensor:
        """(..., tower width) features of the tower to (..., width)."""
        projected: Tensor = self.projector(features)
        return projected

    def rotary(self, positions: Tensor) -> Tensor:
        """(2, B, 1, L, head size) cosine and sine; apart, or compiled layers work them out anew."""
        size = self.token.shape[1] // self.heads
        rates = THETA ** -(torch.arange(0, size, 2) / size)
        angles = positions[..., None].float() * rates
        angles = torch.cat((angles, angles), -1)[:, None]
        return torch.stack((angles.cos(), angles.sin())).to(self.token.dtype)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Logits at the tokens that `wanted` names.

        Parameters
        ----------
        x : (B, L, width) embeddings
        rotary : of the positions
        mask : (B, 1, l, L) for the last l tokens as queries, 0 where one sees a key, HIDDEN
            elsewhere; the tokens before them are causal
        wanted : (n,) int64, indices into the B * l tokens
        """
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, rotary, mask, last=number == len(self.layers))
        chosen = x.flatten(0, 1)[wanted]
        logits: Tensor = self.head(self.norm(chosen))
        return logits

    def hf(self) -> State:
        state: State = {
            "model.embed_tokens.weight": self.token,
            "model.norm.weight": self.norm.weight,
            "lm_head.weight": self.head.weight,
            "model.image_newline": self.newline,
        }
        for index in (0, 2):
            linear = self.projector[index]
            assert isinstance(linear, nn.Linear)
            state[f"model.mm_projector.{index}.weight"] = linear.weight
            state[f"model.mm_projector.{index}.bias"] = linear.bias
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{index}"
            parts = zip("qkv", layer.qkv.weight.chunk(3), strict=True)
            state |= {f"{prefix}.self_attn.{name}_proj.weight": part for name, part in parts}
            gate, up = layer.gate_up.weight.chunk(2)
            state |= {
                f"{prefix}.self_attn.o_proj.weight": layer.out.weight,
                f"{prefix}.mlp.gate_proj.weight": gate,
                f"{prefix}.mlp.up_proj.weight": up,
                f"{prefix}.mlp.down_proj.weight": layer.down.weight,
                f"{prefix}.input_layernorm.weight": layer.norm1.weight,
                f"{prefix}.post_attention_layernorm.weight": layer.norm2.weight,
            }
        return state


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding in Llama's layout: the first half of a head is turned with the second."""
    cosine, sine = rotary[0], rotary[1]
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine
