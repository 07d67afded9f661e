"""Sessions kept by the server: the prompts of resent messages, one turn at a time, a tenant's own, and gone in time."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from radixkv import errors
from radixkv.engine import Completion, SamplingParams
from radixkv.engine.session_store import SessionStore
from radixkv.engine.tokenizer import Tokenizer
from radixkv.engine.transcripts import Transcripts

pytestmark = pytest.mark.model
END = 2  # <|im_end|>
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello, 42!"}
MORE = {"role": "user", "content": "And now?"}


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer(smollm2.path, "SmolLM2")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tokenizer, clock):
    return SessionStore(Transcripts(tokenizer), max_sessions=4, max_per_tenant=3, clock=clock)


def generated(tokenizer, text):
    """A completion whose ids are not those that its text has."""
    ids = [token for piece in text for token in tokenizer.encode(piece, special=False).tolist()]
    return Completion(text, (*ids, END), "stop", 1, 0, 1, 0.0, 0.0)


def say(store, session_id, text="Yes.", *, namespace="", messages=(HELLO,)):
    with store.turn(session_id, namespace, messages) as turn:
        turn.keep({"role": "assistant", "content": text}, generated(store.transcripts.splicer.tokenizer, text))
    return turn


def test_a_turn_through_a_session_and_the_history_resent_give_the_same_ids(fp32_engine):
    engine = fp32_engine
    engine.cache.flush()
    store = SessionStore(Transcripts(engine.tokenizer))
    session_id = store.open("a", [SYSTEM])
    with engine.chat("Be brief.", namespace="a") as chat:
        for seed, question in enumerate(("A word for snow?", "Another?", "Again.")):
            asked = {"role": "user", "content": question}
            resent = store.transcripts.prompt_ids([*store.messages(session_id, "a"), asked], namespace="a")
            params = SamplingParams(max_tokens=8, temperature=1.8, seed=seed)
            with store.turn(session_id, "a", [asked]) as turn:
                assert turn.prompt == resent
                done = chat.send(question, params)
                assert chat.tokens == turn.prompt.ids + done.token_ids
                turn.keep({"role": "assistant", "content": done.text}, done)
    assert store.info(session_id, "a").num_turns == 3


def test_answers_stay_exact_in_a_session_when_the_transcripts_forget_them(tokenizer):
    store = SessionStore(Transcripts(tokenizer, max_tokens=0))
    session_id = store.open("", [SYSTEM])
    say(store, session_id)
    twin = store.fork(session_id)
    for one in (session_id, twin):
        assert store.turn(one, messages=[MORE]).prompt.spliced == (2,)
    assert store.transcripts.prompt_ids([*store.messages(twin), MORE]).spliced == ()


def test_a_session_may_begin_with_what_was_said_before_it(store, tokenizer):
    history = [HELLO, {"role": "assistant", "content": "Yes."}]
    store.transcripts.remember([HELLO], history[1], generated(tokenizer, "Yes."), namespace="a")
    for namespace, spliced in (("a", (1,)), ("b", ())):
        turn = store.turn(store.open(namespace, history), namespace, [MORE])
        assert turn.prompt.spliced == spliced


def test_a_turn_that_is_not_kept_leaves_nothing(store):
    session_id = store.open("", [SYSTEM])
    say(store, session_id)
    before = store.messages(session_id)
    with pytest.raises(ZeroDivisionError), store.turn(session_id, messages=[MORE]):
        raise ZeroDivisionError
    turn = store.turn(session_id, messages=[MORE])
    turn.undo()
    turn.undo()
    for marks, messages in (([(9, 0)], [MORE]), ([], [{"role": "user", "content": 3}])):
        with pytest.raises(errors.ConfigError):
            store.turn(session_id, messages=messages, marks=marks)
    with pytest.raises(errors.SessionBusy):
        turn.keep({"role": "assistant", "content": "Yes."}, generated(store.transcripts.splicer.tokenizer, "Yes."))
    assert store.messages(session_id) == before
    assert store.info(session_id).num_turns == 1
    assert not store.info(session_id).busy


def test_one_turn_at_a_time(store):
    session_id = store.open()
    turn = store.turn(session_id, messages=[HELLO])
    for act in (
        lambda: store.turn(session_id),
        lambda: store.append(session_id, "", [MORE]),
        lambda: store.fork(session_id),
        lambda: store.rewind(session_id, "", 0),
    ):
        with pytest.raises(errors.SessionBusy):
            act()
    assert store.info(session_id).busy
    assert store.messages(session_id) == []
    turn.undo()
    say(store, session_id)


def test_in_another_namespace_a_session_is_not_there(store):
    session_id = store.open("a", [SYSTEM])
    for act in (
        lambda: store.turn(session_id, "b", [HELLO]),
        lambda: store.append(session_id, "b", [HELLO]),
        lambda: store.fork(session_id, "b"),
        lambda: store.rewind(session_id, "b"),
        lambda: store.messages(session_id, "b"),
        lambda: store.info(session_id, "b"),
        lambda: store.close(session_id, "b"),
        lambda: store.info("nobody", "a"),
    ):
        with pytest.raises(errors.SessionNotFound):
            act()
    assert store.sessions("b") == []
    assert [info.session_id for info in store.sessions("a")] == [session_id]


def test_a_session_expires_when_it_was_not_used_for_its_time(store, clock):
    session_id, other = store.open("", [SYSTEM], ttl_s=10), store.open(ttl_s=1000)
    clock.now_s = 9
    assert store.info(session_id).expires_in_s == 1
    store.append(session_id, "", [HELLO])
    clock.now_s = 18
    assert store.expire() == 0
    turn = store.turn(session_id)
    clock.now_s = 100
    assert store.expire() == 0, "it is busy"
    turn.undo()
    assert store.info(session_id).expires_in_s == 10
    clock.now_s = 110
    for act in (lambda: store.info(session_id), lambda: store.turn(session_id)):
        with pytest.raises(errors.SessionNotFound):
            act()
    assert [info.session_id for info in store.sessions()] == [other]
    assert (store.expire(2000), len(store)) == (1, 0)


def test_only_so_many_sessions_are_open(store, clock):
    first = store.open("a", ttl_s=5)
    for _ in range(2):
        store.open("a")
    for act in (lambda: store.open("a"), lambda: store.fork(first, "a")):
        with pytest.raises(errors.TooManySessions, match="3 sessions are open and the limit is 3"):
            act()
    store.open("b")
    with pytest.raises(errors.TooManySessions) as caught:
        store.open("b")
    assert (caught.value.num_open, caught.value.limit) == (4, 4)
    clock.now_s = 5
    store.open("b")
    for limits in ({"max_sessions": 0}, {"max_per_tenant": 0}):
        with pytest.raises(errors.ConfigError):
            SessionStore(store.transcripts, **limits)
    for ttl_s in (0, -1, float("nan"), float("inf"), None):
        with pytest.raises(errors.ConfigError):
            store.open("c", ttl_s=ttl_s)


def test_a_tenant_has_only_so_many_sessions_in_all_its_namespaces(tokenizer):
    store = SessionStore(Transcripts(tokenizer), max_per_tenant=2, tenant_of=lambda namespace: namespace[0])
    first = store.open("a1")
    store.open("a2")
    for act in (lambda: store.open("a3"), lambda: store.fork(first, "a1")):
        with pytest.raises(errors.TooManySessions, match="2 sessions are open and the limit is 2"):
            act()
    store.open("b1")
    store.close(first, "a1")
    store.open("a3")


def test_a_session_holds_only_so_much_text_and_what_is_too_much_changes_nothing(tokenizer):
    used = sum(len(key) + len(value) for message in (SYSTEM, HELLO) for key, value in message.items())
    store = SessionStore(Transcripts(tokenizer), max_chars=used)
    long = {"role": "user", "content": [{"type": "text", "text": "x" * used}]}
    session_id = store.open("", [SYSTEM])
    for _ in range(2):
        for act in (
            lambda: store.open("", [long]),
            lambda: store.append(session_id, "", [long]),
            lambda: store.turn(session_id, "", [HELLO, HELLO]),
        ):
            with pytest.raises(errors.SessionTooLong, match=f"no prompt can have more than {used}"):
                act()
        assert (store.messages(session_id), store.info(session_id).busy) == ([SYSTEM], False)
        store.turn(session_id, "", [HELLO]).undo()
    say(store, session_id)
    for one in (session_id, store.fork(session_id)):
        with pytest.raises(errors.PromptTooLong):
            store.append(one, "", [MORE])
        store.rewind(one)
        store.append(one, "", [HELLO])


def test_rewind_goes_back_to_before_the_turn_and_all_that_was_appended_for_it(store):
    session_id = store.open("", [SYSTEM])
    store.append(session_id, "", [HELLO])
    say(store, session_id, messages=())
    after_one = store.messages(session_id)
    say(store, session_id, messages=(MORE,))
    store.append(session_id, "", [HELLO])
    store.rewind(session_id)
    assert store.messages(session_id) == after_one
    assert store.turn(session_id, messages=[MORE]).prompt.spliced == (2,)
    twin_of = store.open("", [SYSTEM])
    say(store, twin_of)
    store.rewind(twin_of)
    assert store.messages(twin_of) == [SYSTEM]
    for turns in (1, -1, 0.5):
        with pytest.raises(errors.ConfigError):
            store.rewind(twin_of, turns=turns)


def test_a_fork_goes_its_own_way(store):
    session_id = store.open("", [SYSTEM])
    say(store, session_id)
    twin = store.fork(session_id)
    say(store, twin, "No.", messages=[MORE])
    store.rewind(session_id)
    assert [info.num_messages for info in store.sessions()] == [1, 5]
    assert store.messages(twin)[-1]["content"] == "No."


def test_a_closed_session_is_gone_and_its_turn_cannot_be_kept(store, tokenizer):
    session_id = store.open()
    turn = store.turn(session_id, messages=[HELLO])
    store.close(session_id)
    with pytest.raises(errors.SessionNotFound):
        turn.keep({"role": "assistant", "content": "Yes."}, generated(tokenizer, "Yes."))
    turn.undo()
    with pytest.raises(errors.SessionNotFound):
        store.close(session_id)


def test_what_goes_in_or_comes_out_cannot_change_a_session(store):
    mine = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    session_id = store.open("", [mine])
    mine["content"][0]["text"] = "b"
    store.messages(session_id)[0]["content"].clear()
    assert store.messages(session_id) == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


class Sessions(RuleBasedStateMachine):
    """Sessions beside lists of messages."""

    tokenizer: Tokenizer

    def __init__(self):
        super().__init__()
        self.store = SessionStore(Transcripts(self.tokenizer, max_tokens=200))
        self.model: dict[str, list[list[dict]]] = {}  # by id: the messages of the opening, then of each turn
        self.texts = 0

    def pick(self, data):
        return list(self.model)[data.draw(st.integers(0, len(self.model) - 1))]  # the ids are random: by age

    @rule()
    def open(self):
        self.model[self.store.open("a", [SYSTEM])] = [[SYSTEM]]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), kept=st.booleans(), text=st.sampled_from(["Yes.", "No, 1.", ""]))
    def take_a_turn(self, data, kept, text):
        name = self.pick(data)
        with self.store.turn(name, "a", [HELLO]) as turn:
            assert turn.prompt.ids == self.expected([*chain(*self.model[name]), HELLO])
            if kept:
                said = {"role": "assistant", "content": text}
                turn.keep(said, generated(self.tokenizer, text))
                self.model[name].append([HELLO, said])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data):
        name = self.pick(data)
        self.model[self.store.fork(name, "a")] = list(self.model[name])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rewind(self, data):
        name = self.pick(data)
        turns = data.draw(st.integers(0, len(self.model[name]) - 1))
        self.store.rewind(name, "a", turns)
        del self.model[name][len(self.model[name]) - turns :]

    def expected(self, messages):
        """The ids, from the texts alone: every answer character by character."""
        ids = self.tokenizer.chat_ids(messages[:2]).tolist()
        for answered in range(3, len(messages), 2):
            ids += generated(self.tokenizer, messages[answered - 1]["content"]).token_ids
            ids += self.tokenizer.turn_tail(messages[: answered - 1], messages[answered], ids[-8:]).tolist()
        return type(self.store.transcripts.prompt_ids([HELLO]).ids)(ids)

    @invariant()
    def agree(self):
        for name, parts in self.model.items():
            assert self.store.messages(name, "a") == list(chain(*parts))
            assert self.store.info(name, "a").num_turns == len(parts) - 1


def test_sessions_are_their_messages_whatever_is_done(tokenizer):
    Sessions.tokenizer = tokenizer
    machine = Sessions.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    machine().runTest()
