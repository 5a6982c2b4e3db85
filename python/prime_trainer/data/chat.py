"""Chats as files have them, and the system prompt of the Eurus-2-SFT stage."""

from __future__ import annotations

from typing import Any

ROLES = ("system", "user", "assistant")


def checked(messages: Any, field: str, last: str) -> list[dict[str, str]]:
    """Returns `messages` with role and content alone. Raises ValueError unless it is a chat that ends with `last`."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{field} must be a non-empty list of messages, got {messages!r:.100}")
    found = [message(each, f"{field}[{index}]") for index, each in enumerate(messages)]
    if found[-1]["role"] != last:
        raise ValueError(f"{field} must end with a message of role {last!r}, got role {found[-1]['role']!r}")
    return found


def prompt(value: Any, field: str) -> list[dict[str, str]]:
    """A question as a chat: text becomes a user message, a chat must end with one."""
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} must be a non-empty list of messages or a string, got {value!r:.100}")
    return checked(value, field, last="user")


def asking(question: str, system_prompt: str | None) -> list[dict[str, str]]:
    """The chat of one question, after the system prompt if one is set."""
    return with_system([{"role": "user", "content": question}], system_prompt)


def with_system(messages: list[dict[str, str]], text: str | None) -> list[dict[str, str]]:
    """The chat with `text` in place of its system message; as it is where `text` is None."""
    if text is None:
        return messages
    return [{"role": "system", "content": text}, *(m for m in messages if m["role"] != "system")]


def message(value: Any, field: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{field} must be a message with role and content, got {value!r:.100}")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise ValueError(f"{field}.role must be one of {', '.join(ROLES)}, got {role!r:.100}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{field}.content must be a non-empty string, got {content!r:.100}")
    return {"role": role, "content": content}
