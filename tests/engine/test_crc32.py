import zlib

from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.engine.crc32 import combine


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_crc_of_a_concatenation_follows_from_its_parts(a: bytes, b: bytes) -> None:
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
