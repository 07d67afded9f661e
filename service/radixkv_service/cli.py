"""`radixkv serve`: the options, and nothing that takes time to import."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]

_SERVER, _ACCESS, _ENGINE = "Server", "Access", "Engine"


def serve(
    model: Annotated[str | None, typer.Argument(help="A name (smollm2), a folder, a .gguf file or a hub id.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", rich_help_panel=_SERVER)] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name in requests; repeatable.", rich_help_panel=_SERVER)
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds running requests get after SIGTERM.", rich_help_panel=_SERVER)
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body.", rich_help_panel=_SERVER)] = None,
    header_timeout: Annotated[float | None, typer.Option(help="Seconds for the headers.", rich_help_panel=_SERVER)] = None,
    body_timeout: Annotated[float | None, typer.Option(help="Seconds for the body.", rich_help_panel=_SERVER)] = None,
    write_timeout: Annotated[
        float | None, typer.Option(help="Seconds a client may leave a full socket unread.", rich_help_panel=_SERVER)
    ] = None,
    keep_alive_timeout: Annotated[
        int | None, typer.Option(help="Seconds an idle connection stays open.", rich_help_panel=_SERVER)
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds a request may take.", rich_help_panel=_SERVER)
    ] = None,
    max_choices: Annotated[
        int | None, typer.Option(help="Most answers to one request: n times prompts.", rich_help_panel=_SERVER)
    ] = None,
    max_sessions: Annotated[int | None, typer.Option(help="Sessions open at once.", rich_help_panel=_SERVER)] = None,
    max_repositories: Annotated[int | None, typer.Option(help="Source trees open at once.", rich_help_panel=_SERVER)] = None,
    repository_root: Annotated[
        list[Path] | None, typer.Option(help="Folder whose source trees may be asked about.", rich_help_panel=_ACCESS)
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", rich_help_panel=_SERVER)] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="NAME=KEY or KEY; repeatable.", rich_help_panel=_ACCESS)] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="File with such an entry a line.", rich_help_panel=_ACCESS)
    ] = None,
    admin_token: Annotated[
        str | None, typer.Option(help="For the admin routes; none: one is made and printed.", rich_help_panel=_ACCESS)
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Host that is answered, * for any; /health, /ready, /version always are.", rich_help_panel=_ACCESS
        ),
    ] = None,
    isolate_tenants: Annotated[
        bool | None, typer.Option(help="A cache of its own for each key's name.", rich_help_panel=_ACCESS)
    ] = None,
    protect_metrics: Annotated[
        bool | None, typer.Option(help="/metrics needs a key or the token.", rich_help_panel=_ACCESS)
    ] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens in a page.", rich_help_panel=_ENGINE)] = None,
    num_pages: Annotated[int | None, typer.Option(help="Pages in the pool.", rich_help_panel=_ENGINE)] = None,
    pool_bytes: Annotated[int | None, typer.Option(help="Bytes of the pool.", rich_help_panel=_ENGINE)] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.", rich_help_panel=_ENGINE)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Longest prompt plus answer, in tokens.", rich_help_panel=_ENGINE)
    ] = None,
    max_running: Annotated[int | None, typer.Option(help="Requests that decode together.", rich_help_panel=_ENGINE)] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may wait.", rich_help_panel=_ENGINE)] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction policy.", rich_help_panel=_ENGINE)] = None,
    exact: Annotated[
        bool | None, typer.Option(help="A hit answers bit for bit as a miss; slower.", rich_help_panel=_ENGINE)
    ] = None,
    weights: Annotated[str | None, typer.Option(help="native, or int8 on a CPU.", rich_help_panel=_ENGINE)] = None,
    enable_prefix_caching: Annotated[bool | None, typer.Option(help="Reuse prefixes.", rich_help_panel=_ENGINE)] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Tokens of a step in which nobody decodes.", rich_help_panel=_ENGINE)
    ] = None,
    mixed_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step in which somebody decodes.", rich_help_panel=_ENGINE)
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads.", rich_help_panel=_ENGINE)] = None,
    attention: Annotated[
        str | None, typer.Option(help="pages, views, or auto: pages on a GPU.", rich_help_panel=_ENGINE)
    ] = None,
    graphs: Annotated[
        bool | None, typer.Option(help="On a GPU, replay small steps as CUDA graphs.", rich_help_panel=_ENGINE)
    ] = None,
    compile: Annotated[  # noqa: A002
        bool | None, typer.Option(help="On a GPU, compile the layers after the start.", rich_help_panel=_ENGINE)
    ] = None,
) -> None:
    """Serve a model over HTTP, in OpenAI's form. What is not given here is read from RADIXKV_..., or has its default."""
    given = dict(locals())
    given["api_keys"] = given.pop("api_key") or None
    for name in ("served_model_name", "allowed_hosts", "repository_root"):
        given[name] = given[name] or None
    try:
        from radixkv_service.server import serve_forever
        from radixkv_service.settings import load_settings
    except ImportError as missing:
        sys.exit(f"radixkv serve needs the package {missing.name!r}: pip install 'radixkv[service]'")
    settings = load_settings(given)
    _log_to_stderr(settings.log_level)
    try:
        code = serve_forever(settings)
    except OSError as error:
        sys.exit(f"error: {settings.host}:{settings.port} cannot be listened on: {error.strerror or error}")
    raise typer.Exit(code)


def _log_to_stderr(level: str) -> None:
    """One line a record: time, level, text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("radixkv", "radixkv.service"):
        logging.getLogger(name).setLevel(level.upper())
