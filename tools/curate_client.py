"""A client of OpenAI's chat protocol (POST /chat/completions), with the standard library: paced, and with its key kept.

The key is sent to the given address alone: in a header, over https or to this machine, and redirects are not followed.
It is in no message: what the server says is shown without it."""

import email.utils
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from config import BadSample, stop
from formats.strict_json import strict_json

LARGEST = 4_000_000        # bytes of a reply that are read
LONGEST = 600              # seconds that a server may ask us to wait
FATAL = (301, 302, 303, 307, 308, 401, 403, 404, 405)    # another request would not do better
AGAIN = (408, 409, 425, 429)                             # and 500 or more: perhaps it does


class Failed(BadSample):
    """A request without a usable reply. again: may the same request be sent again? wait: seconds until then; None:
    the server has not said"""

    def __init__(self, reason, detail="", again=True, wait=0.0):
        super().__init__(reason, detail)
        self.again, self.wait = again, wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None                                            # the redirect becomes an HTTPError


class Endpoint:
    def __init__(self, url, key="", per_minute=0.0, timeout=120.0):
        """url: up to /v1; key: sent as a bearer token, "" = none; per_minute: most requests, 0 = no limit"""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            stop("url: expected http://HOST:PORT/v1 or https://HOST/v1, without a name, a password or a query in it")
        if key and not re.fullmatch(r"[!-~]+", key):
            stop("the key has a character that a key cannot have, such as a space or a line break")
        if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            stop(f"url: {parts.hostname} is another machine, and http would show the key to all between: use https")
        self.url, self._key, self.timeout = url.rstrip("/"), key, timeout
        self.gap, self.next, self.lock = 60 / per_minute if per_minute else 0.0, 0.0, threading.Lock()
        direct = [urllib.request.ProxyHandler({})] * (key != "" and parts.scheme == "http")      # no proxy gets the key
        self.requests, self.opener = 0, urllib.request.build_opener(NoRedirect, *direct)

    def hidden(self, text):
        """-> text without the key"""
        return text.replace(self._key, "(key)") if self._key else text

    def pace(self):
        """Wait until the next request may be made."""
        with self.lock:
            at = max(time.monotonic(), self.next)
            self.next, self.requests = at + self.gap, self.requests + 1
        time.sleep(max(0.0, at - time.monotonic()))

    def hold(self, seconds):
        """No request of any thread begins earlier than in so many seconds."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)

    def call(self, path, body=None):
        """-> the object that the server replies. Raise Failed, or stop where no request can succeed."""
        request = urllib.request.Request(f"{self.url}{path}", None if body is None else json.dumps(body).encode(), {
            "Content-Type": "application/json", "User-Agent": "pumice"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        self.pace()
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                text = reply.read(LARGEST + 1)
                if reply.length and len(text) <= LARGEST:      # bytes that were announced and did not come
                    raise Failed("the reply is cut off")
        except urllib.error.HTTPError as e:
            with e:
                self.refuse(e)
        except http.client.IncompleteRead:
            raise Failed("the reply is cut off") from None
        except (OSError, http.client.HTTPException) as e:      # URLError and timeouts are OSErrors
            raise Failed("no reply", self.hidden(f"{getattr(e, 'reason', e)}"), wait=None) from None
        try:
            if len(text) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            found = strict_json(text.decode("utf-8"), "the reply")
        except ValueError as e:
            raise Failed("the reply is not JSON", self.hidden(str(e))[:200]) from None
        return found if isinstance(found, dict) else {}

    def refuse(self, e):
        """An HTTPError -> Failed, or stop"""
        if e.code in FATAL:
            stop(f"{self.url} answers with status {e.code}" + {401: ": is the key right?", 403: ": is the key right?",
                 404: ": is the address right up to /v1, and model_name?"}.get(e.code, ""))
        try:
            said = self.hidden(e.read(2000).decode("utf-8", "replace"))[:200]
        except (OSError, http.client.HTTPException):
            said = ""
        again = e.code in AGAIN or e.code >= 500
        raise Failed(f"status {e.code}", said, again, retry_after(e.headers.get("Retry-After")) if again else 0.0)

    def ask(self, model, messages, **more):
        """-> the text of the reply. more: fields of the request, such as temperature"""
        body = self.call("/chat/completions", {"model": model, "messages": messages, **more})
        try:
            choice = body["choices"][0]
            message, why = choice["message"], choice.get("finish_reason")
            content, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failed("the reply has no message", self.hidden(json.dumps(body))[:200]) from None
        if refusal or why == "content_filter":
            raise Failed("the model refuses", self.hidden(str(refusal or why))[:200])
        if why == "length":
            raise Failed("the reply is cut at max_tokens")
        if not isinstance(content, str) or not content.strip():
            raise Failed("the reply is empty")
        return self.hidden(content)

    def models(self):
        """-> names of the models that the server has"""
        found = self.call("/models").get("data")
        return [m["id"] for m in found if isinstance(m, dict) and "id" in m] if isinstance(found, list) else []


def retry_after(value):
    """The header Retry-After, seconds or a date -> seconds, or None"""
    if value is None:
        return None
    try:
        return max(0.0, float(value) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value) else
                   email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None
