"""A model that chats, for tests of agents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.support.paths import TINY

TEMPLATE = (
    "<pad>{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""Append-only."""
FORGETFUL = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if loop.revindex0 < 2 else '' }}")
"""Drops what was said before the last two messages."""


def chat_model(folder: Path, template: str = TEMPLATE) -> Path:
    """The quick start's model with a chat template."""
    folder.mkdir()
    for path in TINY.iterdir():
        if not path.name.startswith("tokenizer"):
            (folder / path.name).symlink_to(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
