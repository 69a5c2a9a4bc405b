"""Files by name: a hub id `user/repo/file` or an http(s) URL, downloaded once and kept.

Hub files are kept where huggingface_hub keeps them, other files in gca3d/ next to those (in
~/.cache/huggingface, or wherever HF_HOME says). A file that is kept is used without asking anybody
for news; with HF_HUB_OFFLINE=1 nobody is asked for others either.
"""

import hashlib
import os
import re
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from tqdm import tqdm

# What the hub takes in a file's path: anything but control characters and what leaves the folder.
FILE_PART = r"(?!\.{1,2}(?:/|$)|\.git(?:/|$))[^/\x00-\x1f\x7f]{1,255}"
PART = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"  # Not \w, which knows more letters.
HUB_ID = f"{PART}/{PART}"
TIMEOUT = 20  # Longest wait for a server [s].
MAX_SHOWN = 300  # Letters of a name or reason in a message.
CHUNK = 2**20  # Bytes read at once.
LFS_POINTER = b"version https://git-lfs.github.com/"  # What git keeps in place of a large file.
MIRRORS = (
    "EG3D's own files (ffhqrebalanced512-128.pkl, afhqcats512-128.pkl, ...) are in NVIDIA's NGC "
    "catalog, these two also as nvidia_*.pkl in the hub repository of DATID-3D"
)


def fetch(name: str) -> Path:
    """Return the local copy of a hub file `user/repo/file` or URL, downloading it if need be.

    Raises:
        ValueError: the name is neither, or what it names cannot be had; one line.
    """
    if re.match("https?://", name, re.IGNORECASE):
        return fetch_url(name)
    if match := re.fullmatch(f"({HUB_ID})/({FILE_PART}(?:/{FILE_PART})*)", name):
        return fetch_hub_file(*match.groups())
    hint = f". {MIRRORS}" if name.endswith(".pkl") else ""
    name = " ".join(name.split())[:MAX_SHOWN]
    raise ValueError(
        f"{name}: no such file or run folder, and no hub id (user/repo/file) or URL{hint}"
    )


def fetch_hub_file(repo: str, file: str) -> Path:
    """Return the local copy of a file in a hub repository `user/repo`.

    Raises:
        ValueError: there is none and it cannot be downloaded.
    """
    try:
        kept = try_to_load_from_cache(repo, file)
        if isinstance(kept, str):
            return Path(kept)
        if constants.HF_HUB_OFFLINE:
            raise ValueError("not downloaded yet, and HF_HUB_OFFLINE is set")
        # One request says what is wrong; hf_hub_download repeats some for half a minute.
        get_hf_file_metadata(hf_hub_url(repo, file), timeout=TIMEOUT)
        return Path(hf_hub_download(repo, file))
    # The hub's errors, its HTTP library's and the disk's have nothing else in common.
    except Exception as error:
        reason = " ".join(str(error).split()).split(" Please ")[0] or type(error).__name__
        raise ValueError(
            f"{f'{repo}/{file}'[:MAX_SHOWN]}: no such file here, and not from the hub "
            f"({reason[:200]}). {MIRRORS}"
        ) from error


def check_downloaded(path: str | Path) -> None:
    """Refuse a git-lfs pointer, which lies in a repository in place of a large file.

    Raises:
        ValueError: it is one; the message names no file.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("a git-lfs pointer, the file itself was not downloaded (git lfs pull)")


def fetch_url(url: str) -> Path:
    """Return the local copy of what is at a URL.

    Raises:
        ValueError: there is none and it cannot be downloaded.
    """
    shown = re.sub("^([^/]*//)[^/]*@", r"\1", url)  # Without a password.
    try:
        if shown != url:
            raise ValueError("user names and passwords in URLs are not supported")
        name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
        name = re.sub("[^A-Za-z0-9_.-]", "_", name)[-100:]
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        path = Path(constants.HF_HOME) / "gca3d" / f"{key}-{name}"
        if path.exists():
            return path
        if constants.HF_HUB_OFFLINE:
            raise ValueError("not downloaded yet, and HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(url, timeout=TIMEOUT) as response:
            save_response(response, path)
    except (OSError, HTTPException, ValueError) as error:
        shown, reason = (" ".join(str(x).split())[:MAX_SHOWN] for x in (shown, error))
        raise ValueError(f"{shown} cannot be downloaded: {reason}. {MIRRORS}") from error
    return path


def save_response(response: HTTPResponse, path: Path) -> None:
    """Write a server's answer to a file, completely or not at all, with a bar.

    Raises:
        ValueError: the answer is a web page, or breaks off.
    """
    if response.headers.get_content_type() == "text/html":
        raise ValueError("a web page, not a file")
    length = response.headers.get("Content-Length")
    total = int(length) if length else None
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # Others may be at it too.
    try:
        with (
            open(temporary, "wb") as file,
            tqdm(desc=path.name, total=total, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total not in (None, temporary.stat().st_size):
            raise ValueError(f"broke off after {temporary.stat().st_size} of {total} bytes")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
