"""The command line's `chat --url`: the same conversation, with a server that runs somewhere else.

The server keeps no conversation: all messages are sent again each turn, and what it skipped of them stands under the answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from radixkv.terminal import err, one_turn, out, rewind, show_error, typed_lines

if TYPE_CHECKING:
    from radixkv_client import ChatChunk, Client

__all__ = ["Conversation", "chat_remote"]

_LOADING_RETRIES = 60  # of 2 s each: so long a server may take to load its model

_HELP = """\
/rewind [n]   undo the last n turns       /system TEXT   start anew with a system message
/help         this                        /exit          leave (or Ctrl-D)"""


def chat_remote(url: str, api_key: str | None, model: str | None, system: str | None, fields: Mapping[str, Any]) -> None:
    """Chat in the terminal with the server at `url` until the user leaves.

    Args:
        url: where it is.
        api_key: where it wants one.
        model: one of its names; None: its first.
        system: a system message.
        fields: of every request: max_tokens, temperature, ...
    """
    try:
        from radixkv_client import Client, ClientError, Retry
    except ImportError as missing:
        raise SystemExit(f"chat --url needs the package {missing.name!r}: pip install 'radixkv[client]'") from None
    try:
        with Client(url, api_key, retry=Retry(_LOADING_RETRIES, max_wait_s=30.0)) as client:
            with err.status(f"waiting for {escape(client.base_url)} ..."):
                name = model or client.models()[0].id
            out.print(f"[bold]{escape(name)}[/] at {escape(client.base_url)}; /help lists commands, Ctrl-C stops an answer")
            _converse(Conversation(client, {"model": name, **fields}, system))
    except ClientError as error:
        show_error(str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        out.print()


class Conversation:
    """Messages, and the server that continues them.

    Args:
        client: the server.
        fields: of every request.
        system: a system message.

    Attributes:
        num_turns: finished turns.
    """

    def __init__(self, client: Client, fields: Mapping[str, Any], system: str | None = None) -> None:
        self._client = client
        self._fields = fields
        self.num_turns = 0
        self._messages: list[dict[str, str]] = []
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forget everything, and begin with this system message."""
        self._messages = [{"role": "system", "content": system}] if system else []
        self.num_turns = 0

    def rewind(self, num_turns: int) -> None:
        """Undo the last turns, as many as there are."""
        num_turns = min(num_turns, self.num_turns)
        self._messages = self._messages[: len(self._messages) - 2 * num_turns]
        self.num_turns -= num_turns

    def turn(self, text: str) -> None:
        """Say something, show the answer as it comes, and what it cost. A turn that does not end leaves no trace.

        Raises:
            ClientError: of the server or the way to it.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        started, first_s, said = time.perf_counter(), 0.0, []
        last: ChatChunk | None = None
        with closing(self._client.chat(asked, **self._fields)) as chunks:  # closed, whatever happens: the server stops then
            for last in chunks:
                first_s = first_s or time.perf_counter() - started
                said.append(last.text)
                out.print(last.text, end="", markup=False, soft_wrap=True)
        seconds = time.perf_counter() - started - first_s
        out.print()
        self._messages = [*asked, {"role": "assistant", "content": "".join(said)}]
        self.num_turns += 1
        if last is not None and last.usage is not None:
            usage = last.usage
            rate = (usage.completion_tokens - 1) / seconds if seconds > 0 else 0.0
            out.print(
                f"[dim]prompt {usage.prompt_tokens} tokens: {usage.cached_tokens} skipped, "
                f"{usage.prompt_tokens - usage.cached_tokens} computed; "
                f"first token {first_s * 1e3:.0f} ms, then {max(rate, 0.0):.0f} tokens/s[/]",
                soft_wrap=True,
            )


def _converse(talk: Conversation) -> None:
    from radixkv_client import ClientError

    for text in typed_lines():
        with one_turn(ClientError, "this turn is undone, what it computed stays cached"):
            if text.startswith("/"):
                _command(talk, text)
            else:
                talk.turn(text)


def _command(talk: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/rewind":
        rewind(talk, rest)
    elif name == "/system":
        talk.restart(rest or None)
        out.print("[dim]a new conversation[/]")
    else:
        out.print(_HELP, markup=False)
