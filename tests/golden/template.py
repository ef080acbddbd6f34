"""Writes template.json: small chat templates and what Jinja2 makes of them, with the settings of
the Python package transformers. Run it with Jinja2 3.1: python3 tests/golden/template.py"""

import datetime
import json
import pathlib

import jinja2
import jinja2.ext
import jinja2.sandbox

NOW = datetime.datetime(2026, 11, 24, 9, 5, 7, 123456)
MESSAGES = [
    {"role": "system", "content": "  Be brief.  "},
    {"role": "user", "content": "Größe <b>&\"'\\ \n\t\u0007 🦀"},
    {"role": "assistant", "content": "a,b,,c", "n": [1, -2, 2.5, 1e300, 1e-7, None, True], "d": {"z": 1, "a": {}, "l": []}},
]

CASES = r"""
{{ messages[2] | tojson }}
{{ messages | tojson(indent=2) }}
{{ messages[1] | tojson(ensure_ascii=True) }}
{{ messages[2].d | tojson(sort_keys=true) }}{{ messages[2].d | tojson(indent=0) }}
{{ messages[2].d | tojson(separators=(',', ':')) }}{{ messages[2].d | tojson(false, 4, none, true) }}
{{ [0.1, 1.0, 1e16, 1e15, 123456789.125, 0.0001, 0.00001, 1e22, -0.0, 5e-324] | tojson }}
{{ {1: 2, false: 3, none: 4, 1.5: 5} | tojson }}
{{ (1, 'a') | tojson }}{{ [] | tojson }}{{ {} | tojson(indent=2) }}
{{ none }} {{ true }} {{ false }} {{ 1.0 }} {{ undefined_thing }}|
{{ [1, 'a', none, true, 2.5] }} {{ {'k': 'v', 'n': [1]} }} {{ ('x',) }}
{{ strftime_now('%Y-%m-%d %H:%M:%S') }}|{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%A %-d %B, %j %p %I %y %%f %f') }}
{{ strftime_now('%Z%z') }}|{{ strftime_now('plain Größe') }}
{%- for m in messages -%} {{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} {{ m.role }}; {%- endfor %}
{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }},{% endfor %}
{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.role }},{% endfor %}
{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }} {% endfor %}
{% for m in messages if m.role != 'system' %}{{ m.role }}{% else %}none{% endfor %}{% for m in [] %}x{% else %}none{% endfor %}
{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}
{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}
{% set block %}a{{ 1 + 1 }}b{% endset %}[{{ block }}]
{% macro tag(name, kind='p') %}<{{ kind }}>{{ name }}</{{ kind }}>{% endmacro %}{{ tag('x') }}{{ tag('y', kind='q') }}
{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}
{% generation %}kept{% endgeneration %}{%- generation -%} trimmed {%- endgeneration -%} end {% raw %}{% generation %}{{ x }}{% endraw %}
{% if messages %}  yes  {% endif %}\n   {% if true %}   \n  inner\n   {% endif %}\nafter\n
  {%- if true %}\n a {# comment {{ x }} #}\n{# whole line #}\n  b\n{%- endif -%}  \n c
  {%+ if true %}x{% endif %}\n\ty{% if true +%}\nz{% endif %}
line\r\n  {% if true %}\r\nx\r\n{% endif %}\r\nend
trailing\n\n
{{ ' a b '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xxaxx'.lstrip('x') }}|{{ 'xxaxx'.rstrip('x') }}|{{ '\n\na\n'.lstrip('\n') }}
{{ 'a b  c'.split() }}{{ 'a,b,,c'.split(',') }}{{ 'a,b,c'.split(',', 1) }}{{ 'a</think>b'.split('</think>')[-1] }}{{ ''.split(',') }}
{{ 'a,b,c'.rsplit(',', 1) }}{{ 'k=v=w'.partition('=') }}{{ 'k=v=w'.rpartition('=') }}{{ 'kv'.partition('=') }}{{ 'kv'.rpartition('=') }}
{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abc'.find('c') }}{{ 'abc'.find('x') }}{{ 'aXbX'.replace('X', '-') }}{{ 'aXbX'.replace('X', '-', 1) }}
{{ 'abc'.upper() }}{{ 'ABC'.lower() }}{{ 'hello world'.title() }}{{ 'hELLO wORLD'.capitalize() }}{{ '-'.join(['a', 'b']) }}{{ 'abab'.count('ab') }}
{{ 'a b'.removeprefix('a') }}{{ 'a b'.removesuffix('b') }}{{ 'a b'.removeprefix('b') }}{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'ab'.isalpha() }}{{ ' '.isspace() }}
{{ 'a\nb\nc'.splitlines() }}{{ '{} is {}'.format('x', 2) }}{{ '%s-%d' | format('x', 3) }}{{ 'Größe🦀' | length }}{{ 'Größe🦀'[3:] }}{{ 'abcdef'[::-1] }}{{ 'abcdef'[-2] }}
{{ messages[2].d.items() | list }}{{ messages[2].d.keys() | list }}{{ messages[2].d.get('z') }}{{ messages[2].d.get('q') }}{{ messages[2].d.get('q', 7) }}{{ messages[2].d.values() | list }}
{% for k, v in messages[2].d.items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in messages[2].d | items %}{{ k }}={{ v }};{% endfor %}{% for k, v in messages[2].d | dictsort %}{{ k }};{% endfor %}
{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | join('+') }}
{{ [3, 1, 2] | sort }}{{ [3, 1, 2] | sort(reverse=true) | first }}{{ [1, 2, 3] | last }}{{ [1, 2, 3] | sum }}{{ [1, 2] | max }}{{ [1, 1, 2] | unique | list }}{{ 'abc' | reverse }}{{ [1, 2] | reverse | list }}
{{ messages[0].content | trim }}|{{ 'x' | default('y') }}|{{ nothing | default('y') }}|{{ '' | default('y', true) }}|{{ none | default('y') }}|{{ 'a b' | upper | replace('A', 'c') }}
{{ messages[0] is mapping }}{{ messages is iterable }}{{ 'a' is string }}{{ 1 is number }}{{ 1.5 is float }}{{ none is none }}{{ x is defined }}{{ x is not defined }}{{ true is boolean }}{{ messages is sequence }}{{ 3 is odd }}{{ 4 is divisibleby 2 }}
{{ tools is none }}{{ tools is defined }}{{ documents is defined }}{{ custom_thing is defined }}{{ not tools }}{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}
{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ 'a' ~ 1 ~ none }} {{ 'ab' * 3 }} {{ [1] + [2] }} {{ 1 < 2 <= 2 }} {{ 'a' in 'abc' }} {{ 'role' in messages[0] }} {{ 4 not in [1] }}
{{ 'a' if false }}|{{ 'a' if true else 'b' }}|{{ (1, 2)[0] }}|{{ messages[-1].role }}|{{ messages[1:] | length }}|{{ messages[9] is defined }}|{{ messages[0]['nothing'] is defined }}
{{ range(3) | list }}{{ range(1, 10, 4) | list }}{{ dict(a=1) }}{{ 'x' | string }}{{ '3' | int + 1 }}{{ '2.5' | float }}{{ 2.567 | round(1) }}{{ -3 | abs }}{{ 'a b' | title }}
{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'abc' | list }}|{{ [[1, 2], [3]] | map('length') | list }}|{{ ['a', 'B'] | map('upper') | join(',') }}|{{ '<b>' | escape }}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% filter upper %}abc{% endfilter %}{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ loop is defined }}
{% call(x) wrap() %}inner {{ x }}{% endcall %}
{% macro wrap() %}[{{ caller('v') }}]{% endmacro %}{% call(x) wrap() %}inner {{ x }}{% endcall %}
{{ ''.__class__ }}|{{ messages.__class__ is defined }}
{{ ''.__class__.__mro__ }}
{{ nothing.attribute }}
{{ raise_exception('Only user and assistant roles\nare supported!') }}
{% macro refuse() %}{{ raise_exception('inside') }}{% endmacro %}{% for m in messages %}{{ refuse() }}{% endfor %}
{{ 'a' + 1 }}
{{ messages | nofilter }}
{% if true %}open
{{ 1 +* 2 }}
{% for x in 5 %}{% endfor %}
{{ nothing() }}
{{ 'a'.nomethod() }}
{{ nothing | tojson }}
{{ 1 / 0 }}
{% include '/etc/passwd' %}
{% import '/etc/passwd' as x %}
{% extends 'base' %}
"""


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(text):
    raise jinja2.exceptions.TemplateError(text)


environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = NOW.strftime


def case(line):
    # "\n" outside of a tag is written as such in the list above.
    source = line if line.startswith("{{") else line.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    try:
        text = environment.from_string(source).render(
            messages=MESSAGES, tools=None, documents=None, add_generation_prompt=True,
            bos_token="<s>", eos_token="</s>",
        )
        return {"template": source, "expected": text}
    except jinja2.exceptions.TemplateError as error:
        raised = type(error) is jinja2.exceptions.TemplateError
        return {"template": source, "raised": str(error)} if raised else {"template": source}
    except Exception:
        return {"template": source}


cases = [case(line) for line in CASES.strip("\n").split("\n")]
lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases)
messages = json.dumps(MESSAGES, ensure_ascii=False)
path = pathlib.Path(__file__).with_suffix(".json")
path.write_text(f'{{"now": "{NOW.isoformat()}", "messages": {messages}, "cases": [\n{lines}\n]}}\n')
