"""Source trees that clients ask about, by their ids; and which folders they may name.

path ── symlinks resolved ──▶ inside a --repository-root? ── no ──▶ 403, whether it exists or not
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import time
from typing import TYPE_CHECKING

from radixkv.errors import RepositoryError
from radixkv_service.errors import Problem, ProblemError, bad_request

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.repository import Repository

__all__ = ["OpenedRepository", "RepositoryStore"]


@dataclass(frozen=True, slots=True)
class OpenedRepository:
    """A source tree of one tenant.

    Attributes:
        id: names it.
        tenant: whose it is.
        path: as it was asked for.
        created: in seconds since 1970.
        tree: its files.
    """

    id: str
    tenant: str
    path: str
    created: int
    tree: Repository


class RepositoryStore:
    """Source trees by their ids.

    Args:
        roots: folders in which clients may name some; none: the routes are off.
        max_open: at most so many at once.
        max_per_tenant: at most so many of one tenant; None: as many as there may be.

    Thread safety: any thread may call anything.
    """

    def __init__(self, roots: Sequence[Path], *, max_open: int = 256, max_per_tenant: int | None = None) -> None:
        self._roots = [root.resolve() for root in roots]
        self._max_open, self._max_per_tenant = max_open, max_open if max_per_tenant is None else max_per_tenant
        self._opened: dict[str, OpenedRepository] = {}
        self._lock = Lock()

    def require_enabled(self) -> None:
        """Refuse what needs a root, where there is none.

        Raises:
            ProblemError: 403, saying how to enable the routes.
        """
        if not self._roots:
            message = "this server reads no source trees; start it with --repository-root FOLDER to allow those inside"
            raise ProblemError(Problem(403, "permission_error", message, None, "repositories_disabled"))

    def open(
        self,
        engine: Engine,
        tenant: str,
        path: str,
        *,
        budget_tokens: int | None = None,
        exclude: Sequence[str] = (),
        namespace: str = "",
    ) -> OpenedRepository:
        """Read a source tree. Cost: reads and tokenises every file: not for the event loop.

        Args:
            engine: with the tokenizer.
            tenant: whose it is.
            path: its folder, from the file system's root.
            budget_tokens: as for `Engine.repository`.
            exclude: as for `Engine.repository`.
            namespace: where its files are cached.

        Raises:
            ProblemError: 403, outside of every root; 400, it cannot be asked about; 429, too many are open.
        """
        folder = self._allowed(path)
        with self._lock:
            self._require_room(tenant)
        try:
            tree = engine.repository(folder, budget_tokens=budget_tokens, exclude=exclude, namespace=namespace)
        except RepositoryError as error:
            raise _refused(error) from error
        opened = OpenedRepository(f"repo_{secrets.token_hex(12)}", tenant, path, int(time()), tree)
        with self._lock:
            self._require_room(tenant)
            self._opened[opened.id] = opened
        return opened

    def get(self, repository_id: str, tenant: str) -> OpenedRepository:
        """A source tree.

        Raises:
            ProblemError: 403, the routes are off; 404, none of this id and tenant.
        """
        self.require_enabled()
        opened = self._opened.get(repository_id)
        if opened is None or opened.tenant != tenant:
            message = f"there is no repository {repository_id!r}; open one with POST /v1/repositories"
            raise ProblemError(Problem(404, "invalid_request_error", message, "repository_id", "repository_not_found"))
        return opened

    def all_of(self, tenant: str) -> list[OpenedRepository]:
        """A tenant's source trees, oldest first.

        Raises:
            ProblemError: 403, the routes are off.
        """
        self.require_enabled()
        with self._lock:
            return [one for one in self._opened.values() if one.tenant == tenant]

    def refresh(self, repository_id: str, tenant: str) -> tuple[str, ...]:
        """Read a source tree again; the paths that changed. Cost: reads every file: not for the event loop.

        Raises:
            ProblemError: 403, its folder is now a link to one outside; 400, it cannot be read; 404, as `get`.
        """
        opened = self.get(repository_id, tenant)
        if self._allowed(str(opened.tree.path)) != opened.tree.path:
            raise _outside()
        try:
            return opened.tree.refresh()
        except RepositoryError as error:
            raise _refused(error) from error

    def remove(self, repository_id: str, tenant: str) -> None:
        """Forget a source tree; answers that are being made are finished.

        Raises:
            ProblemError: as `get`.
        """
        self.get(repository_id, tenant)
        with self._lock:
            self._opened.pop(repository_id, None)

    def _allowed(self, path: str) -> Path:
        """The folder that a path names, links resolved."""
        self.require_enabled()
        if not Path(path).is_absolute():
            raise bad_request("path: name the folder from the file system's root", "path")
        try:
            folder = Path(path).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, or links in a circle
            raise bad_request(f"path: not a path ({error})", "path") from error
        if not any(folder.is_relative_to(root) for root in self._roots):
            raise _outside()
        return folder

    def _require_room(self, tenant: str) -> None:
        """Under the lock."""
        own = sum(one.tenant == tenant for one in self._opened.values())
        if own >= self._max_per_tenant:
            message = f"you have {own} repositories open and the limit is {self._max_per_tenant}; delete some"
        elif len(self._opened) >= self._max_open:
            message = f"{len(self._opened)} repositories are open and the limit is {self._max_open}; delete some"
        else:
            return
        raise ProblemError(Problem(429, "rate_limit_error", message, None, "too_many_repositories", {"retry-after": "60"}))


def _outside() -> ProblemError:
    message = "path: not inside a folder that this server may read (--repository-root)"
    return ProblemError(Problem(403, "permission_error", message, "path", "outside_repository_root"))


def _refused(error: RepositoryError) -> ProblemError:
    return bad_request(str(error), "path", "repository_refused")
