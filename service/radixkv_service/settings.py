"""Settings of the server: typed, from the environment (RADIXKV_...) and the command line, which wins.

--page-size 32  >  RADIXKV_PAGE_SIZE=16  >  the default
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.engine.config import EngineConfig

__all__ = ["BadSetting", "ServiceSettings", "load_settings"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

_ENGINE_FIELDS = {
    "page_size": "page_size",
    "num_pages": "num_pages",
    "pool_bytes": "pool_bytes",
    "dtype": "dtype",
    "device": "device",
    "max_context": "max_context",
    "max_running": "max_running",
    "max_waiting": "max_waiting",
    "policy": "policy",
    "exact": "exact",
    "weights": "weights",
    "enable_prefix_caching": "cache",
    "prefill_chunk": "prefill_chunk",
    "mixed_tokens": "mixed_tokens",
    "num_threads": "num_threads",
    "attention": "attention",
    "graphs": "graphs",
    "compile": "compile",
}
"""Our name -> the engine's. None everywhere means the engine's own default."""


class ServiceSettings(BaseSettings):
    """How the server runs. Settings of the engine that are None keep the engine's defaults.

    Attributes:
        model: a name (smollm2), a folder, a .gguf file or a hub id.
        host: the address to listen on; loopback unless you say otherwise.
        port: the port to listen on; 0 takes a free one and prints it.
        api_keys: who may ask, as NAME=KEY or KEY; none: anybody who reaches the socket.
        api_keys_file: a file with one such entry a line; lines that start with # are left out.
        admin_token: allows the admin routes; none: one is made and printed at the start.
        isolate_tenants: each key's tenant has a cache of its own; off, all keys share prefixes.
        protect_metrics: /metrics needs an API key or the admin token.
        allowed_hosts: Host headers that are answered; empty: on a loopback address loopback names only, else any.
            /health, /ready and /version answer under every name; /metrics does not: name the host by which it is scraped.
        served_model_name: names that requests may use for the model; none: the model's own name.
        drain_timeout: seconds that running requests get to finish in after SIGTERM.
        max_body_bytes: the largest request body, in bytes.
        header_timeout: seconds a client has for sending a request's headers.
        body_timeout: seconds a client has for sending a request's body.
        write_timeout: seconds a client may leave a full socket unread.
        keep_alive_timeout: seconds an idle connection stays open.
        request_timeout: seconds a request may take when it does not say; None: no end.
        repository_root: folders in which clients may name source trees to ask about; none: those routes answer 403.
        max_choices: the largest number of answers one HTTP request may ask for, over `n`, `best_of` and its prompts.
        max_sessions: kept sessions at once; where there are several tenants, each may have a quarter of them.
        max_repositories: source trees open at once; a quarter for each tenant likewise.
        log_level: how much is logged.
        page_size: tokens in a page.
        num_pages: pages in the pool.
        pool_bytes: bytes of the pool, instead of num_pages.
        dtype: of weights and KV.
        device: cpu, cuda, cuda:1 or auto.
        max_context: longest prompt plus answer, in tokens.
        max_running: requests that decode together.
        max_waiting: requests that may wait; beyond, 429.
        policy: the eviction policy.
        exact: a hit answers bit for bit as a miss; slower.
        weights: native, or int8 on a CPU.
        enable_prefix_caching: reuse prefixes.
        prefill_chunk: tokens of a step in which nobody decodes.
        mixed_tokens: tokens of a step in which somebody decodes.
        num_threads: CPU threads.
        attention: pages reads and writes pages in place, views gives each request a copy; auto is pages on a GPU.
        graphs: on a GPU, replay small steps as CUDA graphs.
        compile: on a GPU, compile the decoder layers after the start, while requests are answered.
    """

    model_config = SettingsConfigDict(env_prefix="RADIXKV_", extra="forbid", hide_input_in_errors=True)

    model: str = Field("smollm2", min_length=1)
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8100, ge=0, le=65535)
    api_keys: Annotated[list[SecretStr], NoDecode] = []
    api_keys_file: Path | None = None
    admin_token: SecretStr | None = Field(None, min_length=8)
    isolate_tenants: bool = True
    protect_metrics: bool = False
    allowed_hosts: Annotated[list[str], NoDecode] = []
    served_model_name: Annotated[list[str], NoDecode] = []
    drain_timeout: float = Field(30.0, ge=0, le=86_400)
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    header_timeout: float = Field(20.0, gt=0, le=86_400)
    body_timeout: float = Field(60.0, gt=0, le=86_400)
    write_timeout: float = Field(60.0, gt=0, le=86_400)
    keep_alive_timeout: int = Field(75, ge=0, le=86_400)
    request_timeout: float | None = Field(None, gt=0)
    max_choices: int = Field(128, ge=1)
    repository_root: Annotated[list[Path], NoDecode] = []
    max_sessions: int = Field(1024, ge=1)
    max_repositories: int = Field(256, ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    page_size: int | None = None
    num_pages: int | None = None
    pool_bytes: int | None = None
    dtype: str | None = None
    device: str | None = None
    max_context: int | None = None
    max_running: int | None = None
    max_waiting: int | None = None
    policy: str | None = None
    exact: bool | None = None
    weights: str | None = None
    enable_prefix_caching: bool | None = None
    prefill_chunk: int | None = None
    mixed_tokens: int | None = None
    num_threads: int | None = None
    attention: str | None = None
    graphs: bool | None = None
    compile: bool | None = None

    @field_validator("api_keys", "allowed_hosts", "served_model_name", "repository_root", mode="before")
    @classmethod
    def _split(cls, value: object, info: ValidationInfo) -> object:
        """A JSON list, or texts separated by commas, as the environment can hold them."""
        if not isinstance(value, str):
            return value
        text = value.strip()
        try:
            values = json.loads(text) if text.startswith("[") else [one.strip() for one in text.split(",") if one.strip()]
        except ValueError as error:
            raise ValueError("not a JSON list; separate several values by commas") from error
        if info.field_name == "api_keys" and not values:
            raise ValueError("it is set and holds no key; to let everybody in, do not set it")
        return values

    @property
    def names(self) -> list[str]:
        """The names under which the model is served; the first one is what answers carry."""
        return self.served_model_name or [self.model]

    @property
    def hosts(self) -> list[str]:
        """Host headers that are answered, without ports; empty: any."""
        if self.allowed_hosts:
            return [] if "*" in self.allowed_hosts else [host.lower() for host in self.allowed_hosts]
        return list(_LOOPBACK) if self.host in _LOOPBACK else []

    def engine_config(self) -> EngineConfig:
        """The engine's part, checked by the engine.

        Raises:
            ConfigError: a setting that cannot be; it names it.
        """
        from radixkv.engine.config import EngineConfig

        given = {theirs: getattr(self, ours) for ours, theirs in _ENGINE_FIELDS.items()}
        return EngineConfig(**{name: value for name, value in given.items() if value is not None})


def load_settings(given: dict[str, Any]) -> ServiceSettings:
    """Settings of the environment, and over them what was `given` (None: not given).

    Raises:
        ConfigError: the first bad value, by the name of its setting.
    """
    try:
        return ServiceSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise BadSetting(name, first["msg"]) from None


class BadSetting(ConfigError):
    """A setting of the server that cannot be; its value is not repeated, since it may be a key."""

    def __init__(self, setting: str, reason: str) -> None:
        root = setting.split(".", maxsplit=1)[0]
        flag = "api-key" if root == "api_keys" else root.replace("_", "-")
        Exception.__init__(self, f"{setting} (RADIXKV_{root.upper()}, --{flag}) is not possible: {reason}")
        self.fields = {"setting": setting, "reason": reason}
