"""CLIP and Llama as this training runs them: the same sums, fewer kernels, HF's names on request.

Working weights are bfloat16, so that a CPU's matrix unit is used; see `Masters` for the float32
ones that the optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

State = dict[str, Tensor]


class Block(nn.Module):
    """A CLIP layer, of the vision tower or the text encoder."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-5), nn.LayerNorm(width, 1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if causal:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # On a CPU the fused kernel's backward takes five times as long as these three steps.
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        inner = self.fc1(self.norm2(x))
        # quick_gelu, x * sigmoid(1.702 x), as one kernel.
        return x + self.fc2(F.silu(1.702 * inner) / 1.702)

    def hf(self, prefix: str) -> State:
        width = self.out.in_features
        state = {}
        for index, part in enumerate(("q", "k", "v")):
            rows = slice(index * width, (index + 1) * width)
            state[f"{prefix}.self_attn.{part}_proj.weight"] = self.qkv.weight[rows]
            state[f"{prefix}.self_attn.{part}_proj.bias"] = self.qkv.bias[rows]
        for name, module in (
            ("layer_norm1", self.norm1),
            ("layer_norm2", self.norm2),
            ("self_attn.out_proj", self.out),
            ("mlp.fc1", self.fc1),
            ("mlp.fc2", self.fc2),
        ):
            state |= {
                f"{prefix}.{name}.weight": module.weight,
                f"{prefix}.{name}.bias": module.bias,
            }
        return state


class Vision(nn.Module):
    """CLIP's vision tower with its projection. Pixels come as patches, normalised."""

    def __init__(self, width: int, heads: int, inner: int, layers: int, grid: int) -> None:
        super().__init__()
        self.patch = nn.Linear(588, width, bias=False)
        self.cls = nn.Parameter(torch.randn(width) * 0.3)
        self.position = nn.Parameter(positions(grid, width))
        self.before = nn.LayerNorm(width, 1e-5)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.after = nn.LayerNorm(width, 1e-5)
        self.project = nn.Linear(width, width, bias=False)
        _start(self.blocks, layers)

    def embed(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, n, 588) pixels of the patches `keep` (B, n), or of all, to (B, 1 + n, width)."""
        position = self.position[1:][None] if keep is None else self.position[1:][keep]
        first = (self.cls + self.position[0]).expand(len(pixels), 1, -1)
        return self.before(torch.cat((first, self.patch(pixels) + position), 1))

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs of the last layer but one and of the last, (B, 1 + n, width) each."""
        x = self.embed(pixels, keep)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return x, self.blocks[-1](x)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, n, width), what LLaVA gives to the projector."""
        x = self.embed(pixels)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return x[:, 1:]

    def hf(self) -> State:
        name = "vision_model"
        width = self.cls.shape[0]
        state = {
            f"{name}.embeddings.class_embedding": self.cls,
            f"{name}.embeddings.patch_embedding.weight": self.patch.weight.view(width, 3, 14, 14),
            f"{name}.embeddings.position_embedding.weight": self.position,
            "visual_projection.weight": self.project.weight,
        }
        for part, norm in (("pre_layrnorm", self.before), ("post_layernorm", self.after)):
            state |= {f"{name}.{part}.weight": norm.weight, f"{name}.{part}.bias": norm.bias}
        return state | _layers(self.blocks, f"{name}.encoder.layers")


class Text(nn.Module):
    """CLIP's text encoder with its projection."""

    def __init__(self, vocabulary: int, width: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(vocabulary, width) * 0.3)
        self.position = nn.Parameter(torch.randn(77, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.after = nn.LayerNorm(width, 1e-5)
        self.project = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """(B, L) ids, (B,) index of the end token, to (B, width), of unit length."""
        x = self.token[ids] + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        last = self.after(x[torch.arange(len(ids)), ends])
        return F.normalize(self.project(last).float(), dim=-1)

    def hf(self) -> State:
        name = "text_model"
        return {
            f"{name}.embeddings.token_embedding.weight": self.token,
            f"{name}.embeddings.position_embedding.weight": self.position,
            f"{name}.final_layer_norm.weight": self.after.weight,
            f"{name}.final_layer_norm.bias": self.after.bias,
            "text_projection.weight": self.project.weight,
            "logit_scale": self.scale,
            **_layers(self.blocks, f"{name}.encoder.layers"),
        }


class Masters:
    """float32 copies of bfloat16 parameters, for AdamW to step, and a moving average of them."""

    def __init__(self, model: nn.Module, decay: float = 0.05, average: float = 0.999) -> None:
        self.model = model
        self.average = average
        self.names = [name for name, _ in model.named_parameters()]
        self.working = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.working]
        self.mean = [p.clone() for p in self.masters]
        self.steps = 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.masters if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in self.masters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.98),
            fused=True,
        )
        model.bfloat16()

    def step(self, rate: float, clip: float = 1.0) -> float:
        """One step at a learning rate; the norm of the gradient before clipping."""
        for master, working in zip(self.masters, self.working, strict=True):
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        weight = min(self.average, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, self.masters, 1 - weight)
        with torch.no_grad():
            for working, master in zip(self.working, self.masters, strict=True):
                working.copy_(master)
        return float(norm)

    def state(self) -> State:
        return dict(zip(self.names, (p.clone() for p in self.mean), strict=True))


def positions(grid: int, width: int) -> Tensor:
    """(1 + grid * grid, width): sines of row and column, so that neighbours start out alike."""
    frequencies = math.pi / 2 / grid * 2 ** torch.linspace(0, 3.2, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies
    side = torch.cat((angles.sin(), angles.cos()), 1)
    rows, columns = side[:, None].expand(-1, grid, -1), side[None].expand(grid, -1, -1)
    table = torch.cat((rows, columns), -1).reshape(grid * grid, width)
    return torch.cat((torch.zeros(1, width), 0.5 * table))


def learning_rate(share: float, peak: float, warm: float = 0.03) -> float:
    """Linear warm-up, then a cosine to a fiftieth; share : of all steps done."""
    if share < warm:
        return peak * share / warm
    return peak * (
        0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, (share - warm) / (1 - warm)))) / 2
    )


def _start(blocks: nn.ModuleList, layers: int) -> None:
    """Attention that starts out local: queries and keys alike, so that like attends to like.

    After Trockman and Kolter, "Mimetic initialization of self-attention layers" (2023).
    """
    for block in blocks:
        assert isinstance(block, Block)
        width = block.out.in_features
        size = width // block.heads
        with torch.no_grad():
            for head in range(block.heads):
                product = 0.5 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width)
                left, values, right = torch.linalg.svd(product)
                root = values[:size].sqrt()
                rows = slice(head * size, (head + 1) * size)
                block.qkv.weight[rows] = (left[:, :size] * root).T
                block.qkv.weight[width:][rows] = right[:size] * root[:, None]
            nn.init.normal_(block.qkv.weight[2 * width :], std=width**-0.5)
            block.qkv.bias.zero_()
            for linear, gain in ((block.out, 1.0), (block.fc1, 1.0), (block.fc2, 1.0)):
                branch = (2 * layers) ** -0.5 if linear is not block.fc1 else 1.0
                nn.init.normal_(linear.weight, std=gain * branch * linear.in_features**-0.5)
                linear.bias.zero_()


def _layers(blocks: nn.ModuleList, prefix: str) -> State:
    state: State = {}
    for index, block in enumerate(_blocks(blocks)):
        state |= block.hf(f"{prefix}.{index}")
    return state


def _blocks(blocks: nn.ModuleList) -> Iterator[Block]:
    for block in blocks:
        assert isinstance(block, Block)
        yield block
