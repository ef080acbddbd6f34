#!/usr/bin/env python3
"""Make quant.bin: blocks of every tensor format and the numbers that the PyPI package `gguf` reads from them.

usage: quant.py quant.bin        (needs: pip install gguf numpy)

Records, little-endian: u32 type id, u32 block length, u32 bytes per block, u32 number of blocks, the blocks, f32 values.
Bytes are random, with scales kept finite, and the first blocks are edges: all zero, all ones, negative and subnormal scales.
"""
import struct
import sys

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

# Where the half-precision numbers of a block lie.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}
EDGES = [0x0000, 0x8000, 0xBC00, 0x0001, 0x83FF, 0x7BFF]  # 0, -0, -1, subnormals, the largest
N_BLOCKS = 12
N_FLOATS = 600


def blocks(name, n_bytes, rng):
    b = rng.integers(0, 256, (N_BLOCKS, n_bytes), dtype=np.uint8)
    b[0], b[1] = 0, 255
    for i in range(N_BLOCKS):
        for at in HALVES[name]:
            half = EDGES[i % len(EDGES)] if i < len(EDGES) else int(np.float16(rng.normal(0, 0.05)).view(np.uint16))
            b[i, at:at + 2] = np.frombuffer(struct.pack("<H", half), np.uint8)
    if name == "MXFP4":
        # Exponents of powers of two, low enough for sums.
        b[:, 0] = [0, 1, 2, 127, 200, 240, *rng.integers(100, 140, N_BLOCKS - 6)]
    return b


def main(path):
    rng = np.random.default_rng(2026)
    with open(path, "wb") as f:
        for name, bits in (("F32", 4), ("F16", 2), ("BF16", 2)):
            raw = rng.normal(0, 1, N_FLOATS).astype(np.float32)
            raw[:6] = [0.0, -0.0, 1e-40, -3e-8, 6.1e-5, 65504.0]
            if name == "F32":
                data, values = raw.view(np.uint8), raw
            elif name == "F16":
                data, values = raw.astype(np.float16).view(np.uint8), raw.astype(np.float16).astype(np.float32)
            else:
                data = (raw.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
                values = dequantize(data, T.BF16)
            f.write(struct.pack("<4I", T[name].value, 1, bits, N_FLOATS) + data.tobytes() + values.astype("<f4").tobytes())
        for name in HALVES:
            length, n_bytes = GGML_QUANT_SIZES[T[name]]
            b = blocks(name, n_bytes, rng)
            values = dequantize(b, T[name]).reshape(-1)
            assert values.size == N_BLOCKS * length and np.isfinite(values).all(), name
            f.write(struct.pack("<4I", T[name].value, length, n_bytes, N_BLOCKS) + b.tobytes() + values.astype("<f4").tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
