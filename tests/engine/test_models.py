"""From a name to weights: GGUF conversion, folders, the hub, what is refused, and fingerprints of what computes KV."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
    T5Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from radixkv.engine import Engine, SamplingParams, models
from radixkv.engine.convert import convert
from radixkv.engine.gguf_file import read_gguf
from radixkv.engine.models import (
    fingerprint,
    load_model,
    model_fingerprint,
    random_model,
    resolve_model,
)
from radixkv.engine.support import check_config
from radixkv.engine.tokenizer import Tokenizer
from radixkv.errors import ModelCorrupt, ModelError, ModelNotFound, UnsupportedModel
from radixkv_kernels import backend

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def small_model(config, seed=0, dtype=torch.float32):
    model, _ = random_model(config, dtype=dtype, device=CPU, attn_implementation="eager", seed=seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide a norm that was put in another's place
            parameter.data += torch.linspace(0, 0.1, parameter.numel()).to(dtype).view_as(parameter)
    return model


def write_gguf(path, arch, model, leave_out=(), **extra):
    """Write a model as llama.cpp's converter would: its names, its order of rotary halves, its norms."""
    config = model.config
    file = gguf.GGUFWriter(str(path), arch)
    file.add_context_length(config.max_position_embeddings)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    file.add_layer_norm_eps(getattr(config, "norm_epsilon", 1e-5))
    rope = config.rope_parameters
    file.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    file.add_rope_dimension_count(head_dim)
    file.add_key_length(head_dim)
    for name, value in extra.items():
        getattr(file, name)(value)
    write_vocabulary(file, config.vocab_size)
    for name, values in gguf_tensors(arch, model):
        if name not in leave_out:
            file.add_tensor(name, values)
    if rope.get("rope_type") == "llama3":
        inverse = 1 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        file.add_tensor("rope_freqs.weight", (inverse / model.model.rotary_emb.inv_freq).numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def write_vocabulary(file, vocab_size):
    tokens = [*bytes_to_unicode().values(), "he", "<|eos|>"]
    tokens += [f"unused{i}" for i in range(vocab_size - len(tokens))]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(tokens)
    file.add_token_types([1] * 257 + [3] + [1] * (vocab_size - 258))
    file.add_token_merges(["h e"])
    file.add_eos_token_id(257)


def gguf_tensors(arch, model):
    config = model.config
    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if arch == "gemma3" and "norm" in name:
            values = values + 1
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                yield f"blk.{layer}.ffn_{part}_exps.weight", np.ascontiguousarray(half)
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        yield found if found.endswith((".weight", ".bias")) else f"{found}.weight", np.ascontiguousarray(values)


def logits(model):
    return model(torch.arange(40)[None]).logits


@pytest.fixture(scope="module")
def llama():
    return small_model(LlamaConfig(**SMALL))


@pytest.fixture
def llama_gguf(llama, tmp_path):
    return write_gguf(tmp_path / "llama.gguf", "llama", llama)


def load(folder, dtype=torch.float32):
    return load_model(folder, dtype=dtype, device=CPU, attn_implementation="eager")


# -- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "config", "extra"),
    [
        ("llama", LlamaConfig(**SMALL), {}),
        ("llama", LlamaConfig(**SMALL, tie_word_embeddings=True), {}),
        ("llama", LlamaConfig(**SMALL, head_dim=64, rope_parameters=LLAMA3), {}),
        ("qwen2", Qwen2Config(**SMALL), {}),
        ("qwen3", Qwen3Config(**SMALL, head_dim=32), {}),
        (
            "qwen3moe",
            Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16),
            {"add_expert_count": 4, "add_expert_used_count": 2, "add_expert_feed_forward_length": 32},
        ),
        ("phi3", Phi3Config(**SMALL), {}),
        ("starcoder2", Starcoder2Config(**SMALL), {}),
        (
            "gemma3",
            Gemma3TextConfig(**SMALL, head_dim=256, query_pre_attn_scalar=256, sliding_window=64),
            {"add_sliding_window": 64},
        ),
    ],
    ids=["llama", "tied", "llama3 rope", "qwen2", "qwen3", "qwen3moe", "phi3", "starcoder2", "gemma3"],
)
def test_a_converted_model_computes_what_the_original_did(tmp_path, arch, config, extra):
    model = small_model(config)
    path = write_gguf(tmp_path / "m.gguf", arch, model, **extra)
    folder = resolve_model(path, cache_dir=tmp_path)
    assert folder.source == "gguf"
    assert torch.equal(logits(load(folder)), logits(model))


def test_scaled_rope_is_read_from_the_metadata(tmp_path, llama):
    scaling = {"add_rope_scaling_type": gguf.RopeScalingType.YARN, "add_rope_scaling_factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", "llama", llama, **scaling, add_rope_scaling_orig_ctx_len=128)
    rope = load(resolve_model(path, cache_dir=tmp_path)).config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 128)


def test_quantized_weights_are_within_float16_of_what_the_file_says(tmp_path, llama):
    path = tmp_path / "q.gguf"
    write_gguf(path, "llama", llama, leave_out=("blk.0.ffn_up.weight",))
    exact = read_gguf(path)
    weight = llama.model.layers[0].mlp.up_proj.weight.numpy()
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    file = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "llama")
    for key, value in exact.metadata.items():
        if key.startswith("llama."):
            (file.add_float32 if isinstance(value, float) else file.add_uint32)(key, value)
    write_vocabulary(file, 300)
    for name, values in gguf_tensors("llama", llama):
        if name == "blk.0.ffn_up.weight":
            file.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            file.add_tensor(name, values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    loaded = load(resolve_model(tmp_path / "w.gguf", cache_dir=tmp_path)).model.layers[0].mlp.up_proj.weight
    expected = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1))
    assert (loaded - expected).abs().max() <= 2**-11 * expected.abs().max()


def test_a_file_is_converted_once_whatever_its_name(tmp_path, llama_gguf):
    first = convert(llama_gguf, tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    copy = shutil.copy(llama_gguf, tmp_path / "another name.gguf")
    assert convert(Path(copy), tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_damaged_or_half_written_folder_is_converted_again(tmp_path, llama_gguf):
    folder = convert(llama_gguf, tmp_path)
    stale = folder.parent / f".{folder.name}-dead"
    stale.mkdir()
    os.truncate(folder / "model.safetensors", 100)
    assert convert(llama_gguf, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_size > 100
    assert not stale.exists()


def test_an_interrupted_conversion_leaves_nothing_and_the_next_succeeds(tmp_path, llama_gguf):
    class Interrupt(BaseException):
        pass

    def stop(done, total):
        raise Interrupt

    with pytest.raises(Interrupt):
        convert(llama_gguf, tmp_path, progress=stop)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []
    seen = []
    convert(llama_gguf, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_weights_are_split_into_files_of_bounded_size(tmp_path, llama, llama_gguf, monkeypatch):
    monkeypatch.setattr("radixkv.engine.convert._SHARD_BYTES", 100_000)
    folder = resolve_model(llama_gguf, cache_dir=tmp_path)
    assert len(list(folder.path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(folder)), logits(llama))


def test_two_processes_at_once_convert_once(tmp_path, llama_gguf, caplog):
    program = (
        "import sys, logging; from pathlib import Path; from radixkv.engine.convert import convert; "
        "logging.basicConfig(level='INFO', stream=sys.stdout); print('ready', flush=True); input(); "
        "print(convert(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(llama_gguf), str(tmp_path)]
    caplog.set_level("INFO", "radixkv")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        mine = convert(llama_gguf, tmp_path)
        theirs, _ = other.communicate()
    assert other.returncode == 0
    assert theirs.splitlines()[-1] == str(mine)
    assert (theirs + caplog.text).count("converting llama.gguf, once") == 1


def test_a_truncated_gguf_is_refused_wherever_it_ends(tmp_path, llama_gguf):
    content = llama_gguf.read_bytes()
    tensor = read_gguf(llama_gguf).tensors[0]
    cuts = [0, 3, 4, 23, 24, 100, 2000, tensor.offset - 1, tensor.offset + 1, len(content) - 64]
    for cut in cuts:
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:cut])
        with pytest.raises(ModelCorrupt, match=r"cut\.gguf"):
            resolve_model(path, cache_dir=tmp_path)
    assert not (tmp_path / "models").exists()


def test_garbage_is_refused_quickly_and_by_name(tmp_path):
    dice = random.Random(3)
    huge = struct.pack("<IQQ", 3, 2**60, 2**60)
    for content in (dice.randbytes(5000), b"GGUF" + dice.randbytes(5000), b"GGUF" + huge + bytes(5000), b"\0" * 5000):
        path = tmp_path / "garbage.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelCorrupt):
            resolve_model(path, cache_dir=tmp_path)


def test_no_damaged_header_raises_anything_but_a_model_error(tmp_path, llama_gguf):
    content = bytearray(llama_gguf.read_bytes())
    end = read_gguf(llama_gguf).tensors[0].offset
    dice, path, refused = random.Random(5), tmp_path / "mutant.gguf", 0
    for _ in range(400):
        mutant = bytearray(content)
        for _ in range(dice.choice([1, 1, 8])):
            mutant[dice.randrange(end)] = dice.choice([0, 1, 0x7F, 0xFF, dice.randrange(256)])
        path.write_bytes(mutant)
        try:
            read_gguf(path)
        except ModelError:
            refused += 1
    assert refused > 40


def test_a_missing_tensor_and_a_foreign_one_are_told(tmp_path, llama):
    path = write_gguf(tmp_path / "m.gguf", "llama", llama, leave_out=("blk.1.attn_v.weight",))
    with pytest.raises(ModelCorrupt, match=r"missing.*model\.layers\.1\.self_attn\.v_proj\.weight"):
        convert(path, tmp_path)
    path = write_gguf(tmp_path / "n.gguf", "llama", small_model(LlamaConfig(**SMALL, mlp_bias=True)))
    with pytest.raises(UnsupportedModel, match=r"ffn_\w+\.bias"):
        convert(path, tmp_path)


def test_a_tensor_of_another_shape_than_its_metadata_is_told(tmp_path, llama):
    path = write_gguf(tmp_path / "m.gguf", "llama", llama, add_feed_forward_length=128)
    with pytest.raises(ModelCorrupt, match="shape"):
        convert(path, tmp_path)


def test_a_gguf_architecture_without_paged_attention_is_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    file = gguf.GGUFWriter(str(path), "mamba")
    file.add_tensor("output.weight", np.zeros((2, 2), np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(UnsupportedModel, match="mamba"):
        resolve_model(path, cache_dir=tmp_path)


# -- folders and the hub -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    path = write_gguf(folder / "llama.gguf", "llama", llama)
    return convert(path, folder)


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "folder"))


def test_a_folder_is_used_as_it_is(folder, llama):
    found = resolve_model(folder)
    assert (found.source, found.path) == ("folder", folder)
    assert torch.equal(logits(load(found)), logits(llama))
    assert not any(parameter.requires_grad for parameter in load(found).parameters())
    assert load(found, torch.bfloat16).dtype == torch.bfloat16


def test_loading_prints_nothing(folder, capfd):
    Tokenizer(resolve_model(folder).path)
    load(resolve_model(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "no such name", "a/b/c", ""])
def test_an_unknown_path_is_told_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", pytest.fail)
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        resolve_model(name)


def test_a_hub_id_is_downloaded_without_pickles(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        models.huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(folder)
    )
    assert resolve_model("owner/name").source == "hub"
    assert asked["name"] == "owner/name"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("cannot reach it"), ConnectionError("no route")])
def test_a_hub_that_cannot_be_reached_says_what_to_do(error, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(models.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFound, match="check the spelling or the network, or give the path"):
        resolve_model("owner/name")


def test_a_folder_lacking_a_part_says_which(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="safetensors"):
        resolve_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelCorrupt, match=r"config\.json"):
        resolve_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(folder)


def test_damaged_weights_are_a_corrupt_model(folder):
    content = (folder / "model.safetensors").read_bytes()
    for damaged in (content[:-1000], content[:20], b"", b"{}" + content):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelCorrupt):
            load(resolve_model(folder))


def test_weights_that_do_not_fit_the_config_are_a_corrupt_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelCorrupt, match="missing"):
        load(resolve_model(folder))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(ModelCorrupt):
        load(resolve_model(folder))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (T5Config(), "encoder"),
        (MambaConfig(), "attention heads"),
        (Gemma2Config(), "soft-capped"),
        (AutoConfig.for_model("deepseek_v3"), "latent"),
        (AutoConfig.for_model("qwen3_next"), "recurrent"),
        (AutoConfig.for_model("jamba"), "recurrent"),
        (AutoConfig.for_model("bloom"), "cannot be replaced"),
        (AutoConfig.for_model("gemma4_text"), "several shapes"),
        (AutoConfig.for_model("vit"), "no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_be_paged_is_refused_by_its_config(config, why, tmp_path):
    with pytest.raises(UnsupportedModel, match=why) as caught:
        check_config(config)
    assert config.model_type in caught.value.fields["architecture"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=why):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BertConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=64), "looks ahead"),
        (GptOssConfig(**SMALL | {"pad_token_id": 0}, head_dim=16, num_local_experts=2), "sinks"),
    ],
    ids=["bert", "gpt_oss"],
)
def test_what_a_config_does_not_tell_is_found_in_the_model(config, why):
    with pytest.raises(UnsupportedModel, match=why):
        random_model(config, dtype=torch.float32, device=CPU, attn_implementation="eager")


# -- what needs attention in pages -------------------------------------------------------------------------------------

SHARP = SMALL | {"head_dim": 16, "sliding_window": 16, "initializer_range": 0.25, "pad_token_id": 0}  # so that scores differ
ONLY_IN_PAGES = {
    "soft-capped": Gemma2Config(**SHARP, attn_logit_softcapping=1.0, query_pre_attn_scalar=16),
    "sinks": GptOssConfig(**SHARP, num_local_experts=4, num_experts_per_tok=2),
}


def tiny_engine(config, **settings):
    return Engine.random(config, seed=3, dtype="float32", device="cpu", num_pages=64, page_size=8, **settings)


@pytest.mark.parametrize("why", ONLY_IN_PAGES)
def test_what_views_cannot_compute_is_refused_there_and_told_where_it_runs(why):
    with pytest.raises(UnsupportedModel, match=f"{why}.*on a GPU, or with attention='pages'"):
        tiny_engine(ONLY_IN_PAGES[why], attention="views")


@pytest.mark.parametrize("why", ONLY_IN_PAGES)
def test_pages_give_transformers_own_logits_and_tokens(why, record, monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    config = ONLY_IN_PAGES[why]
    model, _ = random_model(config, dtype=torch.float32, device=CPU, attn_implementation="eager", seed=3, in_pages=True)
    prompt = np.random.default_rng(0).integers(10, 250, 37).tolist()
    tokens, rows = list(prompt), []
    for _ in range(8):
        rows.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with tiny_engine(config, attention="pages") as engine:
        for cached in (0, 36):
            with record(engine) as logits:
                done = engine.generate([prompt], params)[0]
            assert done.cached_tokens == cached
            assert [*prompt, *done.token_ids] == tokens
            torch.testing.assert_close(torch.stack(logits[:8]), torch.stack(rows), atol=2e-4, rtol=0)
        engine.cache.check()


@pytest.mark.parametrize("why", ONLY_IN_PAGES)
def test_a_folder_of_such_a_model_is_taken_for_pages_only(why, tmp_path):
    model, _ = random_model(ONLY_IN_PAGES[why], dtype=torch.float32, device=CPU, attn_implementation="eager", in_pages=True)
    model.save_pretrained(tmp_path)
    options = {"dtype": torch.float32, "device": CPU, "attn_implementation": "eager"}
    found = resolve_model(tmp_path, in_pages=True)
    assert torch.equal(logits(load_model(found, **options, in_pages=True)), logits(model))
    with pytest.raises(UnsupportedModel, match=why):
        load_model(found, **options)


def test_an_architecture_transformers_does_not_know_is_refused_by_name(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "brand_new"}))
    with pytest.raises(UnsupportedModel, match="brand_new"):
        resolve_model(folder)


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_names_the_content_and_not_the_place(folder, saved):
    assert fingerprint(resolve_model(folder), dtype=torch.float32) == fingerprint(resolve_model(saved), dtype=torch.float32)


def test_whatever_changes_the_kv_changes_the_fingerprint(folder):
    seen = {fingerprint(resolve_model(folder), dtype=torch.float32)}
    seen.add(fingerprint(resolve_model(folder), dtype=torch.bfloat16))
    seen.add(fingerprint(resolve_model(folder), dtype=torch.float32, extra="page 16"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    seen.add(fingerprint(resolve_model(folder), dtype=torch.float32))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 12345.0
    (folder / "config.json").write_text(json.dumps(config))
    seen.add(fingerprint(resolve_model(folder), dtype=torch.float32))
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    seen.add(fingerprint(resolve_model(folder), dtype=torch.float32))
    assert len(seen) == 6
    assert all(len(text) == 64 for text in seen)


def test_what_does_not_change_the_kv_leaves_the_fingerprint(folder):
    before = fingerprint(resolve_model(folder), dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "dtype": "bfloat16"}))
    assert fingerprint(resolve_model(folder), dtype=torch.float32) == before


def test_random_models_follow_from_their_seed_alone():
    def make(seed, dtype=torch.float32):
        return random_model(LlamaConfig(**SMALL), dtype=dtype, device=CPU, attn_implementation="eager", seed=seed, extra="x")

    torch.manual_seed(1)
    state = torch.get_rng_state()
    (one, first), (_, again), (_, other), (_, half) = make(1), make(1), make(2), make(1, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert len({first, other, half}) == 3
    assert first == model_fingerprint(one, "x") != model_fingerprint(one, "y")


# -- the real model ----------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_says_what_it_should(smollm2):
    assert smollm2.source == "fetched"
    model, tokenizer = load(smollm2), Tokenizer(smollm2.path)
    assert models.eos_ids(model) == tokenizer.eos_ids == {2}
    ids = torch.from_numpy(tokenizer.encode("The capital of France is")).long()[None]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0].numpy())


@pytest.mark.model
def test_smollm2_is_found_under_its_name_in_any_case_with_nothing_to_do(smollm2, monkeypatch):
    monkeypatch.setattr(models, "fetch_smollm2", pytest.fail)
    monkeypatch.setattr(models, "convert", pytest.fail)
    assert {resolve_model(name).path for name in ("smollm2", "SMOLLM2", "SmolLM2")} == {smollm2.path}
