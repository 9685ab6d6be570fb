"""Spoils a segment and a prompt cache in thousands of ways, and counts what reading them does.

    python -m benches.fuzz_files [--mutations 10000] [--seed 0]

Two in five mutations are of a file's bytes. The others change a manifest, a header or numbers and put every checksum
right again, as a forger would, so that what is behind the checksums is tried as well; a forged file that is a good
file of other content is counted as such once it has been used.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from turboquant import CacheCodec, EncodedLayer, Fork, TurboQuantKVCache, load_prompt_cache, save_prompt_cache
from turboquant.caches.prefix import Segment, join
from turboquant.io.identity import Identity
from turboquant.io.json_file import seal
from turboquant.io.prompt_cache import MANIFEST as MANIFEST_KEY
from turboquant.io.safetensors import FileError, digest_stored
from turboquant.io.safetensors_header import Stored
from turboquant.io.segment_file import MANIFEST, TENSORS, read_segment, write_segment
from turboquant.kernels.encoding import encode_layer

CODEC = CacheCodec(3, 4, window=8)
IDENTITY = Identity("weights", "tokenizer", CODEC.identity, "exact")
KEY = IDENTITY.key([1, 2, 3])
TOKENS = 300
PIECES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 127, 1 << 31, 1 << 63, 1 << 90, 0.5, 1e308, float("nan"), "", "x", "0", "tensor"),
    *("KVCache", "RotatingKVCache", "ArraysCache", "encoded", "turboquant", "fork", "F32", "BOOL", "subprocess.Popen"),
    *([], {}, [1], [0, 0], [1 << 40, 1 << 40], {"value": 3}, {"items": []}, {"tensor": "0.state.0"}),
]


class Target:
    """A kind of file: its bytes, how it is read, and what is in it as (name, value) pairs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.expected = contents(self.read())

    def write(self) -> None:
        """Write the good files."""
        raise NotImplementedError

    def read(self) -> list[Any]:
        """What the files hold, or a FileError."""
        raise NotImplementedError

    def forge(self, rng: random.Random) -> dict[str, bytes]:
        """The files changed, with all checksums right."""
        raise NotImplementedError

    def put(self, files: dict[str, bytes]) -> None:
        """Put these files in the place of the good ones."""
        for name, content in files.items():
            (self.folder / name).write_bytes(content)


class SegmentFile(Target):
    """A segment, as the store keeps it."""

    def write(self) -> None:
        """Write the good files."""
        write_segment(self.folder, KEY, Segment((encoded(), *stock_caches()), 0, TOKENS), IDENTITY)

    def read(self) -> list[Any]:
        """What the files hold, or a FileError."""
        return list(join([read_segment(self.folder, KEY, CODEC)]).fork())

    def forge(self, rng: random.Random) -> dict[str, bytes]:
        """The manifest changed, or the tensors' header or numbers, with all checksums right."""
        manifest, tensors = json.loads(self.files[MANIFEST]), self.files[TENSORS]
        if rng.random() < 0.5:
            manifest = change(manifest, rng)
        else:
            tensors = forge_tensors(tensors, rng)
            manifest |= {"bytes": len(tensors), "checksum": xxhash.xxh3_128_hexdigest(tensors)}
        return {MANIFEST: dump(sealed(manifest)).encode(), TENSORS: tensors}


class PromptCache(Target):
    """A prompt cache of all kinds of layer."""

    NAME = "cache.safetensors"

    def write(self) -> None:
        """Write the good file."""
        streaming, short, fork = TurboQuantKVCache(CODEC), TurboQuantKVCache(CODEC), Fork(encoded())
        for tokens in (TOKENS - 1, 1):
            streaming.update_and_fetch(*random_kv(tokens))
        for cache in (short, fork):
            cache.update_and_fetch(*random_kv(5))
        save_prompt_cache(self.folder / self.NAME, [streaming, short, fork, *stock_caches()], {"model": "a name"})

    def read(self) -> list[Any]:
        """What the file holds, or a FileError."""
        caches, metadata = load_prompt_cache(self.folder / self.NAME, return_metadata=True)
        return [*caches, metadata]

    def forge(self, rng: random.Random) -> dict[str, bytes]:
        """The manifest changed, or the tensors' header or numbers, with all checksums right."""
        content = self.files[self.NAME]
        if rng.random() < 0.5:
            content = forge_tensors(content, rng)
        header, data = split(content)
        manifest = json.loads(header["__metadata__"][MANIFEST_KEY])
        if content is self.files[self.NAME]:
            manifest = change(manifest, rng)
        if isinstance(manifest, dict) and "checksum" in manifest:
            manifest["checksum"] = self._digest(header, data) or manifest["checksum"]
        header["__metadata__"][MANIFEST_KEY] = dump(sealed(manifest))
        return {self.NAME: joined(header, data)}

    def _digest(self, header: Any, data: bytes) -> str | None:
        """The checksum over tensors that lie where the header says, None where they cannot."""
        (self.folder / "data").write_bytes(data)
        try:
            stored = {
                name: Stored(x["dtype"], x["shape"], *x["data_offsets"])
                for name, x in header.items()
                if name != "__metadata__"
            }
            with (self.folder / "data").open("rb") as file:
                return digest_stored(file, stored)
        except Exception:
            return None
        finally:
            (self.folder / "data").unlink()


def fuzz(mutations: int, seed: int, folder: Path) -> Counter[str]:
    """Read ``mutations`` spoilt files; counts what came of it, and prints what should not have."""
    rng, counts = random.Random(seed), Counter[str]()
    mx.random.seed(seed)
    targets = [SegmentFile(folder / "segment"), PromptCache(folder / "prompt_cache")]
    for number in range(mutations):
        target = targets[number % 2]
        forged = rng.random() < 0.6
        target.put(target.files)
        target.put(target.forge(rng) if forged else spoil(target.files, rng))
        outcome = read(target, forged)
        counts[outcome] += 1
        if outcome in ("crashed", "loaded wrong"):
            print(f"mutation {number} of seed {seed}: {outcome}", file=sys.stderr)
    return counts


def read(target: Target, forged: bool) -> str:
    """What came of reading a target's files as they are now."""
    try:
        caches = target.read()
    except FileError as error:
        return "refused" if str(error) else "crashed"
    except Exception:
        traceback.print_exc()
        return "crashed"
    if contents(caches) == target.expected:
        return "loaded equal"
    if not forged:
        return "loaded wrong"
    try:
        with np.errstate(all="ignore"):  # forged numbers may be too large to compute with
            use(caches)
    except Exception:
        traceback.print_exc()
        return "crashed"
    return "forged a good file of other content"


def use(caches: list[Any]) -> None:
    """Add a token to each cache and attend, as a model would."""
    for cache in caches:
        if isinstance(cache, Fork):
            past = cache.layer
            dims = (64, 64) if past is None else (past.key_mean.shape[2], past.value_mean.shape[2])
            heads = 2 if past is None else past.key_mean.shape[0]
            if not cache.suffix.empty():
                heads, dims = cache.suffix.keys.shape[1], [x.shape[3] for x in cache.suffix.keys_and_values()]
            fetched = cache.update_and_fetch(*(mx.ones((1, heads, 1, dim)) for dim in dims))
            queries = mx.ones((1, heads, 1, dims[0]))
            mx.eval(cache.attend(queries, *fetched, scale=1.0, mask=cache.make_mask(1), sinks=None))
        elif isinstance(cache, KVCache | RotatingKVCache) and cache.keys is not None:
            shapes = [(*x.shape[:2], 1, x.shape[3]) for x in (cache.keys, cache.values)]
            mx.eval(cache.update_and_fetch(*(mx.ones(shape) for shape in shapes)))


def contents(caches: list[Any]) -> list[tuple[str, Any]]:
    """Everything the caches hold, comparable bit by bit."""
    flat: list[tuple[str, Any]] = []
    for index, cache in enumerate(caches):
        state = cache if isinstance(cache, dict) else cache.state
        if type(cache) is Fork:
            state = [cache.layer.tensors(), cache.layer.codec.identity, state]
        leaves: Any = tree_flatten(state)
        for name, leaf in leaves:
            if isinstance(leaf, mx.array):
                leaf = (leaf.dtype, leaf.shape, bytes(np.array(leaf.reshape(-1).view(mx.uint8))) if leaf.size else b"")
            flat.append((f"{index}.{type(cache).__name__}.{name}", leaf))
    return flat


# --- good files


def random_kv(tokens: int) -> tuple[mx.array, mx.array]:
    """Keys and values (1, 2, tokens, 64)."""
    return mx.random.normal((1, 2, tokens, 64)), mx.random.normal((1, 2, tokens, 64))


def encoded() -> EncodedLayer:
    """An encoded layer of TOKENS tokens."""
    keys, values = random_kv(TOKENS)
    return encode_layer(keys[0], values[0], CODEC)


def stock_caches() -> list[Any]:
    """mlx-lm's own after TOKENS tokens."""
    plain, rotating, arrays = KVCache(), RotatingKVCache(max_size=16, keep=2), ArraysCache(3)
    plain.update_and_fetch(*random_kv(TOKENS))
    plain.keys, plain.values = (mx.contiguous(x) for x in plain.keys_and_values())
    for tokens in (TOKENS - 1, 1):
        rotating.update_and_fetch(*random_kv(tokens))
    arrays[0], arrays[2] = mx.random.normal((1, 4, 8)), mx.random.normal((1, 2))
    return [plain, rotating, arrays]


# --- spoiling


def spoil(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """One of the files with other bytes."""
    name = rng.choice(list(files))
    good = files[name]
    head = len(good) if rng.random() < 0.5 else min(len(good), 3000)  # a file's beginning says what the rest is
    at, length = rng.randrange(head), rng.choice((1, 2, 8, 100, 4096))
    piece = rng.choice((b"", rng.randbytes(length), bytes(length), b"\xff" * length, good[:length], good[at:]))
    ways: list[Callable[[], bytes]] = [
        lambda: good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :],
        lambda: good[:at],
        lambda: good[:at] + piece + good[at:],
        lambda: good[:at] + piece + good[at + len(piece) :],
        lambda: good[:at] + good[at + length :],
    ]
    return {name: rng.choice(ways)()}


def change(content: Any, rng: random.Random, pieces: Sequence[Any] = PIECES) -> Any:
    """JSON with one of its nodes changed, left out, doubled, or swapped with its neighbour."""
    content = json.loads(dump(content))
    parent, key = rng.choice(list(nodes(content)))
    way, value = rng.randrange(6), parent[key]
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, list):
        parent.append(value)
    elif way == 2 and isinstance(parent, list):
        other = rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif way == 3 and isinstance(value, int):
        parent[key] = value + rng.choice((-1, 1, 64, -64))
    elif way == 4 and isinstance(parent, dict):
        other = rng.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = json.loads(dump(rng.choice(pieces)))
    return content


def nodes(content: Any) -> Any:
    """All (container, key) of JSON."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from nodes(content[key])


def forge_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, but for its metadata, or with other numbers."""
    header, data = split(content)
    metadata = header.pop("__metadata__", None)
    if rng.random() < 0.7:
        header = change(header, rng)
    else:
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice((b"\x00\x7e", b"\xff" * 4, b"\x00\x00\x80\x7f", rng.randbytes(3))) + data[at:]
        data = data[: len(content) - 8 - int.from_bytes(content[:8], "little")]
    return joined({"__metadata__": metadata} | header if metadata is not None else header, data)


def split(content: bytes) -> tuple[Any, bytes]:
    """A safetensors file's header and data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    """Undo ``split``."""
    text = dump(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def sealed(manifest: Any) -> Any:
    """A manifest with its checksum right."""
    return (
        {**manifest, "manifest_checksum": seal(manifest, "manifest_checksum")}
        if isinstance(manifest, dict)
        else manifest
    )


def dump(content: Any) -> str:
    """As JSON."""
    return json.dumps(content)


def main() -> int:
    """Run the command; returns 1 where a file crashed the reader or was loaded wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(options.mutations, options.seed, Path(folder))
    for outcome in ("refused", "loaded equal", "forged a good file of other content", "loaded wrong", "crashed"):
        print(json.dumps({"outcome": outcome, "count": counts[outcome]}))
    return 1 if counts["loaded wrong"] or counts["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main())
