"""The same model in PyTorch, eager: fused scaled dot-product attention and fused AdamW.

python -m benchmarks.steps.torch_eager --size small       (needs the extra `benchmark`)
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import nn
from torch.nn import functional

from benchmarks.steps.sizes import B2, EPSILON, LEARNING_RATE, ROPE_THETA, WEIGHT_DECAY, Size
from benchmarks.workers import serve


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] with tables [T, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, size: Size):
        super().__init__()
        width, self.heads = size.width, size.heads
        self.mixer_norm, self.ffn_norm = nn.RMSNorm(width, eps=EPSILON), nn.RMSNorm(width, eps=EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, size.hidden, bias=False), nn.Linear(width, size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, T, width]."""
        batch, length, width = x.shape
        split = self.qkv(self.mixer_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        mixed = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        h = self.ffn_norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self, size: Size):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=EPSILON)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        units = size.width // size.heads
        angle = torch.arange(size.length)[:, None] * ROPE_THETA ** (-torch.arange(0, units, 2) / units)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> [B, T, vocabulary]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def main() -> None:
    """Serve steps."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--size", type=Size.parse, required=True)
    size = arguments.parse_args().size
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    tokens, targets = (torch.from_numpy(rows).long() for rows in size.rows())
    model = Model(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, B2), weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    serve("PyTorch eager", size.tokens, step)


if __name__ == "__main__":
    main()
