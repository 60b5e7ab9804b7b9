"""A language model that drops visual tokens between its layers, slowly, one row at a time.

Nothing leaves the sequence: what is dropped is masked with -inf from then on. Where tokens are
merged, the sequence is built anew. Everything is float64, without a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

MINUS = float("-inf")


@dataclass
class Rule:
    """How to drop: at {layer: tokens that stay}.

    `rows`: of which tokens the attention is asked, from (embeds, visual); `of`: "before" or "next";
    `score`: of the attention (heads, rows, n), what RoPE alone gives (rows, n), the visual tokens;
    `merge`: of the dropped states, the best first, and their order in the sequence.
    """

    at: dict
    renumbers: bool = False
    of: str = "before"
    rows: object = None
    score: object = None
    merge: object = None


@dataclass(eq=False)
class Token:
    state: torch.Tensor
    visual: bool
    position: int
    column: int | None  # of the prompt; None for what was merged or generated
    alive: bool = True
    generated: bool = False


@dataclass
class Trace:
    """Logits of the last token, and after each stage the columns of the visual tokens that stay."""

    logits: torch.Tensor
    stages: dict = field(default_factory=dict)
    entering: list = field(default_factory=list)


def raters(embeds, visual):
    """Columns of the text behind the images that rate."""
    end = max(i for i, v in enumerate(visual) if v) + 1
    words = embeds[end:]
    shares = [0.0] * len(words)
    images = [embeds[i] for i, v in enumerate(visual) if v]
    for image in images:
        row = torch.stack([image @ word for word in words]).softmax(0).tolist()
        shares = [share + r / len(images) for share, r in zip(shares, row, strict=True)]
    mean = sum(shares) / len(shares)
    return {end + i for i, share in enumerate(shares) if share > mean} or set(
        range(end, len(embeds))
    )


def corrected(attention, alone, visual):
    """SparseVLM 2.0: less RoPE's own part, mean of the 14 heads that look most at the image."""
    shares = attention / alone
    heads = sorted(range(len(shares)), key=lambda h: (-float(shares[h][:, visual].sum()), h))
    return shares[heads[:14]].mean((0, 1))


def merged(states, _order):
    """SparseVLM 1.5: the best of what goes, clustered around density peaks, as means."""
    x = states[: int(0.3 * len(states)) + 1]
    count, n = len(x) // 10 + 1, len(x)
    far = [[float((a - b).norm()) / math.sqrt(len(a)) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    # Two nearest neighbours of each other are as dense: the lower index is the denser.
    rank = {i: r for r, i in enumerate(sorted(range(n), key=lambda i: (-round(density[i], 12), i)))}
    most = max(map(max, far))
    apart = [min([far[i][j] for j in range(n) if rank[j] < rank[i]] or [most]) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-apart[i] * density[i], i))[:count]
    groups = {c: [c] for c in centres}
    for i in range(n):
        if i not in groups:
            groups[min(centres, key=lambda c: far[c][i])].append(i)
    return [
        sum(x[i] for i in members) / (len(members) + 1e-6)
        for members in (groups[c] for c in centres)
    ]


class SlowLlama:
    """The decoder and the head of a Llama or Mistral."""

    def __init__(self, model):
        self.weights = {
            name.removeprefix("base_model.model."): w.double()
            for name, w in model.state_dict().items()
            if w.is_floating_point()
        }
        config = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.depth, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.width = config.hidden_size // self.heads

    def weight(self, layer, name):
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def norm(self, x, weight):
        x = x.float()  # as everywhere
        return weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()).double()

    def turn(self, x, positions):
        """RoPE: pairs (i, i + d / 2) turned by position / 10000 ** (2 i / d).

        Angles are float32 as everywhere: of position 900 they are off by more than 1e-5.
        """
        half = self.width // 2
        speeds = 1 / 10000 ** (torch.arange(half, dtype=torch.float32) / half)
        angle = torch.tensor(positions)[:, None].float() * speeds
        cos, sin = angle.cos().double(), angle.sin().double()
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def heads_of(self, layer, x, side, positions):
        flat = (
            self.norm(x, self.weight(layer, "input_layernorm"))
            @ self.weight(layer, f"self_attn.{side}_proj").T
        )
        split = flat.view(len(x), -1, self.width).transpose(0, 1)
        split = split.repeat_interleave(self.heads // len(split), 0)
        return split if side == "v" else self.turn(split, positions)

    def attention(self, layer, tokens):
        """(heads, n, n) after the softmax; dropped tokens are seen by themselves alone."""
        x = torch.stack([token.state for token in tokens])
        positions = [token.position for token in tokens]
        q, k = (self.heads_of(layer, x, side, positions) for side in "qk")
        return self.softmax(q @ k.transpose(1, 2) / math.sqrt(self.width), tokens)

    def softmax(self, logits, tokens):
        n = len(tokens)
        seen = torch.tensor([token.alive for token in tokens])[None] & (
            torch.arange(n)[None] <= torch.arange(n)[:, None]
        )
        return logits.masked_fill(~(seen | torch.eye(n, dtype=torch.bool)), MINUS).softmax(-1)

    def rope_alone(self, tokens):
        """(n, n), the products of vectors of ones, scaled."""
        ones = torch.ones(len(tokens), self.width, dtype=torch.float64)
        turned = self.turn(ones, [token.position for token in tokens])
        return turned @ turned.T / math.sqrt(self.width)

    def run_layer(self, layer, tokens):
        x = torch.stack([token.state for token in tokens])
        values = self.heads_of(layer, x, "v", None)
        mixed = (self.attention(layer, tokens) @ values).transpose(0, 1).flatten(1)
        x = x + mixed @ self.weight(layer, "self_attn.o_proj").T
        inner = self.norm(x, self.weight(layer, "post_attention_layernorm"))
        gate, up, down = (self.weight(layer, f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
        for token, state in zip(tokens, x, strict=True):
            token.state = state

    def drop(self, layer, tokens, rule, raters, before, trace):
        """The tokens from `layer` on."""
        attention = self.attention(layer, tokens) if rule.of == "next" else before
        alone = self.rope_alone(tokens)
        prompt = [t for t in tokens if not t.generated]
        last = tokens.index(prompt[-1])
        if raters is None:
            rows = [last]
        else:
            rows = [i for i, t in enumerate(tokens) if t.column in raters and t.column is not None]
        visual = [i for i, t in enumerate(tokens) if t.visual and t.alive]
        if rule.score is None:
            scores = attention[:, rows].mean((0, 1))
        else:
            scores = rule.score(attention[:, rows], alone[rows], visual)
        count = rule.at[layer]
        count = count(len(visual)) if callable(count) else count
        best = sorted(visual, key=lambda i: (-float(scores[i]), i))
        for i in best[count:]:
            tokens[i].alive = False
        if rule.merge is not None and best[count:]:
            dropped = best[count:]
            made = rule.merge(torch.stack([tokens[i].state for i in dropped]), dropped)
            end = max(i for i, t in enumerate(tokens) if t.visual and (t.alive or i in dropped)) + 1
            new = [Token(state, True, 0, None) for state in made]
            tokens = tokens[:end] + new + tokens[end:]
            tokens = [t for t in tokens if t.alive]
        if rule.renumbers:
            rank = 0
            for token in tokens:
                token.position = rank
                rank += token.alive
        trace.stages[layer] = [t.column for t in tokens if t.visual and t.alive]
        return tokens

    @torch.no_grad()
    def __call__(self, embeds, visual, rule, generated=()):
        """Of one prompt (n, D) with its visual tokens (n,), and ids that were generated since."""
        embedding = self.weights["model.embed_tokens.weight"]
        tokens = [
            Token(state.double(), bool(is_visual), i, i)
            for i, (state, is_visual) in enumerate(zip(embeds, visual, strict=True))
        ]
        for i, number in enumerate(generated):
            tokens.append(Token(embedding[number], False, len(embeds) + i, None, generated=True))
        raters = None if rule.rows is None else rule.rows(embeds.double(), visual)
        trace, before = Trace(torch.empty(0)), None
        for layer in range(self.depth):
            if layer in rule.at:
                tokens = self.drop(layer, tokens, rule, raters, before, trace)
            trace.entering.append(sum(t.visual and t.alive for t in tokens))
            before = self.attention(layer, tokens)
            self.run_layer(layer, tokens)
        last = self.norm(tokens[-1].state, self.weights["model.norm.weight"])
        trace.logits = self.weights["lm_head.weight"] @ last
        return trace

    def generate(self, embeds, visual, rule, count, banned=()):
        """(ids, logits (count, vocabulary)), greedily."""
        ids, logits = [], []
        for _ in range(count):
            found = self(embeds, visual, rule, ids).logits
            logits.append(found)
            allowed = found.clone()
            allowed[list(banned)] = MINUS
            ids.append(int(allowed.argmax()))
        return ids, torch.stack(logits)
