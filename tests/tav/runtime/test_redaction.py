"""Secrets in addresses are taken out of texts."""

from hypothesis import given
from hypothesis import strategies as st

from tav.runtime.redaction import redact


@given(st.text("abcXYZ019:@!$-_.~%", min_size=1), st.text("abcXYZ019=&%-_", min_size=1))
def test_redact_takes_secrets_out_and_leaves_the_rest(login, query):
    text = f"see http://{login}@host:5000/a?{query}, who is it? a@b"
    assert redact(text).startswith("see http://host:5000/a")
    assert redact(text).endswith("who is it? a@b")
    assert redact("who is it? a@b") == "who is it? a@b"
