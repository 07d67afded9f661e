"""Bodies and answers of the repository routes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from radixkv_service.openai_answers import Answer, Usage
from radixkv_service.openai_models import Request, StreamOptions

__all__ = [
    "AskRequest",
    "DeletedRepository",
    "FileCostView",
    "FileView",
    "OpenRepository",
    "RefreshedRepository",
    "RepositoryAnswerView",
    "RepositoryComputed",
    "RepositoryList",
    "RepositoryText",
    "RepositoryView",
    "SkippedView",
    "WholeRepository",
]


class OpenRepository(BaseModel):
    """The body of POST /v1/repositories."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(description="A folder on the server, from its root.")
    budget_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="Tokens that all files together may have; none: what the model's context and the pool hold."
    )
    exclude: Annotated[list[str], Field(max_length=1000)] = Field([], description="Patterns, as a .gitignore writes them.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Its files are cached apart from those of other salts."
    )


class AskRequest(Request):
    """The body of POST /v1/repositories/{repository_id}/ask; greedy unless a temperature is given."""

    question: Annotated[str, Field(min_length=1)]
    stream_options: StreamOptions | None = Field(None, description="Read by nobody: the last event has the usage.")


class RepositoryView(Answer):
    """A source tree's numbers."""

    id: str
    object: Literal["repository"] = "repository"
    created: int
    path: str
    budget_tokens: int
    num_files: int
    num_tokens: int
    num_skipped: int


class FileView(Answer):
    """A file in the prompt; files stand in the order in which they are listed."""

    path: str
    num_tokens: int


class SkippedView(Answer):
    """A file that is not in the prompt, and why."""

    path: str
    reason: str


class WholeRepository(RepositoryView):
    """A source tree with its files."""

    files: list[FileView]
    skipped: list[SkippedView]


class RepositoryList(Answer):
    """The source trees of one tenant, oldest first."""

    object: Literal["list"] = "list"
    data: list[RepositoryView]


class RefreshedRepository(RepositoryView):
    """A source tree that was read again: paths that came, went, or have other contents."""

    changed: list[str]


class FileCostView(Answer):
    """What a file cost: of its tokens, so many went through the model."""

    path: str
    num_tokens: int
    computed_tokens: int


class RepositoryAnswerView(Answer):
    """An answer, and the files that had to be computed for it, in order."""

    id: str
    object: Literal["repository.answer"] = "repository.answer"
    created: int
    model: str
    answer: str
    finish_reason: Literal["stop", "length"]
    computed: list[FileCostView]
    usage: Usage


class RepositoryComputed(Answer):
    """The files that are being computed for an answer: the first event of a stream."""

    object: Literal["repository.computed"] = "repository.computed"
    computed: list[FileCostView]


class RepositoryText(Answer):
    """A piece of an answer, in a stream."""

    object: Literal["repository.text"] = "repository.text"
    text: str


class DeletedRepository(Answer):
    """A source tree that nobody can ask about any more; its files on disk are as they were."""

    id: str
    object: Literal["repository"] = "repository"
    deleted: Literal[True] = True
