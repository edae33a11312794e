"""Which commit a name on the Hugging Face hub means, from the hub or from its local cache, within seconds.

transformers, datasets and huggingface_hub each retry for 23 s a file when there is no network (measured with
huggingface_hub 2.4). One short question first, without retries, tells whether the hub answers; where it does
not, everything that follows is read with `local_files_only` or from folders of the cache.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from raydisp.errors import RaydispError

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 6.0
"""How long the hub may take to say which commit a revision is, name look-up included."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Commit:
    """A pinned repository.

    Attributes:
        sha: 40 hexadecimal digits.
        online: the hub answered just now; if not, only the local cache can be read.
        snapshot: the folder of this commit in the local cache (it may lack files), None if there is none.
    """

    sha: str
    online: bool
    snapshot: Path | None


def resolve(
    repo_id: str,
    revision: str | None,
    repo_type: Literal["model", "dataset"],
    *,
    where: str,
    error: type[RaydispError],
) -> Commit:
    """The commit that a branch, tag or commit of a hub repository is now.

    Without an answer of the hub the local cache decides: what the revision meant when it was last downloaded,
    or, for the default branch, the only commit there.

    Args:
        repo_id: "name" or "owner/name".
        revision: None means the default branch.
        where: the field and value that a message starts with.
        error: the class to raise.
    Raises:
        error: no such repository or revision, or neither the hub answers nor the cache holds it; within
            `ANSWER_TIMEOUT_S` and a moment.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hf_errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        info = _within(
            ANSWER_TIMEOUT_S,
            lambda: HfApi().repo_info(
                repo_id, revision=revision, repo_type=repo_type, timeout=ANSWER_TIMEOUT_S - 1
            ),
        )
    except hf_errors.HFValidationError as problem:
        raise error(f"{where} is not a name that the hub allows: {one_line(problem)}") from None
    except hf_errors.GatedRepoError:
        raise error(
            f"{where} is gated on the hub: accept its terms on its page, then log in (`hf auth login`) "
            "or set HF_TOKEN"
        ) from None
    except hf_errors.RepositoryNotFoundError:
        raise error(
            f"{where} is not a {repo_type} that the hub knows; check the spelling, and for a private one "
            "log in (`hf auth login`) or set HF_TOKEN"
        ) from None
    except hf_errors.RevisionNotFoundError:
        raise error(
            f"{where} has no revision {revision!r} on the hub; name a branch, a tag or a commit"
        ) from None
    # Whatever keeps the hub from answering (no route, no name server, a proxy's refusal, HTTP 5xx, offline
    # mode) leaves the same question: is it in the cache?
    except Exception as problem:
        found = _in_cache(repo_id, revision, repo_type)
        if found is None:
            unreachable = error(
                f"{where}{at} is not in the local cache and the hub does not answer "
                f"({type(problem).__name__}: {one_line(problem)}); connect to the network, or download it "
                f"where there is one and name the folder"
            )
            unreachable.hub_unreachable = True
            raise unreachable from None
        logger.info("%s: the hub does not answer, using the cached commit %s", where, found.name)
        return Commit(found.name, online=False, snapshot=found)
    if info.sha is None:
        raise error(f"{where}{at}: the hub names no commit for it; give a commit as its revision")
    _remember(repo_id, revision, repo_type, info.sha)
    return Commit(info.sha, online=True, snapshot=_in_cache(repo_id, info.sha, repo_type))


def answers() -> bool:
    """Whether the hub answers just now, whatever it says; known within `ANSWER_TIMEOUT_S`."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hf_errors

    try:
        _within(
            ANSWER_TIMEOUT_S,
            lambda: HfApi().repo_info("EleutherAI/lambada_openai", repo_type="dataset", timeout=5.0),
        )
    except (hf_errors.RepositoryNotFoundError, hf_errors.GatedRepoError):
        return True
    except Exception:
        return False
    return True


def one_line(problem: BaseException) -> str:
    """The first line of a library's message, at most 200 characters, without a full stop at its end."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[0] if lines else type(problem).__name__)[:200].rstrip(".")


def _cache_folder(repo_id: str, repo_type: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join([f"{repo_type}s", *repo_id.split("/")])


def _remember(repo_id: str, revision: str | None, repo_type: str, sha: str) -> None:
    # As huggingface_hub does when it downloads by name. We download by commit, which leaves no trace of the
    # name, and a later run without a network could not tell what it meant.
    if revision == sha:
        return
    reference = _cache_folder(repo_id, repo_type) / "refs" / (revision or "main")
    with contextlib.suppress(OSError):
        if not reference.is_file() or reference.read_text() != sha:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(sha)


def _in_cache(repo_id: str, revision: str | None, repo_type: str) -> Path | None:
    folder = _cache_folder(repo_id, repo_type)
    snapshots = folder / "snapshots"
    if revision is not None and _COMMIT.fullmatch(revision):
        sha = revision
    else:
        try:
            sha = (folder / "refs" / (revision or "main")).read_text().strip()
        except OSError:
            # Downloaded by commit, which leaves no reference to the branch.
            commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
            if revision is not None or len(commits) != 1:
                return None
            sha = commits[0]
    snapshot = snapshots / sha
    return snapshot if _COMMIT.fullmatch(sha) and snapshot.is_dir() else None


def _within(timeout_s: float, call: Callable[[], _T]) -> _T:
    # A request's own timeout does not cover the look-up of a host name, which a dead name server can hold up
    # for half a minute; so the wait is limited from outside, and a daemon thread does not delay the exit.
    answer: list[_T] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=run, name="raydisp-hub", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if problem:
        raise problem[0]
    if not answer:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return answer[0]
