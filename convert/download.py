"""Weight files by path, https address, repository of the Hugging Face Hub, or published name.

Downloads are kept in a cache.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import pathlib
import re
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import IO

from tqdm import tqdm

from mbv2_jax.errors import UserError, first_line
from mbv2_jax.storage import user_cache

from .published import PUBLISHED, suggest

TRIES = 5  # in a row without a new byte
WAIT = 1.0  # seconds before the second try; doubled before each further one
TIMEOUT = 30.0  # seconds without a byte

_LARGEST_ANSWER = 16 << 20  # bytes

_LOCAL = ("localhost", "127.0.0.1", "::1")


class Refused(UserError):
    """The server refuses a request, and another try would not change that.

    Attributes:
      code: the HTTP status.
      reason: the server's X-Error-Code, such as "GatedRepo"; "" without one.
    """

    def __init__(self, address: str, error: urllib.error.HTTPError) -> None:
        super().__init__(f"{address}: the server says {error.code} {error.reason}")
        self.code = error.code
        self.reason = error.headers.get("X-Error-Code", "")


def locate(source: str) -> pathlib.Path:
    """Returns the file that holds the weights, and downloads it if necessary.

    Downloads stay in `cache_folder()` and are used from there, without the network, until they are
    deleted. If a downloaded file's name ends with the beginning of its SHA-256, as in
    `...-3b2dc3af.pth`, the content has to match. A file given by its path has to match only if it
    has the name of a published file, since its owner may have chosen any other name.

    Args:
      source: a path, an https address, hf:OWNER/NAME[@REVISION], or a key of PUBLISHED. A file
        takes precedence over a name. A folder stands for the weights that timm or transformers
        would read in it.

    Raises:
      UserError: there is no such file, address, repository or name, the download fails, or the
        SHA-256 differs.
    """
    from . import hub  # here: it downloads with this module

    path = pathlib.Path(os.path.expanduser(source))
    if os.path.isfile(path):
        published = [weights.sha256 for weights in PUBLISHED.values() if weights.file == path.name]
        if published and not _sha256(path).startswith(published[0]):
            raise UserError(
                f"{path} is not the published file of this name: its SHA-256 begins with"
                f" {_sha256(path)[:8]}; download it again, or rename it if it is meant to differ"
            )
        return path
    if source.startswith(hub.PREFIX):
        return hub.locate(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return _cached(source)
    if source in PUBLISHED:
        return _cached(PUBLISHED[source].address)
    if os.path.isdir(path):
        return hub.weights_in(path)
    if "/" in source or re.search(r"\.[a-z]\w*$", source):
        raise UserError(f"{source} does not exist")
    raise UserError(
        f"{source!r} is not a file, an https address or the name of published weights: "
        + suggest(source)
    )


def cache_folder() -> pathlib.Path:
    """Returns $MBV2_CACHE, or else the user's cache folder.

    Raises:
      UserError: the user has no home folder.
    """
    if folder := os.environ.get("MBV2_CACHE"):
        return pathlib.Path(folder).expanduser()
    try:
        return user_cache.folder()
    except FileNotFoundError as error:
        raise UserError(f"{error} for downloads; MBV2_CACHE names another folder") from None


def _cached(address: str) -> pathlib.Path:
    """Returns the file of an address, from the cache if it is complete there."""
    _check_address(address)
    name = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    name = re.sub(r"[^\w.+-]", "_", name)[-100:] or "weights"
    # A folder per address: many files are called model.pth.
    target = cache_folder() / hashlib.sha256(address.encode()).hexdigest()[:12] / name
    return keep(address, target, _hash_in(name))


def keep(address: str, target: pathlib.Path, sha256: str = "", token: str = "") -> pathlib.Path:
    """Returns the file `target`, downloaded from an address unless it is complete already.

    Args:
      address: https, or http on this machine.
      target: a file in the cache; its folder is created.
      sha256: hex digits with which the file's SHA-256 begins; "" where it is not known.
      token: is sent to the host of the address, and to no other one after a redirection.

    Raises:
      Refused: the server has no such file, or does not give it.
      UserError: the download fails, the content is wrong, or the cache cannot be written.
    """
    _check_address(address)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if target.is_file() and (not sha256 or _sha256(target).startswith(sha256)):
                return target
            part = target.with_name(f"{target.name}.part")
            print(f"downloading {address} to {target}", file=sys.stderr)
            _download(address, part, token)
            _check(address, part, sha256)
            os.replace(part, target)
            return target
    except OSError as error:
        raise not_kept(address, target.parent, error) from None


def not_kept(source: str, folder: pathlib.Path, error: OSError) -> UserError:
    """Returns the error for a folder of the cache that cannot be written."""
    return UserError(
        f"cannot keep {source} in {folder}: {first_line(error)}; MBV2_CACHE names another folder"
    )


def read(address: str, token: str = "") -> bytes:
    """Returns the content at an address, such as the answer of an API.

    Args:
      address, token: as `keep` takes them.

    Raises:
      Refused: the server has nothing there, or does not give it.
      UserError: there is no connection, or the content has more than _LARGEST_ANSWER bytes.
    """
    _check_address(address)
    for failures in range(TRIES):
        try:
            with _open(_request(address, token)) as response:
                return _whole(address, response)
        except _Interrupted as error:
            reason = error
        if failures < TRIES - 1:
            print(f"{reason}; trying again", file=sys.stderr)
            time.sleep(WAIT * 2**failures)
    raise UserError(f"{address}: {reason}")


def _whole(address: str, response: http.client.HTTPResponse) -> bytes:
    """Returns the whole content of a response."""
    content = bytearray()
    for chunk in _chunks(response):
        content += chunk
        if len(content) > _LARGEST_ANSWER:
            raise UserError(f"{address}: the answer has more than {_LARGEST_ANSWER:,} bytes")
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and len(content) < int(length):
        raise _Interrupted(f"the connection broke after {len(content):,} of {int(length):,} bytes")
    return bytes(content)


def _check_address(address: str) -> None:
    """Raises UserError for an address that is malformed or not encrypted."""
    try:
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{address} is not an address: {error}") from None
    if not host or not address.isprintable() or " " in address:
        raise UserError(f"{address!r} is not an address such as https://HOST/FILE.pth")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOCAL):
        raise UserError(f"{address}: weights are downloaded over https only")


def _hash_in(name: str) -> str:
    """Returns the hash at the end of a file's name; "" where there is none."""
    match = re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)
    if not match or re.fullmatch(r"(19|20)[0-9]{6}", match[1]):  # a date
        return ""
    return match[1]


def _check(address: str, part: pathlib.Path, expected: str) -> None:
    """Removes a download and raises if it is a web page, or its SHA-256 is not `expected`."""
    with open(part, "rb") as file:
        head = file.read(1024).lstrip().lower()
    sha256 = _sha256(part)
    if head.startswith((b"<!doctype html", b"<html")):
        _remove(part)
        hint = ""
        if "/blob/" in address:
            raw = "resolve" if "huggingface.co/" in address else "raw"
            hint = f"; the file itself may be {address.replace('/blob/', f'/{raw}/', 1)}"
        elif page := re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", address):
            hint = f"; the weights of this repository are hf:{page[1]}"
        raise UserError(f"{address} is a web page, not a file of weights{hint}")
    if not sha256.startswith(expected):
        _remove(part)
        raise UserError(
            f"{address}: wrong content: its SHA-256 has to begin with {expected[:16]}, and begins"
            f" with {sha256[: len(expected)][:16]}; nothing was kept"
        )


class _Interrupted(Exception):
    """The connection broke, or the server is busy: another try may succeed."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https addresses only, with a token only to the same host."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_address(newurl)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        origins = [urllib.parse.urlsplit(url)[:2] for url in (req.full_url, newurl)]
        if new is not None and token and origins[0] == origins[1]:
            new.add_unredirected_header("Authorization", token)
        return new


def _request(
    address: str, token: str, headers: Mapping[str, str] | None = None
) -> urllib.request.Request:
    """Returns a request, whose token is not sent along by a redirection to another host."""
    usual = {"User-Agent": "mbv2_jax", "Accept-Encoding": "identity"}
    request = urllib.request.Request(address, headers=usual | dict(headers or {}))
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _download(address: str, part: pathlib.Path, token: str = "") -> None:
    """Downloads to `part`, and resumes where an earlier download of the same file stopped."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch(address, part, token)
        except _Interrupted as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures == TRIES:
                kept = "; the same command resumes from there" if _tag_file(part).is_file() else ""
                raise UserError(f"{address}: {error}{kept}") from None
            print(f"{error}; trying again", file=sys.stderr)
            time.sleep(WAIT * 2 ** (failures - 1))


def _fetch(address: str, part: pathlib.Path, token: str) -> None:
    """Requests the bytes that are missing in `part` once, and appends them."""
    tag_file = _tag_file(part)
    have = _size(part) if tag_file.is_file() else 0
    rest = {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()} if have else {}
    with _open(_request(address, token, rest), part) as response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else 0
        if response.status == 206:
            follows = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not follows or _tag_of(response) not in ("", tag_file.read_text()):
                _remove(part)
                raise _Interrupted("the server sent another part of the file than was requested")
            total += have if total else 0
        else:
            have = 0
            _remove(part)
            if tag := _tag_of(response):
                tag_file.write_text(tag)
        _append(response, part, have, total)
    if total and _size(part) < total:
        raise _Interrupted(f"the connection broke after {_size(part):,} of {total:,} bytes")
    tag_file.unlink(missing_ok=True)


def _append(response: http.client.HTTPResponse, part: pathlib.Path, have: int, total: int) -> None:
    """Appends the content of a response to `part`, with a progress bar.

    Args:
      have: bytes in `part`.
      total: bytes of the whole file; 0 where the server does not say.
    """
    with (
        open(part, "ab") as file,
        tqdm(
            desc=part.name.removesuffix(".part"),
            initial=have,
            total=total or None,
            unit="B",
            unit_scale=True,
            disable=None,  # where stderr is not a terminal
        ) as bar,
    ):
        for chunk in _chunks(response):
            file.write(chunk)
            bar.update(len(chunk))


@contextlib.contextmanager
def _open(
    request: urllib.request.Request, part: pathlib.Path | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Opens a request.

    Args:
      request: may ask for the rest of `part`.
      part: is deleted if the server has no more than it.

    Raises:
      UserError: another try would fail, too.
      _Interrupted: another try may succeed.
    """
    address = request.full_url
    try:
        response = urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f"the server says {error.code} {error.reason}") from None
        if error.code == 416 and part:  # `part` is as long as the file, and yet unfinished
            _remove(part)
            raise _Interrupted("the server has no more than the part that was kept") from None
        raise Refused(address, error) from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            raise _Interrupted(f"no answer for {TIMEOUT:g} seconds") from None
        if isinstance(reason, ConnectionResetError):
            raise _Interrupted(f"the connection broke: {reason}") from None
        if isinstance(reason, socket.gaierror):
            host = urllib.parse.urlsplit(address).hostname
            raise UserError(f"{address}: no such host as {host}, or no network") from None
        raise UserError(f"{address}: {getattr(reason, 'strerror', None) or reason}") from None
    except TimeoutError:
        raise _Interrupted(f"no answer for {TIMEOUT:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"the connection broke: {error}") from None
    with response:
        yield response


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yields the content of a response in pieces."""
    while True:
        try:
            chunk = response.read(1 << 16)
        except TimeoutError:
            raise _Interrupted(f"nothing came for {TIMEOUT:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection broke: {error}") from None
        if not chunk:
            return
        yield chunk


def _tag_file(part: pathlib.Path) -> pathlib.Path:
    """Returns the file that keeps the server's tag of the version in `part`.

    The tag tells the server whether `part` belongs to its current version of the file. Without one,
    a download starts again.
    """
    return part.with_name(f"{part.name}.state")


def _tag_of(response: http.client.HTTPResponse) -> str:
    """Returns the tag for If-Range: a strong ETag, else the date; "" where there is neither."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


@contextlib.contextmanager
def _lock(target: pathlib.Path) -> Iterator[None]:
    """Makes other processes wait for the same download."""
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is downloading {target.name}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(part: pathlib.Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
