"""Getting a model from the hub into the cache of huggingface_hub, whose settings it obeys: HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from receptance.cli.hub import FOLDER_WEIGHTS, HubError, cache_folder, choose, parse

T = TypeVar("T")


def pull(name: str, *, revision: str = "main", endpoint: str | None = None) -> Path:
    """Fetch `org/name[:file]` into the cache, going on where an earlier attempt ended; give the file or folder.

    Without a file: the repository's folder model, or its only weight file. Each file whose SHA-256 the hub states is
    compared with it; one that differs is deleted. Raises HubError.
    """
    from huggingface_hub import HfApi, hf_hub_download

    parsed = parse(name)
    if parsed is None:
        raise HubError(f"{name!r} is no model of the hub; expected org/name or org/name:file")
    repo, file = parsed
    api = HfApi(endpoint=endpoint)
    info = _asked(name, lambda: api.model_info(repo, revision=revision, files_metadata=True))
    commit = info.sha or revision
    siblings = info.siblings or []
    sums = {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs}
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    fetched = []
    for path in choose(repo, file, sizes):
        what = f"{repo}:{path}"
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
            raise HubError(f"{what}: this path does not stay inside the model's folder; refused")
        if path in sums:
            blob = cache_folder() / f"models--{repo.replace('/', '--')}" / "blobs" / sums[path]
            _asked(what, partial(_fetch_blob, repo, path, commit, endpoint, blob, sizes[path]))
        # files without a sum are small; for the others this only links the blob into the model's folder
        link = partial(hf_hub_download, repo, path, revision=revision, endpoint=endpoint)
        fetched.append(Path(_asked(what, link)))
        if path in sums and fetched[-1].resolve() != blob.resolve():  # a mirror that names its blobs otherwise
            _verify(fetched[-1], sums[path])
    return fetched[0].parent if fetched[0].name in FOLDER_WEIGHTS else fetched[0]


def _fetch_blob(repo: str, path: str, commit: str, endpoint: str | None, blob: Path, size: int) -> None:
    """Download a file whose SHA-256 is the blob's name.

    huggingface_hub itself drops what it has when its process ends. Here the part stays, and the next attempt goes on.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # in its __init__

    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    with WeakFileLock(blob.with_name(f"{blob.name}.lock")):
        if blob.exists():
            _verify(blob, blob.name)
            return
        with part.open("ab") as file:
            done = file.tell()
            if done < size:
                url = hf_hub_url(repo, path, revision=commit, endpoint=endpoint)
                http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=size)
        _verify(part, blob.name)
        os.replace(part, blob)


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.resolve().unlink()
        raise HubError(f"{path}: SHA-256 is {found}, the hub states {expected}; deleted, pull it again")


def _asked(what: str, call: Callable[[], T]) -> T:
    """The answer of a hub call, its many kinds of failure turned into one with advice."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise HubError(f"{what}: access must be asked for on its page; then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{what}: no such model on the hub, or it is private (set HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what}: the model has no such revision") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{what}: offline mode is on (HF_HUB_OFFLINE), so nothing is downloaded") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(f"{what}: the hub cannot be reached ({_first_line(error)})") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{what}: the model has no such file") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{what}: the hub answered with an error ({_first_line(error)})") from error
    except OSError as error:  # no space left, no permission, and the connection errors of some versions
        raise HubError(f"{what}: {_first_line(error)}; pull it again to go on") from error
    except Exception as error:  # the transport underneath (requests, httpx) has exceptions of its own
        if type(error).__module__.partition(".")[0] not in ("requests", "httpx", "httpx2", "httpcore"):
            raise
        raise HubError(f"{what}: the connection failed ({_first_line(error)}); pull it again to go on") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
