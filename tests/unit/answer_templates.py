"""Chat templates in the manner of published ones, with marks around what the assistant writes.

Without the marks (`unmarked`) a template is what models come with; the marks are the oracle.
"""

import re

from data_cases import chat_tokenizer

CHATML = """
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN2 = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif -%}
{%- if tools %}{{ '<tools>' + (tools | tojson) + '</tools>\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}
{%- for c in m.tool_calls or [] -%}
{{ '\n' if m.content or not loop.first }}{{ '<tool_call>\n{"name": "' + c.function.name + '", ' }}
{{- '"arguments": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3 = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor -%}
{%- if tools %}{{ '<tools>' + (tools | tojson) + '</tools>\n' }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set thought, words = '', m.content -%}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in words -%}
{%- set thought = words.split('</think>')[0].split('<think>')[-1] -%}
{%- set words = words.split('</think>')[-1].lstrip('\n') %}{% endif -%}
{{ '<|im_start|>assistant\n' }}{% generation %}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif -%}
{{ words }}
{%- for c in m.tool_calls or [] -%}
{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""

LLAMA3 = """
{{- bos_token }}
{%- for m in messages -%}
{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{%- if m.role == 'assistant' %}{% generation %}
{%- if m.tool_calls -%}
{{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '}' }}
{%- else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ (m.content | trim) + '<|eot_id|>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """
{{- bos_token }}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.index0 == ns.last -%}
{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif -%}
{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}
{%- elif m.role == 'assistant' %}{% generation %}
{%- if m.tool_calls %}{{ '[CALLS]' + (m.tool_calls | map(attribute='function') | list | tojson) }}
{%- else %}{{ ' ' + m.content }}{% endif %}{{ eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('no ' + m.role) }}{% endif -%}
{%- endfor %}"""

GEMMA = """
{{- bos_token }}
{%- for m in messages -%}
{%- if m.role not in ('user', 'assistant') %}{{ raise_exception(m.role + ' is not supported') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{%- if m.role != 'assistant' %}{{ m.content | trim + '<end_of_turn>' }}
{%- else %}{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}
{%- endif %}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

PHI = """
{%- for m in messages -%}
{{ '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

DEEPSEEK = """
{{- bos_token }}
{%- for m in messages -%}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{{ '<|result|>' + m.content + '<|/result|>' }}
{%- else -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|Assistant|>' }}{% endif -%}
{%- generation %}{{ m.content.split('</think>')[-1] }}
{%- for c in m.tool_calls or [] -%}
{{ '<|call|>' + c.function.name + '\n' + (c.function.arguments | tojson) + '<|/call|>' }}
{%- endfor %}{{ eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|Assistant|>' }}{% endif %}"""

PLAIN = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '### Response:\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n\n' }}
{%- else %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "deepseek": DEEPSEEK,
    "plain": PLAIN,
}
WITH_SYSTEM = ("chatml", "qwen2", "qwen3", "llama3", "phi", "deepseek", "plain")
WITH_TOOLS = ("qwen2", "qwen3", "llama3", "mistral", "deepseek")
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|User|>"),
    *("<|Assistant|>", "[INST]", "[/INST]", "<s>", "</s>"),
)


def unmarked(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def tokenizer_of(template: str, special: tuple[str, ...] = SPECIAL):
    """Bytes and special tokens are tokens."""
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer
