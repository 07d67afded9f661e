"""Text to ids and back with the real model's tokenizer: known vectors, exact conversations, text streamed in pieces."""

import argparse
import ast
import heapq
import inspect
import json
import random
import shutil
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.engine.tokenizer import TextStream, Tokenizer
from radixkv.errors import ChatTemplateMissing, EngineError, ModelCorrupt, ModelNotFound

pytestmark = pytest.mark.model
VECTORS = json.loads((Path(__file__).parents[1] / "data" / "smollm2_token_vectors.json").read_text("utf-8"))["vectors"]
END = 2  # <|im_end|>
SYSTEM = {"role": "system", "content": "Answer in one word."}
HELLO = {"role": "user", "content": "Hello, 42!"}
MORE = {"role": "user", "content": "And now?"}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer(smollm2.path, "SmolLM2")


@pytest.fixture
def folder(smollm2, tmp_path):
    """The tokenizer's files alone, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(smollm2.path / name, tmp_path)
    return tmp_path


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: ascii(vector["text"])[:30])
def test_known_texts_have_the_ids_the_model_was_trained_on(tokenizer, vector):
    ids = tokenizer.encode(vector["text"])
    assert ids.dtype == np.int32
    assert ids.flags.c_contiguous
    assert ids.tolist() == vector["ids"]


@pytest.mark.parametrize("module", [argparse, ast, heapq, inspect, textwrap, random, json.decoder, unicodedata])
def test_source_code_comes_back_as_it_was(tokenizer, module):
    text = inspect.getsource(module) if hasattr(module, "__file__") and module.__file__.endswith(".py") else str(module)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    for text in ("1234567890", "In 2024", "0x1F 3.14159 ٣٤", "v1.22.333"):
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        assert all(sum(char.isdigit() for char in piece) <= 1 for piece in pieces), pieces


# the model's vocabulary lacks the bytes of some control characters and of the unused planes above U+3FFFF
WRITABLE = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"], include_characters="\t\n\r")


@settings(max_examples=200, deadline=None)
@given(text=st.text(WRITABLE, max_size=60))
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, special=False), skip_special=False) == text


def test_a_lone_surrogate_does_not_stop_anybody(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_special_tokens_are_read_or_left_as_characters_as_asked(tokenizer):
    assert tokenizer.encode("<|im_end|>").tolist() == [END]
    plain = tokenizer.encode("<|im_end|>", special=False)
    assert END not in plain
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.decode([504, END]) == tokenizer.decode([504])
    assert tokenizer.decode([END], skip_special=False) == "<|im_end|>"
    assert tokenizer.encode("").shape == (0,)


def test_the_ids_that_end_an_answer_come_from_both_configs(folder):
    assert Tokenizer(folder).eos_ids == {END}
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Tokenizer(folder).eos_ids == {0, END}
    (folder / "generation_config.json").unlink()
    assert Tokenizer(folder).eos_ids == {END}


def test_a_folder_that_names_a_class_without_digit_splitting_still_splits_digits(folder):
    """The original repository of this model names GPT2Tokenizer, which transformers builds anew, without its digits."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["backend"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = Tokenizer(folder)
    assert all(tokenizer.encode(vector["text"]).tolist() == vector["ids"] for vector in VECTORS)


def test_truncation_left_in_a_file_is_not_applied(folder):
    stated = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    stated["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stated), "utf-8")
    assert len(Tokenizer(folder).encode("one two three four five six seven")) > 4


def test_a_folder_without_or_with_a_damaged_tokenizer_says_so(folder, tmp_path_factory):
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        Tokenizer(tmp_path_factory.mktemp("empty"))
    (folder / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ModelCorrupt, match="tokenizer"):
        Tokenizer(folder)


# -- conversations -----------------------------------------------------------------------------------------------------


def test_chat_ids_are_the_ids_of_the_rendered_text(tokenizer):
    assert tokenizer.chat_text([SYSTEM, HELLO]) == (
        "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nHello, 42!<|im_end|>\n<|im_start|>assistant\n"
    )
    vector = next(vector for vector in VECTORS if "Hi 42!" in vector["text"])
    messages = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "Hi 42!"}]
    assert tokenizer.chat_ids(messages, add_generation_prompt=True).tolist() == vector["ids"]
    assert not tokenizer.chat_text(messages, add_generation_prompt=False).endswith("assistant\n")


@pytest.mark.parametrize("ended", [True, False], ids=["answers end with the end token", "answers were cut"])
def test_a_conversation_of_exact_ids_is_the_whole_rendered_conversation(tokenizer, ended):
    messages, ids = [SYSTEM, HELLO], tokenizer.chat_ids([SYSTEM, HELLO]).tolist()
    for turn in range(4):
        answer = f" Answer no. {turn}: 3.14 naïve 🙂 <b>\n\n"
        ids += tokenizer.encode(answer, special=False).tolist() + [END] * ended
        before = list(ids)
        question = {"role": "user", "content": f"  Question {turn}?\n"}
        ids += tokenizer.turn_tail(messages, question, ids[-8:]).tolist()
        messages += [{"role": "assistant", "content": answer}, question]
        assert ids[: len(before)] == before
        assert tokenizer.decode(ids, skip_special=False) == tokenizer.chat_text(messages)


def test_the_history_may_end_with_the_answer_that_was_given(tokenizer):
    answer = {"role": "assistant", "content": "anything"}
    with_it = tokenizer.turn_tail([HELLO, answer], MORE, [END])
    assert with_it.tolist() == tokenizer.turn_tail([HELLO], MORE, [END]).tolist()


def test_only_an_end_token_that_is_there_is_left_out(tokenizer):
    whole = tokenizer.turn_tail([HELLO], MORE).tolist()
    assert whole[0] == END
    assert tokenizer.turn_tail([HELLO], MORE, [504, END]).tolist() == whole[1:]
    assert tokenizer.turn_tail([HELLO], MORE, [504, *whole[:2]]).tolist() == whole[2:]
    assert tokenizer.turn_tail([HELLO], MORE, [END, 504]).tolist() == whole
    assert tokenizer.turn_tail([HELLO], MORE, np.array([504, END], dtype=np.int32)).tolist() == whole[1:]


def test_several_messages_may_follow_an_answer(tokenizer):
    result = {"role": "tool", "content": "5"}
    text = tokenizer.decode(tokenizer.turn_tail([HELLO], [result, MORE], [END]), skip_special=False)
    assert text == "\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"


def test_a_text_that_repeats_itself_is_not_taken_for_an_end_token(folder):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}assistant: "
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(folder)
    whole = tokenizer.turn_tail([HELLO], MORE).tolist()
    assert tokenizer.decode(whole).startswith("\n\n")
    assert tokenizer.turn_tail([HELLO], MORE, [504, *whole[:1]]).tolist() == whole


def test_tools_reach_the_template(folder):
    (folder / "chat_template.jinja").write_text("{{ tools | length if tools else 'none' }}")
    tokenizer = Tokenizer(folder)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    assert tokenizer.chat_text([HELLO]) == "none"
    assert tokenizer.chat_text([HELLO], tools=[tool]) == "1"


def test_a_model_without_template_and_a_template_that_refuses_are_told(folder):
    tokenizer = Tokenizer(folder, "plain")
    assert not tokenizer.has_chat_template
    for ask in (lambda: tokenizer.chat_ids([HELLO]), lambda: tokenizer.turn_tail([HELLO], MORE)):
        with pytest.raises(ChatTemplateMissing, match="plain"):
            ask()
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(EngineError, match="roles must alternate"):
        Tokenizer(folder).chat_ids([HELLO])
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(EngineError, match="does not show an answer"):
        Tokenizer(folder).turn_tail([HELLO], MORE)


# -- streams -----------------------------------------------------------------------------------------------------------


def pushed(tokenizer, ids, stop=(), skip_special=True):
    stream = TextStream(tokenizer, stop, skip_special)
    return [stream.push(token) for token in ids], stream


def test_a_character_is_shown_when_it_is_whole_and_not_before(tokenizer):
    text = "naïve 你好世界 🙂👩‍💻 Ωmega"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "characters are split over tokens, or this shows nothing"
    pieces, stream = pushed(tokenizer, ids)
    assert "".join(pieces) == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_an_incomplete_character_is_given_out_at_the_end(tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    pieces, stream = pushed(tokenizer, ids)
    assert "".join(pieces) == "a"
    assert stream.flush() == tokenizer.decode(ids)[1:] != ""
    assert stream.flush() == ""


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_join_to_their_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    pieces, stream = pushed(tokenizer, ids, skip_special=skip)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


def test_a_stop_string_across_tokens_is_met_and_never_shown(tokenizer):
    ids = tokenizer.encode("The answer is 42. STOP HERE and more")
    pieces, stream = pushed(tokenizer, ids, ["nothing", "STOP HERE"])
    assert "".join(pieces) == "The answer is 42. "
    assert stream.stopped == "STOP HERE"
    assert stream.push(504) == ""
    assert stream.flush() == ""


def test_the_head_of_a_stop_string_is_held_back_until_it_is_decided(tokenizer):
    for text in ("a ST", "a STO", "a STO b ST"):
        pieces, stream = pushed(tokenizer, tokenizer.encode(text), ["STOP"])
        shown = "".join(pieces)
        assert not shown.endswith(("S", "ST", "STO"))
        assert shown + stream.flush() == text
        assert stream.stopped is None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc🙂", max_size=14),
    stops=st.lists(st.text("abc🙂", min_size=1, max_size=4), max_size=3),
    cuts=st.integers(0, 2**14),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(tokenizer, text, stops, cuts):
    """Against a model too simple to be wrong: one character at a time, up to the first that ends a stop string."""
    expected, met = "", None
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            met = max(ending, key=len)
            expected = text[: end - len(met)]
            break
    else:
        expected = text
    stream, shown, piece = TextStream(tokenizer, stops), [], ""
    for index, char in enumerate(text):
        piece += char
        if cuts >> index & 1:
            shown += [stream.push(token) for token in tokenizer.encode(piece)]
            piece = ""
        assert "".join(shown) == expected[: len("".join(shown))]
    shown += [stream.push(token) for token in tokenizer.encode(piece)]
    assert "".join(shown) + stream.flush() == expected
    assert stream.stopped == met
