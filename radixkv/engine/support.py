"""Which models can be paged: decided by what they are, not by a list of names."""

from __future__ import annotations

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from radixkv.errors import UnsupportedModel

__all__ = ["SUPPORTED", "check_config", "check_model"]

SUPPORTED = "decoders with full or sliding-window attention (Llama, Mistral, Qwen2, Qwen3, SmolLM, Phi-3, OLMo, ...)"
"""What can be paged, in words."""

_KEPT = {"full_attention", "sliding_attention"}
_ONLY_IN_PAGES = "which needs attention in pages: run it on a GPU, or with attention='pages'"


def check_config(config: PretrainedConfig, name: str | None = None, *, in_pages: bool = False) -> None:
    """Refuse what cannot be paged, by its config alone: before gigabytes are downloaded or read.

    Args:
        config: of the model.
        name: what the user calls it.
        in_pages: whether attention reads pages in place; it can do more there than over views.

    Raises:
        UnsupportedModel: no decoder, or one that keeps something other than keys and values of one shape per layer.
    """
    try:
        found = _refusal(config, in_pages)
    except RuntimeError as error:  # transformers' own: what was read is not one value for all layers
        raise _unsupported(config, "layers of several shapes", name) from error
    if found is not None:
        raise _unsupported(config, found, name)


def check_model(model: PreTrainedModel, name: str | None = None, *, in_pages: bool = False) -> None:
    """Check what a config does not tell: each layer has exactly one causal attention, all of one shape.

    Args:
        model: as transformers made it.
        name: what the user calls it.
        in_pages: as for `check_config`; attention sinks are only known there.

    Raises:
        UnsupportedModel: otherwise.
    """
    config = model.config
    check_config(config, name, in_pages=in_pages)
    layers = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
    found = None
    if sorted(int(layer.layer_idx) for layer in layers) != list(range(config.num_hidden_layers)):  # type: ignore[arg-type]
        found = "layers without an attention of their own"
    elif not all(layer.is_causal for layer in layers):
        found = "attention that looks ahead"
    elif len({getattr(layer, "head_dim", None) for layer in layers}) > 1:
        found = "heads of several sizes"
    elif not in_pages and any("sink" in parameter for parameter, _ in model.named_parameters()):
        found = f"attention sinks, {_ONLY_IN_PAGES}"
    if found is not None:
        raise _unsupported(config, found, name)


def _refusal(config: PretrainedConfig, in_pages: bool) -> str | None:
    """Why a config's model cannot be paged, if so."""
    text = config.get_text_config(decoder=True)
    model_class = _model_class(config)
    value_dim, head_dim = getattr(text, "v_head_dim", None), getattr(text, "head_dim", None)
    reasons = {
        "an encoder and a decoder": config.is_encoder_decoder,
        "no causal language model": model_class is None,
        "images or audio in its input": text is not config,
        "no layers of attention heads": not (
            isinstance(getattr(text, "num_hidden_layers", None), int)
            and isinstance(getattr(text, "num_attention_heads", None), int)
            and isinstance(getattr(text, "num_key_value_heads", None) or 1, int)
        ),
        "a recurrent state": getattr(model_class, "_is_stateful", False),
        "compressed (latent) attention": getattr(text, "kv_lora_rank", None) is not None,
        "keys and values of different sizes": value_dim not in {None, head_dim},
        "layers that are not attention": not _KEPT.issuperset(getattr(text, "layer_types", None) or ()),
        "layers that share keys and values": bool(getattr(text, "num_kv_shared_layers", 0)),
        "attention that cannot be replaced": not getattr(model_class, "_supports_attention_backend", False),
        f"soft-capped attention scores, {_ONLY_IN_PAGES}": not in_pages
        and getattr(text, "attn_logit_softcapping", None) is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    try:
        found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


def _unsupported(config: PretrainedConfig, reason: str, name: str | None) -> UnsupportedModel:
    return UnsupportedModel(name or config.model_type, f"{config.model_type} ({reason})", SUPPORTED)
