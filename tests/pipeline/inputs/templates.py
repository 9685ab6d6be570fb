"""Chat templates built as the main families of models build theirs: the same marks, order and checks, other words."""

from __future__ import annotations

from dataclasses import dataclass

_CHATML = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
_CHATML_ANSWER = "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
_ALTERNATES = (
    "{%- for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor -%}"
)


@dataclass(frozen=True)
class Family:
    """A template and the marks in it that are tokens; whether it takes a system text, and heeds enable_thinking."""

    template: str
    marks: tuple[str, ...]
    has_system: bool = True
    can_think: bool = False


FAMILIES = {
    "llama 3": Family(  # a system turn always, with dates; every content is trimmed
        "{{- bos_token }}"
        "{%- if not today is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif -%}"
        "{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif -%}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nKnows until: May\nIt is: ' + today + '\n\n' }}"
        "{{- system + '<|eot_id|>' }}"
        "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{- m.content | trim + '<|eot_id|>' }}{% endfor -%}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen 2.5": Family(  # a system text of its own where there is none
        "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou help whoever asks.<|im_end|>\n{% endif -%}"
        + _CHATML
        + _CHATML_ANSWER,
        ("<|im_start|>", "<|im_end|>"),
    ),
    "qwen 3": Family(  # an empty thought where there is to be none
        _CHATML
        + "{%- if add_generation_prompt %}<|im_start|>assistant\n"
        + "{%- if enable_thinking is defined and enable_thinking is false %}\n<think>\n\n</think>\n\n{% endif %}"
        + "{% endif -%}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        can_think=True,
    ),
    "gemma": Family(  # refuses a system role, and has a role of its own for the model
        "{{- bos_token }}"
        "{%- if messages[0].role == 'system' %}{{ raise_exception('no role for a system') }}{% endif -%}"
        "{%- set turns = messages %}" + _ALTERNATES + "{%- for m in messages %}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{- '<end_of_turn>\n' }}{% endfor -%}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif -%}",
        ("<start_of_turn>", "<end_of_turn>"),
        has_system=False,
    ),
    "mistral": Family(  # the system text goes into the last user turn; nothing asks for an answer
        "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif -%}" + _ALTERNATES + "{{- bos_token }}"
        "{%- for m in turns %}{% if m.role == 'user' %}"
        "{{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + ' [/INST]' }}"
        "{% else %}{{- ' ' + m.content + eos_token }}{% endif %}{% endfor -%}",
        ("[INST]", "[/INST]"),
    ),
    "phi 3": Family(
        "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor -%}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif -%}",
        (),
    ),
    "phi 4": Family(
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor -%}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif -%}",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "smollm 2": Family(
        "{%- for m in messages %}{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nYou are small, and help.<|im_end|>\n{% endif %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor -%}" + _CHATML_ANSWER,
        ("<|im_start|>", "<|im_end|>"),
    ),
    "smollm 3": Family(  # what it is told of thinking stands before the document
        "{{- '<|im_start|>system\nThinks: ' + ('yes' if enable_thinking else 'no') + '\n' }}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% set messages = messages[1:] %}{% endif -%}"
        "{{- '<|im_end|>\n' }}" + _CHATML + _CHATML_ANSWER,
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        can_think=True,
    ),
    "deepseek r1": Family(  # the system text without a role; has the model think whatever it is told
        "{{- bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{- '<|User|>' + m.content }}{% endif %}{% endfor -%}"
        "{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{% endif -%}",
        ("<|User|>", "<|Assistant|>", "<think>", "</think>"),
    ),
    "parts only": Family(  # a text that is no list of parts is written as nothing
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{- part.text }}{% endif %}{% endfor %}{{- '<|im_end|>\n' }}{% endfor -%}"
        + _CHATML_ANSWER,
        ("<|im_start|>", "<|im_end|>"),
    ),
    "parts only, no system": Family(
        "{%- for m in messages if m.role != 'system' %}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{- 'USER: ' + part.text + '\n' }}{% endif %}{% endfor %}{% endfor %}{{- 'MODEL:' -}}",
        (),
        has_system=False,
    ),
    "parts or text": Family(
        "{%- for m in messages %}{{- '<|' + m.role + '|>' }}{% if m.content is string %}{{- m.content }}{% else %}"
        "{% for part in m.content %}{{- '<part>' + part.text }}{% endfor %}{% endif %}{{- '<|end|>' }}{% endfor -%}"
        "{{- '<|assistant|>' -}}",
        (),
    ),
    "channels": Family(  # a system turn with the date, and the system text as a developer's instructions
        "{{- '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '\n\n# Channels: analysis, final' }}"
        "{{- '<|end|>' }}{% if messages[0].role == 'system' %}"
        "{{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}{{- '<|start|>assistant' -}}",
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>"),
    ),
    "strips and raises": Family(  # for texts that are empty; titles in capitals
        "{%- for m in messages %}{% if not m.content.strip() %}{{ raise_exception('a message is empty') }}{% endif %}"
        "{{- '### ' + m.role | upper + ':\n' + m.content.strip() + '\n\n' }}{% endfor %}{{- '### ASSISTANT:\n' -}}",
        (),
    ),
    "system last": Family(  # the system text stands behind the question, so it is put before the document instead
        "{%- for m in messages | reverse %}{{- '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
        "{{- '[assistant]' -}}",
        (),
        has_system=False,
    ),
}

# Templates that no form of messages brings through them whole, each with the reason that is given.
REFUSED = {
    "in capitals": ("{{ messages[-1].content | upper }}", "leaves out or changes text of the user's message"),
    "for HTML": ("{{ messages[-1].content | e }}", "leaves out or changes text of the user's message"),
    "only the beginning": ("{{ messages[-1].content[:2000] }}", "leaves out or changes text of the user's message"),
    "words in lines": ("{{ messages[-1].content | wordwrap(40) }}", "leaves out or changes text of the user's message"),
    "twice": (
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "writes the text of a message twice",
    ),
    "only tools": ("{{ raise_exception('this model calls tools') }}", "this model calls tools"),
    "nothing": ("<|user|><|assistant|>", "leaves out or changes text of the user's message"),
}

# By family: the prompt of the system text "Be brief.", the document "  The lease ends\nin <May>." and the query
# "When?".
PROMPTS = {
    "llama 3": (
        "<|bos|><|start_header_id|>system<|end_header_id|>\n\nKnows until: May\nIt is: 26 Jul 2024\n\n"
        "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThe lease ends\nin <May>.\n\n"
        "When?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen 2.5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  The lease ends\nin <May>.\n\n"
        "When?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen 3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  The lease ends\nin <May>.\n\n"
        "When?<|im_end|>\n<|im_start|>assistant<think>\n\n</think>\n\n"
    ),
    "gemma": (
        "<|bos|><start_of_turn>user\nBe brief.\n\n  The lease ends\nin <May>.\n\nWhen?<end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
    "mistral": "<|bos|>[INST] Be brief.\n\n  The lease ends\nin <May>.\n\nWhen? [/INST]",
    "phi 3": "<|system|>\nBe brief.<|end|>\n<|user|>\n  The lease ends\nin <May>.\n\nWhen?<|end|>\n<|assistant|>\n",
    "phi 4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>  The lease ends\n"
        "in <May>.\n\nWhen?<|im_end|><|im_start|>assistant<|im_sep|>"
    ),
    "smollm 2": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  The lease ends\nin <May>.\n\n"
        "When?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "smollm 3": (
        "<|im_start|>system\nThinks: no\nBe brief.<|im_end|>\n<|im_start|>user\n  The lease ends\nin <May>.\n\n"
        "When?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "deepseek r1": "<|bos|>Be brief.<|User|>  The lease ends\nin <May>.\n\nWhen?<|Assistant|><think>\n",
    "parts only": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  The lease ends\nin <May>.\n\n"
        "When?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "parts only, no system": "USER: Be brief.\n\n  The lease ends\nin <May>.\n\nWhen?\nMODEL:",
    "parts or text": "<|system|>Be brief.<|end|><|user|>  The lease ends\nin <May>.\n\nWhen?<|end|><|assistant|>",
    "channels": (
        "<|start|>system<|message|>Today: 2024-07-26\n\n"
        "# Channels: analysis, final<|end|><|start|>developer<|message|># Instructions\n\n"
        "Be brief.<|end|><|start|>user<|message|>  The lease ends\nin <May>.\n\nWhen?<|end|><|start|>assistant"
    ),
    "strips and raises": "### SYSTEM:\nBe brief.\n\n### USER:\nThe lease ends\nin <May>.\n\nWhen?\n\n### ASSISTANT:\n",
    "system last": "[user] Be brief.\n\n  The lease ends\nin <May>.\n\nWhen?\n[assistant]",
}
