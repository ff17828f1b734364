"""Models of the Hugging Face hub: their names, what lies in the cache, and which files make a model."""

import re
from dataclasses import dataclass
from pathlib import Path

from receptance.errors import ReceptanceError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<file>[^:]+))?")
WEIGHT_SUFFIXES = (".pth", ".safetensors", ".gguf")
FOLDER_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# what a model folder may hold beside its weights; never code
COMPANIONS = ("config.json", "tokenizer.json", "vocab.txt", "20B_tokenizer.json", "model.toml")


class HubError(ReceptanceError):
    """A model could not be found on the hub, fetched, or verified."""


@dataclass(frozen=True)
class CachedModel:
    """One repository in the cache, at its most recent revision there."""

    repo: str
    folder: Path
    size: int  # bytes
    weights: tuple[str, ...]  # names of the weight files, relative to the folder


def parse(name: str) -> tuple[str, str | None] | None:
    """`org/name[:file]` → (repository, file); None for anything else."""
    match = HUB_ID.fullmatch(name)
    return (match["repo"], match["file"]) if match else None


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_models() -> list[CachedModel]:
    """All repositories of the cache that hold weight files, in order of name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache_folder()).repos
    except CacheNotFound:
        return []
    models = []
    for repo in repos:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: ("main" in revision.refs, revision.last_modified))
        names = sorted(file.file_path.relative_to(newest.snapshot_path).as_posix() for file in newest.files)
        weights = tuple(name for name in names if name.endswith(WEIGHT_SUFFIXES))
        if weights:
            models.append(CachedModel(repo.repo_id, newest.snapshot_path, newest.size_on_disk, weights))
    return sorted(models, key=lambda model: model.repo)


def choose(repo: str, file: str | None, sizes: dict[str, int]) -> list[str]:
    """The files to fetch, weights first. Raises HubError, listing what there is, unless the choice is clear."""
    companions = [name for name in COMPANIONS if name in sizes]
    companions += [name for name in sizes if name.startswith("rwkv_vocab") and name.endswith(".txt")]
    weights = [name for name in sizes if name.endswith(WEIGHT_SUFFIXES)]
    listing = ", ".join(f"{name} ({sizes[name] / 1e6:,.0f} MB)" for name in weights) or "no weight file"
    if file is not None:
        if file not in sizes:
            raise HubError(f"{repo} has no file {file!r}; it has {listing}")
        return [file, *(name for name in companions if name != file)]
    folder = next((name for name in FOLDER_WEIGHTS if name in sizes), None)
    if folder:
        shards = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
        return [folder, *(shards if folder.endswith(".json") else []), *companions]
    if len(weights) != 1:
        raise HubError(f"{repo} has {listing}; name one, as in {repo}:{weights[0] if weights else 'FILE'}")
    return [weights[0], *companions]
