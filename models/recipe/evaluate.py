"""Perplexity as `qkov eval` has it: windows of a context, their second halves scored, each after `<|end|>`.

usage: evaluate.py NAME.pt TEXT [--ctx N] [--windows N]
"""

import argparse
import math

import torch
import torch.nn.functional as F

import corpus
from model import Model, Shape


def nlls(model, windows, n_first):
    """Of the tokens after the first `n_first`, which a mask may take for a prompt."""
    prompts = torch.full((len(windows),), n_first) if model.s.mask == "prefix" else None
    logits = model(windows, prompts)[:, n_first:-1]
    return F.cross_entropy(logits.flatten(0, 1).double(), windows[:, n_first + 1 :].flatten(), reduction="none")


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("model")
    args.add_argument("text")
    args.add_argument("--ctx", type=int, default=512)
    args.add_argument("--windows", type=int)
    args = args.parse_args()
    saved = torch.load(args.model)
    model = Model(Shape(**saved["config"]["model"]))
    model.load_state_dict({n: p.float() for n, p in saved["weights"].items()})
    model.eval()
    text = corpus.read(args.text)
    ids = torch.tensor([corpus.END] + corpus.Encoder().ids(text))
    windows = ids[: len(ids) // args.ctx * args.ctx].view(-1, args.ctx)[: args.windows]
    windows[:, 0] = corpus.END
    with torch.no_grad():
        nll = torch.cat([nlls(model, part, args.ctx // 2) for part in windows.split(8)])
    # Characters for a token are those of the whole text.
    bits = nll.mean().item() / math.log(2) * len(ids) / len(text)
    error = nll.std().item() / math.sqrt(len(nll))
    perplexity = math.exp(nll.mean().item())
    print(f"perplexity {perplexity:.4f} +- {perplexity * error:.4f}, {len(nll)} tokens, {bits:.4f} bits per character")


if __name__ == "__main__":
    main()
