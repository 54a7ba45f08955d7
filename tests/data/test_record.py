import pytest

from alignvlm_jax.data.record import Record, Turn, Word, decode_record, encode_record
from alignvlm_jax.errors import UserError


def test_records_survive_the_round_trip():
    word = Word("a\0é", (0.5, 1.0, 2.0, 3.0), (0.5, 1.0, 1.5, 2.0))
    bare = Word("b", (0.0, 0.0, 1.0, 1.0))
    turns = (Turn("What?", ("x", "y")), Turn("Who?", ("z",)))
    for record in (
        Record("id", "source", (b"\0png\0", b""), turns, (((word, bare), ()), ())),
        Record("id", "source", (), ()),
    ):
        assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize("data", [b"", b"junk", b"{}\0", b'{"images": [5]}\0ab', b"\xff\xfe"])
def test_junk_is_a_user_error(data):
    with pytest.raises(UserError, match="not a record"):
        decode_record(data)
