#!/usr/bin/env python3
"""Write a Llama-shaped checkpoint of random weights, of any size, without ever holding it in memory.

For measuring, and for whatever must be seen to work on files larger than memory. A tensor's weights follow from the
seed and its name alone: both formats, and any cut into files, hold the same model.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

HIDDEN = [2**n for n in range(9, 15)]  # so that the heads can be shared by 2, 4 and mostly 8 ranks
CHUNK = 2**20  # elements drawn at once
NEAR_ENOUGH = 0.05  # of the size that was asked for
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

# The zip format (APPNOTE.TXT 4.3.7, 4.3.9, 4.3.12): where a CRC lies in a record, and how far the next one is.
LOCAL_HEADER, LOCAL_LENGTHS = 30, 26
DESCRIPTOR_CRC = 4
DIRECTORY_ENTRY, DIRECTORY_CRC, DIRECTORY_LENGTHS = 46, 16, 28


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the modules."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            **{
                f"model.layers.{i}.{name}.weight": shape
                for i in range(self.layers)
                for name, shape in layer.items()
            },
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self, dtype: str) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": dtype,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def choose_shape(parameters: int, chosen: argparse.Namespace) -> Llama:
    """The model of about so many parameters that looks most like a Llama, with the sizes that were given.

    Llamas have a layer for every 100 to 130 of hidden (2048: 16, 4096: 32, 8192: 80), heads of 64 in the small and
    of 128 in the large, a quarter as many KV heads, and an intermediate size of 2.67 to 3.5 times hidden.
    """
    found = []
    for hidden in [chosen.hidden] if chosen.hidden else HIDDEN:
        heads = chosen.heads or max(1, hidden // (64 if hidden <= 2048 else 128))
        kv_heads = chosen.kv_heads or max(1, heads // 4)
        if hidden % heads or heads % kv_heads:
            sys.exit(
                f"hidden {hidden}, heads {heads}, KV heads {kv_heads}: each must divide the one before it"
            )
        steps = range(-(-hidden * 8 // 3 // 256) * 256, hidden * 7 // 2 + 1, 256)
        for intermediate in [chosen.intermediate] if chosen.intermediate else steps:
            without = Llama(hidden, intermediate, 0, heads, kv_heads, chosen.vocab).parameters()
            layer = Llama(hidden, intermediate, 1, heads, kv_heads, chosen.vocab).parameters() - without
            layers = chosen.layers or max(1, round((parameters - without) / layer))
            miss = abs((without + layers * layer) / parameters - 1)
            oddness = round(abs(math.log2(layers * 115 / hidden)), 1)  # coarse, so that then the size decides
            shape = Llama(hidden, intermediate, layers, heads, kv_heads, chosen.vocab)
            found.append((miss > NEAR_ENOUGH, oddness if miss <= NEAR_ENOUGH else miss, miss, shape))
    too_far, _, miss, shape = min(found, key=lambda candidate: candidate[:3])
    if too_far:
        sys.exit(
            f"the nearest shape, {shape}, misses --size by {miss:.0%}; change --size, or --hidden or --vocab"
        )
    return shape


@functools.cache
def values(dtype: torch.dtype, *, mean: float) -> NDArray[Any]:
    """65536 quantiles of a normal distribution of deviation 0.02, as raw bits: one for each 16 random bits."""
    uniform = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    normal = torch.special.ndtri(uniform).mul(0.02).add(mean).to(dtype)
    bits: NDArray[Any] = normal.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    return bits


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Iterator[memoryview]:
    """The bytes of one tensor, in chunks."""
    table = values(dtype, mean=1.0 if name.endswith("norm.weight") else 0.0)
    generator = np.random.SFC64([seed, zlib.crc32(name.encode())])
    for start in range(0, math.prod(shape), CHUNK):
        count = min(CHUNK, math.prod(shape) - start)
        picks = generator.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        yield table[picks].data


def write_torch_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """Write what torch.save would, but for the digest in `.data/serialization_id`.

    torch.save writes the zip with holes where the data belongs (it reserves memory for it, but touches none). Then
    the holes are filled, and the two CRCs that each record has, after its data and in the directory.
    """
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, path)
    with zipfile.ZipFile(path) as archive:
        records, entry = archive.infolist(), archive.start_dir
    names = iter(shapes)  # storages are numbered as they come
    with path.open("r+b") as file:
        for record in records:
            if record.filename.startswith(f"{path.stem}/data/"):
                name = next(names)
                file.seek(record.header_offset + LOCAL_LENGTHS)
                file.seek(record.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4))))
                crc = 0
                for chunk in draw(name, shapes[name], dtype, seed):
                    crc = zlib.crc32(chunk, crc)
                    file.write(chunk)
                file.seek(DESCRIPTOR_CRC, 1)
                file.write(struct.pack("<I", crc))
                file.seek(entry + DIRECTORY_CRC)
                file.write(struct.pack("<I", crc))
            file.seek(entry + DIRECTORY_LENGTHS)
            entry += DIRECTORY_ENTRY + sum(struct.unpack("<HHH", file.read(6)))


def write_safetensors_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            file.writelines(draw(name, shape, dtype, seed))


def cut_into_files(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file, in order; only a tensor that is larger by itself makes a larger file."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and held + size > max_bytes:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += size
    return files


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|)", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GiB, 500MB or 1000000")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist or is empty")
    parser.add_argument(
        "--size", type=parse_size, required=True, help="of all weights, within 5 %% (4GiB, 500MB)"
    )
    parser.add_argument("--format", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--max-shard-size", type=parse_size, default="1GB", help="of one file (default: 1GB)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=32000, help="default: 32000")
    for name in ("--hidden", "--intermediate", "--layers", "--heads", "--kv-heads"):
        parser.add_argument(name, type=int, help="default: as a Llama of this size would have")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} is not an empty folder; choose another, or remove it first")
    return options


def main() -> None:
    options = parse_arguments()
    dtype = getattr(torch, options.dtype)
    shape = choose_shape(options.size // dtype.itemsize, options)
    files = cut_into_files(shape.tensors(), dtype, options.max_shard_size)
    total = shape.parameters() * dtype.itemsize
    if options.format == "bin":
        stem, ending, write = "pytorch_model", ".bin", write_torch_file
    else:
        stem, ending, write = "model", ".safetensors", write_safetensors_file

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "config.json").write_text(json.dumps(shape.config(options.dtype), indent=2) + "\n")
    weight_map: dict[str, str] = {}
    began = time.monotonic()
    for i, shapes in enumerate(files, start=1):
        name = f"{stem}-{i:05d}-of-{len(files):05d}{ending}" if len(files) > 1 else stem + ending
        write(options.out / name, shapes, dtype, options.seed)
        weight_map |= dict.fromkeys(shapes, name)
        print(f"{name}  {time.monotonic() - began:.0f} s", file=sys.stderr)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (options.out / f"{stem}{ending}.index.json").write_text(json.dumps(index, indent=2) + "\n")

    rate = total / 1e6 / (time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{shape}: {total:,} bytes in {len(files)} files, {rate:.0f} MB/s, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
