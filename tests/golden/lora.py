#!/usr/bin/env python3
"""Make a random adapter for llama.gguf, lora/llama.gguf, and lora/lora.bin: what Hugging Face `peft`
computes with both. Records are those of arch.py.

usage: lora.py tests/golden
needs: pip install gguf==0.19.0 torch==2.* transformers==5.24.0 peft==0.21.*

Names, keys and the order of rows are those of llama.cpp's converter of adapters.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import peft
import torch

from arch import VOCAB, adjacent, llama, record, shape

RANK, ALPHA, SEED = 3, 5.0, 2
PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]
TARGETS = [f"{name}_proj" for name in PROJECTIONS] + ["embed_tokens", "lm_head"]


def heads(name, config):
    """Heads whose rows have another order in files."""
    if ".q_proj" in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj" in name else None


def load(model, path):
    """Gives a model the weights of a file."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    for name, p in model.named_parameters():
        data = stored[names.get_name(name, try_suffixes=(".weight",))].astype(np.float64)
        if n := heads(name, config):
            data = data.reshape(n, -1, 2, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
            assert (adjacent(data, n) == stored[names.get_name(name, (".weight",))]).all()
        p.data = torch.from_numpy(np.ascontiguousarray(data))


def write(path, model):
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    w = gguf.GGUFWriter(path, "llama")
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        if len(module.lora_embedding_A) > 0:
            a, b = module.lora_embedding_A["default"].T, module.lora_embedding_B["default"]
        else:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a, b = (x.detach().numpy() for x in (a, b))
        if n := heads(name, config):
            b = adjacent(b, n)
        stem = names.get_name(name) + ".weight"
        w.add_tensor(f"{stem}.lora_a", np.ascontiguousarray(a, dtype=np.float32))
        w.add_tensor(f"{stem}.lora_b", np.ascontiguousarray(b, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main(folder):
    model = llama(**shape(32, 48, 4, 2, 64, False)).double().eval()
    load(model, folder / "llama.gguf")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    # No two tokens are nearly as good with these.
    g = torch.Generator().manual_seed(SEED)
    for name, p in model.named_parameters():
        if "lora_" in name:
            noise = torch.empty(p.shape, dtype=torch.float64).normal_(generator=g)
            rounded = (0.2 * noise).numpy().astype(np.float32)
            p.data = torch.from_numpy(rounded.astype(np.float64))
    write(folder / "lora" / "llama.gguf", model)
    rng = np.random.default_rng(2026)
    with open(folder / "lora" / "lora.bin", "wb") as out:
        record(out, "llama", model, rng.integers(0, len(VOCAB), 40).tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
