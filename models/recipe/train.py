"""Trains models, each by its file.

usage: train.py CONFIG.toml.. --tokens TOKENS.bin --out FOLDER [--valid TEXT] [--steps N] [--batch N]

Writes FOLDER/NAME.pt (weights, matrices in float16), FOLDER/NAME.jsonl (the log) and, until then, FOLDER/NAME.resume, from
which an interrupted run goes on. The same file, tokens, seed and kind of machine give the same model.
"""

import argparse
import json
import os
import pathlib
import time
import tomllib

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import corpus
from model import Model, Shape


def config(path):
    """A file's settings, over those of the file that it extends."""
    path = pathlib.Path(path)
    own = tomllib.loads(path.read_text())
    base = config(path.parent / own.pop("extends")) if "extends" in own else {}
    merged = {**base, **own, "model": {**base.get("model", {}), **own.get("model", {})}}
    return merged


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024), as large as Adam's steps (Liu et al., arXiv 2502.16982)."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                grads = [p.grad for p in params]
                moments = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])
                step = orthogonal(torch.stack(ahead)) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(step.unbind()), alpha=-group["lr"])


def orthogonal(g):
    """The nearest matrices `[n, rows, columns]` with all singular values near 1, by a quintic iteration."""
    x = g.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x if wide else x.mT).type_as(g)


def batch(tokens, n_ctx, n_batch, seed):
    """Texts from anywhere, `[n_batch, n_ctx + 1]`, each after `<|end|>`; and lengths of prompts in them."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, len(tokens) - n_ctx - 1, n_batch)
    start = torch.from_numpy(start).to(tokens.device)
    at = start[:, None] + torch.arange(n_ctx + 1, device=tokens.device)
    ids = tokens[at].long() & 0xFFFF
    ids[:, 0] = corpus.END
    return ids, torch.from_numpy(rng.integers(1, n_ctx, n_batch)).to(tokens.device)


def loss_of(model, ids, prompts, asked=1):
    """Mean negative log-likelihood of tokens, of those that follow prompts if there are any. Words that were asked for
    count `asked` times."""
    tokens = ids % corpus.ASKED
    goals = tokens[:, 1:]
    nll = F.cross_entropy(model(tokens[:, :-1], prompts).float().flatten(0, 1), goals.flatten(), reduction="none")
    weight = torch.where(ids[:, 1:] < corpus.ASKED, 1.0, asked)
    if prompts is not None:
        weight = weight * (torch.arange(goals.shape[1], device=ids.device)[None] >= prompts[:, None] - 1)
    return (nll * weight.flatten()).sum() / weight.sum()


def optimizers(model, c):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embd" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embd" in n]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    decay = c.get("weight_decay", 0.1)
    adam = [dict(params=embeddings, weight_decay=decay), dict(params=vectors, weight_decay=0.0)]
    return [Muon(matrices, c["lr"], weight_decay=decay), torch.optim.AdamW(adam, c["lr"], betas=(0.9, 0.95), fused=True)]


def rate(step, steps):
    """Share of the learning rate: up, level, and down to 0."""
    return min(1, (step + 1) / (0.03 * steps), (steps - step) / (0.6 * steps))


def train(c, tokens, valid, out, compiled):
    device = tokens.device
    shape = Shape(**c["model"])
    torch.manual_seed(c["seed"])
    model = Model(shape).to(device)
    if "start" in c:
        start = torch.load(out / f"{c['start']}.pt")["weights"]
        model.load_state_dict({n: p.float() for n, p in start.items()})
    opts = optimizers(model, c)
    n_params = sum(p.numel() for p in model.parameters())
    resume, done = out / f"{c['name']}.resume", 0
    if resume.exists():
        saved = torch.load(resume, map_location=device)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"]):
            opt.load_state_dict(state)
        done = saved["step"]
    log = open(out / f"{c['name']}.jsonl", "a" if done else "w")
    put = lambda **line: print(json.dumps(line), file=log, flush=True)
    if not done:
        put(config=c, parameters=n_params, tokens=c["steps"] * c["batch"] * c.get("window", shape.n_ctx), device=device.type)
    prefix = shape.mask == "prefix"
    run = torch.compile(loss_of) if compiled else loss_of

    def loss(step):
        ids, prompts = batch(tokens, c.get("window", shape.n_ctx), c["batch"], [c["seed"], step])
        # A region for every step: a longer one would keep the weights of its first step in bfloat16.
        with torch.autocast(device.type, torch.bfloat16):
            return run(model, ids, prompts if prefix else None, c.get("asked", 1.0))

    def validate():
        total = 0
        model.eval()
        n = min(16, c["batch"])
        for i in range(64 // n):
            ids, prompts = batch(valid, shape.n_ctx, n, [2**32, i])
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                total += loss_of(model, ids, prompts if prefix else None).item()
        model.train()
        return total / (64 // n)

    began, bar = time.time(), tqdm(range(done, c["steps"]), desc=c["name"], initial=done, total=c["steps"], mininterval=5)
    for step in bar:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = c["lr"] * rate(step, c["steps"])
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        last = step + 1 == c["steps"]
        if step % 50 == 0 or last:
            bar.set_postfix_str(f"loss {value.item():.3f}", refresh=False)
            put(step=step, loss=value.item(), seconds=time.time() - began)
        if valid is not None and (step % 500 == 499 or last):
            put(step=step, valid=validate())
        if step % 500 == 499 and not last:
            state = dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step + 1)
            torch.save(state, f"{resume}.new")
            os.replace(f"{resume}.new", resume)
    weights = {n: p.float().cpu() for n, p in model.state_dict().items()}
    if "mix" in c:
        # Between what it started from and what it became is better than either (Wortsman et al., arXiv 2109.01903).
        weights = {n: torch.lerp(start[n].float(), p, c["mix"]) for n, p in weights.items()}
    # As they go into the GGUF file.
    weights = {n: p.half() if p.dim() == 2 else p for n, p in weights.items()}
    torch.save(dict(config=c, weights=weights), out / f"{c['name']}.pt")
    resume.unlink(missing_ok=True)


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("configs", nargs="+", type=pathlib.Path)
    args.add_argument("--tokens", required=True)
    args.add_argument("--valid", help="text on which the loss is told every 500 steps")
    args.add_argument("--out", required=True, type=pathlib.Path)
    args.add_argument("--plain", action="store_true", help="without torch.compile, which needs a C++ compiler on a CPU")
    args.add_argument("--steps", type=int)
    args.add_argument("--batch", type=int)
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.from_numpy(np.fromfile(args.tokens, np.uint16).astype(np.int16)).to(device)
    valid = None
    if args.valid:
        ids = corpus.Encoder().ids(corpus.read(args.valid))
        valid = torch.tensor(ids, dtype=torch.int16, device=device)
    for path in args.configs:
        c = config(path)
        c |= {k: v for k, v in (("steps", args.steps), ("batch", args.batch)) if v}
        if not (args.out / f"{c['name']}.pt").exists():
            train(c, tokens, valid, args.out, not args.plain)


if __name__ == "__main__":
    main()
