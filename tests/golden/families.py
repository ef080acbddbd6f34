#!/usr/bin/env python3
"""Make a small random model of every family that arch.py leaves out, NAME.gguf, and families.bin: what
Hugging Face `transformers` computes with them. Weights and records are those of arch.py.

usage: families.py tests/golden
needs: pip install gguf==0.19.0 torch==2.* transformers==5.24.0

Names, keys and the order of rows are those of llama.cpp's converter. InternLM 2 is not part of
`transformers`; with other names for the same matrices it is a Llama, which computes it here.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from arch import EPS, VOCAB, adjacent, common_metadata, fill, record, save

# Families, as files name them, and as `gguf` and `transformers` do where that is not the same.
IN_GGUF = {"command-r": "COMMAND_R", "gptneox": "GPTNEOX"}
IN_HF = {
    "command-r": "Cohere",
    "gptneox": "GPTNeoX",
    "internlm2": "Llama",
    "mistral3": "Ministral3",
    "olmo3": "Olmo3",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
}
# Rows that rotate together lie side by side in their files, but not in `transformers`.
REORDERED = ("smollm3", "granite", "internlm2", "mistral3")
# Their files have 1 added to the gains of norms.
ONE_ADDED = ("gemma2", "gemma3")
# Those whose norms take the mean away.
LAYER_NORM = ("starcoder2", "stablelm", "command-r", "cohere2", "falcon", "gptneox", "bloom", "mpt")


def shape(n_embd, n_ff, n_head, n_head_kv, n_layer=2, n_ctx=64, tied=True, **more):
    return dict(
        hidden_size=n_embd,
        intermediate_size=n_ff,
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        num_hidden_layers=n_layer,
        max_position_embeddings=n_ctx,
        tie_word_embeddings=tied,
        rms_norm_eps=EPS,
        **more,
    )


def rope(theta=10000.0, kind="default", **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


def kinds(windows):
    """Kinds of layers, from a string with a letter for each."""
    return ["sliding_attention" if w == "w" else "full_attention" for w in windows]


N_TOKENS = 40
# Seeds of weights with which no two tokens are nearly as good, and keys have an inverse, where the
# first does not.
SEEDS = {"olmo3": 3, "exaone4": 3, "stablelm-parallel": 2, "gptneox-serial": 3, "bloom": 8}
LONG = [1.0, 1.5, 2.5, 6.0]
SHORT = [1.0, 1.1, 1.4, 1.3]

# Name, family, config. Windows, spans and contexts are short enough to be passed.
MODELS = [
    ("qwen3", "qwen3", dict(**shape(36, 56, 3, 1), head_dim=16)),
    (
        "gemma2",
        "gemma2",
        dict(
            **shape(24, 40, 4, 2, 3),
            head_dim=10,
            query_pre_attn_scalar=10,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
            sliding_window=7,
            layer_types=kinds("w-w"),
        ),
    ),
    (
        "gemma3",
        "gemma3",
        dict(
            **shape(24, 32, 4, 1, 7),
            head_dim=10,
            query_pre_attn_scalar=10,
            sliding_window=9,
            layer_types=kinds("wwwww-w"),
            rope_parameters=dict(
                full_attention=rope(50000.0, "linear", factor=4.0), sliding_attention=rope(300.0)
            ),
        ),
    ),
    (
        "phi3",
        "phi3",
        dict(
            **shape(40, 44, 4, 2, n_ctx=256, tied=False),
            original_max_position_embeddings=32,
            sliding_window=23,
            rope_parameters=rope(
                kind="longrope",
                short_factor=SHORT,
                long_factor=LONG,
                partial_rotary_factor=0.8,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    (
        "phi3-short",
        "phi3",
        dict(
            **shape(24, 44, 3, 3, 1, n_ctx=256),
            original_max_position_embeddings=64,
            rope_parameters=rope(
                kind="longrope",
                short_factor=SHORT,
                long_factor=LONG,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    ("smollm3", "smollm3", dict(**shape(24, 36, 4, 2, 5), rope_parameters=rope(700.0))),
    (
        "olmo2",
        "olmo2",
        dict(**shape(24, 40, 4, 2, tied=False), rope_parameters=rope(700.0)),
    ),
    (
        "olmo3",
        "olmo2",
        dict(
            **shape(24, 36, 3, 3, 4, n_ctx=128, tied=False),
            sliding_window=11,
            layer_types=kinds("www-"),
            rope_parameters=dict(
                full_attention=rope(
                    700.0,
                    "yarn",
                    factor=4.0,
                    beta_fast=8.0,
                    beta_slow=1.5,
                    original_max_position_embeddings=32,
                ),
                sliding_attention=rope(700.0),
            ),
        ),
    ),
    (
        "granite",
        "granite",
        dict(
            **shape(24, 40, 4, 2, tied=False),
            attention_multiplier=0.6,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            logits_scaling=0.8,
        ),
    ),
    (
        "mistral3",
        "mistral3",
        dict(
            **shape(36, 52, 3, 1, n_ctx=40),
            head_dim=16,
            rope_parameters=rope(
                700.0,
                "yarn",
                factor=4.0,
                beta_fast=8.0,
                beta_slow=1.5,
                original_max_position_embeddings=10,
                mscale=1.0,
                mscale_all_dim=0.7,
                llama_4_scaling_beta=0.5,
            ),
        ),
    ),
    (
        "exaone4",
        "exaone4",
        dict(
            **shape(24, 36, 3, 1, 5),
            sliding_window=9,
            layer_types=kinds("www-w"),
            rope_parameters=rope(
                700.0,
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    (
        "command-r",
        "command-r",
        dict(
            **shape(36, 52, 6, 2), layer_norm_eps=EPS, logit_scale=0.7, rope_parameters=rope(700.0)
        ),
    ),
    (
        "command-r-normed",
        "command-r",
        dict(**shape(32, 44, 4, 2, 1), layer_norm_eps=EPS, logit_scale=1.5, use_qk_norm=True),
    ),
    (
        "cohere2",
        "cohere2",
        dict(
            **shape(24, 36, 3, 1, 5),
            layer_norm_eps=EPS,
            logit_scale=0.7,
            sliding_window=9,
            layer_types=kinds("www-w"),
            rope_parameters=rope(700.0),
        ),
    ),
    (
        "internlm2",
        "internlm2",
        dict(**shape(24, 40, 4, 2, tied=False), rope_parameters=rope(700.0)),
    ),
    (
        "stablelm",
        "stablelm",
        dict(
            **shape(24, 40, 3, 1, tied=False),
            layer_norm_eps=EPS,
            use_qkv_bias=True,
            rope_parameters=rope(700.0, partial_rotary_factor=0.5),
        ),
    ),
    (
        "stablelm-parallel",
        "stablelm",
        dict(
            **shape(24, 36, 3, 1, tied=False),
            layer_norm_eps=EPS,
            qk_layernorm=True,
            use_parallel_residual=True,
            rope_parameters=rope(700.0, partial_rotary_factor=0.5),
        ),
    ),
    (
        "starcoder2",
        "starcoder2",
        dict(
            **shape(36, 52, 6, 2),
            norm_epsilon=EPS,
            use_bias=True,
            sliding_window=None,
            rope_parameters=rope(700.0),
        ),
    ),
    (
        "falcon",
        "falcon",
        dict(
            **shape(24, 96, 4, 1),
            layer_norm_epsilon=EPS,
            multi_query=True,
            parallel_attn=True,
            bias=False,
            alibi=False,
            rope_parameters=rope(700.0),
        ),
    ),
    (
        "falcon-two-norms",
        "falcon",
        dict(
            **shape(24, 96, 6, 2),
            layer_norm_epsilon=EPS,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bias=False,
            alibi=False,
        ),
    ),
    (
        "gptneox",
        "gptneox",
        dict(
            **shape(30, 44, 3, 3, tied=False),
            layer_norm_eps=EPS,
            rope_parameters=rope(700.0, partial_rotary_factor=0.4),
        ),
    ),
    (
        "gptneox-serial",
        "gptneox",
        dict(**shape(24, 36, 3, 3, 1, tied=False), layer_norm_eps=EPS, use_parallel_residual=False),
    ),
    (
        "bloom",
        "bloom",
        dict(
            hidden_size=24,
            n_head=3,
            n_layer=2,
            layer_norm_epsilon=EPS,
            tie_word_embeddings=True,
        ),
    ),
    (
        "mpt",
        "mpt",
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            layer_norm_epsilon=EPS,
            # Other biases than up to 8 are not computed.
            attn_config=dict(clip_qkv=1.5, alibi_bias_max=8),
        ),
    ),
]


def make(name, family, config):
    hf = IN_HF.get(name) or IN_HF.get(family) or family.capitalize()
    if family == "gemma3":
        hf = "Gemma3"
    make_config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(hf, f"{hf}Config"))
    config = make_config(vocab_size=len(VOCAB), attn_implementation="eager", pad_token_id=None, **config)
    return getattr(transformers, f"{hf}ForCausalLM")(config).double().eval()


def regrouped(data, n_head_kv, per_kv, dim):
    """All queries, then all keys, then all values, from rows with those of each kv head together."""
    rows = data.reshape(n_head_kv, per_kv + 2, dim, *data.shape[1:])
    parts = rows[:, :-2], rows[:, -2:-1], rows[:, -1:]
    return np.concatenate([part.reshape(-1, *data.shape[1:]) for part in parts])


def heads(config, family):
    """Query heads, kv heads, and the width of one."""
    n_head = config.num_attention_heads
    n_head_kv = getattr(config, "num_key_value_heads", n_head)
    if family == "falcon":
        n_head_kv = config.num_kv_heads if config.new_decoder_architecture else 1
    dim = getattr(config, "head_dim", None) or config.hidden_size // n_head
    return n_head, n_head_kv, dim


def tensors(model, family):
    """Names and f32 arrays as in a file."""
    config = model.config
    arch = gguf.MODEL_ARCH[IN_GGUF.get(family, family.upper())]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    n_head, n_head_kv, dim = heads(config, family)
    stacks = {}
    for name, p in model.named_parameters():  # a tied output is listed once, as the embedding
        if family == "cohere2" and name.endswith("bias"):
            continue
        data = p.detach().numpy() + (has_one_added(family)(name))
        if ".norms." in name:  # a vector for each head
            stacks.setdefault(name.split(".norms.")[0], []).append(data)
            continue
        if family in REORDERED and ".q_proj." in name:
            data = adjacent(data, n_head)
        if family in REORDERED and ".k_proj." in name:
            data = adjacent(data, n_head_kv)
        if "query_key_value" in name:
            data = regrouped(data, n_head_kv, n_head // n_head_kv, dim)
        if family == "bloom":
            name = name.removeprefix("transformer.")
        yield file_name(names, name), np.ascontiguousarray(data, dtype=np.float32)
    for name, rows in stacks.items():
        yield file_name(names, f"{name}.weight"), np.stack(rows).astype(np.float32)
    scaling = rope_parameters(config)
    if scaling.get("rope_type") == "llama3":
        inverse = model.model.rotary_emb.inv_freq.numpy()
        plain = scaling["rope_theta"] ** -(np.arange(len(inverse)) / len(inverse))
        yield "rope_freqs.weight", (plain / inverse).astype(np.float32)
    if scaling.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(scaling["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(scaling["short_factor"], np.float32)


def file_name(names, name):
    name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert name
    return name


def has_one_added(family):
    return lambda name: family in ONE_ADDED and name.endswith("norm.weight")


def rope_parameters(config):
    """Those of layers without a window."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def metadata(w, config, family):
    common_metadata(w, config)
    n_head, n_head_kv, dim = heads(config, family)
    n_ff = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None)
    w.add_context_length(getattr(config, "max_position_embeddings", None) or 2048)
    w.add_feed_forward_length(n_ff or 4 * config.hidden_size)
    w.add_head_count_kv(n_head_kv)
    if family in LAYER_NORM:
        w.add_layer_norm_eps(EPS)
    else:
        w.add_layer_norm_rms_eps(EPS)
    if getattr(config, "head_dim", None) and family != "granite":
        w.add_key_length(config.head_dim)
        w.add_value_length(config.head_dim)
    if family == "mpt":
        w.add_clamp_kqv(config.attn_config.clip_qkv)
        w.add_max_alibi_bias(config.attn_config.alibi_bias_max)
    if family == "gptneox":
        w.add_parallel_residual(config.use_parallel_residual)
    factors_and_window(w, config)
    if family in ("olmo2", "exaone4") and getattr(config, "sliding_window", None):
        w.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
    rope_metadata(w, config, dim)


def factors_and_window(w, config):
    for name, add in [
        ("attn_logit_softcapping", w.add_attn_logit_softcapping),
        ("final_logit_softcapping", w.add_final_logit_softcapping),
        ("attention_multiplier", w.add_attention_scale),
        ("embedding_multiplier", w.add_embedding_scale),
        ("residual_multiplier", w.add_residual_scale),
        ("logits_scaling", w.add_logit_scale),
        ("logit_scale", w.add_logit_scale),
        ("sliding_window", w.add_sliding_window),
    ]:
        if getattr(config, name, None):
            add(getattr(config, name))


def yarn_metadata(w, rope):
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(rope["factor"])
    w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def rope_metadata(w, config, dim):
    rope = rope_parameters(config)
    if not rope:
        return
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(int(dim * rope.get("partial_rotary_factor", 1.0)))
    if "sliding_attention" in config.rope_parameters:
        w.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    if kind == "longrope":
        n_ctx_orig = rope["original_max_position_embeddings"]
        w.add_rope_scaling_orig_ctx_len(n_ctx_orig)
        scale = config.max_position_embeddings / n_ctx_orig
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(n_ctx_orig))))
    if kind == "yarn":
        yarn_metadata(w, rope)
    if "mscale_all_dim" in rope:
        w.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    if "llama_4_scaling_beta" in rope:
        w.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def write(path, model, family):
    w = gguf.GGUFWriter(path, family)
    metadata(w, model.config, family)
    save(w, "F16", tensors(model, family))


def main(folder):
    rng = np.random.default_rng(2026)
    with open(folder / "families.bin", "wb") as out:
        for name, family, config in MODELS:
            model = make(name, family, config)
            fill(model, "F16", SEEDS.get(name, 1), has_one_added(family))
            write(folder / f"{name}.gguf", model, family)
            record(out, name, model, rng.integers(0, len(VOCAB), N_TOKENS).tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
