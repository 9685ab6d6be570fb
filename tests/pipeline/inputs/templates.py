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
}
