"""LLaVA's conversation templates as chat templates of transformers: the same prompts."""

from __future__ import annotations

from llava_hvp.checkpoints.conversation import OTHERS, default_template
from llava_hvp.errors import OptionError

# A message's pictures, then its text; a message that is text places its pictures itself.
_SAID = """{%- macro said(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
TEMPLATES = {
    "vicuna_v1": _SAID
    + """{%- if messages[0]['role'] != 'system' -%}
{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + said(message) + ' ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + said(message) + '</s>' }}
{%- else -%}{{ said(message) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
""",
    "mistral_instruct": _SAID
    + """{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '[INST] ' + said(message) + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ' + said(message) + ' </s>' }}
{%- else -%}{{ raise_exception('this template has no place for a system message') }}
{%- endif -%}
{%- endfor -%}
""",
}


def chat_template(name: str, language: str, conv_mode: str | None = None) -> str:
    """The chat template that a checkpoint of LLaVA's is asked in.

    Parameters
    ----------
    name : str
        as LLaVA calls the checkpoint
    language : str
        of its model, llama or mistral; decides where the name says nothing
    conv_mode : str | None
        LLaVA's name of the template

    Raises
    ------
    OptionError
        a template that is not written here
    """
    by_language = "mistral_instruct" if language == "mistral" else "vicuna_v1"
    by_name = default_template(name)
    chosen = conv_mode or (by_language if by_name == OTHERS else by_name)
    if chosen not in TEMPLATES:
        raise OptionError(
            f"{name} is asked in the conversation template {chosen}, which is none of "
            f"{', '.join(TEMPLATES)}: give one of these as --conv-mode"
        )
    return TEMPLATES[chosen]
