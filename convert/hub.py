"""Repositories of the Hugging Face Hub, hf:OWNER/NAME[@REVISION], and folders with their files.

A repository holds one of WEIGHTS with CONFIGS beside it, as does a folder that timm or transformers
wrote. In the cache:

    HOST/OWNER/NAME/COMMIT/           these files, and files.json: the hub's answer about the commit
    HOST/OWNER/NAME/revisions/NAME    the commit of a branch or tag when the hub was last asked

HF_ENDPOINT is the hub's address, and HF_TOKEN the token of an account, as for huggingface_hub.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import urllib.parse
from typing import Any

from mbv2_jax.errors import UserError, first_line, listed
from mbv2_jax.storage import atomic

from . import download
from .hub_folder import WEIGHTS

PREFIX = "hf:"
CONFIGS = ("config.json", "preprocessor_config.json")

_LISTING = "files.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Of files that may be weights, for messages.
_SUFFIXES = (
    *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".npz"),
    *(".keras", ".h5", ".pb", ".tflite", ".onnx"),
)


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of a hub at one of its revisions.

    Attributes:
      name: OWNER/NAME.
      revision: a branch, a tag, or a commit.
      endpoint: the hub's address.
      token: of an account; "" for none.
    """

    name: str
    revision: str
    endpoint: str
    token: str = dataclasses.field(repr=False)

    @property
    def source(self) -> str:
        """The source that names it."""
        return f"{PREFIX}{self.name}@{self.revision}"

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"{self.endpoint}/{self.name}"

    @property
    def folder(self) -> pathlib.Path:
        """Its folder in the cache."""
        host = re.sub(r"[^\w.-]", "_", self.endpoint.partition("://")[2])
        return download.cache_folder() / host / self.name


def locate(source: str) -> pathlib.Path:
    """Returns the weights of a repository, with its configs in the same folder.

    A commit that was downloaded before needs no network. Of a branch or tag the hub is asked for
    the commit; without a connection, the commit that it gave last is used, and a message says so.

    Args:
      source: hf:OWNER/NAME, or hf:OWNER/NAME@REVISION; REVISION is "main" by default.

    Raises:
      UserError: there is no such repository or revision, it has none of WEIGHTS or may not be read,
        the download fails, or a SHA-256 is not the one that the hub states.
    """
    repository = _parse(source)
    commit, files = _files(repository)
    wanted = [name for name in CONFIGS if name in files]
    wanted.append(_choose(repository, commit, files))
    for name in wanted:
        path = _keep(repository, commit, name, files[name])
    return path


def weights_in(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file of WEIGHTS in a folder that timm or transformers wrote.

    Raises:
      UserError: there is none; lists the files that may be meant.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    try:
        found = sorted(os.fspath(path) for path in folder.iterdir() if path.suffix in _SUFFIXES)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None
    hint = f"; it holds {listed(found, separator=', ')}" if found else ""
    raise UserError(
        f"{folder} is a folder without {' or '.join(WEIGHTS)}: give the file of weights{hint}"
    )


def _parse(source: str) -> Repository:
    """Reads hf:OWNER/NAME[@REVISION], HF_ENDPOINT and HF_TOKEN."""
    part = r"(?!.*\.\.)[A-Za-z0-9_][\w.-]*"
    match = re.fullmatch(rf"{PREFIX}({part}/{part})(?:@([\w./-]+))?", source, re.ASCII)
    if not match:
        raise UserError(
            f"{source!r} names no repository: write {PREFIX}OWNER/NAME, or "
            f"{PREFIX}OWNER/NAME@REVISION for a branch, tag or commit"
        )
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):  # http.client would print it in its error
        raise UserError("HF_TOKEN holds characters that no token has")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return Repository(match[1], match[2] or "main", endpoint, token)


def _files(repository: Repository) -> tuple[str, dict[str, str]]:
    """Returns the commit of a revision, and the SHA-256 of each of its files.

    The SHA-256 is "" for a file that the hub keeps in git itself.
    """
    if _COMMIT.fullmatch(repository.revision):
        kept = repository.folder / repository.revision / _LISTING
        if kept.is_file():
            return _parse_listing(repository, kept.read_bytes())
    reference = repository.folder / "revisions" / urllib.parse.quote(repository.revision, safe="")
    address = (
        f"{repository.endpoint}/api/models/{repository.name}/revision/{reference.name}?blobs=true"
    )
    try:
        answer = download.read(address, repository.token)
    except download.Refused as error:
        raise _explained(repository, error) from None
    except UserError as error:
        return _last_known(repository, reference, error)
    commit, files = _parse_listing(repository, answer)
    try:
        for path, content in (
            (repository.folder / commit / _LISTING, answer),
            (reference, commit.encode()),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(path, content)
    except OSError as error:
        raise download.not_kept(repository.source, repository.folder, error) from None
    return commit, files


def _last_known(
    repository: Repository, reference: pathlib.Path, failure: UserError
) -> tuple[str, dict[str, str]]:
    """Returns what `_files` does, from the cache; raises `failure` where it has nothing."""
    try:
        commit = reference.read_text()
        content = (repository.folder / commit / _LISTING).read_bytes()
    except (OSError, ValueError):
        raise failure from None
    print(
        f"{failure}; {repository.source} is taken from the cache, at commit {commit}",
        file=sys.stderr,
    )
    return _parse_listing(repository, content)


def _parse_listing(repository: Repository, answer: bytes) -> tuple[str, dict[str, str]]:
    """Reads the hub's answer about a revision; returns what `_files` does."""
    try:
        info = json.loads(answer)
        commit = info["sha"]
        files = {
            file["rfilename"]: (file.get("lfs") or {}).get("sha256", "")
            for file in info["siblings"]
        }
        well_formed = _COMMIT.fullmatch(commit) and all(
            isinstance(name, str) and re.fullmatch(r"([0-9a-f]{64})?", sha256)
            for name, sha256 in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        well_formed = None
    if not well_formed:
        raise UserError(
            f"{repository.endpoint} does not answer as the Hugging Face Hub does about "
            f"{repository.source}; HF_ENDPOINT names another"
        )
    return commit, files


def _choose(repository: Repository, commit: str, files: dict[str, Any]) -> str:
    """Returns the name of the weights among the files of a repository."""
    for name in WEIGHTS:
        if name in files:
            return name
    others = sorted(name for name in files if name.endswith(_SUFFIXES))
    if not others:
        raise UserError(f"{repository.source} holds no weights")
    raise UserError(
        f"{repository.source} has neither {' nor '.join(WEIGHTS)}; its weights are "
        f"{listed(others, separator=', ')}: give one by its address, "
        f"{repository.page}/resolve/{commit}/FILE"
    )


def _keep(repository: Repository, commit: str, name: str, sha256: str) -> pathlib.Path:
    """Returns a file of a commit, which is downloaded unless it is in the cache."""
    address = f"{repository.page}/resolve/{commit}/{name}"
    target = repository.folder / commit / name
    try:
        return download.keep(address, target, sha256, repository.token)
    except download.Refused as error:
        raise _explained(repository, error) from None


def _explained(repository: Repository, refusal: download.Refused) -> UserError:
    """Returns the error for a hub's refusal, with its remedy."""
    name, page, code = repository.source, repository.page, refusal.code
    reader = "the account of HF_TOKEN" if repository.token else "requests without a token"
    if refusal.reason == "GatedRepo" or (code == 403 and not repository.token):
        return UserError(
            f"{name} is gated, and closed to {reader} ({code}): accept its conditions at {page}, "
            "and give a token of the account that did in HF_TOKEN"
        )
    if code == 401 and repository.token:
        return UserError(f"{name}: the hub does not accept the token in HF_TOKEN (401)")
    if code == 401:
        return UserError(
            f"{name} does not exist, or is private (401): look at {page}; for a private one, give "
            "a token of an account that may read it in HF_TOKEN"
        )
    if code == 403:
        return UserError(f"{name} may not be read by {reader} (403): look at {page}")
    if refusal.reason == "RevisionNotFound":
        return UserError(
            f"{name}: {repository.name} has no branch, tag or commit {repository.revision!r}; "
            f"{page}/tree/main lists them"
        )
    if code == 404:
        return UserError(f"{name} does not exist, or is hidden from {reader} (404): look at {page}")
    return refusal
