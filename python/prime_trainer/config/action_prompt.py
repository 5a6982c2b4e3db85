"""The action-centric system prompt of the Eurus-2-SFT stage."""

from __future__ import annotations

ACTIONS = {
    "ASSESS": "take stock of the problem: what is given, what is asked, which routes there are",
    "ADVANCE": "go one step further on the chosen route: calculate, derive or write the next part",
    "VERIFY": "check a result so far, by another way or by putting it in",
    "SIMPLIFY": "break a part into easier ones or rewrite it in an easier form",
    "SYNTHESIZE": "put partial results together",
    "PIVOT": "give up a route that does not lead on and choose another, saying why",
    "OUTPUT": "state the final answer; nothing comes after it",
}


ACTION_PROMPT = "\n".join(
    [
        "You solve the task in steps. Every step is one of these actions:",
        "",
        *(f"[{name}] {what}" for name, what in ACTIONS.items()),
        "",
        "Write each step in this form, and begin with the action that the task calls for:",
        "",
        "[ACTION NAME]",
        "# what you think, on lines that each begin with #",
        "Next action: [NEXT ACTION NAME]",
        "",
        "The last step is [OUTPUT] and names no next action.",
    ]
)


def system_prompt(text: str | None) -> str | None:
    """`actions` stands for the action-centric prompt."""
    return ACTION_PROMPT if text == "actions" else text
