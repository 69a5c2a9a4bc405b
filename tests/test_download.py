"""Generators by hub id and URL: what is fetched once, and what is refused at once."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import huggingface_hub.constants
import pytest
import torch
from official_pickle import content_of, write_pickle
from tiny_run import build_generator

from files.generators import load_generator, save_generator
from harness import download


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Be online, with an empty cache and an empty working directory."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    def offline():
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    return offline


@pytest.fixture
def pickled(tmp_path):
    """Return the bytes of an official .pkl."""
    return write_pickle(tmp_path / "g.pkl", content_of(build_generator())).read_bytes()


@pytest.fixture
def server(monkeypatch):
    """Serve `server.files` by path, also as a hub would, and note each request in `server.log`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/api/agent-harnesses":  # The hub library's own, once a process.
                server.log.append(f"{self.command} {self.path}")
            status, headers, content = server.files.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.log = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def is_tiny(G):
    return torch.equal(G.decoder.net[2].weight, build_generator().decoder.net[2].weight)


def refusal(source):
    """Return the line by which a source is refused."""
    with pytest.raises(ValueError) as caught:
        load_generator(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# URLs.


def test_url_is_downloaded_once_and_with_a_bar(server, pickled, offline, cache, capsys):
    server.files["/a/my%20heads.pkl?dl=1"] = (200, {}, pickled)
    url = f"{server.url}/a/my%20heads.pkl?dl=1"
    assert is_tiny(load_generator(url))
    assert "-my_heads.pkl: 100%" in capsys.readouterr().err
    offline()
    assert is_tiny(load_generator(url))
    assert server.log == ["GET /a/my%20heads.pkl?dl=1"]
    assert [path.name[16:] for path in (cache / "gca3d").iterdir()] == ["-my_heads.pkl"]


@pytest.mark.parametrize(
    "path",
    [
        "/a@b//c@d.pkl?by=http://me@x/",
        "/files?redirect=true&path=x.pkl",
        "/uc?id=1",
        "/%2e%2e",
        "/",
        "/" + "%E5%A4%B4" * 90,
    ],
)
def test_url_without_a_name_is_read_by_its_content(server, pickled, path, cache):
    server.files[path] = (200, {}, pickled)
    assert is_tiny(load_generator(server.url + path))
    assert len([*(cache / "gca3d").iterdir()]) == 1


def test_refusals_are_one_line_and_tell_no_password(server):
    server.files["/loop.pkl"] = (302, {"Location": "/loop.pkl"}, b"")
    assert "infinite loop" in refusal(f"{server.url}/loop.pkl")
    assert "secret" not in refusal("http://me:secret@127.0.0.1:1/g.pkl")
    assert refusal("a\nb").startswith("a b: no such file")


@pytest.mark.parametrize("account", ["me:secret", "secret", "me:secret@word", ":secret", "me@"])
def test_url_with_an_account_is_refused_unasked_and_tells_no_password(server, account):
    host = server.url.removeprefix("http://")
    line = refusal(f"http://{account}@{host}/g.pkl")
    assert line.startswith(f"http://{host}/g.pkl cannot be downloaded: ") and "password" in line
    assert "secret" not in line and server.log == []


def test_equal_names_at_two_urls_are_two_files(server):
    for folder, seed in (("a", 0), ("b", 1)):
        save_generator(build_generator(seed), "g.safetensors")
        content = Path("g.safetensors").read_bytes()
        server.files[f"/{folder}/g.safetensors"] = (200, {}, content)
    assert is_tiny(load_generator(f"{server.url}/a/g.safetensors"))
    assert not is_tiny(load_generator(f"{server.url}/b/g.safetensors"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, {}, b""), "404"),
        ((500, {}, b""), "500"),
        ((200, {"Content-Length": "999"}, b"half"), "broke off after 4 of 999 bytes"),
        ((200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>"), "a web page"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "file:"),
        ((200, {"Content-Length": "many"}, b"?"), "many"),
    ],
)
def test_failed_download_leaves_nothing(server, cache, answer, reason):
    server.files["/g.pkl"] = answer
    assert reason in refusal(f"{server.url}/g.pkl")
    assert [*cache.rglob("*")] == [cache / "gca3d"]
    assert server.log == ["GET /g.pkl"]


def test_interrupted_download_leaves_nothing(server, cache, pickled, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    server.files["/g.pkl"] = (200, {}, pickled)
    monkeypatch.setattr(download.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_generator(f"{server.url}/g.pkl")
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/g.pkl", "http://[/g.pkl", "https://", "http://a b/c"]
)
def test_url_that_leads_nowhere_is_refused(url):
    assert refusal(url).startswith(f"{url} cannot be downloaded: ")


def test_url_is_not_asked_for_offline(server, offline):
    offline()
    assert "HF_HUB_OFFLINE is set" in refusal(f"{server.url}/g.pkl")
    assert server.log == []


def test_what_is_downloaded_is_checked_like_any_file(server):
    server.files["/g.pkl"] = (200, {}, b"noise" * 100)
    line = refusal(f"{server.url}/g.pkl")
    assert "-g.pkl holds no usable generator: it is neither" in line
    assert line.endswith("delete it to download it again")


# Hub ids.


def hub_answer(content):
    return 200, {"ETag": '"0123456789abcdef"', "X-Repo-Commit": "a" * 40}, content


HUB_FILES = [
    "g.pkl",
    "sub/folder/g.pkl",
    "c d.pkl",
    "a+b (1)/.c&d=#?%20.pkl",
    "头/ü.pkl",
    "..a/b...pkl",
]


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_file_is_downloaded_once(server, pickled, offline, name):
    server.files[f"/user/repo/resolve/main/{quote(name)}"] = hub_answer(pickled)
    assert is_tiny(load_generator(f"user/repo/{name}"))
    requests = len(server.log)
    assert is_tiny(load_generator(f"user/repo/{name}"))
    offline()
    assert is_tiny(load_generator(f"user/repo/{name}"))
    assert len(server.log) == requests


def test_hub_is_asked_for_repository_and_file(monkeypatch, pickled, tmp_path):
    asked = []

    def hf_hub_download(*arguments):
        asked.append(arguments)
        return str(tmp_path / "g.pkl")

    monkeypatch.setattr(download, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    monkeypatch.setattr(download, "hf_hub_download", hf_hub_download)
    load_generator("user.name/re-po_1/sub/g.pkl")
    assert asked[0].endswith("/user.name/re-po_1/resolve/main/sub/g.pkl")
    assert asked[1:] == [("user.name/re-po_1", "sub/g.pkl")]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "RepoNotFound", "Repository Not Found"),
        (404, "EntryNotFound", "Entry Not Found"),
        (403, "GatedRepo", "gated repo"),
        (503, "", "503"),
    ],
)
def test_wrong_hub_id_costs_one_request(server, status, code, reason):
    server.files["/user/repo/resolve/main/g.pkl"] = (status, {"X-Error-Code": code}, b"")
    line = refusal("user/repo/g.pkl")
    assert line.startswith("user/repo/g.pkl: no such file here, and not from the hub (")
    assert reason in line and "ffhqrebalanced512-128.pkl" in line
    assert server.log == ["HEAD /user/repo/resolve/main/g.pkl"]


def test_hub_is_not_asked_offline(server, offline):
    offline()
    began = time.perf_counter()
    assert "HF_HUB_OFFLINE is set" in refusal("user/repo/g.pkl")
    assert server.log == [] and time.perf_counter() - began < 2


def test_unreachable_hub_is_not_asked_again_and_again(monkeypatch, capfd):
    template = "http://127.0.0.1:1/{repo_id}/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    began = time.perf_counter()
    refusal("user/repo/g.pkl")
    assert time.perf_counter() - began < 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "source",
    [
        "",
        "g.pkl",
        "repo/g.pkl",
        "ü/b/c",
        "user/../g.pkl",
        "a/b/../c.pkl",
        "a/b/",
        "a/b//c.pkl",
        "a/b/./c.pkl",
        "a/b/c/..",
        "a/b/.git/config",
        "a/b/c\0.pkl",
        f"a/b/{'c' * 256}",
        "/a/b/c",
        "x" * 300,
    ],
)
def test_other_names_are_no_hub_ids(server, source):
    assert refusal(source).startswith(f"{source}: no such file or run folder, and no hub id")
    assert server.log == []


@pytest.mark.parametrize("start", ["", "user/repo/file", "user/repo/", "URL/", "http://["])
def test_long_names_are_not_repeated_whole(server, start):
    source = start.replace("URL", server.url) + "/".join(["x" * 50] * 100)
    assert refusal(source).startswith(source[:300])
    assert len(refusal(source)) < 850


def test_existing_path_wins_over_a_hub_id(server):
    Path("user/repo").mkdir(parents=True)
    save_generator(build_generator(), "user/repo/g.safetensors")
    assert is_tiny(load_generator("user/repo/g.safetensors"))
    assert server.log == []


def test_pointer_of_git_lfs_is_refused(tmp_path):
    file = tmp_path / "x"
    for content in ("", "version 1", "hello"):
        file.write_text(content)
        download.check_downloaded(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="^a git-lfs pointer, the file itself was not downloaded"):
        download.check_downloaded(file)
