"""Secrets kept out of messages, logs and tags."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """`text` with user, password and query taken out of every address in it."""
    text = re.sub(r"(\w[\w+.-]*://)[^/\s]*@", r"\1", text)
    return re.sub(r"(\w[\w+.-]*://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
