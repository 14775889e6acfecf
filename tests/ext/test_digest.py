"""BLAKE3 gives what others give, in pieces of any size, on every instruction set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbkit._ext import isa
from hbkit._ext.digest import Blake3

# Of the bytes 0, 1, ..., 250, 0, 1, ...: as in the algorithm's own test vectors, and by its authors' implementation.
WANT = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    63: "e9bc37a594daad83be9470df7f7b3798297c3d834ce80ba85d6e207627b7db7b",
    64: "4eed7141ea4a5cd4b788606bd23f46e212af9cacebacdc7d1f4c6dc7f2511b98",
    65: "de1e5fa0be70df6d2be8fffd0e99ceaa8eb6e8c93a63f2d8d1c30ecb6b263dee",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    2048: "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a",
    2049: "5f4d72f40d7a5f82b15ca2b2e44b1de3c2ef86c426c95c1af0b6879522563030",
    3073: "7124b49501012f81cc7f11ca069ec9226cecb8a2c850cfe644e327d22d3e1cd3",
    8192: "aae792484c8efe4f19e2ca7d371d8c467ffb10748d8a5a1ae579948f718a2a63",
    16384: "f875d6646de28985646f34ee13be9a576fd515f76b5b0a26bb324735041ddde4",
    31744: "62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
    131072: "306baba93b1a393cbd35172837c98b0f59a41f64e1b2682ae102d8b2534b9e1c",
    131073: "f837d4254d24ba3d50fe3743d46e4af6db5f5d6ab0469197d94e7ba1e906c4d8",
    1048576: "74cb441fd087764ca9c3694da742ebe30cbeb3060a17009ca81825c7a8d10343",
}
BYTES = (np.arange(max(WANT)) % 251).astype(np.uint8)


@pytest.fixture(params=isa.available())
def each_isa(request):
    now = isa.name()
    isa.use(request.param)
    yield
    isa.use(now)


def digest(*parts):
    d = Blake3()
    for part in parts:
        d.update(part)
    return d.hexdigest()


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("n", WANT)
def test_digest_is_that_of_the_standard(n):
    assert digest(BYTES[:n]) == WANT[n]
    assert digest(bytes(BYTES[:n]), b"") == WANT[n]


@pytest.mark.parametrize("n", [n for n in WANT if n > 1])
@given(data=st.data())
def test_pieces_do_not_matter(n, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    parts = [BYTES[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    assert digest(*parts) == WANT[n]


def test_asking_changes_nothing():
    d = Blake3()
    for n in (1, 1024, 5000):
        d.update(BYTES[:n])
        assert d.hexdigest() == d.hexdigest()
    assert d.hexdigest() == digest(BYTES[:1], BYTES[:1024], BYTES[:5000])


def test_any_contiguous_buffer_is_taken():
    assert digest(np.arange(12, dtype=np.float32).reshape(3, 4)) == digest(np.arange(12, dtype=np.float32).tobytes())
    with pytest.raises((TypeError, ValueError, BufferError)):
        digest(np.zeros((4, 4))[:, :2])
