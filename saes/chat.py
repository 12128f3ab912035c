"""One client for any OpenAI-compatible chat endpoint: answers cached on disk, a budget that stops, retries.

A request is POST <base_url>/chat/completions with {model, messages, temperature, max_tokens}. The answer is kept in
<cache>/<2 hex>/<sha256 of address and request>.json, so the same question is asked once. The key comes from an
environment variable, goes to `base_url` alone (redirects are refused), and is written nowhere. Answers of 429 and
5xx, lost connections and answers of another shape are tried again with growing pauses; each try counts as a request.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cache.errors import AtomscopeError, DataError, UsageError
from cache.workspace import canonical_json, read_json, write_json

MAX_ANSWER_BYTES = 4 * 2**20
LONGEST_PAUSE = 60.0
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
Message = dict[str, str]


class BudgetError(AtomscopeError):
    """The requests or tokens that were allowed are used up; what was answered is kept."""


class _Retry(Exception):
    """A try that failed in a way that may pass: the reason, and the pause that the server asks for."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Where to ask, and how much."""

    base_url: str
    """Address up to /v1, for example http://127.0.0.1:8080/v1."""
    model: str
    """Model name that the server knows."""
    key_env: str = "ATOMSCOPE_API_KEY"
    """Environment variable with the key; unset: no key is sent."""
    temperature: float = 0.0
    """Sampling temperature."""
    answer_tokens: int = 400
    """Longest answer, in tokens."""
    max_requests: int = 200
    """Requests to send at most, tries included."""
    max_tokens: int = 500_000
    """Tokens of questions and answers at most, as the server counts them (estimated where it does not)."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    retries: int = 4
    """Further tries after one that failed in passing."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UsageError(
                f"--base-url is an http or https address like http://127.0.0.1:8080/v1, not {self.base_url!r}"
            )
        if parts.scheme == "http" and not self.local and os.environ.get(self.key_env):
            raise UsageError(
                f"the key in {self.key_env} would go over plain http to {parts.hostname}: use https, or unset it"
            )
        if not self.model:
            raise UsageError("--model is the name of a model that the server knows")
        if min(self.max_requests, self.max_tokens, self.answer_tokens) < 1 or self.retries < 0:
            raise UsageError("--max-requests and --max-tokens are at least 1")

    @property
    def local(self) -> bool:
        return urlsplit(self.base_url).hostname in LOOPBACK


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class ChatEndpoint:
    """`ask(messages)` gives the text of the answer. Counts `requests`, `tokens` and `cache_hits`."""

    def __init__(
        self,
        config: EndpointConfig,
        *,
        cache: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config, self.cache, self._sleep = config, cache, sleep
        self.requests = self.tokens = self.cache_hits = 0
        # a server on this machine is never reached through a proxy
        proxies = [urllib.request.ProxyHandler({})] if config.local else []
        self._opener = urllib.request.build_opener(_NoRedirect(), *proxies)
        self._url = config.base_url.rstrip("/") + "/chat/completions"

    def ask(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation, from the cache where it was asked before.

        Raises BudgetError before a request that would pass the budget, and AtomscopeError where the server refuses
        or gives no usable answer.
        """
        c = self.config
        body = {
            "model": c.model, "messages": list(messages), "temperature": c.temperature, "max_tokens": c.answer_tokens,
        }  # fmt: skip
        path = self._cache_path(body)
        if path is not None and path.is_file():
            self.cache_hits += 1
            return _cached(path)
        answer = self._ask_with_retries(body)
        if path is not None:
            write_json(path, {"url": self._url, "request": body, "answer": answer})
        return answer

    def _cache_path(self, body: dict[str, Any]) -> Path | None:
        if self.cache is None:
            return None
        digest = hashlib.sha256(canonical_json({"url": self._url, "request": body}).encode()).hexdigest()
        return self.cache / digest[:2] / f"{digest}.json"

    def _ask_with_retries(self, body: dict[str, Any]) -> str:
        pause = 1.0
        for tries_left in range(self.config.retries, -1, -1):
            self._check_budget(body)
            self.requests += 1
            try:
                return self._read_answer(body, self._post(body))
            except _Retry as e:
                if not tries_left:
                    raise AtomscopeError(
                        f"no answer from {self._url} after {self.config.retries + 1} tries ({e}): is the server up, and "
                        f"does it serve {self.config.model!r}?"
                    ) from None
                self._sleep(min(LONGEST_PAUSE, pause if e.pause is None else e.pause))
                pause *= 2
        raise AssertionError("the loop returns or raises")

    def _check_budget(self, body: dict[str, Any]) -> None:
        c = self.config
        if self.requests >= c.max_requests:
            raise BudgetError(
                f"the budget of {c.max_requests} requests is spent; answers so far are kept: give the same command with "
                "a larger --max-requests to go on"
            )
        if self.tokens + _estimate(body["messages"]) + c.answer_tokens > c.max_tokens:
            raise BudgetError(
                f"{self.tokens:,} of {c.max_tokens:,} tokens are used and the next question may not fit; answers so far "
                "are kept: give the same command with a larger --max-tokens to go on"
            )

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.config.timeout) as response:
                return self._read(response)
        except urllib.error.HTTPError as e:
            raise self._refusal(e) from None
        except (OSError, http.client.HTTPException) as e:  # URLError and timeouts are OSErrors
            raise _Retry(str(getattr(e, "reason", e)) or type(e).__name__) from None

    def _read(self, response: Any) -> bytes:
        """The body, bounded in size and in time: a server that drips would outlast the socket's timeout."""
        deadline, parts, size = time.monotonic() + self.config.timeout, [], 0
        while chunk := response.read1(65536):
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                raise _Retry(
                    "the answer is too long" if size > MAX_ANSWER_BYTES else "the answer takes too long"
                )
        return b"".join(parts)

    def _refusal(self, e: urllib.error.HTTPError) -> Exception:
        if e.code == 429 or e.code >= 500:
            asked = e.headers.get("Retry-After", "")
            return _Retry(f"status {e.code}", float(asked) if asked.isascii() and asked.isdigit() else None)
        try:
            said = " ".join(e.read(2000).decode("utf-8", "replace").split())[:200]
        except OSError:
            said = ""
        hint = {
            401: f"put the key into the environment variable {self.config.key_env}",
            403: f"the key in {self.config.key_env} has no access",
            404: "the base URL usually ends in /v1, and the model must be one that the server lists",
        }.get(e.code, "check --base-url and --model")
        return AtomscopeError(f"{self._url} answers with status {e.code}: {said or e.reason}; {hint}")

    def _read_answer(self, body: dict[str, Any], raw: bytes) -> str:
        try:
            value = json.loads(raw)
            text = value["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            value, text = None, None
        if not isinstance(text, str):
            raise _Retry("the answer has no choices[0].message.content")
        usage = value.get("usage")
        used = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(used, int) or isinstance(used, bool) or used < 1:
            used = _estimate([*body["messages"], {"content": text}])
        self.tokens += used
        return text


def _estimate(messages: Sequence[Message]) -> int:
    """Tokens of a conversation, on the high side: three characters each."""
    return sum(len(m["content"]) // 3 + 8 for m in messages)


def _cached(path: Path) -> str:
    answer = read_json(path).get("answer")
    if not isinstance(answer, str):
        raise DataError(f"{path} holds no answer: delete it and give the same command again")
    return answer
