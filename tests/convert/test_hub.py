"""Repositories of a local server that answers as the Hugging Face Hub does."""

import hashlib
import pathlib
import urllib.parse

import numpy as np
import pytest

import mbv2_jax
from mbv2_jax import model_dir
from mbv2_jax.convert import download, importer
from mbv2_jax.errors import UserError
from tests.support import fake_hub, tiny_model
from tests.support.convert_command import make_run, refused
from tests.support.fake_hub import COMMITS, NAME, TOKEN, Handler, Server


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("MBV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "WAIT", 0.0)
    files = {
        "README.md": b"# A network",
        "config.json": b'{"num_labels": 3}',
        "model.safetensors": np.random.default_rng(0).bytes(300_000),
        "pytorch_model.bin": b"pickled",
    }
    with fake_hub.serve(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"{server.address}/")
        yield server


def refusal(source: str = f"hf:{NAME}") -> str:
    with pytest.raises(UserError) as caught:
        download.locate(source)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def paths(server: Server) -> list[str]:
    return [urllib.parse.unquote(path) for path, _, _ in server.asked]


def test_the_weights_come_with_their_config(server):
    file = download.locate(f"hf:{NAME}")
    assert file.name == "model.safetensors"
    assert file.read_bytes() == server.files["model.safetensors"]
    assert (file.parent / "config.json").read_bytes() == server.files["config.json"]
    assert not (file.parent / "pytorch_model.bin").exists()
    assert paths(server) == [
        f"/api/models/{NAME}/revision/main?blobs=true",
        f"/{NAME}/resolve/{COMMITS[0]}/config.json",
        f"/{NAME}/resolve/{COMMITS[0]}/model.safetensors",
    ]
    assert download.locate(f"hf:{NAME}") == file
    assert len(server.asked) == 4  # the hub was asked for the commit of main, and for no file


def test_pickled_weights_where_there_are_no_others(server):
    del server.files["model.safetensors"]
    assert download.locate(f"hf:{NAME}").name == "pytorch_model.bin"


def test_other_weights_are_listed_with_their_address(server):
    for name in ("model.safetensors", "pytorch_model.bin"):
        del server.files[name]
    assert refusal().endswith("holds no weights")
    server.files["onnx/model.onnx"] = b"onnx"
    line = refusal()
    assert "onnx/model.onnx" in line
    assert f"{server.address}/{NAME}/resolve/{COMMITS[0]}/FILE" in line


def test_a_commit_in_the_cache_needs_no_network(server):
    first = download.locate(f"hf:{NAME}")
    asked = len(server.asked)
    assert download.locate(f"hf:{NAME}@{COMMITS[0]}") == first
    second = download.locate(f"hf:{NAME}@{COMMITS[1]}")
    assert second.parent != first.parent
    assert len(server.asked) == asked + 3
    assert download.locate(f"hf:{NAME}@{COMMITS[1]}") == second
    assert len(server.asked) == asked + 3


def test_a_branch_moves_on(server):
    first = download.locate(f"hf:{NAME}")
    server.commit = COMMITS[1]
    server.files["model.safetensors"] = b"retrained"
    assert download.locate(f"hf:{NAME}").read_bytes() == b"retrained"
    assert first.read_bytes() != b"retrained"


def test_a_revision_with_a_slash(server):
    assert COMMITS[1] in str(download.locate(f"hf:{NAME}@refs/pr/1"))
    assert server.asked[0][0] == f"/api/models/{NAME}/revision/refs%2Fpr%2F1?blobs=true"


def test_without_the_network_the_last_commit_of_a_branch_is_used(server, capsys, monkeypatch):
    # A server that is gone: its address stays, and nobody answers there.
    with Server() as gone:
        address = gone.address
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "Connection refused" in refusal()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    file = download.locate(f"hf:{NAME}")
    capsys.readouterr()
    server.shutdown()
    server.server_close()
    assert download.locate(f"hf:{NAME}") == file
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"taken from the cache, at commit {COMMITS[0]}" in said
    assert "Connection refused" in refusal(f"hf:{NAME}@v2")


def test_a_broken_download_is_resumed_through_the_redirection(server):
    server.moved = server.storage.address
    server.breaks += [100_000]
    file = download.locate(f"hf:{NAME}")
    assert file.read_bytes() == server.files["model.safetensors"]
    assert [asked for _, _, asked in server.storage.asked] == [None, "bytes=100000-"]


def test_the_token_is_sent_to_the_hub_alone(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    server.moved = server.storage.address
    server.gated = True
    download.locate(f"hf:{NAME}")
    assert {token for _, token, _ in server.asked} == {f"Bearer {TOKEN}"}
    assert [token for _, token, _ in server.storage.asked] == [None]


def test_the_token_follows_a_redirection_within_the_hub(server, monkeypatch):
    """The hub redirects the old name of a repository to its new one."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.moved = server.address
    download.locate(f"hf:{NAME}")
    assert server.asked[-1] == ("/storage/model.safetensors", f"Bearer {TOKEN}", None)


def test_a_wrong_hash_is_refused_and_nothing_kept(server, tmp_path):
    server.stated = "0" * 64
    line = refusal()
    assert hashlib.sha256(server.files["model.safetensors"]).hexdigest()[:16] in line
    assert not list(tmp_path.rglob("model.safetensors*[!k]"))  # all but its .lock


def test_a_damaged_file_in_the_cache_is_downloaded_again(server):
    file = download.locate(f"hf:{NAME}")
    file.write_bytes(b"damaged")
    assert download.locate(f"hf:{NAME}").read_bytes() == server.files["model.safetensors"]


def test_gated_and_private_repositories(server, monkeypatch):
    server.gated = True
    line = refusal()
    assert "is gated, and closed to requests without a token (401)" in line
    assert f"accept its conditions at {server.address}/{NAME}," in line
    assert "HF_TOKEN" in line
    server.private, server.gated = True, False
    assert "does not exist, or is private (401)" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert download.locate(f"hf:{NAME}").is_file()
    server.closed = True
    assert "is hidden from the account of HF_TOKEN (404)" in refusal()
    server.private, server.gated, server.commit = False, True, COMMITS[1]
    assert "closed to the account of HF_TOKEN (403)" in refusal()


def test_unknown_names(server, monkeypatch):
    assert "does not exist, or is private (401)" in refusal("hf:someone/else")
    assert "has no branch, tag or commit 'v2'" in refusal(f"hf:{NAME}@v2")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "does not exist" in refusal("hf:someone/else")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "does not accept the token in HF_TOKEN (401)" in refusal()
    monkeypatch.setenv("HF_TOKEN", "secret\r\nX-Other: 1")
    assert refusal() == "HF_TOKEN holds characters that no token has"


@pytest.mark.parametrize(
    "source",
    ["hf:net", "hf:a/b/c", "hf://a/b", "hf:a/../b", "hf:../b", "hf:a/b@", "hf:a/b@x y", "hf:"],
)
def test_malformed_names_are_refused(source, server):
    assert "write hf:OWNER/NAME" in refusal(source)
    assert server.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Please log in</html>",
        b"[]",
        b'{"sha": "../../x", "siblings": []}',
        b'{"sha": "%s", "siblings": [{"rfilename": 3, "lfs": []}]}' % COMMITS[0].encode(),
        b'{"sha": "%s", "siblings": [{"rfilename": "a", "lfs": {"sha256": 1}}]}'
        % COMMITS[0].encode(),
        b"[" * 100_000,
    ],
)
def test_answers_of_no_hub_are_refused(answer, server, monkeypatch):
    monkeypatch.setattr(Handler, "send_listing", lambda self, revision: self.send_file(answer))
    assert "does not answer as the Hugging Face Hub does" in refusal()


def test_an_endless_answer_is_refused(server, monkeypatch):
    monkeypatch.setattr(download, "_LARGEST_ANSWER", 1000)
    monkeypatch.setattr(Handler, "send_listing", lambda self, revision: self.send_file(b" " * 1001))
    assert "more than 1,000 bytes" in refusal()


def test_a_token_is_not_sent_unencrypted(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://example.org")
    assert "over https only" in refusal()


def test_the_address_of_a_page_names_the_repository(server, monkeypatch):
    page = b"<!doctype html><html></html>"
    address = "https://huggingface.co/timm/mobilenetv2_100.ra_in1k"
    monkeypatch.setattr(download, "_download", lambda _, part, token: part.write_bytes(page))
    assert refusal(address).endswith("are hf:timm/mobilenetv2_100.ra_in1k")


def test_a_repository_wherever_a_source_is_taken(server, tmp_path, monkeypatch, capsys):
    run = make_run(monkeypatch, capsys)
    tiny_model.write(tmp_path / "m")
    file = tmp_path / "model.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    server.files |= {"model.safetensors": file.read_bytes(), "config.json": b"{}"}
    wanted = model_dir.read(tmp_path / "m").params["stem"]["conv"]["kernel"]
    assert run(f"hf:{NAME}", f"--output={tmp_path / 'converted'}")[0] == 0
    for saved in (
        model_dir.read(tmp_path / "converted"),
        model_dir.read(f"hf:{NAME}@{COMMITS[0]}"),
        importer.load(f"hf:{NAME}").saved,
    ):
        assert saved.classes == tiny_model.CLASSES
        np.testing.assert_array_equal(saved.params["stem"]["conv"]["kernel"], wanted)
    assert mbv2_jax.init_model(f"hf:{NAME}").class_names == tiny_model.CLASSES
    assert "has no branch" in refused(run(f"hf:{NAME}@v2", f"--output={tmp_path / 'other'}"))


def test_a_folder_stands_for_the_weights_in_it(tmp_path, monkeypatch, capsys):
    run = make_run(monkeypatch, capsys)
    tiny_model.write(tmp_path / "m")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "net.onnx").write_bytes(b"")
    for source in (folder, pathlib.Path(f"{folder}/")):
        assert "is a directory" in refused(run(source, f"--output={tmp_path / 'x'}"))
    assert f"it holds {folder / 'net.onnx'}" in refusal(str(folder))
    file = folder / "model.safetensors"
    assert run(tmp_path / "m", "--to=safetensors", f"--output={file}")[0] == 0
    assert run(folder, f"--output={tmp_path / 'again'}")[0] == 0
    for source in (tmp_path / "again", folder):
        assert model_dir.read(source).classes == tiny_model.CLASSES


def test_a_model_directory_comes_before_weights_in_it(tmp_path, monkeypatch, capsys):
    run = make_run(monkeypatch, capsys)
    tiny_model.write(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no weights")
    assert model_dir.read(tmp_path / "m").classes == tiny_model.CLASSES
    assert "is a directory" in refused(run(tmp_path / "m", f"--output={tmp_path / 'x'}"))
