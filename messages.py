"""What a conversation is: a list of messages, each with a role and a content."""
from collections.abc import Sequence

ROLES = ("system", "user", "assistant")


def check_messages(messages: Sequence[dict]) -> None:
    """Raises ValueError, with the number of the message, unless all have a role and a content."""
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or {"role", "content"} - message.keys():
            raise ValueError(f"message {i} is {message!r}; it must be a dict with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"message {i} has role {message['role']!r}; it must be one of "
                             f"{', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} has content {message['content']!r}; it must be a string")


def check_open(messages: Sequence[dict]) -> None:
    """Raises ValueError for a conversation that leaves the assistant nothing to answer."""
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; a prompt ends before its turn")
