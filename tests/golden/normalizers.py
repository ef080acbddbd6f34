#!/usr/bin/env python3
"""Make normalizers.bin: what a model computes whose softmax is replaced.

usage: normalizers.py tests/golden
needs: as arch.py, whose first model it takes

Every normalizer is written from its paper's definition, in f64, with sorts and bisections instead of
the closed forms and iterations that a runtime uses. Records are those of arch.bin, with the
normalizer, as `--norm` takes it, for a name, and no tokens that follow.
"""

import math
import struct
import sys
from pathlib import Path

import numpy as np
import torch

from arch import MODELS, VOCAB, fill


def softmax(x):
    return torch.exp(x - torch.logsumexp(x, 0))


def with_sink(x, s):
    return softmax(torch.cat([x, torch.tensor([float(s)])]))[:-1]


def root(falling, low, high):
    """Where a falling function is 0, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def entmax(x, alpha):
    z, r = (alpha - 1) * x, 1 / (alpha - 1)
    weights = lambda tau: (z - tau).clamp(min=0) ** r
    top = float(z.max())
    return weights(root(lambda tau: float(weights(tau).sum()) - 1, top - 1, top))


def softpick(x):
    y = torch.exp(x) - 1
    return y.clamp(min=0) / (y.abs().sum() + 1e-6)


def stick_breaking(x):
    left, weights = 1.0, torch.zeros_like(x)
    for j in reversed(range(len(x))):
        share = torch.sigmoid(x[j])
        weights[j] = left * share
        left = left * (1 - share)
    return weights


def top_p(x, p):
    w = softmax(x)
    order = torch.argsort(w, descending=True)
    kept, mass = torch.zeros_like(w), 0.0
    for j in order:
        if mass >= p:
            break
        kept[j], mass = w[j], mass + float(w[j])
    return kept / kept.sum()


NORMALIZERS = {
    "softmax1": lambda x: with_sink(x, 0),
    "softmax_n:n=7": lambda x: with_sink(x, math.log(7)),
    "sink:s=1.5": lambda x: with_sink(x, 1.5),
    "sigmoid": lambda x: torch.sigmoid(x - math.log(len(x))),
    "softpick": softpick,
    "sparsemax": lambda x: entmax(x, 2.0),
    "entmax15": lambda x: entmax(x, 1.5),
    "entmax:alpha=1.25": lambda x: entmax(x, 1.25),
    "entmax:alpha=1.05": lambda x: entmax(x, 1.05),
    "clipped:alpha=0.5": lambda x: (softmax(x) * (1 + 0.5 / len(x)) - 0.5 / len(x)).clamp(0, 1),
    "ssmax:s=0.43": lambda x: softmax(0.43 * math.log(len(x)) * x),
    "relu2": lambda x: x.clamp(min=0) ** 2 / len(x),
    "stick_breaking": stick_breaking,
    "top_k:k=5": lambda x: softmax(x.masked_fill(x < x.sort(descending=True)[0][:5][-1], -math.inf)),
    "top_p:p=0.8": lambda x: top_p(x, 0.8),
    "softcap:cap=2": lambda x: softmax(2 * torch.tanh(x / 2)),
    "squareplus:norm=l2": lambda x: (lambda y: y / y.norm())((x + (x * x + 4).sqrt()) / 2),
    "softplus:norm=l1": lambda x: (lambda y: y / y.sum())(torch.log1p(torch.exp(x))),
}


def swapped(row):
    """`softmax` for scores in which invisible keys have the smallest number."""

    def normalize(scores, dim, dtype=None):
        assert dim == -1
        out = torch.zeros_like(scores)
        for head in range(scores.shape[1]):
            for i in range(scores.shape[2]):
                out[0, head, i, : i + 1] = row(scores[0, head, i, : i + 1])
        return out

    return normalize


def main(folder):
    name, ty, n_tokens, make = MODELS[0]
    model = make().double().eval()
    fill(model, ty)
    tokens = np.random.default_rng(7).integers(0, len(VOCAB), n_tokens).tolist()
    positions = [0, 1, 2, n_tokens // 2, n_tokens - 1]
    plain = torch.nn.functional.softmax
    with open(folder / "normalizers.bin", "wb") as out, torch.no_grad():
        trained = model(torch.tensor([tokens])).logits[0]
        for text, row in NORMALIZERS.items():
            torch.nn.functional.softmax = swapped(row)
            logits = model(torch.tensor([tokens])).logits[0]
            torch.nn.functional.softmax = plain
            moved = float((logits - trained).abs().max())
            print(f"{text}: logits differ from softmax by up to {moved:.2f}")
            assert moved > 1e-2
            sizes = [len(text), n_tokens, len(positions), len(VOCAB), 0]
            out.write(struct.pack("<5I", *sizes) + text.encode())
            out.write(np.array(tokens + positions, "<u4").tobytes())
            out.write(logits[positions].numpy().astype("<f4").tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
