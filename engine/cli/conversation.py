"""The messages of a chat: what was said, taking it back, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metalstep.cli.errors import CommandError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


class Conversation:
    """Messages in the chat template's form, `{"role": ..., "content": ...}`; a system message stands first if there is one."""

    def __init__(self, system: str | None = None):
        self.messages: list[Message] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message's text, or None."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system message; None or an empty text removes it."""
        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[: 1 if self.system is not None else 0]

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def undo(self) -> str | None:
        """Drop the last message of the user and what follows it; its text, or None where there is none."""
        for place in reversed(range(len(self.messages))):
            if self.messages[place]["role"] == "user":
                text = self.messages[place]["content"]
                del self.messages[place:]
                return text
        return None

    def take_answer_back(self) -> list[Message] | None:
        """Drop what follows the last message of the user; what was dropped, or None where there is no such message."""
        for place in reversed(range(len(self.messages))):
            if self.messages[place]["role"] == "user":
                dropped = self.messages[place + 1 :]
                del self.messages[place + 1 :]
                return dropped
        return None

    def save(self, path: str) -> None:
        """Write the messages as JSON. Raises: OSError."""
        text = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        Path(path).expanduser().write_text(text, encoding="utf-8")

    def load(self, path: str) -> None:
        """Replace the messages by those of a file that `save` wrote. Raises: CommandError for another file, OSError."""
        try:
            messages = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            raise CommandError(f"{path} is not JSON: {error}", "pass a file that /save wrote") from None
        check_messages(path, messages)
        self.messages = messages


def check_messages(path: str, messages: Any) -> None:
    """Raises: CommandError for anything but a list of messages with text."""
    from metalstep.token_ids import check_text

    hint = 'pass a list of {"role": ..., "content": ...} as /save writes it'
    if not isinstance(messages, list):
        raise CommandError(f"{path} holds no list of messages", hint)
    for place, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise CommandError(f"{path}: message {place} is no role ({', '.join(ROLES)}) with a text", hint)
        if role == "system" and place > 0:
            raise CommandError(f"{path}: message {place} is a system message, expected it first", hint)
        try:
            check_text(f"{path}: message {place}", content)
        except ValueError as error:
            raise CommandError(str(error)) from None
