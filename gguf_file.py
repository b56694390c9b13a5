"""
GGUF, the file of llama.cpp: metadata and tensors in one file, many of them quantized by blocks.

    magic "GGUF", version, number of tensors, number of metadata
    metadata      name, type, value: sizes of the model, its tokenizer, its chat template
    tensors       name, shape (innermost first), type, offset
    data          each tensor at its offset, which is a multiple of the alignment

A block of 32 or 256 numbers has its scales and its codes of a few bits; UNPACK has the published
layout of each type. What is read is checked against the size of the file before it is believed.

    metadata, tensors = read(memoryview(bytes))
    weight = unpacked(tensors["token_embd.weight"])        # fp32, (V, D)
"""
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 32
LONGEST = 1 << 24                     # bytes of a text of the metadata
MOST = 1 << 22                        # entries of an array of the metadata
# Types of metadata by their numbers, those of struct; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}
UINT32 = 4
INT32 = 5
STRING = 8
ARRAY = 9


class Packed(NamedTuple):
    """A tensor as it lies in the file."""
    name: str
    kind: str                         # a name of KINDS
    shape: tuple[int, ...]            # outermost first, as torch has it
    data: np.ndarray                  # its bytes, uint8


# ---------------------------------------------------------------------- what blocks mean

def halves(blocks: np.ndarray, first: int) -> np.ndarray:
    """The fp16 number at byte `first` of each block: (n, 1) fp32."""
    return blocks[:, first:first + 2].copy().view(np.float16).astype(np.float32)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """(n, m) bytes -> (n, 2 m): the low four bits of all, then the high four."""
    return np.concatenate([codes & 15, codes >> 4], 1).astype(np.float32)


def fifth_bits(blocks: np.ndarray, first: int) -> np.ndarray:
    """The 32 bits from byte `first` on, as 0 or 16: (n, 32)."""
    return 16.0 * np.unpackbits(blocks[:, first:first + 4], 1, bitorder="little")


def q4_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * (nibbles(blocks[:, 2:]) - 8)


def q4_1(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * nibbles(blocks[:, 4:]) + halves(blocks, 2)


def q5_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * (nibbles(blocks[:, 6:]) + fifth_bits(blocks, 2) - 16)


def q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = nibbles(blocks[:, 8:]) + fifth_bits(blocks, 4)
    return halves(blocks, 0) * codes + halves(blocks, 2)


def q8_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * blocks[:, 2:].view(np.int8)


def scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of 6 bits that q4_k and q5_k hold in 12 bytes: (n, 8) each."""
    first = packed[:, :4]
    second = packed[:, 4:8]
    third = packed[:, 8:]
    # the last four have their upper two bits above the first four
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 1)
    return scales.astype(np.float32), minima.astype(np.float32)


def by_groups(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """d scale_g code - d_min minimum_g of 8 groups of 32 codes each, (n, 256)."""
    scales, minima = scales_and_minima(blocks[:, 4:16])
    values = (halves(blocks, 0) * scales)[:, :, None] * codes.reshape(-1, 8, 32)
    return (values - (halves(blocks, 2) * minima)[:, :, None]).reshape(-1, 256)


def q4_k(blocks: np.ndarray) -> np.ndarray:
    # 32 bytes are two groups: low bits, then high bits
    codes = nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 256)
    return by_groups(blocks, codes)


def q5_k(blocks: np.ndarray) -> np.ndarray:
    codes = nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    bits = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1     # (n, 8, 32)
    return by_groups(blocks, codes + 16.0 * bits)


def two_bits(codes: np.ndarray) -> np.ndarray:
    """(n, 32 m) bytes -> (n, m, 4, 32): bits 0 and 1 of 32 bytes, then 2 and 3, ..."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return codes.reshape(len(codes), -1, 1, 32) >> shifts & 3


def q2_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, :16].astype(np.float32)
    scales = (blocks[:, :16] & 15) * halves(blocks, 80)
    minima = np.floor(packed / 16) * halves(blocks, 82)
    codes = two_bits(blocks[:, 16:80]).reshape(-1, 16, 16)
    return (scales[:, :, None] * codes - minima[:, :, None]).reshape(-1, 256)


def q3_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], 1)              # (n, 16)
    high = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3    # (n, 4, 4)
    scales = (low | high.reshape(-1, 16) << 4).astype(np.float32) - 32
    # a third bit for each number: where it is missing 4 is taken away
    has_bit = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1    # (n, 8, 32)
    codes = two_bits(blocks[:, 32:96]).reshape(-1, 8, 32) + 4.0 * has_bit - 4
    scales = scales * halves(blocks, 108)
    return (scales[:, :, None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


def q6_k(blocks: np.ndarray) -> np.ndarray:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    high = two_bits(blocks[:, 128:192])                                            # (n, 2, 4, 32)
    codes = (low | high << 4).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8) * halves(blocks, 208)                # (n, 16)
    return (scales[:, :, None] * codes.reshape(-1, 16, 16)).reshape(-1, 256)


class Kind(NamedTuple):
    number: int
    block: int                        # numbers in a block
    size: int                         # its bytes
    unpack: Callable | None           # (n, size) uint8 -> (n, block) fp32; None: plain numbers
    dtype: torch.dtype | None = None


KINDS = {
    "F32": Kind(0, 1, 4, None, torch.float32),
    "F16": Kind(1, 1, 2, None, torch.float16),
    "BF16": Kind(30, 1, 2, None, torch.bfloat16),
    "Q4_0": Kind(2, 32, 18, q4_0),
    "Q4_1": Kind(3, 32, 20, q4_1),
    "Q5_0": Kind(6, 32, 22, q5_0),
    "Q5_1": Kind(7, 32, 24, q5_1),
    "Q8_0": Kind(8, 32, 34, q8_0),
    "Q2_K": Kind(10, 256, 84, q2_k),
    "Q3_K": Kind(11, 256, 110, q3_k),
    "Q4_K": Kind(12, 256, 144, q4_k),
    "Q5_K": Kind(13, 256, 176, q5_k),
    "Q6_K": Kind(14, 256, 210, q6_k),
}


def unpacked(tensor: Packed) -> Tensor:
    """The numbers of a tensor: in its own dtype, or in fp32 where it was quantized."""
    kind = KINDS[tensor.kind]
    if kind.unpack is None:
        return torch.from_numpy(tensor.data.copy()).view(kind.dtype).view(tensor.shape)
    blocks = tensor.data.reshape(-1, kind.size)
    numbers = np.empty((len(blocks), kind.block), np.float32)
    at_once = 1 << 16                                  # blocks, because they grow on the way
    for first in range(0, len(blocks), at_once):
        numbers[first:first + at_once] = kind.unpack(blocks[first:first + at_once])
    return torch.from_numpy(numbers).view(tensor.shape)


def slice_of(tensor: Packed, i: int) -> Packed:
    """tensor[i], still packed: blocks lie within the innermost dimension."""
    [chunk] = tensor.data.reshape(tensor.shape[0], -1)[i:i + 1]
    return tensor._replace(shape=tensor.shape[1:], data=chunk)


# ---------------------------------------------------------------------- reading

class Reader:
    """Values from the beginning of a file on. Raises ValueError where it is cut short."""

    def __init__(self, data: memoryview):
        self.data = data
        self.place = 0

    def take(self, n: int, what: str) -> memoryview:
        if n > len(self.data) - self.place:
            raise ValueError(f"{what} at byte {self.place:,} should have {n:,} bytes, and "
                             f"{len(self.data) - self.place:,} are left: the file is cut short or "
                             "its header is wrong")
        self.place += n
        return self.data[self.place - n:self.place]

    def number(self, code: str, what: str) -> float:
        [value] = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return value

    def text(self, what: str) -> str:
        n = self.number("Q", what)
        chunk = self.take(n, what)
        if n > LONGEST:                                # before it is copied
            raise ValueError(f"{what} has {n:,} bytes; up to {LONGEST:,} are served")
        raw = bytes(chunk)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is no text: {raw[:40]!r}") from None

    def value(self, kind: int, what: str):
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise ValueError(f"{what} has the type {kind}, which GGUF does not know")
        of = self.number("I", what)
        if of == ARRAY:                                # one in the other, perhaps without an end
            raise ValueError(f"{what} is an array of arrays, which no model has")
        n = self.number("Q", what)
        if of not in SCALARS and n * 8 > len(self.data) - self.place:      # 8 bytes a string
            raise ValueError(f"{what} should have {n:,} entries: the file is cut short or its "
                             "header is wrong")
        if n > MOST:
            raise ValueError(f"{what} should have {n:,} entries; up to {MOST:,} are served")
        if of in SCALARS:
            code = SCALARS[of]
            raw = self.take(n * struct.calcsize("<" + code), what)
            return list(struct.unpack(f"<{n}{code}", raw))
        return [self.value(of, what) for _ in range(n)]


def read(data: memoryview) -> tuple[dict, dict[str, Packed]]:
    """The metadata and the tensors of a GGUF file. Raises ValueError, saying where, for what is
    none, is cut short or contradicts itself."""
    reader = Reader(data)
    if bytes(reader.take(4, "the magic number")) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; 2 and 3 are served, in little-endian order")
    n_tensors = reader.number("Q", "the number of tensors")
    n_metadata = reader.number("Q", "the number of metadata")
    metadata = {}
    for i in range(n_metadata):
        name = reader.text(f"the name of metadata {i}")
        if name in metadata:
            raise ValueError(f"{name} stands twice")
        kind = reader.number("I", f"the type of {name}")
        metadata[name] = reader.value(kind, name)
    headers = []
    for i in range(n_tensors):
        headers.append(read_header(reader, i))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}; it must be a positive number")
    start = -(-reader.place // alignment) * alignment
    tensors = {}
    spans = []                                         # (first byte, behind the last, name)
    for name, kind, shape, offset in headers:
        if name in tensors:
            raise ValueError(f"the tensor {name} stands twice")
        n_bytes = math.prod(shape) // KINDS[kind].block * KINDS[kind].size
        if offset % alignment:
            raise ValueError(f"the offset of {name} is {offset:,}, no multiple of {alignment}")
        spans.append((offset, offset + n_bytes, name))
        reader.place = min(start + offset, len(data))
        raw = reader.take(n_bytes, f"the tensor {name}")
        tensors[name] = Packed(name, kind, shape, np.frombuffer(raw, np.uint8))
    spans.sort()
    for (_, end, name), (begin, _, following) in zip(spans, spans[1:]):
        if begin < end:
            raise ValueError(f"the tensors {name} and {following} overlap")
    return metadata, tensors


def read_header(reader: Reader, i: int) -> tuple[str, str, tuple[int, ...], int]:
    """Name, kind, shape and offset of tensor i."""
    name = reader.text(f"the name of tensor {i}")
    n_dimensions = reader.number("I", f"the dimensions of {name}")
    if not 1 <= n_dimensions <= 4:
        raise ValueError(f"the tensor {name} has {n_dimensions} dimensions")
    shape = [reader.number("Q", f"the shape of {name}") for _ in range(n_dimensions)]
    number = reader.number("I", f"the type of {name}")
    offset = reader.number("Q", f"the offset of {name}")
    if 0 in shape:
        raise ValueError(f"the tensor {name} has the shape {tuple(shape)}, with no number in it")
    kinds = [kind for kind, of in KINDS.items() if of.number == number]
    if not kinds:
        raise ValueError(f"the tensor {name} has the type {number}; served are {', '.join(KINDS)}")
    if shape[0] % KINDS[kinds[0]].block:
        raise ValueError(f"the tensor {name} of shape {tuple(shape)} does not divide into blocks "
                         f"of {KINDS[kinds[0]].block}")
    return name, kinds[0], tuple(reversed(shape)), offset


# ---------------------------------------------------------------------- writing

def packed_value(value) -> bytes:
    """Type and value of a piece of metadata: bool, int, float, str, or a list of one of them."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + packed_text(value)
    entries = [packed_value(entry) for entry in value]
    of = entries[0][:4] if entries else struct.pack("<I", STRING)
    if of == struct.pack("<I", UINT32):                # llama.cpp takes arrays of int32 alone
        of = struct.pack("<I", INT32)
    values = b"".join(entry[4:] for entry in entries)
    return struct.pack("<I", ARRAY) + of + struct.pack("<Q", len(entries)) + values


def packed_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def write(file: Path, metadata: dict, tensors: dict[str, Tensor]) -> None:
    """A GGUF file of these metadata and of tensors in fp32, fp16 or bf16."""
    kinds = {kind.dtype: kind.number for kind in KINDS.values() if kind.dtype}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for name, value in metadata.items():
        head += [packed_text(name), packed_value(value)]
    offset = 0
    for name, tensor in tensors.items():
        shape = reversed(tensor.shape)
        head += [packed_text(name), struct.pack("<I", tensor.dim()),
                 struct.pack(f"<{tensor.dim()}Q", *shape),
                 struct.pack("<IQ", kinds[tensor.dtype], offset)]
        offset += padded(tensor.numel() * tensor.element_size())
    with open(file, "wb") as out:
        out.write(b"".join(head))
        out.write(bytes(padded(out.tell()) - out.tell()))
        for tensor in tensors.values():
            raw = tensor.contiguous().view(torch.uint8).numpy()
            raw.tofile(out)
            out.write(bytes(padded(out.tell()) - out.tell()))


def padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
