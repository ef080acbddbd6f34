#!/usr/bin/env python3
"""Make a small random model of every architecture, NAME.gguf, and arch.bin: what Hugging Face
`transformers` computes with them.

usage: arch.py tests/golden
needs: pip install gguf==0.19.0 torch==1.13.* transformers==4.45.2 'numpy<2'

Weights are random, but far from a fresh network: attention is peaked, norms differ from 1, biases
from 0, epsilons are large. Matrices are rounded to the file's format before anything is computed,
so that both sides have the very same weights, and everything is computed in f64.

Records of arch.bin, little-endian: u32 length of the name, numbers of tokens, of positions, of
logits at a position, of tokens that follow; the name, u32 tokens, u32 positions, f32 logits after
each of these positions, u32 tokens that follow greedily.
"""

import math
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

# transformers asks for f32 inside norms, softmax and rotations whatever the model's type is.
torch.float32 = torch.float64
torch.Tensor.float = torch.Tensor.double

# GPT-2's byte-level BPE: bytes that print stand for themselves, others for characters from 256 on.
PRINTS = [b for b in range(256) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173)]
BYTES = [chr(b) for b in PRINTS] + [chr(256 + i) for i in range(256 - len(PRINTS))]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "a n"]
VOCAB = BYTES + [m.replace(" ", "") for m in MERGES] + ["<|endoftext|>"]
EOS = len(VOCAB) - 1
N_FOLLOW = 16
EPS = 3e-3

LLAMA = dict(
    vocab_size=len(VOCAB), rms_norm_eps=EPS, num_hidden_layers=2, attn_implementation="eager"
)
YARN = dict(factor=4.0, attention_factor=1.3, beta_fast=8.0, beta_slow=1.5)


def llama(**config):
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **config))


def qwen2(**config):
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA, **config))


def gpt2(**config):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCAB), layer_norm_epsilon=EPS, attn_implementation="eager", **config
        )
    )


def shape(n_embd, n_ff, n_head, n_head_kv, n_ctx, tied):
    return dict(
        hidden_size=n_embd,
        intermediate_size=n_ff,
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        max_position_embeddings=n_ctx,
        tie_word_embeddings=tied,
    )


# Name, format of matrices, number of tokens, model. Scaled rotations get enough tokens to see what
# was scaled, and more than an engine takes at once.
MODELS = [
    ("llama", "F32", 40, lambda: llama(**shape(32, 48, 4, 2, 64, False))),
    (
        "llama-freqs",
        "F16",
        280,
        lambda: llama(
            **shape(48, 80, 3, 1, 512, True),
            rope_theta=5000.0,
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=256,
            ),
        ),
    ),
    (
        "llama-linear",
        "F16",
        40,
        lambda: llama(
            **shape(48, 64, 4, 2, 64, False),
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            rope_scaling=dict(rope_type="linear", factor=2.5),
        ),
    ),
    (
        "llama-yarn",
        "F16",
        280,
        lambda: llama(
            **shape(48, 80, 3, 3, 256, True), rope_scaling=dict(rope_type="yarn", **YARN)
        ),
    ),
    ("qwen2", "Q8_0", 40, lambda: qwen2(**shape(64, 96, 4, 2, 64, True), rope_theta=1000.0)),
    ("gpt2", "F16", 40, lambda: gpt2(n_embd=48, n_layer=2, n_head=4, n_inner=80, n_positions=64)),
]


# What makes queries and keys.
PEAKED = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")


def is_head_norm(name):
    return any(s in name for s in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"))


def fill(model, ty, seed=2026, has_one_added=lambda name: False):
    """Random weights as the file's format can hold them, where it holds some of them with 1 added."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.empty(p.shape, dtype=torch.float64).normal_(generator=g)
        n_in = p.shape[0] if "c_" in name else p.shape[-1]
        if p.dim() == 1 or is_head_norm(name):
            p.data = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)
            p.data *= 1.6 if is_head_norm(name) else 1.0
        elif any(s in name for s in ("embed", "wte", "wpe", "lm_head")):
            p.data = 0.3 * noise
        else:
            peaked = any(s in name for s in PEAKED)
            p.data = noise * (1.5 if peaked else 1.0) / math.sqrt(n_in)
        q = gguf.GGMLQuantizationType[ty if p.dim() > 1 and not is_head_norm(name) else "F32"]
        rounded = gguf.dequantize(gguf.quantize(p.detach().numpy().astype(np.float32), q), q)
        p.data = torch.from_numpy(rounded.astype(np.float64)) - float(has_one_added(name))
    model.tie_weights()


def adjacent(rows, n_head):
    """Llama's file order: rows that rotate together side by side, not half a head apart."""
    return rows.reshape(n_head, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors(model, arch):
    """Names and f32 arrays as in a file."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():  # a tied output is listed once, as the embedding
        data = p.detach().numpy()
        if isinstance(modules[name.rsplit(".", 1)[0]], Conv1D) and data.ndim == 2:
            data = data.T
        if arch == "llama" and ".q_proj." in name:
            data = adjacent(data, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            data = adjacent(data, config.num_key_value_heads)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(
            data, dtype=np.float32
        )
    if (getattr(config, "rope_scaling", None) or {}).get("rope_type") == "llama3":
        rotary = model.model.rotary_emb
        plain = config.rope_theta ** -(
            torch.arange(0, rotary.inv_freq.numel()) / rotary.inv_freq.numel()
        )
        yield "rope_freqs.weight", (plain / rotary.inv_freq).numpy().astype(np.float32)


def common_metadata(w, config):
    w.add_block_count(config.num_hidden_layers)
    w.add_embedding_length(config.hidden_size)
    w.add_head_count(config.num_attention_heads)
    w.add_vocab_size(config.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(VOCAB)
    w.add_token_types([gguf.TokenType.NORMAL] * EOS + [gguf.TokenType.CONTROL])
    w.add_token_merges(MERGES)
    w.add_bos_token_id(EOS)
    w.add_eos_token_id(EOS)


def metadata(w, config):
    common_metadata(w, config)
    if config.model_type == "gpt2":
        w.add_context_length(config.n_positions)
        w.add_feed_forward_length(config.n_inner)
        w.add_layer_norm_eps(EPS)
        return
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(EPS)
    w.add_rope_freq_base(config.rope_theta)
    if hasattr(config, "head_dim"):
        w.add_rope_dimension_count(config.head_dim)
        w.add_key_length(config.head_dim)
        w.add_value_length(config.head_dim)
    scaling = config.rope_scaling or dict(rope_type="default")
    extended = 1
    if scaling["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        extended = int(scaling["factor"])
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling["factor"])
        w.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
        # A file has what comes on top of the paper's factor.
        w.add_rope_scaling_attn_factors(
            scaling["attention_factor"] / (0.1 * math.log(scaling["factor"]) + 1.0)
        )
        w.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    w.add_context_length(extended * config.max_position_embeddings)


def write(path, model, ty):
    config = model.config
    w = gguf.GGUFWriter(path, config.model_type)
    metadata(w, config)
    save(w, ty, tensors(model, config.model_type))


def save(w, ty, tensors, full=()):
    for name, data in tensors:
        is_matrix = data.ndim > 1 and not name.endswith("_norm.weight") and name not in full
        q = gguf.GGMLQuantizationType[ty if is_matrix else "F32"]
        raw = gguf.quantize(data, q)
        assert (gguf.dequantize(raw, q) == data).all() or name.startswith("rope_f"), name
        w.add_tensor(name, raw, raw_dtype=q)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def record(out, name, model, tokens):
    """Appends what a model computes with these tokens."""
    n_tokens = len(tokens)
    with torch.no_grad():
        result = model(torch.tensor([tokens]), output_attentions=True)
        logits = result.logits[0]
        follow, margins = [], []
        for _ in range(N_FOLLOW):
            best = model(torch.tensor([tokens + follow])).logits[0, -1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            follow.append(int(best.indices[0]))
    positions = sorted({0, 1, 2, n_tokens // 4, n_tokens // 2, n_tokens * 7 // 8, n_tokens - 1})
    assert logits.dtype == torch.float64 and min(margins) > 1e-2, (name, margins)
    # 1 is uniform attention, 1 / n_tokens a single key.
    spread = [
        float((-a * a.clamp(min=1e-99).log()).sum(-1)[0, :, -1].exp().mean()) / n_tokens
        for a in result.attentions
    ]
    print(
        name,
        "logits",
        round(float(logits.std()), 2),
        "margin",
        round(min(margins), 3),
        "keys attended",
        np.round(spread, 2),
    )
    sizes = [len(name), n_tokens, len(positions), len(VOCAB), N_FOLLOW]
    out.write(struct.pack("<5I", *sizes) + name.encode())
    out.write(np.array(tokens + positions, "<u4").tobytes())
    out.write(logits[positions].numpy().astype("<f4").tobytes())
    out.write(np.array(follow, "<u4").tobytes())


def main(folder):
    rng = np.random.default_rng(2026)
    with open(folder / "arch.bin", "wb") as out:
        for name, ty, n_tokens, make in MODELS:
            model = make().double().eval()
            fill(model, ty)
            write(folder / f"{name}.gguf", model, ty)
            record(out, name, model, rng.integers(0, len(VOCAB), n_tokens).tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
