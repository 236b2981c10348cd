"""Runs one kernel of planted_bugs.cu and prints what came of it; a process of its own, because a
sanitizer ends it. Needs no torch.

    python run_planted.py LIBRARY KERNEL BUG SEED
"""

import array
import ctypes
import itertools
import sys

BLOCKS = 4


def block_sums(x: array.array) -> list[float]:
    return [sum(x[i : i + 256]) for i in range(0, len(x), 256)]


def product_sums(x: array.array) -> list[float]:
    """Weighted sums of the 64x64 products of 320 numbers each."""
    rows = [[x[(row * 320 + k) % 1024] - 8 for k in range(320)] for row in range(64)]
    flat = [sum(a * b for a, b in zip(p, q, strict=True)) for p in rows for q in rows]
    return [sum(flat[i] * (i % 7) for i in range(b, 64 * 64, 4)) for b in range(4)]


EXPECTED = {
    "block_sum": block_sums,
    "staged_sum": block_sums,
    "global_sum": lambda x: [sum(x)],
    "relayed_sum": lambda x: list(itertools.accumulate(block_sums(x))),
    "pipelined_product": product_sums,
}


def main(path: str, kernel: str, bug: int, seed: int) -> None:
    library = ctypes.CDLL(path)
    library.run_planted.restype = ctypes.c_char_p
    library.fastseg_emulation_seed(ctypes.c_uint64(seed))
    kind = "i" if kernel == "global_sum" else "f"
    x = array.array(kind, [i * 7 % 16 for i in range(BLOCKS * 256)])
    out = array.array(kind, [0] * BLOCKS)
    pointers = [ctypes.c_void_p(a.buffer_info()[0]) for a in (x, out)]
    error = library.run_planted(kernel.encode(), *pointers, BLOCKS, bug).decode()
    expected = EXPECTED[kernel](x)
    if error:
        print(f"reported: {error}")
    elif list(out[: len(expected)]) != expected:
        print(f"wrong result: {list(out)} instead of {expected}")
    else:
        print("right")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
