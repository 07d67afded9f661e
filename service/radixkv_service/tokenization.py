"""POST /tokenize and /detokenize, in vLLM's form: what a prompt costs, before it is asked."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from radixkv.engine.tools import tool_prompt
from radixkv.errors import TokenRangeError
from radixkv.tokens import Tokens
from radixkv_service.dialog import messages_of, tools_of
from radixkv_service.documents import ERRORS
from radixkv_service.errors import bad_request
from radixkv_service.generation import check_model, service_of
from radixkv_service.openai_models import ChatMessage, ListOf, Tool
from radixkv_service.prompt_limits import COUNTED, refuse_long_ids, refuse_long_messages, refuse_long_text
from radixkv_service.service import Service

__all__ = [
    "DetokenizeAnswer",
    "DetokenizeRequest",
    "TokenizeAnswer",
    "TokenizeRequest",
    "detokenize",
    "router",
    "tokenize",
]

router = APIRouter(tags=["tokens"])


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text or messages."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[ListOf[ChatMessage], Field(min_length=1)] | None = None
    tools: ListOf[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class TokenizeAnswer(BaseModel):
    """The ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: ListOf[int]


class DetokenizeAnswer(BaseModel):
    """The text of ids."""

    prompt: str


@router.post("/tokenize", response_model=TokenizeAnswer, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The ids of a text, or of messages as the model's chat template writes them."""
    service = service_of(request)
    check_model(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("prompt: send either prompt or messages", "prompt")
    return Response(await asyncio.to_thread(_tokenized, service, body), media_type="application/json")


def _tokenized(service: Service, body: TokenizeRequest) -> str:
    """The answer as JSON: writing many ids takes time, as finding them does."""
    ids = _encode(service, body)
    texts = [service.token_texts(token_id)[0] for token_id in ids] if body.return_token_strs else None
    answer = TokenizeAnswer(count=len(ids), max_model_len=service.max_tokens, tokens=ids, token_strs=texts)
    return answer.model_dump_json()


def _encode(service: Service, body: TokenizeRequest) -> list[int]:
    tokenizer = service.engine.tokenizer
    if body.prompt is not None:
        refuse_long_text(service, body.prompt, "prompt")
        return Tokens(tokenizer.encode(body.prompt, bos=body.add_special_tokens is not False)).tolist()
    messages, tools = messages_of(body.messages or []), tools_of(body.tools)
    refuse_long_messages(service, messages, tools)
    shown = tool_prompt(tokenizer, messages, tools)
    return Tokens(tokenizer.chat_ids(shown.messages, body.add_generation_prompt, shown.tools)).tolist()


@router.post("/detokenize", response_model=DetokenizeAnswer, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of ids."""
    service = service_of(request)
    check_model(service, body.model)
    refuse_long_ids(service, len(body.tokens), "tokens", contexts=COUNTED)
    return Response(await asyncio.to_thread(_detokenized, service, body.tokens), media_type="application/json")


def _detokenized(service: Service, tokens: list[int]) -> str:
    """The answer as JSON.

    Raises:
        TokenRangeError: an id that is none of the vocabulary's.
    """
    ids = Tokens(tokens)
    limit = service.engine.tokenizer.vocab_size
    wrong = next((index for index, token_id in enumerate(ids) if token_id >= limit), None)
    if wrong is not None:
        raise TokenRangeError(ids[wrong], wrong, limit)
    return DetokenizeAnswer(prompt=service.engine.tokenizer.decode(ids.array, False)).model_dump_json()
