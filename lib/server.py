"""Where calls go, with what key and headers, through which proxy, and what of it may be shown (SPEC §8)."""

import os
import re
import resource
import sys
from urllib.parse import parse_qsl, urlsplit

from common import InputError, Stopped

OPENAI = "https://api.openai.com/v1"
SECRET = re.compile(r"key|auth|token|secret|cookie|sig|code", re.I)  # names of what nobody may see
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class Server:
    """One OpenAI-compatible server. `shown` is what of its address may be told. Raises InputError.

    secrets: the key, values of the user's headers, and passwords of the address, none of which is ever shown.
    """

    def __init__(self, base_url=None, key_env="OPENAI_API_KEY", headers=()):
        if not key_env.isidentifier():
            raise InputError("--key-env takes the name of an environment variable that holds the key, no key")
        url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip()
        try:
            self.parts = urlsplit(url)
            port = self.parts.port
        except ValueError as error:
            raise InputError(f"--base-url: {error}") from None
        host = self.parts.hostname
        strange = set(url) & set(" \t\r\n<>\"'“”…")
        if self.parts.scheme not in ("http", "https") or not host or strange:
            raise InputError("--base-url: expected an address such as http://127.0.0.1:8000/v1")
        where = f"[{host}]" if ":" in host else host
        if port:
            where = f"{where}:{port}"
        self.path = self.parts.path.rstrip("/").removesuffix("/chat/completions")
        self.query = dict(parse_qsl(self.parts.query, keep_blank_values=True))
        self.shown = f"{self.parts.scheme}://{where}{self.path}"
        self.loopback = host in ("localhost", "::1") or host.startswith("127.")
        self.key_env = key_env
        self.checked = False
        self.given_headers = read_headers(headers)
        self.secrets = {self.parts.password} - {None}
        for name, value in (*self.given_headers.items(), *self.query.items()):
            if SECRET.search(name):
                self.secrets.add(value.rpartition(" ")[2])  # of "Bearer sk-…" the key

    def url(self, name):
        """The address of an endpoint, such as "chat/completions"; the base URL's query stays at its end."""
        query = f"?{self.parts.query}" if self.parts.query else ""
        return f"{self.parts.scheme}://{self.parts.netloc}{self.path}/{name}{query}"

    # ------------------------------------------------------------ keys

    def brings_key(self):
        """Whether a header of the user's carries the key."""
        return bool(self.given_headers.keys() & {"authorization", "api-key", "x-api-key"})

    def key(self):
        """The key, stripped. Raises Stopped where it is none: what cannot pay must not begin."""
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise Stopped(
                f"{self.key_env} is not set: export your key (for a local server any value will do)"
            )
        strange = "".join(character for character in key if not "!" <= character <= "~")
        if strange.isspace():
            raise Stopped(f"{self.key_env} holds a line break or a space: export the key alone")
        if strange or key[0] in "\"'":
            raise Stopped(f"{self.key_env} holds quotes or signs that no key has: export the key itself")
        self.secrets.add(key)
        return key

    def headers(self):
        """Of every request. The key goes to this server alone: redirects are not followed."""
        headers = {"content-type": "application/json", "user-agent": "jmere-r1"}
        if not self.brings_key():
            headers["authorization"] = f"Bearer {self.key()}"
        if self.parts.hostname.endswith("openai.com"):
            for name, variable in (("organization", "OPENAI_ORG_ID"), ("project", "OPENAI_PROJECT_ID")):
                if os.environ.get(variable):
                    headers[f"openai-{name}"] = os.environ[variable].strip()
        return headers | self.given_headers

    def hide(self, text, shortest=4):
        """`text` without keys. Every message goes through here.

        An answer too, but for short keys: a local server takes any key, be it a word of the answer.
        """
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) >= shortest:
                text = text.replace(secret, "…")
        return text

    def one_line(self, text):
        """White space folded, keys hidden, at most 300 characters."""
        return self.hide(" ".join(str(text).split()))[:300]

    # ------------------------------------------------------------ before the first call

    def check(self, files):
        """Raises InputError or Stopped for what would fail every call: key, address, proxy, open files."""
        import httpx2  # here: training need not pay for it

        self.headers()
        if self.checked:
            return
        self.checked = True
        named = self.proxies() or "none set"
        try:
            httpx2.URL(self.url("models"))
            httpx2.Client(**self.http_options(), verify=False).close()  # sends nothing
        except ImportError:
            raise InputError(f"a SOCKS proxy ({named}) needs: pip install 'httpx2[socks]'") from None
        except (ValueError, httpx2.InvalidURL):
            raise InputError(f"{self.shown}, or a proxy ({named}), is no address that can be used") from None
        if self.loopback and self.proxies():
            print(f"{self.shown} is asked directly, not through the proxy of {named}", file=sys.stderr)
        allow_open_files(files)

    def proxies(self):
        """The variables that name a proxy."""
        return ", ".join(name for name in os.environ if name.lower() in PROXIES and os.environ[name])

    def http_options(self):
        """Of an HTTP client. A proxy of the environment is used, but not for this machine itself."""
        return {"timeout": None, "follow_redirects": False, "trust_env": not self.loopback}


def allow_open_files(wanted):
    """Raise this process's limit to `wanted` where it is lower. Raises InputError where that is forbidden."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InputError(
            f"this shell allows {hard} open files and the calls in flight may need {wanted}: "
            "lower --concurrency, or raise ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_headers(items):
    """NAME=VALUE items → {name in lower case: value}. Messages show no value: it may be a key."""
    headers = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().lower()
        value = value.strip()
        if not equals or not value or not name.replace("-", "").replace("_", "").isalnum():
            raise InputError("--header: expected NAME=VALUE, such as api-key=… (quote it for the shell)")
        if not all(" " <= character <= "~" for character in value):
            raise InputError(f"--header {name}: its value holds a line break or signs outside ASCII")
        headers[name] = value
    return headers
