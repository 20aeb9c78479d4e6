"""A chat template from a stranger can only render, within limits."""

import time

import pytest

from memopt.text import templates
from memopt.text.templates import PLAIN, RenderError, Template, UnusableTemplateError
from memopt.text.tokenizer import load_tokenizer
from tests.text import chat_tokenizers

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Less than usual, so that nothing takes long."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "MEMORY", 2**27)
    monkeypatch.setattr(templates, "CHARACTERS", 2**16)


def render(source, **variables):
    with Template(source, variables) as template:
        return template.render([{"messages": MESSAGES}])[0]


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
ENDLESS = "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}"

CRAFTED = {
    "'a' * 10**12": ("{{ messages[0].content * 10**12 }}", "needs more than 128 MiB"),
    "'a' * 10**8": ("{{ messages[0].content * 10**8 }}", "needs more than 128 MiB"),
    "doubled in a loop": (DOUBLED, "needs more than 128 MiB"),
    "a width": ("{{ '%1000000000d' % 1 }}", "needs more than 128 MiB"),
    "a long output": ("{% for i in range(99999) %}{{ i }}{% endfor %}", "renders 488,885 charac"),
    "a range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "without end": (ENDLESS, "recursion"),
    "python": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "'__class__' of 'str' object is un",
    ),
    "a method": ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
    "globals": ("{{ namespace.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
    "a namespace": ("{% set n = namespace(__class__=1) %}", "has no attribute '__class__'"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a sentence": ("{{ raise_exception('no system role') }}", "no system role"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_template_that_wants_too_much_is_refused_in_a_sentence(name):
    source, reason = CRAFTED[name]
    began = time.monotonic()
    with pytest.raises((RenderError, UnusableTemplateError), match=reason):
        render(source)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("source", [LOOP, "{{ 3 ** (3 ** (3 ** 3)) }}"])
def test_a_template_that_computes_for_hours_is_ended(source):
    with pytest.raises(
        (RenderError, UnusableTemplateError), match=r"computes for more than 0\.5 seconds"
    ):
        render(source)


def test_a_conversation_that_takes_too_long_is_one_and_the_third_ends_all():
    source = f"{{% if messages %}}{LOOP}{{% endif %}}fine"
    with Template(source, {}) as template:
        for error in (RenderError, RenderError, UnusableTemplateError):
            with pytest.raises(error, match="computes for more than"):
                template.render([{"messages": MESSAGES}])
            if error is RenderError:
                assert template.render([{"messages": []}]) == ["fine"]


def test_a_conversation_too_long_for_the_process_is_refused_alone(monkeypatch):
    monkeypatch.setattr(templates, "QUESTION", 1000)
    with Template(PLAIN, {"eos_token": "|"}) as template:
        with pytest.raises(RenderError, match="longer than"):
            template.render([{"messages": [{"role": "user", "content": "é" * 200}]}])
        assert template.render([{"messages": MESSAGES}])


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% unknown %}", "{{" + "(" * 20_000])
def test_what_is_no_template_is_refused(source):
    with pytest.raises(UnusableTemplateError, match="chat template is no template: "):
        render(source)


def test_a_template_goes_on_after_a_conversation_that_it_refuses():
    source = "{% if messages %}{{ raise_exception('none, please') }}{% endif %}fine"
    with Template(source, {}) as template:
        with pytest.raises(RenderError, match="none, please"):
            template.render([{"messages": MESSAGES}])
        assert template.render([{"messages": []}] * 2) == ["fine", "fine"]


def test_its_process_ends_with_it():
    with Template(PLAIN, {"eos_token": "|"}) as template:
        process = template._process
        assert process.poll() is None
    assert process.poll() is not None


def test_the_date_is_always_the_same_and_json_is_not_escaped_for_html():
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "Hello"}]'
    assert render("{{ {'a': '<é>'} | tojson(indent=1) }}") == '{\n "a": "<é>"\n}'


def test_blocks_take_no_lines_and_loops_can_be_left():
    loop = "{% for i in range(9) %}\n    {% if i == 2 %}\n{% break %}\n{% endif %}\n"
    source = loop + "{{ i }}\n{% endfor %}"
    assert render(source) == "0\n1\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_template.jinja", b"\xff\xfe\x00bad", "chat_template .* is not text"),
        (
            "tokenizer_config.json",
            b'{"chat_template": {"a": 1}}',
            "chat_template in .* must be tex",
        ),
        ("tokenizer_config.json", b"[1, 2]", "must hold a JSON object"),
        ("tokenizer_config.json", b"[" * 200_000, "is not valid JSON: it is nested too deeply"),
        ("tokenizer.json", b"\x80\x04\x95pickle", "tokenizer.json' cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer.json' cannot be read"),
        ("tokenizer.json", b"[" * 200_000, "tokenizer.json' cannot be read"),
    ],
)
def test_a_file_of_a_tokenizer_that_is_no_such_thing_is_refused(tmp_path, name, content, reason):
    chat_tokenizers.write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(str(tmp_path))


def test_the_default_one_of_several_templates_is_taken(tmp_path):
    chat_tokenizers.write(tmp_path)
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(
        f'{{"chat_template": {named}}}'.replace("'", '"')
    )
    assert load_tokenizer(str(tmp_path)).chat_template == "b"
