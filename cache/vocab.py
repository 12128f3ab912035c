"""What a tokenizer is: its content hash, whether it prepends BOS, and the text that each token id stands for.

A token's string is the text it adds (" the", not "Ġthe"). Bytes that are not UTF-8 on their own, as in half of an
emoji, are shown as \\xNN. Works on any `transformers` tokenizer object without importing transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from cache.workspace import canonical_json

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    core = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(core.to_str()) if core is not None else None


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of everything that decides which ids a text becomes. Padding and truncation state is not part of it."""
    state = _backend(tokenizer) or {"vocab": tokenizer.get_vocab()}
    state = {k: v for k, v in state.items() if k not in ("padding", "truncation")}
    state["special_ids"] = sorted(int(i) for i in tokenizer.all_special_ids)
    state["prepends_bos"] = prepends_bos(tokenizer)
    return hashlib.sha256(canonical_json(state).encode()).hexdigest()


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template, None for a tokenizer without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(canonical_json(template).encode()).hexdigest() if template else None


def prepends_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return bos is not None and len(ids) > 0 and ids[0] == bos


def _byte_of_char() -> dict[str, int]:
    """Inverse of the printable alphabet that byte-level BPE writes its 256 bytes in (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    shifted = (b for b in range(256) if b not in set(plain))
    return table | {chr(256 + n): b for n, b in enumerate(shifted)}


def _decoder_types(state: dict[str, Any] | None) -> set[str]:
    decoder = (state or {}).get("decoder") or {}
    return {decoder.get("type", "")} | {d.get("type", "") for d in decoder.get("decoders", [])}


def vocab_strings(tokenizer: Any) -> list[str]:
    """The string of every token id, 0 … len(tokenizer) − 1."""
    state = _backend(tokenizer)
    types = _decoder_types(state)
    added = {int(t["id"]): str(t["content"]) for t in (state or {}).get("added_tokens", [])}
    size = len(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    if "ByteLevel" in types:
        table = _byte_of_char()

        def text(name: str) -> str:
            if not all(c in table for c in name):
                return name
            return bytes(table[c] for c in name).decode("utf-8", errors="backslashreplace")
    elif types & {"ByteFallback", "Metaspace", "Replace"}:

        def text(name: str) -> str:
            byte = _BYTE_TOKEN.fullmatch(name)
            if byte:
                return bytes([int(byte[1], 16)]).decode("utf-8", errors="backslashreplace")
            return name.replace("▁", " ")
    else:
        return [added.get(i) or tokenizer.decode([i]) for i in range(size)]
    return [added[i] if i in added else text(name or "") for i, name in enumerate(names)]
