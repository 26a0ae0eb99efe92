"""Repositories of the hub: the commit that is taken, and the files of it that are cached or downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from mpq_compiler.support.errors import UserError, named

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(@(?P<revision>\w[\w./+-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Lacking = Callable[[Path, Collection[str]], list[str]]


@dataclass(frozen=True)
class Name:
    """A repository, and which of its commits is meant."""

    repository: str
    """`owner/name`."""
    revision: str = "main"
    """The hash of a commit, a tag or a branch."""

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision != "main" else "")


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit, on disk."""

    repository: str
    commit: str
    folder: Path


def parse(text: str) -> Name | None:
    """Reads `owner/name` or `owner/name@revision`; None: it is neither."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text:
        return None
    return Name(found["repository"], found["revision"] or "main")


def snapshot(name: Name, small: list[str], lacking: Lacking) -> Snapshot:
    """The snapshot of a commit with all that is needed of it: the cached one, completed by the hub where it is not.

    What is cached whole is taken without asking the hub, so a branch is the commit that it was when it was cached.

    Args:
        name: the repository and the commit.
        small: patterns of the files that say what else is needed.
        lacking: the files, or patterns of them, that a snapshot's folder lacks, where the hub was asked for others.

    Raises:
        UserError: there is no such repository or commit, or files are missing and cannot be had.
    """
    from huggingface_hub import constants

    found, wanted = _cached(name), small
    while found is None or lacking(found.folder, ()):
        if constants.HF_HUB_OFFLINE:
            raise _incomplete(name, found, lacking, "HF_HUB_OFFLINE forbids to ask the hub")
        try:
            _download(name, wanted)
        except _Refused as error:
            raise _incomplete(name, found, lacking, f"the hub could not be asked ({error})") from error.__cause__
        found = _cached(name)
        needed = lacking(found.folder, wanted) if found else []
        if found is None or {*needed} <= {*wanted}:
            break
        wanted = [*wanted, *needed]
    if found is None or lacking(found.folder, ()):
        raise _incomplete(name, found, lacking, "the hub does not have it or did not answer")
    return found


class _Refused(Exception):
    """The hub gave nothing."""


def _download(name: Name, patterns: list[str]) -> None:
    """Downloads what matches `patterns` and is not cached. UserError: there is no such repository or commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns)
    except GatedRepoError as error:
        raise UserError(
            f"the hub gives '{name.repository}' only to those who accepted its terms; accept them there, and log in "
            "with `hf auth login`"
        ) from error
    except RepositoryNotFoundError:
        raise UserError(f"there is no folder '{name.repository}', and the hub has no such public model") from None
    except RevisionNotFoundError:
        raise UserError(
            f"the hub's '{name.repository}' has no commit, tag or branch '{name.revision}'; see the list of its commits"
        ) from None
    except Exception as error:  # the client's network stack raises errors of many libraries
        raise _Refused(type(error).__name__) from error


def _incomplete(name: Name, found: Snapshot | None, lacking: Lacking, why: str) -> UserError:
    """The error of a repository that is not cached, or in part, and that the hub did not give."""
    if found is not None:
        return UserError(
            f"'{name}' is cached in part, without {named(lacking(found.folder, ()))} of commit {found.commit}, and "
            f"{why}; download what is missing, or name a commit that is cached whole"
        )
    kept = _folder(name) / "snapshots"
    commits = sorted(path.name for path in kept.iterdir()) if kept.is_dir() else []
    if commits:
        return UserError(
            f"'{name}' is not cached, and {why}; cached are the commits {named(commits)}: name one, as in "
            f"'{name.repository}@{commits[0]}'"
        )
    return UserError(
        f"there is no folder '{name}', and the hub could not be asked for a model of that name ({why}); check the name "
        "and the network, or download it yourself"
    )


def _folder(name: Name) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{name.repository.replace('/', '--')}")


def _cached(name: Name) -> Snapshot | None:
    """The cached files of the commit, whole or not."""
    folder, commit = _folder(name), name.revision
    if (reference := folder / "refs" / name.revision).is_file():
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
    if not _COMMIT.fullmatch(commit):
        return None
    kept = folder / "snapshots" / commit
    return Snapshot(name.repository, commit, kept) if kept.is_dir() else None
