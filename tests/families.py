"""Chat templates of the structure of well-known families, over the tokenizer of tests/tokens.py."""

from __future__ import annotations

from tokens import CHAT

_ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "</call>{% endfor %}"
)
_TOOLS = "{% if tools %}<|system|>Tools: {{ tools | tojson }}<|end|>\n{% endif %}"

# Tools and calls, as Qwen's and Hermes' have them.
TOOLS = (
    _TOOLS + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + _CALLS + "<|end|>\n{% endfor %}" + _ASK
)  # fmt: skip
# Calls with their arguments as they are: JSON text is expected.
RAW_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name + ' ' }}{{ c.function.arguments }}</call>{% endfor %}<|end|>\n{% endfor %}" + _ASK
)
# Qwen3's: an empty or given thought before the answer to the last question, none in earlier turns.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}{{ c }}{% else %}{{ m.content }}{% endif %}<|end|>\n"
    "{% endfor %}" + _ASK
)
# R1's: no thought in any answer, and a generation prompt that opens one.
OPENS_THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1].lstrip('\n') }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Phi-3's: an end token after all.
END_AFTER_ALL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|end|>{% endif %}"
)
# Gemma's: no system message, and roles that alternate.
ALTERNATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}" + _ASK
)
# Mistral 0.3's: the system message in the last question only, and none after an answer.
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}<|user|>"
    "{% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% else %}"
    " {{ m.content }}<|end|>{% endif %}{% endfor %}"
)
# Only the roles that it knows are written.
DROPS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>\n{% elif m.role == 'assistant' %}"
    "<|assistant|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + _ASK
)
_ALTERNATES = (
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% endfor %}"
)
# Llama 3's: headers, trimmed contents.
HEADERS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
# Llama 2's: the system message inside the first question, roles that alternate, spaces around.
INSIDE_FIRST = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0].content %}{% else %}"
    "{% set rest = messages %}{% endif %}" + _ALTERNATES + "{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and s is defined %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} <|end|>{% endif %}{% endfor %}"
)
# Mistral 0.1's: no system message, no space before an answer.
BARE = (
    "{% set rest = messages %}" + _ALTERNATES + "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ m.content }} "
    "[/INST]{% else %}{{ m.content }}<|end|> {% endif %}{% endfor %}"
)
# Zephyr's and Tulu's: a role a line.
LINES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Vicuna's: names, one line, an end token after answers alone, a system message of its own.
NAMES = (
    "{% if messages[0].role != 'system' %}A chat. {% endif %}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# Command R's: a token for each part of a turn.
TURNS = (
    "{% for m in messages %}<|turn|><|{{ m.role | upper }}_TOKEN|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|><|ASSISTANT_TOKEN|>{% endif %}"
)
# Granite's: the role between two tokens.
ROLES = (
    "{% for m in messages %}<|role|>{{ m.role }}<|of|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|of|>{% endif %}"
)
# Falcon's: names and blank lines.
BLANK_LINES = (
    "{% for m in messages %}{{ {'user': 'User', 'assistant': 'Falcon', 'system': 'System'}[m.role] }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}\n\n{% endfor %}{% if add_generation_prompt %}Falcon: {% endif %}"
)
FAMILIES = {
    "chatml": CHAT, "tools": TOOLS, "raw calls": RAW_CALLS, "thinking": THINKING, "opens thinking": OPENS_THINKING,
    "end after all": END_AFTER_ALL, "alternate": ALTERNATE, "system last": SYSTEM_LAST, "drops": DROPS,
    "headers": HEADERS, "inside first": INSIDE_FIRST, "bare": BARE, "lines": LINES, "names": NAMES, "turns": TURNS,
    "roles": ROLES, "blank lines": BLANK_LINES,
}  # fmt: skip
