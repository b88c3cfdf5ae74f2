"""Keys in logs and messages."""

from __future__ import annotations

import json
import os
from urllib.parse import quote

import pytest

from lightrft_lightning.engines.masking import Mask, open_private

ODD = "-k 'e\"y\\/%"
FORMS = {
    "plain": str, "Python": repr, "JSON": json.dumps, "URL": quote, "a part of a URL": lambda key: quote(key, safe=""),
    "JSON in Python": lambda key: repr(json.dumps(key)), "Python in JSON": lambda key: json.dumps(repr(key)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["a-key-for-the-tests", ODD])
def test_no_form_of_a_key_is_left(key, form):
    shown = FORMS[form](key)
    masked = Mask(key)(f"api_key={shown}, port=1")
    assert "***" in masked and "port=1" in masked and shown.strip("'\"") not in masked and key not in masked


def test_a_short_key_is_masked_where_it_stands_alone():
    assert Mask("k")("k=k, key 'k', token k.") == "***=***, key '***', token ***."


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_key_is_found_across_pieces(size):
    text = "before a-key-for-the-tests behind\n\xff and a-key-for-the-tests".encode("latin-1")
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = "".join(Mask("a-key-for-the-tests").pieces(iter(pieces))).encode(errors="surrogateescape")
    assert found == b"before *** behind\n\xff and ***"


def test_lines_come_at_once():
    """Somebody may be waiting for them."""
    pieces = Mask("a-key-for-the-tests").pieces(iter([b"ready\n", pytest.fail]))
    assert next(pieces) == "ready\n"


def test_a_file_with_a_key_cannot_be_read_by_others(tmp_path):
    path = tmp_path / "log"
    path.write_text("before")
    path.chmod(0o644)
    os.close(open_private(path, os.O_WRONLY | os.O_APPEND))
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "before"
    os.close(open_private("/dev/null", os.O_WRONLY))
    with pytest.raises(OSError, match="Is a directory"):
        open_private(tmp_path, os.O_WRONLY)
