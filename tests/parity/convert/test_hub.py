"""The hub of our tests answers as the real one does: its own client understands it."""

import hashlib

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tests.support import fake_hub
from tests.support.fake_hub import COMMITS, NAME, TOKEN

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    # Other tests of this process set it for the peers.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub.serve(FILES) as server:
        yield server


def test_the_client_reads_the_answer_about_a_revision(server):
    api = huggingface_hub.HfApi(server.address, token=False)
    info = api.model_info(NAME, revision="refs/pr/1", files_metadata=True)
    assert server.asked[0][0] == f"/api/models/{NAME}/revision/refs%2Fpr%2F1?blobs=true"
    assert info.sha == COMMITS[1]
    assert info.siblings is not None
    sha256 = {file.rfilename: file.lfs.sha256 if file.lfs else "" for file in info.siblings}
    weights = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert sha256 == {"config.json": "", "model.safetensors": weights}


def test_the_address_of_a_file(server):
    address = huggingface_hub.hf_hub_url(
        NAME, "config.json", revision=COMMITS[0], endpoint=server.address
    )
    assert address == f"{server.address}/{NAME}/resolve/{COMMITS[0]}/config.json"


def test_the_client_understands_the_refusals(server):
    api = huggingface_hub.HfApi(server.address, token=False)
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info(NAME, revision="v2")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("someone/else", revision="main")
    server.private = True
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info(NAME, revision="main")
    assert api.model_info(NAME, revision="main", token=TOKEN).sha == COMMITS[0]
    assert server.asked[-1][1] == f"Bearer {TOKEN}"
