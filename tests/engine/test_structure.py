"""Answers held to a form: what is refused before a request runs, and what the real model writes under it."""

from __future__ import annotations

import json
import re
import threading

import jsonschema_rs
import pytest
import torch

from radixkv.engine import SamplingParams
from radixkv.engine.sampler import Sampler
from radixkv.engine.structure import Structure, StructureCompiler
from radixkv.engine.tools import ToolCallParser, forced_structure
from radixkv.errors import StructureError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from radixkv.engine.tokenizer import Tokenizer

    return Tokenizer(smollm2.path)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return StructureCompiler(tokenizer, keep=3)


def accepts(tokenizer, compiler, structure, answer):
    """Whether a structure lets exactly this answer through."""
    matcher = compiler.matcher(structure)
    for token_id in tokenizer.encode(answer).tolist():
        if not matcher.allowed()[token_id]:
            return False
        matcher.advance(token_id)
    return matcher.accepting


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        (Structure.json_object(), ['{"a": [1, {"b": null}]}', "{}"], ["[]", "{", '{"a": NaN}', "{} "]),
        (Structure.json_schema(True), ["[1]", "null"], ["nul", "x"]),
        (Structure.json_schema('{"enum": ["é", 1]}'), ['"é"', "1"], ['"e"', "2"]),
        (Structure.regex("[0-9]{3}|x+"), ["123", "xxxx"], ["12", "1234", "x1"]),
        (Structure.regex("^ab$"), ["ab"], ["a", "abc"]),
        (
            Structure.choice(["yes", "yes, sir", 'a "b"\n', "鳥😀"]),
            ["yes", "yes, sir", 'a "b"\n', "鳥😀"],
            ["yes,", "no", ""],
        ),
        (Structure.lark('start: "(" start ")" | /[a-z]/'), ["((a))", "b"], ["((a)", "ab"]),
    ],
)
def test_a_structure_lets_its_answers_through_and_no_others(tokenizer, compiler, structure, good, bad):
    assert [answer for answer in good if not accepts(tokenizer, compiler, structure, answer)] == []
    assert [answer for answer in bad if accepts(tokenizer, compiler, structure, answer)] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Structure.json_schema("[1"),
        lambda: Structure.json_schema('{"type": "object"} }, {"lark_grammar": "start: /.*/"'),
        lambda: Structure.json_schema('{"minimum": NaN}'),
        lambda: Structure.json_schema({"minimum": float("inf")}),
        lambda: Structure.json_schema({"x": object()}),
        lambda: Structure.json_schema("[" * 100_000),
        lambda: Structure.json_schema('"text"'),
        lambda: Structure.json_schema({"enum": ["\ud800"]}),
        lambda: Structure.json_schema({"enum": ["x" * 200_000]}),
        lambda: Structure.choice([]),
        lambda: Structure.choice([3]),
        lambda: Structure.choice(["\ud800"]),
        lambda: Structure.regex(""),
        lambda: Structure.lark(""),
        lambda: Structure("json_object", "[]"),
        lambda: Structure("yaml", "x"),
    ],
)
def test_what_is_malformed_is_refused_when_made(make):
    with pytest.raises(StructureError):
        make()


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (Structure.json_schema({"type": "text"}), "text"),
        (Structure.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Structure.json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (Structure.json_schema({"type": "string", "not": {"const": "a"}}), "not"),
        (Structure.json_schema({"type": "string", "format": "colour"}), "colour"),
        (Structure.json_schema({"$ref": "https://example.com/schema.json"}), "example.com"),
        (Structure.json_schema({"$ref": "#"}), "no answer"),
        (Structure.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "minimum"),
        (Structure.json_schema(False), "nsatisfiable"),
        (
            Structure.json_schema({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(20)]}),
            "one allOf",
        ),
        (Structure.regex("(a"), "unclosed group"),
        (Structure.regex("a(?=b)"), "look-ahead"),
        (Structure.lark("start: start"), "no answer"),
        (Structure.lark('begin: "a"'), "start"),
        (Structure.lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
        (Structure.lark("start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(600)) + 'A600: "a"'), "terminals"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_its_reason(compiler, structure, reason):
    with pytest.raises(StructureError, match=re.escape(reason)) as caught:
        compiler.check(structure)
    assert caught.value.what == structure.label
    assert len(str(caught.value)) < 400


def test_the_longest_chain_of_definitions_does_not_end_the_process(tokenizer, compiler):
    number = 2800
    links = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(number)}
    schema = {"$ref": "#/$defs/0", "$defs": {**links, str(number): {"type": "integer"}}}
    compiler.check(Structure.json_schema(schema))
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(9000))
    assert accepts(tokenizer, compiler, Structure.lark(f'start: r0\n{rules}r9000: "a"'), "a")


def test_a_structure_is_a_value():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert Structure.json_schema(schema) == Structure.json_schema(json.dumps(schema, indent=2))
    assert len({Structure.json_schema(schema), Structure.json_schema(json.dumps(schema)), Structure.json_object()}) == 2
    assert hash(SamplingParams(structure=Structure.json_object(), logit_bias={1: 2}))


def test_matchers_share_a_grammar_and_nothing_else(tokenizer, compiler):
    structure = Structure.choice(["left", "right"])
    one, other = compiler.matcher(structure), compiler.matcher(structure)
    (left,), (right,) = tokenizer.encode("left").tolist(), tokenizer.encode("right").tolist()
    one.advance(left)
    other.advance(right)
    assert one.complete
    assert other.complete
    assert not compiler.matcher(structure).complete
    with pytest.raises(StructureError):
        compiler.matcher(structure).advance(tokenizer.encode("up").tolist()[0])


def test_only_the_grammars_used_last_are_kept(compiler):
    for number in range(10):
        compiler.check(Structure.choice([f"word {number}"]))
    assert len(compiler._kept) == 3


def test_grammars_are_compiled_from_several_threads(tokenizer, compiler):
    found: list[bool] = []

    def work(number: int) -> None:
        found.append(accepts(tokenizer, compiler, Structure.choice([f"word {number % 5}"]), f"word {number % 5}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 10


def test_a_model_with_more_ids_than_its_tokenizer_never_gives_one_of_them(tokenizer, compiler):
    structure = Structure.choice(["ab"])
    size = tokenizer.vocab_size + 100
    params = SamplingParams(structure=structure, min_tokens=50)
    sampler = Sampler(params, size, CPU, end_ids=tokenizer.eos_ids, matcher=compiler.matcher(structure))
    logits = torch.zeros(size)
    logits[tokenizer.vocab_size :] = 50.0
    chosen = [sampler.choose(logits)[0]]
    while not sampler.accepting:
        chosen.append(sampler.choose(logits)[0])
    assert tokenizer.decode(chosen) == "ab"
    assert sampler.choose(logits)[0] in tokenizer.eos_ids, "a complete form ends, whatever min_tokens says"


def test_a_form_and_a_bias_that_leave_nothing_are_an_error(tokenizer, compiler):
    structure = Structure.choice(["a", "b"])
    forbidden = dict.fromkeys(tokenizer.encode("a").tolist() + tokenizer.encode("b").tolist(), -100)
    params = SamplingParams(structure=structure, logit_bias=forbidden)
    sampler = Sampler(params, tokenizer.vocab_size, CPU, matcher=compiler.matcher(structure))
    with pytest.raises(StructureError, match="logit_bias"):
        sampler.choose(torch.zeros(tokenizer.vocab_size))


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    with pytest.raises(StructureError, match="no token that ends"):
        StructureCompiler(tokenizer, eos_ids=())


# -- the real model ----------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["city", "zip"],
            "additionalProperties": False,
        },
        "mood": {"enum": ["fröhlich", "müde", "鳥"]},
    },
    "required": ["name", "home", "mood"],
    "additionalProperties": False,
}
NUMBERS = {
    "type": "object",
    "properties": {
        "primes": {"type": "array", "items": {"type": "integer", "minimum": 2, "maximum": 97}, "minItems": 3, "maxItems": 3},
        "pi": {"type": "number", "minimum": 3, "exclusiveMaximum": 4},
        "even": {"type": ["boolean", "null"]},
    },
    "required": ["primes", "pi", "even"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "label": {"type": "string", "maxLength": 8},
                "kids": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/leaf"}},
            },
            "required": ["label", "kids"],
            "additionalProperties": False,
        },
        "leaf": {"anyOf": [{"type": "integer"}, {"const": "blatt"}]},
    },
    "$ref": "#/$defs/node",
}


FORECAST = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def answers(engine, *asked):
    """What the model says when asked all of it at once, each held to its form."""
    requests = [
        engine._request([{"role": "user", "content": question}], SamplingParams(**settings), None)
        for question, settings in asked
    ]
    engine._submit(requests)
    while not all(request.finished for request in requests):
        engine.step()
    return [(request.completion.text, request.completion.finish_reason) for request in requests]


@pytest.mark.model
def test_what_the_model_writes_has_the_form_asked_for(fp32_engine):
    """Together, as they would run: five forms in one batch, and one that is cut short."""
    schemas = [PERSON, NUMBERS, TREE]
    asked = [("About yourself?", {"structure": Structure.json_schema(schema), "max_tokens": 150}) for schema in schemas]
    call = forced_structure([{"type": "function", "function": {"name": "forecast", "parameters": FORECAST}}], "required")
    asked += [
        ("What will the weather in Paris be like over the next 3 days?", {"structure": call, "max_tokens": 80}),
        ("Hello!", {"structure": Structure.regex("(red|green) (ball|box)"), "temperature": 2.0, "seed": 1}),
        ("Hello!", {"structure": Structure.json_schema(PERSON), "max_tokens": 5}),
    ]
    *whole, cut = answers(fp32_engine, *asked)
    assert [reason for _, reason in whole] == ["stop"] * 5
    texts = [text for text, _ in whole]
    for schema, text in zip(schemas, texts[:3], strict=True):
        jsonschema_rs.validate(schema, json.loads(text))
    (made,) = ToolCallParser(["forecast"]).push(texts[3]).calls
    jsonschema_rs.validate(FORECAST, json.loads(made.arguments))
    assert texts[4] in {f"{colour} {thing}" for colour in ("red", "green") for thing in ("ball", "box")}
    assert cut[1] == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut[0])
