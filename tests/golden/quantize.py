#!/usr/bin/env python3
"""Make quantize.bin: numbers, and the blocks that the PyPI package `gguf` rounds them to, for the formats that qkov writes.

usage: quantize.py quantize.bin        (needs: pip install gguf numpy)

Little-endian: u32 number of floats, the floats, then for each format: u32 type id, u32 number of bytes, the bytes.
"""
import struct
import sys

import numpy as np
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import quantize

FORMATS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def main(path):
    rng = np.random.default_rng(2026)
    x = rng.normal(0, 0.05, (12, 32)).astype(np.float32)
    x[0] = 0
    x[1] = 0.25
    x[2, 1:] = 0
    x[3] *= 1000
    x = x.reshape(1, -1)
    with open(path, "wb") as out:
        out.write(struct.pack("<I", x.size) + x.astype("<f4").tobytes())
        for name in FORMATS:
            data = quantize(x, T[name]).tobytes()
            out.write(struct.pack("<II", T[name].value, len(data)) + data)


main(sys.argv[1])
