"""Byte codecs by name. A codec that is not installed is an error: silent fallbacks to zlib put entries of the challenge
over the limit by more than 1 MB (PR #401).

Measured excess over the order-0 entropy of normal int6 values (3 MiB, one a byte): brotli 11 +0.7 %, zstd 22 +1.0 %,
lzma 9 +2.7 %.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from pgolf.errors import ArtifactError, ConfigError, SetupError

# Bytes that brotli's decoder is fed at a time: before 1.2 it cannot bound its output itself. 16 bytes hold a meta-block
# or two of 16 MiB, so a bomb allocates no more than that before it is caught (31 MiB measured on zeros; 64 bytes: 64).
FEED = 16
LZMA_WINDOW = 2**26  # preset 9's


@dataclass(frozen=True)
class Codec:
    """`compress(data, level)`; `decompress(data, max_size)` yields at most max_size bytes or raises ArtifactError."""

    id: int  # in the container; never reused
    package: str | None  # what pip installs; None: standard library
    levels: range
    pack: Callable[[bytes, int], bytes]
    unpack: Callable[[bytes, int], bytes]

    def compress(self, data: bytes, level: int = -1) -> bytes:
        """Compresses at `level`, -1 being the strongest. Raises ConfigError on a level that the codec does not have."""
        self.check_level(level)
        return self.pack(data, self.levels[-1] if level == -1 else level)

    def check_level(self, level: int) -> None:
        """Raises ConfigError on a level that this codec does not have."""
        if level != -1 and level not in self.levels:
            raise ConfigError(
                f"quant.level={level}: {name_of(self)} has -1 (strongest), {self.levels[0]}..{self.levels[-1]}"
            )

    def decompress(self, data: bytes, max_size: int) -> bytes:
        """Raises ArtifactError on damaged data, or as soon as there is more than `max_size` bytes of output.

        Data that ends early gives what there is of it: compare the length.
        """
        try:
            out = self.unpack(data, max_size)
        except SetupError:
            raise
        except Exception as e:  # every codec has its own error classes
            raise ArtifactError(f"damaged compressed data: {str(e)[:200]}") from e
        if len(out) > max_size:
            raise ArtifactError(f"compressed data holds more than the {max_size} bytes that its header states")
        return out


def get(name: str) -> Codec:
    """The codec of that name. Raises ConfigError on an unknown name, SetupError when its package is missing."""
    if name not in CODECS:
        raise ConfigError(f"codec {name!r}: expected one of {', '.join(CODECS)} or auto")
    codec = CODECS[name]
    if codec.package:
        _package(codec.package)
    return codec


def choice(name: str, level: int = -1) -> list[Codec]:
    """The codecs that `quant.codec` names: one, or for "auto" all. Raises like `get`, also for "auto": if it made do
    with what is installed, it would silently write larger artifacts on one machine than on another. ConfigError on a
    level that one of them does not have."""
    found = [get(n) for n in (CODECS if name == "auto" else [name])]
    for codec in found:
        codec.check_level(level)
    return found


def known(number: int) -> Codec:
    """The codec with this container id, installed or not. Raises ArtifactError on an unknown id."""
    for codec in CODECS.values():
        if codec.id == number:
            return codec
    raise ArtifactError(f"codec id {number}: unknown; the artifact is damaged or from a newer pgolf")


def name_of(codec: Codec) -> str:
    """What `quant.codec` calls it."""
    return next(name for name, known_ in CODECS.items() if known_ is codec)


def need(used: Iterable[Codec]) -> None:
    """Raises SetupError, which names all packages that are missing, unless every codec of `used` can decompress."""
    missing = [p for p in packages(used) if not _installed(p)]
    if missing:
        raise SetupError(
            f"this artifact needs {' and '.join(missing)} to be read; run: pip install {' '.join(missing)}"
        )


def packages(used: Iterable[Codec]) -> list[str]:
    """What pip must have installed for these codecs, sorted."""
    return sorted({codec.package for codec in used if codec.package})


def _installed(name: str) -> bool:
    try:
        return bool(_package(name))
    except SetupError:
        return False


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as e:
        raise SetupError(f"codec {name} is not installed; run: pip install {name}") from e


def _brotli(data: bytes, level: int) -> bytes:
    return _package("brotli").compress(data, quality=level, lgwin=24)


def _unbrotli(data: bytes, max_size: int) -> bytes:
    decoder, out, size = _package("brotli").Decompressor(), [], 0
    for at in range(0, len(data), FEED):
        out.append(decoder.process(data[at : at + FEED]))
        size += len(out[-1])
        if size > max_size:
            break
    return b"".join(out)


def _zstd(data: bytes, level: int) -> bytes:
    return _package("zstandard").ZstdCompressor(level=level).compress(data)


def _unzstd(data: bytes, max_size: int) -> bytes:
    return _package("zstandard").ZstdDecompressor().stream_reader(data).read(max_size + 1)


def _lzma_filters(level: int, window: int) -> list[dict]:
    # pb and lc other than the preset's 2 and 3 lose 0.3 % on int6 values
    preset = level | lzma.PRESET_EXTREME if level == 9 else level
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}]


def _lzma(data: bytes, level: int) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_lzma_filters(level, _lzma_window(len(data))))


def _lzma_window(size: int) -> int:
    """None larger than `size` bytes have use for: the encoder allocates about 11 windows, the decoder one."""
    return min(max(1 << size.bit_length(), 4096), LZMA_WINDOW)


def _unlzma(data: bytes, max_size: int) -> bytes:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(9, _lzma_window(max_size)))
    return decoder.decompress(data, max_size + 1)


def _unzlib(data: bytes, max_size: int) -> bytes:
    return zlib.decompressobj().decompress(data, max_size + 1)


CODECS = {
    "brotli": Codec(1, "brotli", range(12), _brotli, _unbrotli),
    "zstd": Codec(2, "zstandard", range(1, 23), _zstd, _unzstd),
    "lzma": Codec(3, None, range(10), _lzma, _unlzma),
    "zlib": Codec(4, None, range(1, 10), zlib.compress, _unzlib),
}
