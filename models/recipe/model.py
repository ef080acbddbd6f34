"""One decoder with the shapes of several families, and attention with any of the normalizers.

Everything that is stored has the name and the shape that it has in GGUF files.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Shape:
    """Of a model. `arch` is the architecture in the GGUF file."""

    arch: str = "llama"
    normalizer: str = "softmax"
    mask: str = "causal"
    n_vocab: int = 4096
    n_ctx: int = 512
    n_embd: int = 192
    n_layer: int = 4
    n_head: int = 6
    n_head_kv: int = 2
    n_ff: int = 640
    # Of what attention and FFN add, in training.
    dropout: float = 0.0
    # Of MLA: the latent's width, and the elements of a head's key that are rotated, and shared.
    kv_rank: int = 0
    n_rotated: int = 0

    @property
    def d_head(self):
        return self.n_embd // self.n_head

    def rotates(self, layer):
        """SmolLM3 leaves out every fourth layer (arXiv 2501.18795)."""
        return self.arch != "gpt2" and not (self.arch == "smollm3" and layer % 4 == 3)


# Normalizers. Scores [batch, head, query, key] in float32, which keys are seen, and what the module has of its
# own; weights of keys that are not seen are 0. The formulas and papers are those of `qkov norms`.


def masked(x, seen):
    return x.masked_fill(~seen, -math.inf)


def softmax(x, seen, _):
    return masked(x, seen).softmax(-1)


def with_sink(x, seen, logit):
    x = masked(x, seen)
    top = torch.maximum(x.amax(-1, keepdim=True), logit).detach()
    e = (x - top).exp()
    return e / (e.sum(-1, keepdim=True) + (logit - top).exp())


def softmax1(x, seen, _):
    return with_sink(x, seen, torch.zeros((), device=x.device))


def sinks(x, seen, logits):
    return with_sink(x, seen, logits[None, :, None, None])


def sigmoid(x, seen, _):
    n = seen.sum(-1, keepdim=True).float()
    return torch.sigmoid(x - n.log()) * seen


def relu2(x, seen, _):
    n = seen.sum(-1, keepdim=True).float()
    return x.relu().square() * seen / n


def softpick(x, seen, _):
    x = masked(x, seen)
    # Everything times e^-top.
    top = x.amax(-1, keepdim=True).clamp(min=0).detach()
    y = ((x - top).exp() - (-top).exp()).masked_fill(~seen, 0)
    return y.relu() / (y.abs().sum(-1, keepdim=True) + 1e-6 * (-top).exp())


class Entmax15(torch.autograd.Function):
    """The threshold by Newton's method from below, the gradient in closed form (arXiv 1905.05702)."""

    @staticmethod
    def forward(ctx, x):
        z = (x - x.amax(-1, keepdim=True)) / 2
        tau = torch.full_like(z[..., :1], -1.0)
        for _ in range(8):
            over = (z - tau).relu()
            square, slope = over.square().sum(-1, keepdim=True), over.sum(-1, keepdim=True)
            norm = square.sqrt()
            tau = tau + ((norm - 1) * square / (norm * slope)).clamp(min=0)
        w = (z - tau).relu().square()
        w = w / w.sum(-1, keepdim=True)
        ctx.save_for_backward(w)
        return w

    @staticmethod
    def backward(ctx, grad):
        root = ctx.saved_tensors[0].sqrt()
        d = grad * root
        return d - d.sum(-1, keepdim=True) / root.sum(-1, keepdim=True) * root


def entmax15(x, seen, _):
    # As far below any other score as makes no difference, but finite.
    return Entmax15.apply(x.masked_fill(~seen, -1e4))


def stick_breaking(x, seen, _):
    taken = F.softplus(x) * seen
    newer = taken.sum(-1, keepdim=True) - taken.cumsum(-1)
    return (x - F.softplus(x) - newer).exp() * seen


NORMALIZERS = {
    f.__name__: f for f in (softmax, softmax1, sinks, sigmoid, relu2, softpick, entmax15, stick_breaking)
}


def rotated(x, cos, sin, halves):
    """Rotary positions: pairs are neighbours, or of the two halves of a head, as GGUF's architectures have them."""
    if halves:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Norm(nn.Module):
    def __init__(self, n, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, x):
        # In float32 whatever is around it.
        y = x.float()
        if self.bias is None:
            return F.rms_norm(y, self.weight.shape, self.weight, 1e-5).type_as(x)
        return F.layer_norm(y, self.weight.shape, self.weight, self.bias, 1e-5).type_as(x)


class Attention(nn.Module):
    def __init__(self, s, layer):
        super().__init__()
        self.s, self.rotates = s, s.rotates(layer)
        linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=s.arch == "gpt2")
        q, kv = s.n_head * s.d_head, s.n_head_kv * s.d_head
        if s.arch == "gpt2":
            self.attn_qkv = linear(s.n_embd, q + 2 * kv)
        elif s.arch == "deepseek2":
            self.attn_q = linear(s.n_embd, s.n_head * (s.d_head + s.n_rotated))
            self.attn_kv_a_mqa = linear(s.n_embd, s.kv_rank + s.n_rotated)
            self.attn_kv_a_norm = Norm(s.kv_rank)
            self.attn_kv_b = linear(s.kv_rank, s.n_head * 2 * s.d_head)
        else:
            self.attn_q, self.attn_k, self.attn_v = linear(s.n_embd, q), linear(s.n_embd, kv), linear(s.n_embd, kv)
        if s.arch == "qwen3":
            self.attn_q_norm, self.attn_k_norm = Norm(s.d_head), Norm(s.d_head)
        if s.normalizer == "sinks":
            self.attn_sinks = nn.Parameter(torch.zeros(s.n_head))
        self.attn_output = linear(q, s.n_embd)

    def heads(self, x, n):
        return x.unflatten(-1, (n, -1)).transpose(1, 2)

    def rotate(self, x, table):
        return rotated(x, *table, halves=self.s.arch == "qwen3").type_as(x) if self.rotates else x

    def latent(self, x, table):
        """Keys and values through a latent (DeepSeek-V2, arXiv 2405.04434)."""
        s = self.s
        q = self.heads(self.attn_q(x), s.n_head)
        q = torch.cat((q[..., : s.d_head], self.rotate(q[..., s.d_head :], table)), -1)
        latent, shared = self.attn_kv_a_mqa(x).split((s.kv_rank, s.n_rotated), -1)
        k, v = self.heads(self.attn_kv_b(self.attn_kv_a_norm(latent)), s.n_head).chunk(2, -1)
        shared = self.rotate(shared[:, None], table).expand(-1, s.n_head, -1, -1)
        return q, torch.cat((k, shared), -1), v

    def forward(self, x, table, seen):
        s = self.s
        if s.arch == "deepseek2":
            q, k, v = self.latent(x, table)
        else:
            if s.arch == "gpt2":
                q, k, v = self.attn_qkv(x).chunk(3, -1)
            else:
                q, k, v = self.attn_q(x), self.attn_k(x), self.attn_v(x)
            q, k, v = self.heads(q, s.n_head), self.heads(k, s.n_head_kv), self.heads(v, s.n_head_kv)
            if s.arch == "qwen3":
                q, k = self.attn_q_norm(q), self.attn_k_norm(k)
            q, k = self.rotate(q, table), self.rotate(k, table)
            shared = s.n_head // s.n_head_kv
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        if s.normalizer == "softmax":
            causal = seen is None
            out = F.scaled_dot_product_attention(q, k, v, None if causal else seen, is_causal=causal)
        else:
            if seen is None:
                seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            own = self.attn_sinks if s.normalizer == "sinks" else None
            out = NORMALIZERS[s.normalizer](scores, seen, own).type_as(v) @ v
        return self.attn_output(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, s, layer):
        super().__init__()
        gpt2 = s.arch == "gpt2"
        self.attn_norm, self.ffn_norm = Norm(s.n_embd, gpt2), Norm(s.n_embd, gpt2)
        self.attention = Attention(s, layer)
        self.dropout = nn.Dropout(s.dropout)
        self.ffn_gate = None if gpt2 else nn.Linear(s.n_embd, s.n_ff, bias=False)
        self.ffn_up = nn.Linear(s.n_embd, s.n_ff, bias=gpt2)
        self.ffn_down = nn.Linear(s.n_ff, s.n_embd, bias=gpt2)

    def forward(self, x, table, seen):
        x = x + self.dropout(self.attention(self.attn_norm(x), table, seen))
        h = self.ffn_norm(x)
        up = self.ffn_up(h)
        h = F.gelu(up, approximate="tanh") if self.ffn_gate is None else F.silu(self.ffn_gate(h)) * up
        return x + self.dropout(self.ffn_down(h))


class Model(nn.Module):
    """Tokens to logits; embeddings are used both ways."""

    def __init__(self, s):
        super().__init__()
        self.s = s
        self.token_embd = nn.Embedding(s.n_vocab, s.n_embd)
        self.position_embd = nn.Embedding(s.n_ctx, s.n_embd) if s.arch == "gpt2" else None
        self.blk = nn.ModuleList(Block(s, i) for i in range(s.n_layer))
        self.output_norm = Norm(s.n_embd, s.arch == "gpt2")
        n = s.n_rotated or s.d_head
        angles = torch.outer(torch.arange(s.n_ctx), 1e4 ** (-torch.arange(0, n, 2) / n))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            last = name.endswith(("attn_output.weight", "ffn_down.weight"))
            std = 0.02 if "embd" in name else p.shape[1] ** -0.5 * ((2 * s.n_layer) ** -0.5 if last else 1)
            nn.init.normal_(p, std=std)

    def forward(self, ids, prompts=None):
        """Logits `[batch, token, vocabulary]` of `ids`. Of a model with the mask `prefix`, the tokens of each text
        before `prompts`, of shape `[batch]`, see each other."""
        n = ids.shape[1]
        x = self.token_embd(ids)
        if self.position_embd is not None:
            x = x + self.position_embd.weight[:n]
        seen = None
        if prompts is not None:
            at = torch.arange(n, device=ids.device)
            seen = (at[None, :] <= at[:, None]) | (at[None, None, :] < prompts[:, None, None])
            seen = seen[:, None]
        if torch.is_autocast_enabled(ids.device.type):
            x = x.bfloat16()
        table = self.cos[:n].type_as(x), self.sin[:n].type_as(x)
        for block in self.blk:
            x = block(x, table, seen)
        return F.linear(self.output_norm(x), self.token_embd.weight)
