"""Decompression of pages by pyarrow's codecs: as fast as any, and at hand. Snappy is our own (`hbkit._ext`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["NATIVE", "decompress"]

# SPEC: parquet.thrift, CompressionCodec. LZ4 (5) is framed as Hadoop does, which pyarrow's reader takes apart.
_NAMES = {2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
NATIVE = frozenset({0, 1, *_NAMES})
_STREAMS = (2, 4)  # the codecs themselves do not say when they gave less than was asked for
_codecs = {codec: pa.Codec(name) for codec, name in _NAMES.items() if pa.Codec.is_available(name)}


def decompress(codec: int, source: memoryview, nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes that a page decompresses to, n <= nbytes + 1: uint8[n]. Raises what the codec does; holds no GIL."""
    if codec in _STREAMS:
        data = pa.CompressedInputStream(pa.BufferReader(source), _NAMES[codec]).read_buffer(nbytes + 1)
    else:
        data = _codecs[codec].decompress(source, nbytes)
    return np.frombuffer(data, np.uint8)
