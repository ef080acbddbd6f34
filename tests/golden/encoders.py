#!/usr/bin/env python3
"""Make a small random model of every family of encoders, NAME.gguf, and encoders.bin: what Hugging Face
`transformers` computes with them. Weights are those of arch.py.

usage: encoders.py tests/golden
needs: as families.py

Names, keys and the order of rows are those of llama.cpp's converter.

Records of encoders.bin, little-endian: u32 length of the name, of the text, number of tokens, width of
a state; the name, the text, u32 tokens, f32 states of all tokens, their mean.
"""

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer, NomicBertConfig, NomicBertModel

import arch
from arch import EPS, fill, save

# What makes queries and keys in BERT.
arch.PEAKED += ("self.query.", "self.key.")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "rain", "in", "hello", "world", "cafe", "##ing", "中", "文", *"0123456789.,!?-'"]
VOCAB = SPECIAL + list(LETTERS) + [f"##{c}" for c in LETTERS] + WORDS

# Seeds of weights with which keys have an inverse.
SEEDS = {"bert": 2026, "nomic-bert": 29}

# What is added to embeddings.
IN_F32 = ("token_types.weight", "position_embd.weight")

TEXTS = [
    "Hello, world!",
    "The raining CAFÉS: 中文 rains in 2024? It's the rain - the rain...",
    "",
]

SHAPE = dict(
    vocab_size=len(VOCAB),
    num_hidden_layers=2,
    type_vocab_size=2,
    layer_norm_eps=EPS,
    attn_implementation="eager",
)

MODELS = [
    (
        "bert",
        "Mean",
        lambda: BertModel(
            BertConfig(
                hidden_size=36,
                intermediate_size=52,
                num_attention_heads=3,
                max_position_embeddings=64,
                **SHAPE,
            ),
            add_pooling_layer=False,
        ),
    ),
    (
        "nomic-bert",
        "CLS",
        lambda: NomicBertModel(
            NomicBertConfig(
                hidden_size=40,
                intermediate_size=44,
                num_attention_heads=2,
                max_position_embeddings=128,
                rope_parameters=dict(rope_type="default", rope_theta=700.0),
                **SHAPE,
            ),
            add_pooling_layer=False,
        ),
    ),
]


def file_token(token):
    """A token as files have it: beginnings of words are marked, not what goes on."""
    if token in SPECIAL:
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


def tensors(model, family):
    """Names and f32 arrays as in a file."""
    names = gguf.get_tensor_name_map(family, model.config.num_hidden_layers)
    stacked = {}
    for name, p in model.named_parameters():
        data = p.detach().numpy().astype(np.float32)
        if family == gguf.MODEL_ARCH.NOMIC_BERT and any(s in name for s in ("q_proj", "k_proj", "v_proj")):
            stacked.setdefault(name.split(".")[1], []).append(data)
            continue
        own = OTHER_NAMES.get(name.split(".", 2)[-1])
        own = f"blk.{name.split('.')[1]}.{own}" if own else None
        own = own or names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own, name
        yield own, data
    for layer, parts in stacked.items():
        yield f"blk.{layer}.attn_qkv.weight", np.concatenate(parts)


# Of Nomic BERT, whose own code has others than `transformers`.
OTHER_NAMES = {
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "attn_output_norm.weight",
    "post_attention_layernorm.bias": "attn_output_norm.bias",
    "post_mlp_layernorm.weight": "layer_output_norm.weight",
    "post_mlp_layernorm.bias": "layer_output_norm.bias",
}


def metadata(w, config, pooling):
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_layer_norm_eps(EPS)
    w.add_causal_attention(False)
    w.add_pooling_type(gguf.PoolingType[pooling.upper()])
    if getattr(config, "rope_parameters", None):
        w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_tokenizer_model("bert")
    w.add_token_list([file_token(token) for token in VOCAB])
    kinds = [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in VOCAB]
    w.add_token_types(kinds)
    w.add_token_type_count(config.type_vocab_size)
    w.add_pad_token_id(0)
    w.add_unk_token_id(1)
    w.add_bos_token_id(2)
    w.add_sep_token_id(3)
    w.add_mask_token_id(4)


def record(out, name, model, tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    with torch.no_grad():
        result = model(torch.tensor([tokens]), output_attentions=True)
    states = result.last_hidden_state[0]
    assert states.dtype == torch.float64
    spread = [
        float((-a * a.clamp(min=1e-99).log()).sum(-1).exp().mean()) / len(tokens)
        for a in result.attentions
    ]
    print(name, repr(text), tokens, "std", round(float(states.std()), 2), "keys attended", np.round(spread, 2))
    out.write(struct.pack("<4I", len(name), len(text.encode()), *states.shape))
    out.write(name.encode() + text.encode() + np.array(tokens, "<u4").tobytes())
    out.write(states.numpy().astype("<f4").tobytes())
    out.write(states.mean(0).numpy().astype("<f4").tobytes())


def main(folder):
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(VOCAB)}, do_lower_case=True)
    with open(folder / "encoders.bin", "wb") as out:
        for name, pooling, make in MODELS:
            model = make().double().eval()
            for module in model.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    assert module.eps == EPS
            fill(model, "F16", SEEDS[name])
            family = gguf.MODEL_ARCH[name.upper().replace("-", "_")]
            w = gguf.GGUFWriter(folder / f"{name}.gguf", name)
            metadata(w, model.config, pooling)
            save(w, "F16", tensors(model, family), IN_F32)
            for text in TEXTS:
                record(out, name, model, tokenizer, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
