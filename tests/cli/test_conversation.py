"""The messages of a chat: taken back, saved, loaded, refused."""
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.cli.conversation import Conversation
from metalstep.cli.errors import CommandError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def conversations(draw):
    conversation = Conversation(draw(st.none() | texts))
    for _ in range(draw(st.integers(0, 3))):
        conversation.add("user", draw(texts))
        conversation.add("assistant", draw(texts))
    return conversation


@given(conversation=conversations(), question=texts, answer=st.none() | texts)
def test_undo_takes_the_last_exchange_back(conversation, question, answer):
    before = copy.deepcopy(conversation.messages)
    conversation.add("user", question)
    if answer is not None:
        conversation.add("assistant", answer)
    assert conversation.undo() == question
    assert conversation.messages == before


@given(conversation=conversations())
def test_an_answer_taken_back_can_be_put_again(conversation):
    before = copy.deepcopy(conversation.messages)
    dropped = conversation.take_answer_back()
    if dropped is None:
        assert not any(message["role"] == "user" for message in before)
    else:
        assert conversation.messages[-1]["role"] == "user"
        conversation.messages += dropped
    assert conversation.messages == before


@given(conversation=conversations(), system=st.none() | texts)
def test_the_system_message_stands_first_and_outlives_a_reset(conversation, system):
    others = [message for message in conversation.messages if message["role"] != "system"]
    conversation.set_system(system)
    assert conversation.system == (system or None)
    assert [message for message in conversation.messages if message["role"] != "system"] == others
    conversation.reset()
    assert conversation.messages == ([{"role": "system", "content": system}] if system else [])
    assert conversation.undo() is None


@given(conversation=conversations())
def test_a_saved_conversation_is_loaded_as_it_was(tmp_path_factory, conversation):
    path = str(tmp_path_factory.mktemp("chat") / "chat.json")
    conversation.save(path)
    again = Conversation("something else")
    again.load(path)
    assert again.messages == conversation.messages


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"{}", "holds no list of messages"),
        (b"[1]", "message 0 is no role"),
        (b'[{"role": "user"}]', "message 0 is no role"),
        (b'[{"role": "user", "content": 5}]', "message 0 is no role"),
        (b'[{"role": "owner", "content": "x"}]', r"message 0 is no role \(system, user, assistant, tool\) with a text"),
        (b'[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]', "message 1 is a system message"),
        (b'[{"role": "user", "content": "\\udc00"}]', "not valid Unicode"),
    ],
)
def test_another_file_is_refused_and_the_conversation_stays(tmp_path, content, text):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    conversation = Conversation("here")
    with pytest.raises(CommandError, match=text):
        conversation.load(str(path))
    assert conversation.system == "here"


def test_what_a_message_has_besides_is_kept(tmp_path):
    path = tmp_path / "tools.json"
    messages = [{"role": "user", "content": "x", "name": "Ann"}, {"role": "tool", "content": "1", "tool_call_id": "a"}]
    path.write_text(json.dumps(messages))
    conversation = Conversation()
    conversation.load(str(path))
    assert conversation.messages == messages
