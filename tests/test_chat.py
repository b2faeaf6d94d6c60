"""Chat templates: real ones as transformers renders them, hostile ones stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from minillm.chat import ChatTemplate, Message
from minillm.errors import CheckpointError, TemplateError
from minillm.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = [
    "chatml",
    "llama-2-chat",
    "llama-3-instruct",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistral-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "Qwen-Qwen2.5-7B-Instruct",
    "zephyr",
]


def say(*turns: str) -> list[Message]:
    """ "s: text" is the system's, "u: " the user's, "a: " the assistant's."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


CONVERSATIONS = {
    "one": say('u: Hello <b>&</b> "you"  '),
    "system": say("s: Be brief.\n", "u: Grüße 🦙"),
    "turns": say("u: 1", "a:  2 ", "u: 3\n", "a: 4", "u: 5"),
    "answered": say("s: S", "u: 1", "a: 2"),
    "assistant first": say("a: Hi", "u: Hello"),
    "two users": say("u: a", "u: b"),
}


def transformers_render(source: str, messages: Sequence[Message], *, prompt: bool) -> str | None:
    """What transformers makes of it; None where its template raises."""
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    tiny = PreTrainedTokenizerFast(tokenizer_object=empty, **SPECIAL)  # type: ignore[no-untyped-call]
    tiny.chat_template = source
    try:
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        return str(tiny.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt))
    except jinja2.TemplateError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_render_as_in_transformers(shared_data: Path, name: str) -> None:
    source = (shared_data / "chat-templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, SPECIAL)
    refused = 0
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            expected = transformers_render(source, messages, prompt=prompt)
            if expected is None:
                refused += 1
                with pytest.raises(TemplateError, match="must alternate"):
                    template.render(messages, add_generation_prompt=prompt)
            else:
                assert template.render(messages, add_generation_prompt=prompt) == expected
    assert refused in (0, 4)


def test_every_real_template_is_tested(shared_data: Path) -> None:
    assert {path.stem for path in (shared_data / "chat-templates").glob("*.jinja")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_turn_is_the_suffix_of_the_whole(shared_data: Path, name: str, system: str | None) -> None:
    source = (shared_data / "chat-templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, SPECIAL)
    earlier = say("u: one", "a: two", "u: three", "a: LAST-ANSWER")
    new = say("u: And now?")[0]
    whole = template.render([*(say(f"s: {system}") if system else []), *earlier, new])
    turn = template.render_turn(new, system=system)
    assert whole.endswith("LAST-ANSWER" + turn)
    assert "And now?" in turn
    assert "one" not in turn


def test_a_turn_needs_a_template_that_repeats_answers() -> None:
    only_last = ChatTemplate("{{ messages[-1].content }}", {})
    with pytest.raises(TemplateError, match="turn by turn"):
        only_last.render_turn(say("u: x")[0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_message_goes_between_what_stands_around_it(shared_data: Path, name: str) -> None:
    source = (shared_data / "chat-templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, SPECIAL)
    before, after = template.render_around(say("s: Be brief."))
    assert before + "a whole book" + after == template.render(say("s: Be brief.", "u: a whole book"))


def test_rendered_text_has_exactly_one_bos(shared_data: Path) -> None:
    folder = shared_data / "hf-metadata" / "Mistral-7B-Instruct-v0.3"
    template, tokenizer = ChatTemplate.from_folder(folder), Tokenizer.from_folder(folder)
    assert template is not None
    messages = say("s: S", "u: Hello", "a: Hi", "u: Bye")
    ids = tokenizer.encode(template.render(messages), bos=False)
    assert ids.count(1) == 1
    assert ids[0] == tokenizer.bos_id
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids == list(reference.apply_chat_template(messages, return_dict=False))


def test_the_file_of_its_own_comes_first_then_the_default_of_several(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "pad_token": None}))
    assert ChatTemplate.from_folder(tmp_path) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ pad_token }}!"}]
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "pad_token": None, "chat_template": named}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(say("u: x")) == "<s>!"
    (tmp_path / "chat_template.jinja").write_text("from the file: {{ messages[0].content }}")
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(say("u: ä")) == "from the file: ä"


@pytest.mark.parametrize(
    ("config", "error", "reason"),
    [
        ('{"chat_template": [{"name": "rag", "template": ""}]}', TemplateError, "none named 'default'"),
        ('{"chat_template": 3}', TemplateError, "is not text"),
        ('{"chat_template": ', CheckpointError, "not valid JSON"),
    ],
)
def test_unusable_configurations(tmp_path: Path, config: str, error: type[Exception], reason: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(error, match=reason):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_file_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(TemplateError, match="not UTF-8"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is not supported"),
        ([{"role": "user", "content": None}], "not text but NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "not text but list"),
    ],
)
def test_unusable_messages(messages: list[Message], reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        ChatTemplate("{{ messages }}", {}).render(messages)


def test_environment_is_that_of_transformers() -> None:
    source = (
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ [1] | tojson(indent=2, separators=(',', ':')) }}"
        "{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ tools is none }}{{ documents }}"
        "{{ strftime_now('%Y')|length }}{{ nothing }}{{ bos_token }}\n  {% if true %}\n  x\n  {% endif %}\n"
    )
    messages = say("u: A & B")
    ours = ChatTemplate(source, SPECIAL).render(messages)
    assert ours == transformers_render(source, messages, prompt=True)
    assert '{"b": "<é>", "a": [1]}' in ours


HOSTILE = {
    "endless loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "within 1 s"),
    "one long call": ("{{ 9 ** (9 ** 9) }}", "within 1 s|memory"),
    "long range": ("{{ range(10 ** 9) | length }}", "OverflowError"),
    "huge string": ("{{ ('x' * 10 ** 10) | length }}", "MiB of memory"),
    "doubling": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "memory",
    ),
    "padding": ("{{ 'x' | center(10 ** 10) }}", "MiB of memory"),
    "long output": ("{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}", "longer than"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "branching": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "within 1 s",
    ),
    "nesting": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "could not be rendered|failed"),
    "class": ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
    "attr filter": (
        "{{ ''|attr('format')|attr('__globals__') }}{{ (''|attr('__class__')).x }}",
        "SecurityError|Undefined",
    ),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "namespace": ("{% set n = namespace() %}{% set n.__html__ = range %}", "underscore"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "unknown": ("{{ raise_exception('two\nlines') }}", "two lines$"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_stopped(case: str) -> None:
    source, reason = HOSTILE[case]
    with pytest.raises(TemplateError, match=reason) as caught:
        ChatTemplate(source, {}, seconds=1.0 if "within 1 s" in reason else 30.0).render(say("u: x"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_template_may_not_be_long() -> None:
    with pytest.raises(TemplateError, match="70000 characters; the limit is 65536"):
        ChatTemplate("x" * 70_000, {})


def test_long_messages_are_no_hostility() -> None:
    content = "Ω word " * 500_000
    assert ChatTemplate("[{{ messages[0].content | trim }}]", {}).render(say("u: " + content)) == f"[{content.strip()}]"


def test_rendering_works_beside_the_main_thread() -> None:
    texts: list[str] = []
    template = ChatTemplate("{{ messages[0].content }}", {})
    threads = [threading.Thread(target=lambda i=i: texts.append(template.render(say(f"u: {i}")))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == ["0", "1", "2", "3"]
