"What would bore a reader of nbs/api/19_widgets.ipynb: each field type, refusals, cancelling, a shared model."

import threading
import time
from types import SimpleNamespace
from typing import Literal

import ipywidgets
import pytest
import torch
from pydantic import Field

from truthgpt_nb import configs
from truthgpt_nb.configs import GenerationConfig, ProfileConfig, config, from_dict, to_dict
from truthgpt_nb.core import ConfigError, InputError
from truthgpt_nb.ragged import RaggedModel
from truthgpt_nb.text import TextGenerator
from truthgpt_nb.widgets import ProfilePanel, SettingsForm, TextPanel, _Task

CONFIGS = [cls for cls in vars(configs).values() if isinstance(cls, type) and hasattr(cls, "__pydantic_fields__")]
LIMIT = 60  # seconds for what takes a moment: reached only where something hangs


class Stream:
    "Pieces as `TextGenerator.stream` gives them; each waits for `go` where one is given."

    def __init__(self, pieces, cancel, go=None, cached=False):
        self.pieces, self.cancel, self.go, self.result, self.given, self.closed = (
            iter(pieces),
            cancel,
            go,
            None,
            0,
            False,
        )
        self.cached = cached

    def __iter__(self):
        return self

    def __next__(self):
        if self.go is not None:
            assert self.go.acquire(timeout=LIMIT)
        if self.cancel.is_set():
            raise StopIteration
        piece = next(self.pieces, None)
        if piece is None:
            facts = {"cached": self.cached, "seconds": 0.5, "tokens_per_second": 6.0, "finish_reason": "stop"}
            self.result = SimpleNamespace(text="", **facts)
            raise StopIteration
        self.given += 1
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self):
        self.closed = True


class Fake:
    "A generator that writes given pieces, and remembers what it was asked."

    def __init__(self, *pieces, go=None):
        self.pieces, self.go, self.asked, self.streams = pieces, go, [], []

    def stream(self, prompt, cancel, **settings):
        self.asked.append((prompt, settings))
        self.streams.append(Stream(self.pieces, cancel, self.go, cached=len(self.asked) > 1))
        return self.streams[-1]


def line(panel):
    return panel._task.line.value


def until(ready):
    end = time.monotonic() + LIMIT
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def ready(panel):
    return not panel.write_button.disabled and panel.cancel_button.disabled


# forms


@config
class Everything:
    "One setting of each type."

    flag: bool = Field(default=True, description="a yes or no")
    count: int = Field(default=3, ge=1, description="a whole number")
    share: float = Field(default=0.5, le=1, description="a number")
    name: str = Field(default="x", description="a line")
    kind: Literal["a", "b"] = Field(default="b", description="one of two")
    words: tuple[str, ...] = Field(default=("one", " two"), description="some lines")
    maybe_count: int | None = Field(default=None, description="a whole number or none")
    maybe_share: float | None = Field(default=None, gt=0, description="a number or none")
    maybe_name: str | None = Field(default=None, description="a line or none")
    maybe_kind: Literal["a", "b"] | None = Field(default=None, description="one of two or none")


@pytest.mark.parametrize(
    ("name", "widget", "entered", "value"),
    [
        ("flag", ipywidgets.Checkbox, False, False),
        ("count", ipywidgets.IntText, 8, 8),
        ("share", ipywidgets.FloatText, 0.25, 0.25),
        ("name", ipywidgets.Text, "a $name$", "a $name$"),
        ("kind", ipywidgets.Dropdown, "a", "a"),
        ("words", ipywidgets.Textarea, "END\n\\n\n\n a\\\\b ", ("END", "\n", " a\\b ")),
        ("maybe_count", ipywidgets.Text, " 7 ", 7),
        ("maybe_count", ipywidgets.Text, str(2**62 + 1), 2**62 + 1),
        ("maybe_count", ipywidgets.Text, "", None),
        ("maybe_share", ipywidgets.Text, "1e-3", 0.001),
        ("maybe_name", ipywidgets.Text, "Ann", "Ann"),
        ("maybe_name", ipywidgets.Text, "", None),
        ("maybe_kind", ipywidgets.Dropdown, "b", "b"),
        ("maybe_kind", ipywidgets.Dropdown, None, None),
    ],
)
def test_each_type_has_its_widget(name, widget, entered, value):
    form = SettingsForm(Everything)
    assert type(form.fields[name]) is widget
    form.fields[name].value = entered
    assert form.value[name] == value
    assert getattr(form.config(), name) == value


def test_a_type_without_a_widget_is_refused():
    @config
    class Nested:
        "A mapping."

        inner: dict[str, int] = Field(default={}, description="a mapping")

    with pytest.raises(ConfigError, match="inner must be of a type that has a field"):
        SettingsForm(Nested)


@pytest.mark.parametrize("cls", [*CONFIGS, Everything], ids=lambda cls: cls.__name__)
def test_a_form_gives_what_it_was_given(cls):
    assert SettingsForm(cls).config() == cls()
    form = SettingsForm(cls)
    for name, field in form.fields.items():
        assert field.description == name and len(field.tooltip) > 10
    other = from_dict(
        cls, to_dict(cls()) | ({"stop": ["\n", "\\n"], "max_new_tokens": 5} if "stop" in form.fields else {})
    )
    assert SettingsForm(cls, {name: getattr(other, name) for name in form.fields}).config() == other


def test_all_configs_were_found():
    assert {GenerationConfig, ProfileConfig} < set(CONFIGS) and len(CONFIGS) >= 7


@pytest.mark.parametrize(
    ("name", "entered", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens should be greater than or equal to 1, got 0"),
        ("top_k", "many", "top_k should be a valid integer"),
        ("top_k", "3.5", "top_k should be a valid integer"),
        ("top_p", "nan", "top_p"),
        ("temperature", 0.7, "temperature has an effect only with do_sample=True"),
        ("repetition_penalty", float("inf"), "repetition_penalty"),
    ],
)
def test_what_the_config_refuses_is_one_line_and_nothing_runs(name, entered, message):
    generator = Fake("never")
    panel = TextPanel(generator)
    panel.settings.fields[name].value = entered
    panel.start()
    assert panel.wait(LIMIT) and message in line(panel) and "\n" not in line(panel) and "Traceback" not in line(panel)
    assert isinstance(panel.error, ConfigError) and generator.asked == [] and ready(panel)


def test_settings_to_begin_with_are_checked():
    with pytest.raises(ConfigError, match="Did you mean 'max_new_tokens'"):
        TextPanel(Fake(), max_tokens=3)
    with pytest.raises(ConfigError, match="top should be greater"):
        ProfilePanel(torch.nn.Linear(2, 2), torch.ones(1, 2), top=0)


# writing


def test_the_pieces_and_the_settings_arrive():
    generator = Fake(" there", " was", "")
    panel = TextPanel(generator, prompt="Once", max_new_tokens=7, stop=("\n",))
    assert "batch_size" not in panel.settings.fields
    for fact in ("6 tokens/s, 500 ms, ended by stop", "from the cache"):
        panel.write_button.click()
        assert panel.wait(LIMIT) and panel.error is None
        assert "Once</span> there was</div>" in panel.output.value and fact in line(panel)
    prompt, settings = generator.asked[0]
    assert (prompt, settings["max_new_tokens"], settings["stop"]) == ("Once", 7, ("\n",))
    assert GenerationConfig(**settings) == GenerationConfig(max_new_tokens=7, stop=("\n",))
    assert all(stream.closed for stream in generator.streams)


def test_markup_is_shown_as_it_is_written():
    panel = TextPanel(Fake("<img src=x onerror=alert(1)>", "&lt;", ValueError("<i>no</i>")), prompt="<b>bold</b>")
    panel.start()
    panel.wait(LIMIT)
    for shown in (panel.output.value, line(panel)):
        assert not any(tag in shown for tag in ("<img", "<b>", "<i>"))
    assert "&lt;i&gt;no" in line(panel)


def test_a_second_click_does_nothing_while_it_writes():
    generator = Fake("a", "b", go=(go := threading.Semaphore(0)))
    panel = TextPanel(generator)
    panel.write_button.click()
    assert panel.write_button.disabled and not panel.cancel_button.disabled
    panel.write_button.click()
    panel.start()
    assert not panel.wait(0.01)
    go.release(3)
    assert panel.wait(LIMIT) and len(generator.asked) == 1 and ready(panel)


def test_cancel_stops_within_a_piece_and_keeps_what_there_is():
    generator = Fake(*"abcdefgh", go=(go := threading.Semaphore(0)))
    panel = TextPanel(generator, prompt="> ")
    panel.start()
    go.release(3)
    until(lambda: generator.streams and generator.streams[0].given == 3)
    panel.cancel_button.click()
    assert "Cancelling" in line(panel)
    go.release(1)
    assert panel.wait(LIMIT) and generator.streams[0].given == 3 and generator.streams[0].closed
    assert "</span>abc</div>" in panel.output.value and "Cancelled" in line(panel)
    assert panel.result is None and panel.error is None and ready(panel)
    go.release(20)
    panel.start()
    assert panel.wait(LIMIT) and "abcdefgh" in panel.output.value  # a cancelled run leaves nothing behind


def test_cancel_while_nothing_is_at_work_does_nothing():
    panel = TextPanel(Fake("a"))
    panel.cancel()
    panel.start()
    assert panel.wait(LIMIT) and "a</div>" in panel.output.value


@pytest.mark.parametrize(
    "error", [InputError("prompt", "must not be empty", "", "Pass one."), RuntimeError("two\nlines")]
)
def test_an_error_is_one_line_and_the_next_run_works(error):
    generator = Fake("a", error)
    panel = TextPanel(generator)
    panel.start()
    assert panel.wait(LIMIT) and panel.error is error and "\n" not in line(panel) and 'role="alert"' in line(panel)
    assert ready(panel) and generator.streams[0].closed
    generator.pieces = ("fine",)
    panel.start()
    assert panel.wait(LIMIT) and panel.error is None and "fine" in panel.output.value and "alert" not in line(panel)


def test_a_panel_that_is_closed_stops_and_cannot_start():
    generator = Fake(*"abcdefgh", go=(go := threading.Semaphore(0)))
    panel = TextPanel(generator)
    panel.start()
    go.release(2)
    until(lambda: generator.streams and generator.streams[0].given == 2)
    panel.close()
    go.release(20)
    assert panel.wait(LIMIT) and generator.streams[0].given <= 3 and generator.streams[0].closed
    with pytest.raises(InputError, match="panel must not be closed"):
        panel.start()
    panel.close()


def test_two_panels_write_at_the_same_time():
    generator = Fake("a", "b", go=(go := threading.Semaphore(0)))
    panels = [TextPanel(generator, prompt=prompt) for prompt in ("one ", "two ")]
    for panel in panels:
        panel.start()
    until(lambda: len(generator.asked) == 2)
    panels[0].cancel()
    go.release(20)
    assert all(panel.wait(LIMIT) for panel in panels)
    assert "Cancelled" in line(panels[0]) and "two </span>ab" in panels[1].output.value
    assert sorted(prompt for prompt, _ in generator.asked) == ["one ", "two "]


# the real generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return TextGenerator("tiny-english", cache_dir=tmp_path_factory.mktemp("cache"))


def test_cancel_stops_the_model_itself(generator, monkeypatch):
    forwards, three, real = [], threading.Event(), RaggedModel.forward

    def count(self, parts):
        forwards.append(time.monotonic())
        if len(forwards) == 3:
            three.set()
            assert cancelled.wait(LIMIT)
        return real(self, parts)

    plain = TextGenerator(generator.text_model, use_cache=False)
    cancelled, panel = threading.Event(), TextPanel(plain, prompt="The ship sailed", max_new_tokens=200)
    plain.generate("The ship", 2)  # whatever is done once is done
    monkeypatch.setattr(RaggedModel, "forward", count)
    panel.start()
    assert three.wait(LIMIT)
    panel.cancel()
    cancelled.set()
    assert panel.wait(LIMIT)
    assert len(forwards) == 3 and panel.result is None and "Cancelled" in line(panel)  # the token at work was the last


def test_two_panels_share_a_generator_and_its_cache(generator):
    alone = TextGenerator(generator.text_model, use_cache=False)
    panels = [TextPanel(generator, prompt=prompt, max_new_tokens=12) for prompt in ("The king", "A letter")]
    for panel in panels:
        panel.start()
    assert all(panel.wait(LIMIT) and panel.error is None for panel in panels)
    assert [p.result.text for p in panels] == [alone.generate(p.prompt.value, max_new_tokens=12) for p in panels]
    panels[0].prompt.value = "A letter"
    panels[0].start()
    assert panels[0].wait(LIMIT) and panels[0].result.cached


def test_what_the_generator_refuses_is_one_line(generator):
    panel = TextPanel(generator, prompt="")
    panel.start()
    assert panel.wait(LIMIT) and "prompt must not be empty" in line(panel) and panel.output.value == ""


def test_a_profile_of_a_generator_is_not_answered_from_its_cache(generator):
    generator.generate("Once upon a time", max_new_tokens=4)
    panel = ProfilePanel(generator, max_new_tokens=4)
    panel.start()
    assert panel.wait(LIMIT) and panel.error is None and panel.choice.field.disabled
    assert panel.result.module_times[0].calls == 4


# models


def test_a_model_is_loaded_when_it_is_needed_and_once(monkeypatch, tmp_path):
    made, gate = [], threading.Event()

    def load(name, **settings):
        assert gate.wait(LIMIT)
        made.append((name, settings))
        return Fake(f"by {name}")

    monkeypatch.setattr("truthgpt_nb.widgets.TextGenerator", load)
    panel = TextPanel("first", cache_dir=tmp_path)
    assert made == []
    panel.start()
    until(lambda: "Loading first" in line(panel))
    gate.set()
    assert panel.wait(LIMIT) and "by first" in panel.output.value
    panel.start()
    assert panel.wait(LIMIT) and made == [("first", {"cache_dir": tmp_path})]
    panel.choice.field.value = " second "
    panel.start()
    assert panel.wait(LIMIT) and "by second" in panel.output.value and [name for name, _ in made] == ["first", "second"]


def test_cancel_while_a_model_is_loaded(monkeypatch):
    gate, generator = threading.Event(), Fake("never")
    monkeypatch.setattr("truthgpt_nb.widgets.TextGenerator", lambda name, **_: gate.wait(LIMIT) and generator)
    panel = TextPanel("slow")
    panel.start()
    panel.cancel()
    gate.set()
    assert panel.wait(LIMIT) and "Cancelled" in line(panel) and generator.asked == [] and panel.error is None


@pytest.mark.parametrize("make", [TextPanel, ProfilePanel])
@pytest.mark.parametrize("name", ["no/such/folder/at/all", "tiny-englsh", "", "weights.safetensors"])
def test_a_missing_model_says_so(make, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = make(name)
    panel.start()
    assert panel.wait(LIMIT) and 'role="alert"' in line(panel) and "name_or_path" in line(panel)
    assert "Traceback" not in line(panel) and not panel._task.running
    assert list(tmp_path.iterdir()) == []


# profiling


def test_a_profile_of_a_module():
    panel = ProfilePanel(torch.nn.Linear(4, 4), torch.ones(2, 4), warmup=0, top=3)
    panel.profile_button.click()
    assert panel.wait(LIMIT) and panel.error is None and len(panel.result.operators) <= 3
    assert panel.output.value.count("<table>") == 3 and "data:image/png" in panel.output.value


def test_a_profile_that_fails_says_so_and_the_next_works():
    works = threading.Event()

    def run():
        if not works.is_set():
            raise RuntimeError("not <yet>")

    panel = ProfilePanel(torch.nn.Linear(4, 4), run)
    panel.start()
    assert panel.wait(LIMIT) and "RuntimeError: not &lt;yet&gt;" in line(panel) and panel.result is None
    works.set()
    panel.start()
    assert panel.wait(LIMIT) and panel.error is None


@pytest.mark.parametrize("name", ["top", "warmup"])
def test_a_profile_with_settings_that_are_refused_does_not_run(name):
    panel = ProfilePanel(torch.nn.Linear(4, 4), lambda: pytest.fail("it ran"))
    panel.settings.fields[name].value = -1
    panel.start()
    assert panel.wait(LIMIT) and f"{name} should be greater" in line(panel) and panel.result is None


def test_a_task_says_what_it_is_doing():
    task, gate = _Task(ipywidgets.Button()), threading.Event()
    task.start(lambda cancelled: task.say("at it", running=True) or str(gate.wait(LIMIT)))
    until(lambda: "at it" in task.line.value)
    assert "<progress" in task.line.value
    gate.set()
    assert task.wait(LIMIT) and "<progress" not in task.line.value
