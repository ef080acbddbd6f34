"""Writes a trained model as a GGUF file: matrices in F16, or another type, the rest in F32.

usage: export.py NAME.pt NAME.gguf [TYPE]
"""

import json
import sys

import gguf
import gguf.quants
import torch

import corpus
from model import Shape

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def metadata(w, s, name, file_type):
    w.add_name(name)
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head if s.arch == "gpt2" else s.n_head_kv)
    w.add_vocab_size(s.n_vocab)
    w.add_file_type(file_type)
    if s.arch == "gpt2":
        w.add_layer_norm_eps(1e-5)
    else:
        w.add_layer_norm_rms_eps(1e-5)
        w.add_rope_freq_base(1e4)
        w.add_rope_dimension_count(s.n_rotated or s.d_head)
    if s.arch == "deepseek2":
        w.add_kv_lora_rank(s.kv_rank)
        w.add_leading_dense_block_count(s.n_layer)
    w.add_key_length(s.d_head + s.n_rotated)
    w.add_value_length(s.d_head)
    # As `qkov norms` and `qkov masks` list them; sinks are tensors.
    if s.normalizer != "sinks":
        w.add_string("qkov.attention.normalizer", s.normalizer)
    w.add_string("qkov.attention.mask", s.mask)


def vocabulary(w):
    model = json.loads(corpus.tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if t in corpus.SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    w.add_bos_token_id(corpus.END)
    w.add_eos_token_id(corpus.END)
    w.add_add_bos_token(True)
    w.add_chat_template(TEMPLATE)


def main(source, out, ty="F16"):
    saved = torch.load(source)
    s = Shape(**saved["config"]["model"])
    w = gguf.GGUFWriter(out, s.arch)
    metadata(w, s, f"qkov {saved['config']['name']}", gguf.LlamaFileType[f"MOSTLY_{ty}"])
    vocabulary(w)
    for name, p in saved["weights"].items():
        name = name.replace(".attention", "")
        if name.endswith("attn_sinks"):
            name += ".weight"
        ty_here = gguf.GGMLQuantizationType[ty if p.dim() == 2 else "F32"]
        w.add_tensor(name, gguf.quants.quantize(p.float().numpy(), ty_here), raw_dtype=ty_here)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
