"""Data sets of the Hugging Face hub -> files on this machine.

A data set is named `owner/name`, or `owner/name@revision`, and is loaded by `datasets`, which keeps it as Arrow files in its
cache; `hf://datasets/owner/name/PATH` names files of its repository, which `huggingface_hub` keeps as they are. No code of
a data set is run: `datasets` has not done so since version 4. Without a network, what is in the caches is used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import Any

from packaging.version import Version

from bilevel.errors import InputError
from bilevel.suggest import did_you_mean

log = logging.getLogger("bilevel.llm")

PREFIX = "hf://"
_DATASETS = f"{PREFIX}datasets/"
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+?))?")
_SPLIT = re.compile(r"\w+(\.\w+)*")
_PATIENCE = 10.0  # seconds that the hub has to answer
_WITHOUT_CODE = Version("4")


def may_be_hub_name(path: str) -> bool:
    """Whether a path looks like the name of a data set: `owner/name`."""
    return _NAME.fullmatch(path) is not None


@cache
def hub_files(path: str, split: str | None = None, subset: str | None = None) -> Sequence[Path]:
    """The files of a data set of the hub, or of its repository. They are looked for once in a process, and so stay the same.

    path: `owner/name`, `owner/name@revision`, or either of them after `hf://datasets/`, there also with a path or a glob.
    split, subset: of the data set; None takes the only one.

    Raises `InputError`, saying what was looked for and what to do, if they cannot be had.
    """
    name = path.removeprefix(_DATASETS)
    if name.startswith(PREFIX):
        raise InputError(f"{path}: a path on the hub begins with {_DATASETS}, as in {_DATASETS}owner/name/train.jsonl")
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    match = _NAME.fullmatch(f"{owner}/{repository}")
    if match is None:
        raise InputError(f"{path}: a data set of the hub is named owner/name, or owner/name@revision")
    repo, revision = match["repo"], match["revision"]
    if not inside:
        return _loaded(repo, revision, split, subset)
    if split is not None or subset is not None:
        raise InputError(f"{path}: the files are named, so that split and subset have no meaning; leave them out")
    return _repository_files(repo, revision, inside)


def _loaded(repo: str, revision: str | None, split: str | None, subset: str | None) -> list[Path]:
    import datasets

    if Version(datasets.__version__) < _WITHOUT_CODE:
        raise InputError(
            f"{repo}: datasets {datasets.__version__} may run code that comes with a data set; version {_WITHOUT_CODE} and "
            "later ones do not: pip install -U datasets"
        )
    if split is not None and not _SPLIT.fullmatch(split):
        raise InputError(f"{repo}: split {split!r} is not the name of a split; for a part of one, set max_rows")
    offline = _why_offline(repo, revision)
    with _library_speaks(repo, offline):
        if offline is None:
            found = datasets.load_dataset(repo, subset, revision=revision, keep_in_memory=False)
        else:
            with _from_cache_alone(datasets.config):
                found = datasets.load_dataset(repo, subset, keep_in_memory=False)
    splits = list(found)
    if split is None and len(splits) > 1:
        raise InputError(f"{repo}: there are the splits {', '.join(splits)}; say which, as in split: {splits[0]}")
    if split is not None and split not in splits:
        raise InputError(f"{repo}: there is no split {split!r}{did_you_mean(split, splits)}")
    files = [Path(entry["filename"]) for entry in found[split or splits[0]].cache_files]
    if offline is not None:
        _require_revision(repo, revision, files, offline)
        log.info("%s: %s; the version in the cache is used (%s)", repo, offline, files[0].parent)
    return files


def _require_revision(repo: str, revision: str | None, files: Sequence[Path], offline: str) -> None:
    """The cache knows a version by its commit alone."""
    if revision is not None and not all(revision in file.parts for file in files):
        raise InputError(
            f"{repo}: {offline}, and the version in the cache is not known to be {revision}; leave @{revision} out"
        )


def _repository_files(repo: str, revision: str | None, pattern: str) -> list[Path]:
    from huggingface_hub import snapshot_download

    offline = _why_offline(repo, revision)
    with _library_speaks(f"{repo}/{pattern}", offline):
        folder = Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[pattern],
                local_files_only=offline is not None,
            )
        )
    files = sorted(folder.glob(pattern)) if has_magic(pattern) else [folder / pattern]
    files = [file for file in files if file.is_file()]
    if not files:
        where = f"the data set {repo} on the hub" if offline is None else f"the cache ({folder}), and {offline}"
        raise InputError(f"{_DATASETS}{repo}/{pattern}: no such file in {where}")
    if offline is not None and has_magic(pattern):
        log.warning(
            "%s%s/%s: %s; there may be more files than the %d in the cache", _DATASETS, repo, pattern, offline, len(files)
        )
    return files


def _why_offline(repo: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked; None if it can. One question, so that nobody waits for what others try again and again.

    Raises `InputError` if the hub does not have the data set.
    """
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if config.HF_HUB_OFFLINE:
        return "the network is not used (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set)"
    try:
        HfApi().dataset_info(repo, revision=revision, timeout=_PATIENCE)
    except GatedRepoError as error:
        raise InputError(f"{repo}: access to this data set has to be asked for on the hub; then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{repo}: the hub has no such data set, or it is private (`hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo}: the hub has no revision {revision!r} of this data set") from error
    except OfflineModeIsEnabled:
        return "the network is not used (HF_HUB_OFFLINE is set)"
    except HfHubHTTPError as error:
        return f"the hub answers with an error ({_first_line(error)})"
    except Exception as error:  # of whatever library carries the question
        return f"there is no network ({_first_line(error)})"
    return None


@contextmanager
def _library_speaks(what: str, offline: str | None) -> Iterator[None]:
    """Within, what the libraries raise becomes an `InputError` that says what was looked for, and what to do."""
    try:
        yield
    except Exception as error:  # they raise what comes to hand
        if offline is None:
            raise InputError(f"{what}: the data set cannot be loaded: {_first_line(error)}") from error
        seen = f" ({_first_line(error)})" if isinstance(error, ValueError) else ""  # which of its subsets there are
        raise InputError(
            f"{what}: {offline}, and the data set is not in the cache{seen}; load it once where there is a network, or name "
            "files on this machine"
        ) from error


@contextmanager
def _from_cache_alone(config: Any) -> Iterator[None]:
    """Within, `datasets` does not ask the hub, which without a network it would do six times."""
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return "; ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
