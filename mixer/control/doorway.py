"""The way into a cluster: the address of its job server, and the token that it asks for.

What Ray does with the token: with RAY_AUTH_MODE=token it takes RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH, or
~/.ray/auth_token, and sends `Authorization: Bearer <token>` with each request; the job server answers 401 to a
request without a token and 403 to one with the wrong token. Here the same order is kept, with two differences. A
cluster that asks for a token gets the one found also when RAY_AUTH_MODE is not set, since forgetting it is the
usual reason for a 401. And the door is knocked at first, with a time limit, because Ray's own client has none.

A token is never part of a text: `Token` does not show it, and `Doorway.clean` takes it out of what others wrote.
"""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from mixer.core.errors import ConfigError

TIMEOUT_S = 5.0
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PLACES = f"{TOKEN}, the file named by {TOKEN_PATH}, or ~/.ray/auth_token"
SAFE_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Token:
    value: str = field(repr=False)
    origin: str  # where it was found, for people

    def __str__(self) -> str:
        return f"the token of {self.origin}"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    ray_version: str = ""


@dataclass(frozen=True, slots=True)
class Doorway:
    """A job server that lets us in."""

    address: str
    token: Token | None
    ray_version: str
    notes: tuple[str, ...] = ()  # for the user to know, in one line each

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token.value}"} if self.token else {}

    def clean(self, text: str) -> str:
        return text.replace(self.token.value, "<token>") if self.token else text


def job_server(given: str | None, environ: Mapping[str, str]) -> str:
    """The address asked for, else that of the environment if it is one of a job server."""
    origin, address = "--address", given
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if address is None and environ.get(name):
            origin, address = name, environ[name]
    if address is None:
        raise ConfigError(
            "no address of a cluster. Give --address http://HOST:8265 (the port of its dashboard), or set RAY_ADDRESS "
            "to that. For a cluster behind a gate, open a way first: ssh -L 8265:127.0.0.1:8265 HOST, or "
            "kubectl port-forward service/NAME-head-svc 8265, and then --address http://127.0.0.1:8265."
        )
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.username or parts.password:
        raise ConfigError(f"{origin} holds a user or password, which would end up in logs. Leave them out; {PLACES}.")
    if parts.scheme not in ("http", "https") or not parts.hostname or address == "auto":
        raise ConfigError(
            f"{origin} is {address!r}; jobs go to the cluster's job server. Give http://HOST:8265, the port of the "
            "dashboard and not the one that nodes join by."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def cluster_inside(environ: Mapping[str, str]) -> str | None:
    """The cluster that this process belongs to, as `ray.init` takes it: every job finds its own in RAY_ADDRESS.

    A job server's address there is a client's, who is outside.
    """
    address = environ.get("RAY_ADDRESS") or None
    return None if address and address.startswith(("http://", "https://")) else address


def find_token(environ: Mapping[str, str]) -> Token | None:
    """The token that Ray would use here; a file that was named but cannot be used is an error, as it is there."""
    if value := environ.get(TOKEN, "").strip():
        return Token(value, f"the variable {TOKEN}")
    named = environ.get(TOKEN_PATH, "")
    path = Path(named) if named else Path(environ.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        value = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named and isinstance(error, FileNotFoundError):
            return None
        reason = getattr(error, "strerror", None) or "is no text"
        raise ConfigError(
            f"the token's file {path} cannot be read: {reason}. Needed is a file that you can read with the cluster's "
            f"token in it; Ray looks in {PLACES}."
        ) from error
    if not value and named:
        raise ConfigError(f"{TOKEN_PATH} names {path}, which is empty. Write the cluster's token into it (mode 0600).")
    return Token(value, f"the file {path}") if value else None


def enter(address: str, environ: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> Doorway:
    """Find the token that a job server wants, or say what is wrong in one line."""
    mode = environ.get(MODE, "").lower()
    token = find_token(environ) if mode == "token" else None
    if mode == "token" and token is None:
        raise ConfigError(f"{MODE} is token, but there is none. Put the cluster's token into {PLACES}.")
    answer = knock(address, token, timeout_s=timeout_s)
    if answer.status == 401 and token is None:
        token = find_token(environ)
        if token is None:
            raise ConfigError(
                f"{address} asks for a token, and there is none here. Get it from whoever started the cluster, put it "
                f"into {PLACES} (mode 0600), and set {MODE}=token."
            )
        answer = knock(address, token, timeout_s=timeout_s)
    if answer.status in (401, 403):
        raise ConfigError(
            f"{address} refuses {token or 'a request without a token'} ({answer.status}). It belongs to another "
            f"cluster, or the cluster was started anew. Get the token of this one; Ray looks in {PLACES}."
        )
    if answer.status != 200 or not answer.ray_version:
        raise ConfigError(
            f"{address} answers {answer.status} and is no job server of Ray. Give the port of the dashboard (8265 "
            "unless chosen otherwise), and ray[default] on the head node."
        )
    return Doorway(address, token, answer.ray_version, notes_of(address, token))


def notes_of(address: str, token: Token | None) -> tuple[str, ...]:
    if token is None:
        return (
            f"{address} takes jobs from everybody who can reach it: it asks for no token. Start it with {MODE}=token.",
        )
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in SAFE_HOSTS:
        return (f"the token travels to {parts.hostname} unencrypted; use https, or an SSH tunnel to 127.0.0.1.",)
    return ()


def knock(address: str, token: Token | None, *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask a job server for its version: the status of its answer, whatever that is."""
    request = urllib.request.Request(f"{address}/api/version")
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token.value}")
    try:
        context = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE") or None)
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:
            text = answer.read(65_536)
            status = answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return Answer(error.code)
    except (OSError, HTTPException, ValueError) as error:
        raise ConfigError(f"{address} cannot be reached: {_reason(error, timeout_s)}. {REACH}") from error
    try:
        return Answer(status, str(json.loads(text)["ray_version"]))
    except (ValueError, KeyError, TypeError):
        return Answer(status)


REACH = (
    "Needed is the job server of a running cluster, on the dashboard's port; see that the cluster runs, and that the "
    "way to it (VPN, SSH tunnel, port-forward) is open."
)


def _reason(error: Exception, timeout_s: float) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
