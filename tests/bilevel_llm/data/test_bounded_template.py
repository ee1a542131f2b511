"""Templates are rendered as transformers renders them, and are stopped when they run on or build gigabytes."""

from collections.abc import Callable
from typing import Any

import pytest

from bilevel import InputError
from bilevel_llm.data import bounded_template
from bilevel_llm.data.bounded_template import BoundedTemplate, LimitExceeded
from bilevel_llm.data.chat import Encoder
from bilevel_llm.data.chat_template import RunawayTemplateError
from bilevel_llm.data.rows import Row, Turn
from tests.bilevel_llm.tiny import CHATML, make_tokenizer

QWEN = """
{%- if tools %}{{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" ~ system_message ~ "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """{%- macro turn(text, close=true) -%}[INST] {{ text | replace('[', '(') }}{% if close %} [/INST]{% endif %}{%- endmacro -%}
{{ bos_token }}{% set loop_messages = [] %}{% for message in messages if message.role != 'system' %}
{% set loop_messages = loop_messages + [message] %}{% endfor %}
{% for message in messages %}
{% if message['role'] not in ['user', 'assistant', 'system'] %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}
{% if message.role == 'assistant' %} {{ '%s' % message.content }}{{ eos_token }}{% continue %}{% endif %}
{{ turn(message['content'], close=not loop.last) }}{{ {'n': loop.index, 'w': message.content.split()} | tojson(indent=2) }}
{% endfor %}{{ ['a', 'b'] | join(', ') | upper }}{{ "{:>6}".format(messages|length) }}{% set x %}  kept {% endset %}{{ x * 2 }}
"""
MARKED = CHATML.replace("{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}")
TEMPLATES = [CHATML, QWEN, LLAMA, MISTRAL, MARKED]


def talk(text: str = "a [b] c", **last: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": " be\n brief "},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"},
        {"role": "user", "content": "ünd? \n"},
        {"role": "assistant", "content": "so", **last},
    ]


@pytest.mark.parametrize("source", TEMPLATES, ids=["chatml", "qwen", "llama", "mistral", "marked"])
@pytest.mark.parametrize("messages", [talk(), talk()[1:2], talk("x" * 9_000), talk(reasoning_content="hm")])
def test_the_text_is_that_of_transformers(source: str, messages: list[dict[str, str]]) -> None:
    tokenizer = make_tokenizer(source)
    template = BoundedTemplate(source)
    for prompt in (True, False):
        variables: dict[str, Any] = {
            **tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert template.render(messages, **variables) == expected
        assert template.render_marked(messages, **variables)[0] == expected


LONG = "{% set t = 'x' * 99999 %}"
GROW = "{% set ns = namespace(s='x', l=[1]) %}{% for i in range(60) %}"
RUNAWAY = [
    "{{ 'x' * 10**11 }}",
    "{{ [0] * 10**11 }}",
    "{{ 2**(10**11) }}",
    "{{ '%099999999999d' % 1 }}",
    "{{ '%*d' % (10**11, 1) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**11) }}",
    "{{ '%s' | format('x' * 10**11) }}",
    "{{ 'x'.ljust(10**11) }}",
    "{{ ('x' | attr('zfill'))(10**11) }}",
    "{{ 'x' | center(10**11) }}",
    "{{ (1).to_bytes(10**11) }}",
    "{{ [1] | tojson(indent=10**11) }}",
    "{% filter center(10**11) %}a{% endfilter %}",
    "{{ ('a\n' * 9999) | indent('x' * 9999) }}",
    "{{ range(99999) | map('center', 99999) | join }}",
    "{{ ([nothing] * 9999) | map('default', 'x' * 9999) | join }}",
    LONG + "{{ t | replace('x', t) }}",
    LONG + "{{ t.replace('x', t) }}",
    LONG + "{{ t.join(range(99999) | map('string')) }}",
    LONG + "{% set s %}{% for i in range(99999) %}{{ t }}{% endfor %}{% endset %}",
    LONG + "".join(f"{{% set s{i} = t[1:] %}}" for i in range(99)),
    GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l | tojson }}",
    GROW + "{% set ns.l = namespace(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "{% set s %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endset %}",
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "CHARACTERS", 200_000)


@pytest.mark.parametrize("source", RUNAWAY)
def test_a_template_that_runs_on_or_builds_too_much_is_stopped(source: str, small: None) -> None:
    template = BoundedTemplate(source)
    with pytest.raises(LimitExceeded, match="more than"):
        template.render(talk())


def test_a_template_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "SECONDS", 0.01)
    template = BoundedTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(LimitExceeded, match="takes more than 0 seconds"):
        template.render(talk())


def test_a_source_of_megabytes_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="is longer than"):
        BoundedTemplate("x" * 2_000_000)


@pytest.mark.parametrize("source", [CHATML + RUNAWAY[0], MARKED + RUNAWAY[-1]])
@pytest.mark.parametrize("on_bad", [pytest.fail, None])
def test_a_stopped_template_is_named_and_is_never_a_matter_of_one_row(
    source: str, on_bad: Callable[..., Any] | None, small: None
) -> None:
    tokenizer = make_tokenizer(source)
    tokenizer.name_or_path = "models/sly"
    row = Row((Turn("user", "a"), Turn("assistant", "b")), "chat.jsonl:3")
    encoder = Encoder(tokenizer)
    with pytest.raises(
        RunawayTemplateError, match=r"chat.jsonl:3: the chat template of models/sly was stopped: it makes more"
    ):
        encoder.encode_usable([row], on_bad) if on_bad else encoder.encode([row])
    assert issubclass(RunawayTemplateError, InputError)


def test_a_long_conversation_is_written(small: None) -> None:
    messages = [{"role": role, "content": f"{i} " * 400} for i in range(100) for role in ("user", "assistant")]
    for source in (CHATML, QWEN):
        assert "99 99" in BoundedTemplate(source).render(messages, add_generation_prompt=False)
