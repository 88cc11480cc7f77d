"""Damages files in every way it can think of, and looks at what the readers make of them.

    python -m tests.fuzz 20000 [--seed N] [--only TARGET]

A reader must refuse a damaged file with an EngineError of one line, or read what makes sense: a
file that is opened without complaint must hold what the undamaged one holds where a checksum says
so, and numbers that can be computed with elsewhere. Anything else (another exception, a hang, a
wrong answer) is a finding, told with the seed that makes it again. The same seed makes the same
files.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from tiny_model import (
    CHAT_TEMPLATE,
    CONFIG,
    hf_config,
    random_tensors,
    tokenizer_json,
    write_gguf,
    write_hf_folder,
)

from codec.lossless import LosslessMatrix, decode_lossless
from codec.matrix import decode_matrix
from engine.errors import EngineError
from engine.session import load_session, save_session
from engine.tokenizer import Tokenizer
from weights.convert import CalibrationText, convert
from weights.sources import open_source
from weights.sources.families import read_family
from weights.store import WeightsFile

SECONDS = 10  # for one file: no reader of a few kilobytes may take as long

Rng = np.random.Generator
SMALL = dataclasses.replace(CONFIG, dim=24, hidden_dim=30, n_layers=1, n_heads=2, head_dim=12)

# What numbers in a file like to be wrong by.
_NUMBERS = (
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 97, 10**6, 2**31, 2**63, 10**30, 0.0, -0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), True, False, None, "", "x", "llama", "linear", "yarn", [], {}),
    *([0], ["a"], [[]], {"rope_type": "llama3"}, {"type": "linear", "factor": 2}, [1, 2, 3]),
)


def damaged(data: bytes, rng: Rng) -> bytes:
    """`data` after one to four accidents."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, kind = int(rng.integers(len(out) + 1)), rng.integers(8)
        # Heads of files are small and matter most.
        if rng.random() < 0.5:
            at %= 600
        n = int(rng.integers(1, 9))
        if kind == 0:  # cut off
            del out[at:]
        elif kind == 1:
            del out[at : at + n]
        elif kind == 2:
            out[at:at] = rng.bytes(n)
        elif kind == 3:
            out[at : at + n] = rng.bytes(n)
        elif kind == 4 and at < len(out):
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 5:  # another piece of itself
            begin = int(rng.integers(len(out) + 1))
            out[at : at + 4 * n] = out[begin : begin + 4 * n]
        else:
            width = int(rng.choice([1, 2, 4, 8]))
            number = _NUMBERS[rng.integers(len(_NUMBERS))] % (1 << 8 * width)
            out[at : at + width] = number.to_bytes(width, "little")
    return bytes(out)


def damaged_json(value: Any, rng: Rng) -> Any:
    """A JSON value with some of its parts replaced, left out or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.integers(1, 4)):
        part = value
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.8:
                part = part[key]
                continue
            kind = rng.integers(4)
            if kind == 0:
                del part[key]
            elif kind == 1 and isinstance(part, dict):
                part[f"{key}x"] = part[key]
            else:
                part[key] = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])
            break
    return value


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """An EngineError is what we want, if it reads well."""
    try:
        yield
    except EngineError as error:
        text = str(error)
        assert text and "\n" not in text, f"not one line: {text!r}"


class Files:
    """The undamaged files, and the place for a damaged one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tensors = random_tensors(SMALL)
        self.hf = write_hf_folder(folder / "hf", SMALL, tensors)
        source = open_source(self.hf)
        self.weights: list[bytes] = []
        self.matrices: list[dict[str, Any]] = []
        for bits in (4, "lossless"):
            path = folder / "good"
            convert(source, path, bits, text=CalibrationText(0), progress=False)
            self.weights.append(path.read_bytes())
            self.matrices.append(contents(WeightsFile.open(path)))
        self.gguf = write_gguf(folder / "good.gguf", SMALL, tensors).read_bytes()
        self.shard = (self.hf / "model.safetensors").read_bytes()
        self.engine: Any = SimpleNamespace(  # as much of one as sessions know
            exact=False,
            context=64,
            config=SMALL,
            cached_tokens=[3, 4, 5],
            device=None,
            weights=SimpleNamespace(identity="tiny", source="tiny"),
            cache=SimpleNamespace(
                kind="f16",
                shapes=lambda n: {"layers.0.keys": (2, n, 4), "layers.0.values": (2, n, 4)},
                read=lambda device, n: [
                    (f"layers.0.{part}", np.full((2, n, 4), 7, np.uint32))
                    for part in ("keys", "values")
                ],
            ),
        )
        save_session(self.engine, folder / "good.session", "a note")
        self.session = (folder / "good.session").read_bytes()

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def contents(file: WeightsFile) -> dict[str, Any]:
    """All that a weights file says, decoded. ValueError: a stream does not end where it should."""
    found: dict[str, Any] = {"config": file.config, "tokenizer": file.tokenizer_json}
    found |= {"source": file.source, "template": file.chat_template}
    for name in file.matrix_names:
        matrix = file.matrix(name)
        if isinstance(matrix, LosslessMatrix):
            found[name] = decode_lossless(matrix).tobytes()
        else:
            found[name] = decode_matrix(matrix).tobytes(), matrix.scale.tobytes()
    return found


def weights_file(files: Files, rng: Rng) -> None:
    """Checksums: what opens is what it was."""
    i = rng.integers(len(files.weights))
    path = files.write("fuzz.safetensors", damaged(files.weights[i], rng))
    with refused_in_one_line():
        file = WeightsFile.open(path)
        assert contents(file) == files.matrices[i], "opened, but holds something else"


def weights_file_with_right_checksums(files: Files, rng: Rng) -> None:
    """What an ill-meaning writer could make: nothing may leave its arrays."""
    i = rng.integers(len(files.weights))
    data = files.weights[i]
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + n]), bytearray(data[8 + n :])
    metadata = header["__metadata__"]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.integers(0, 3)):
        begin, end = header[names[rng.integers(len(names))]]["data_offsets"]
        if begin < end:
            some = damaged(bytes(body[begin:end]), rng)[: end - begin]
            body[begin : begin + len(some)] = some
    for key in ("config", "matrices"):
        if rng.random() < 0.3:
            metadata[key] = json.dumps(damaged_json(json.loads(metadata[key]), rng))
    crc = {name: zlib.crc32(body[slice(*header[name]["data_offsets"])]) for name in names}
    metadata["crc32"] = json.dumps(crc)
    others = {key: text for key, text in metadata.items() if key != "metadata_crc32"}
    canonical = json.dumps(others, sort_keys=True, separators=(",", ":")).encode()
    metadata["metadata_crc32"] = str(zlib.crc32(canonical))
    head = json.dumps(header).encode()
    path = files.write("fuzz.safetensors", len(head).to_bytes(8, "little") + head + body)
    with refused_in_one_line():
        file = WeightsFile.open(path)
        try:
            contents(file)
        except ValueError:  # a stream that ends elsewhere; `answer inspect` says so
            return
        for name in file.matrix_names:
            assert np.isfinite(getattr(file.matrix(name), "scale", 0)).all()


def gguf_file(files: Files, rng: Rng) -> None:
    path = files.write("fuzz.gguf", damaged(files.gguf, rng))
    with refused_in_one_line():
        source = open_source(path)
        for name, tensor in source.tensors.items():
            assert source.read(name).shape == tensor.shape
        Tokenizer(source.tokenizer_json, source.chat_template, source.config).encode("ab 12<eos>")


def safetensors_file(files: Files, rng: Rng) -> None:
    files.write("hf/model.safetensors", damaged(files.shard, rng))
    with refused_in_one_line():
        source = open_source(files.hf)
        for name, tensor in source.tensors.items():
            assert source.read(name).shape == tensor.shape


def config(files: Files, rng: Rng) -> None:
    hf = hf_config(SMALL)
    hf["model_type"] = str(rng.choice(["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"]))
    hf["rope_scaling"] = {
        "rope_type": str(rng.choice(["default", "linear", "llama3", "yarn"])),
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    hf |= {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"]}
    hf |= {"residual_multiplier": 0.5, "attention_multiplier": 0.25, "no_rope_layers": [1]}
    with refused_in_one_line():
        family = read_family(damaged_json(hf, rng))
        c = family.config
        numbers = (c.score_scale, c.norm_eps, family.branch, family.final_norm, *c.rope_divisors)
        assert all(np.isfinite(numbers)) and min(numbers) > 0, numbers
        assert type(c).from_json(c.to_json()) == c


def tokenizer(files: Files, rng: Rng) -> None:
    data = tokenizer_json()
    if rng.random() < 0.5:
        data = damaged(data, rng)
    else:
        data = json.dumps(damaged_json(json.loads(data), rng)).encode()
    with refused_in_one_line():
        found = Tokenizer(data, CHAT_TEMPLATE, SMALL)
        ids = found.encode("ab! <eos> é\n" * 3)
        assert all(0 <= token < SMALL.vocab_size for token in ids)
        found.decode(ids)
        stream = found.stream()
        for token in [*ids, 0, 96, 5]:
            stream.push(token)


def template(files: Files, rng: Rng) -> None:
    source = damaged(CHAT_TEMPLATE.encode(), rng).decode(errors="replace")
    found = Tokenizer(tokenizer_json(), source, SMALL)
    with refused_in_one_line():
        assert isinstance(found.chat_prompt([{"role": "user", "content": "hi"}]), str)


def session(files: Files, rng: Rng) -> None:
    path = files.write("fuzz.session", damaged(files.session, rng))
    with refused_in_one_line():
        tokens, tensors, note = load_session(files.engine, path)
        assert (tokens, note) == ([3, 4, 5], "a note"), "opened, but holds something else"
        assert all((values == 7).all() for values in tensors.values())


TARGETS: dict[str, Callable[[Files, Rng], None]] = {
    function.__name__: function
    for function in (
        weights_file,
        weights_file_with_right_checksums,
        gguf_file,
        safetensors_file,
        config,
        tokenizer,
        template,
        session,
    )
}


class Hang(KeyboardInterrupt):
    """A reader did not come back; no handler of exceptions swallows this."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang(f"not done after {SECONDS} s")


def run(target: str, files: Files, seeds: range) -> Iterator[tuple[int, str]]:
    """Seeds with findings, and what was found."""
    before = signal.signal(signal.SIGALRM, _alarm)
    try:
        for seed in seeds:
            signal.alarm(SECONDS)
            try:
                TARGETS[target](files, np.random.default_rng(seed))
            except BaseException as error:  # a panic of tokenizers is no Exception
                if type(error) is KeyboardInterrupt:
                    raise
                at = error.__traceback__
                while at is not None and at.tb_next is not None:
                    at = at.tb_next
                place = "" if at is None else f" at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
                yield seed, f"{type(error).__name__}: {str(error)[:200]}{place}"
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="files to damage, shared among the targets")
    parser.add_argument("--seed", type=int, default=0, help="of the first file (%(default)s)")
    parser.add_argument("--only", choices=TARGETS, help="one target instead of all")
    options = parser.parse_args()
    targets = [options.only] if options.only else list(TARGETS)
    n_findings = 0
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        for target in targets:
            seeds = range(options.seed, options.seed + -(-options.n // len(targets)))
            found = list(run(target, files, seeds))
            n_findings += len(found)
            print(f"{target}: {len(seeds)} files, {len(found)} findings", flush=True)
            for seed, text in found[:20]:
                print(f"  --only {target} --seed {seed}: {text}")
    return int(n_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
