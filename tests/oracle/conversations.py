"""Conversations for the chat templates beside this file, and what else the templates are given."""

from __future__ import annotations

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How warm is it? <b>&amp;</b> größer",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Köln", "東京"]}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
_CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {}, "return": "str"},
}
_CALL = {
    "id": "abc123xyz",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "days": 2}},
}
_ASK = {"role": "user", "content": "  Where is the harbour? "}
_ANSWER = {"role": "assistant", "content": " Down by the water.\n"}
_RULES = {"role": "system", "content": 'Speak <plainly> & "briefly".'}

CONVERSATIONS: list[tuple[list[dict], dict]] = [
    ([_ASK], {}),
    ([_ASK], {"add_generation_prompt": True}),
    ([_RULES, _ASK], {"add_generation_prompt": True}),
    (
        [_RULES, _ASK, _ANSWER, {"role": "user", "content": "And the 🏠?\n\n<s>[INST] 你好 </s>"}],
        {"add_generation_prompt": True},
    ),
    ([_ASK, _ANSWER], {"date_string": "1 May 2031"}),
    ([_ASK, _ANSWER, _ASK, _ANSWER, _ASK], {"add_generation_prompt": True, "date_string": "1 May 2031"}),
    ([_ASK, _ASK], {}),
    ([_ANSWER], {"add_generation_prompt": True}),
    ([{"role": "wizard", "content": "x"}], {}),
    ([{"role": "user", "content": ""}], {"add_generation_prompt": True}),
    ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is that?"}]}], {}),
    ([_ASK], {"add_generation_prompt": True, "tools": [_WEATHER]}),
    (
        [
            _RULES,
            _ASK,
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "21.5", "tool_call_id": "abc123xyz", "name": "weather"},
        ],
        {"add_generation_prompt": True, "tools": [_WEATHER, _CLOCK]},
    ),
    (
        [
            _ASK,
            {"role": "assistant", "tool_calls": [_CALL, _CALL], "content": "Let me see."},
            {"role": "tool", "content": "1", "tool_call_id": "abc123xyz"},
            {"role": "tool", "content": "2", "tool_call_id": "abc123xyz"},
            _ANSWER,
        ],
        {"tools": [_CLOCK]},
    ),
    ([_ASK, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThere."}], {}),
    ([_ASK, {"role": "assistant", "content": "There.", "reasoning": "Hm."}], {"add_generation_prompt": True}),
    (
        [_ASK, {"role": "note", "content": "-"}, _ANSWER, _ASK],
        {"add_generation_prompt": True, "enable_thinking": False},
    ),
    ([_ASK, _ANSWER], {"documents": [{"title": "Map", "text": "Harbour: south."}, {"title": "<i>", "text": "é"}]}),
    (
        [{"role": "user", "content": "hi", "name": "ann"}, _ANSWER, _ASK, _ANSWER],
        {"documents": [], "bos_token": "<other>"},
    ),
]
"""Messages, and what else `apply_chat_template` is given. Not every template takes every conversation."""
