#!/usr/bin/env python3
"""Make a small random model of every family with experts, or with keys and values made of a latent,
NAME.gguf, and experts.bin: what Hugging Face `transformers` computes with them. Weights and records are
those of arch.py.

usage: experts.py tests/golden
needs: as families.py

Names, keys and the order of rows are those of llama.cpp's converter.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from arch import EPS, VOCAB, adjacent, common_metadata, fill, record, save
from families import factors_and_window, rope, shape, yarn_metadata

N_TOKENS = 40
# Seeds of weights with which no two tokens are nearly as good, and no expert is nearly used.
SEEDS = {
    "mixtral": 61,
    "qwen3moe": 61,
    "olmoe": 25,
    "granitemoe": 39,
    "gpt-oss": 45,
    "deepseek2": 3,
    "deepseek3": 19,
    "qwen2moe": 2,
}

LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
YARN = dict(
    factor=4.0,
    beta_fast=8.0,
    beta_slow=1.5,
    original_max_position_embeddings=16,
    mscale=0.7,
    mscale_all_dim=0.7,
)

# Name, architecture, format of matrices, class of `transformers`, config.
MODELS = [
    (
        "mixtral",
        "llama",
        "Q8_0",
        "Mixtral",
        dict(
            **shape(64, 96, 4, 2, tied=False),
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=rope(700.0),
        ),
    ),
    (
        "qwen3moe",
        "qwen3moe",
        "F16",
        "Qwen3Moe",
        dict(
            **shape(36, 56, 3, 1, tied=False),
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            norm_topk_prob=True,
        ),
    ),
    (
        "olmoe",
        "olmoe",
        "F16",
        "Olmoe",
        dict(
            **shape(36, 20, 6, 2, tied=False),
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            eos_token_id=None,
        ),
    ),
    (
        "granitemoe",
        "granitemoe",
        "F16",
        "GraniteMoeShared",
        dict(
            **shape(36, 20, 6, 3),
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=28,
            attention_multiplier=0.6,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            logits_scaling=0.8,
        ),
    ),
    (
        "gpt-oss",
        "gpt-oss",
        "F16",
        "GptOss",
        dict(
            **shape(24, 20, 4, 2, 3, n_ctx=128, tied=False),
            head_dim=10,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=9,
            rope_parameters=rope(
                700.0,
                "yarn",
                factor=4.0,
                beta_fast=8.0,
                beta_slow=1.5,
                original_max_position_embeddings=32,
                truncate=True,
            ),
        ),
    ),
    (
        "deepseek2",
        "deepseek2",
        "F16",
        "DeepseekV2",
        dict(
            **shape(36, 56, 3, 3, 3, tied=False),
            **LATENT,
            q_lora_rank=None,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=2,
            moe_intermediate_size=12,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            topk_method="greedy",
            rope_parameters=rope(700.0, "yarn", **YARN),
        ),
    ),
    (
        "deepseek3",
        "deepseek2",
        "F16",
        "DeepseekV3",
        dict(
            **shape(36, 56, 3, 3, 2, tied=False),
            **LATENT,
            q_lora_rank=20,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=1,
            moe_intermediate_size=12,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_parameters=rope(700.0),
        ),
    ),
    (
        "qwen2moe",
        "qwen2moe",
        "F16",
        "Qwen2Moe",
        dict(
            **shape(36, 56, 6, 2, tied=False),
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            norm_topk_prob=False,
            rope_parameters=rope(700.0),
        ),
    ),
]

EXPERTS = [
    ("num_experts_per_tok", "add_expert_used_count"),
    ("n_shared_experts", "add_expert_shared_count"),
    ("routed_scaling_factor", "add_expert_weights_scale"),
    ("shared_intermediate_size", "add_expert_shared_feed_forward_length"),
    ("shared_expert_intermediate_size", "add_expert_shared_feed_forward_length"),
]


def make(hf, config):
    config = getattr(transformers, f"{hf}Config")(
        vocab_size=len(VOCAB), attn_implementation="eager", experts_implementation="eager", pad_token_id=None, **config
    )
    model = getattr(transformers, f"{hf}ForCausalLM")(config).double().eval()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = EPS
    return model


def preferences(model):
    """Buffers that are weights in a file."""
    g = torch.Generator().manual_seed(5)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            noise = torch.empty(b.shape, dtype=torch.float32).normal_(generator=g)
            b.copy_(0.2 * noise)
            yield name, b


def of_experts(blk, name, data, turned):
    """Gate and up of experts, which lie in one array, or down."""
    if "gate_up_proj" in name:
        is_bias = name.endswith("bias")
        if turned:
            gate, up = data[..., ::2], data[..., 1::2]
            gate, up = (gate, up) if is_bias else (gate.swapaxes(1, 2), up.swapaxes(1, 2))
        else:
            gate, up = np.split(data, 2, axis=1)
        end = "bias" if is_bias else "weight"
        yield f"{blk}.ffn_gate_exps.{end}", gate
        yield f"{blk}.ffn_up_exps.{end}", up
    elif name.endswith("down_proj_bias"):
        yield f"{blk}.ffn_down_exps.bias", data
    else:
        yield f"{blk}.ffn_down_exps.weight", data.swapaxes(1, 2) if turned else data


def tensors(model, arch, name):
    """Names and f32 arrays as in a file."""
    config = model.config
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[{"gpt-oss": "GPT_OSS", "granitemoe": "GRANITE_MOE"}.get(arch, arch.upper())], config.num_hidden_layers
    )
    n_head, n_head_kv = config.num_attention_heads, config.num_key_value_heads
    weights = [(n, p) for n, p in model.named_parameters()]
    for n, p in weights + list(preferences(model)):
        data = p.detach().numpy().astype(np.float32)
        blk = "blk." + n.split(".")[2] if ".layers." in n else ""
        if ".experts." in n:
            yield from of_experts(blk, n, data, arch == "gpt-oss")
            continue
        if arch in ("llama", "granitemoe") and ".q_proj." in n:
            data = adjacent(data, n_head)
        if arch in ("llama", "granitemoe") and ".k_proj." in n:
            data = adjacent(data, n_head_kv)
        if "shared_mlp.input_linear" in n:
            gate, up = np.split(data, 2)
            yield f"{blk}.ffn_gate_shexp.weight", gate
            yield f"{blk}.ffn_up_shexp.weight", up
            continue
        if n.endswith("e_score_correction_bias"):
            yield f"{blk}.exp_probs_b.bias", data
            continue
        if name == "deepseek3" and "kv_b_proj" in n:
            # Newer files have keys and values apart, keys transposed.
            per_head = data.reshape(n_head, -1, data.shape[1])
            k, v = np.split(per_head, [config.qk_nope_head_dim], axis=1)
            yield f"{blk}.attn_k_b.weight", np.ascontiguousarray(k.swapaxes(1, 2))
            yield f"{blk}.attn_v_b.weight", np.ascontiguousarray(v)
            continue
        special = {
            "mlp.gate.weight": "ffn_gate_inp.weight",
            "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
            "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
            "self_attn.sinks": "attn_sinks.weight",
        }
        own = next((f"{blk}.{to}" for end, to in special.items() if n.endswith(end)), None)
        own = own or names.get_name(n, try_suffixes=(".weight", ".bias"))
        assert own, n
        yield own, data


def metadata(w, config, arch, name):
    common_metadata(w, config)
    w.add_context_length(config.max_position_embeddings)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_layer_norm_rms_eps(EPS)
    w.add_head_count_kv(1 if name == "deepseek3" else config.num_key_value_heads)
    counts = ("num_local_experts", "n_routed_experts", "num_experts")
    w.add_expert_count(next(getattr(config, key) for key in counts if getattr(config, key, None)))
    for key, add in EXPERTS:
        if getattr(config, key, None):
            getattr(w, add)(getattr(config, key))
    if getattr(config, "moe_intermediate_size", None):
        w.add_expert_feed_forward_length(config.moe_intermediate_size)
    factors_and_window(w, config)
    if arch == "deepseek2":
        latent_metadata(w, config, name)
    elif getattr(config, "head_dim", None):
        w.add_key_length(config.head_dim)
        w.add_value_length(config.head_dim)
    parameters = config.rope_parameters
    w.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "yarn":
        yarn_metadata(w, parameters)
        if "mscale_all_dim" in parameters:
            w.add_rope_scaling_yarn_log_mul(0.1 * parameters["mscale_all_dim"])


def latent_metadata(w, config, name):
    w.add_leading_dense_block_count(config.first_k_dense_replace)
    w.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank:
        w.add_q_lora_rank(config.q_lora_rank)
    w.add_rope_dimension_count(config.qk_rope_head_dim)
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    if name == "deepseek3":
        w.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        w.add_value_length(config.kv_lora_rank)
        w.add_key_length_mla(key)
        w.add_value_length_mla(value)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_expert_weights_norm(config.norm_topk_prob)
        w.add_expert_group_count(config.n_group)
        w.add_expert_group_used_count(config.topk_group)
    else:
        w.add_key_length(key)
        w.add_value_length(value)


def main(folder):
    rng = np.random.default_rng(2026)
    with open(folder / "experts.bin", "wb") as out:
        for name, arch, ty, hf, config in MODELS:
            model = make(hf, config)
            fill(model, ty, SEEDS[name])
            w = gguf.GGUFWriter(folder / f"{name}.gguf", arch)
            metadata(w, model.config, arch, name)
            save(w, ty, tensors(model, arch, name))
            record(out, name, model, rng.integers(0, len(VOCAB), N_TOKENS).tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
