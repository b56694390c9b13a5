"""The scripted chats of first_contact.py: their rules know right from wrong."""
import pytest
from first_contact import chats, example_of, hold

from world.judge import is_right
from world.text import ADMISSIONS, REFUSALS, SMALLTALK
from world.world import World


def spoken(right):
    """An answer in the assistant's words, by what is right."""
    kind, _, answer = right.partition(" ")
    if kind == "say":
        return SMALLTALK[answer][1]
    if kind == "refuse":
        return REFUSALS[0]
    if kind == "admit":
        return ADMISSIONS[0]
    return f"That would be {answer}."


@pytest.mark.parametrize("seed", range(3))
def test_thirty_chats_of_three_turns_can_be_answered(seed):
    script = chats(World(seed))
    assert len(script) == 30 and all(len(chat) == 3 for chat in script)
    for chat in script:
        for typed, right in chat:
            example = example_of(typed, right)
            assert is_right(example, spoken(right)), (typed, right)
            # What would be right for another turn of the same chat is wrong here.
            for _, other in chat:
                if example_of(typed, other)["answer"] != example["answer"]:
                    assert not is_right(example, spoken(other)), (typed, other)


def test_a_chat_goes_on_with_what_was_answered():
    seen = []

    def answer(messages):
        seen.append([message["content"] for message in messages])
        return "Hello, my friend!"

    held = hold([("Hello!", "say hello"), ("hi", "say hello"), ("bye", "say goodbye")], answer)
    assert [ok for *_, ok in held] == [True, True, False]
    assert seen[2] == ["Hello!", "Hello, my friend!", "hi", "Hello, my friend!", "bye"]
