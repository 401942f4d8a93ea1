"""RemoteModel against servers that fail in every way they can, and against a real `transformers serve`."""

import _thread
import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from truthgpt_nb.configs import GenerationConfig
from truthgpt_nb.core import InputError, RemoteError, TruthGPTError
from truthgpt_nb.models import embedded_models

pytest.importorskip("openai")

from truthgpt_nb.remote import RemoteModel
from truthgpt_nb.text import TextGenerator

KEY = "sk-not-for-your-eyes"
CHAT = [{"role": "user", "content": "hello"}]
LISTED = [{"id": "parrot", "owned_by": "vllm"}]


class Handler(BaseHTTPRequestHandler):
    "Answers each POST by the next of the server's `script`, a function of this handler; by `say` when it is used up."

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.path, self.headers, None))
        if self.path == "/v1/models":
            self.server.listing(self)
        else:
            self.answer(200 if self.path == "/health" else 404, {"detail": "Not Found"})

    def do_POST(self):
        self.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers, self.asked))
            step = self.server.script.pop(0) if self.server.script else Handler.say
        step(self)

    def answer(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self, **headers):
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def event(self, text="", reason=None, **more):
        part = {"text": text} if "prompt" in self.asked else {"delta": {"content": text}}
        choice = {"index": 0, "finish_reason": reason, **part}
        self.line(json.dumps({"choices": [choice], **more}))

    def line(self, data):
        self.wfile.write(f"data: {data}\n\n".encode())

    def say(self, text="one two three", reason="stop"):
        self.begin()
        for word in text.split(" "):
            self.event(word + " ")
        self.event("", reason, usage={"completion_tokens": 3})
        self.line("[DONE]")

    def until_gone(self):
        "Wait until the client closes the connection."
        if self.connection.recv(1) == b"":
            self.server.gone.release()

    def log_message(self, *_):
        pass


def status(code, words="no", **headers):
    "A step that answers with a status, and asks to come back in ten milliseconds."
    return lambda handler: handler.answer(code, {"error": {"message": words}}, retry_after_ms="10", **headers)


def stream(*pieces, then=None):
    "A step that sends pieces and then nothing, or what `then` does."

    def step(handler):
        handler.begin()
        for piece in pieces:
            handler.event(piece)
        if then is not None:
            then(handler)

    return step


def refusing(message):
    return pytest.raises(RemoteError, match=message)


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 128, True

    def handle_error(self, *_):
        "A client that is gone is no news."


@contextmanager
def serving(*script, listing=LISTED):
    server = Server(("127.0.0.1", 0), Handler)
    server.script, server.seen, server.lock = list(script), [], threading.Lock()
    server.gone = threading.Semaphore(0)
    server.listing = listing if callable(listing) else lambda handler: handler.answer(200, {"data": listing})
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.posts = lambda: [asked for path, _, asked in server.seen if asked is not None]
    worker = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    worker.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        worker.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No key from outside, and short waits before a stream is begun again."
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("truthgpt_nb.remote.random.uniform", lambda *_: 0.02)


# what goes right


def test_the_pieces_are_the_text_and_the_count_is_the_servers():
    with serving() as server, RemoteModel(server.url) as model:
        pieces = []
        written = model.write("hello", show=pieces.append)
        assert (written.text, written.finish_reason, written.tokens) == ("one two three ", "stop", 3)
        assert pieces == ["one ", "two ", "three "]
        assert written.seconds > 0
        asked = server.posts()[0]
        assert (asked["model"], asked["prompt"], asked["temperature"]) == ("parrot", "hello", 0.0)


def test_a_chat_goes_to_its_own_endpoint():
    with serving(lambda handler: handler.say(reason="length")) as server, RemoteModel(server.url) as model:
        assert model.write(CHAT).finish_reason == "length"
        assert (server.seen[-1][0], server.seen[-1][2]["messages"]) == ("/v1/chat/completions", CHAT)


def test_pieces_come_in_the_callers_thread():
    with serving() as server, RemoteModel(server.url) as model:
        threads = set()
        model.write("hello", show=lambda _: threads.add(threading.current_thread()), stopped=lambda: False)
        assert threads == {threading.current_thread()}


def test_a_stop_string_across_pieces_is_cut_off_and_closes_the_connection():
    with serving(stream("a b", " ST", "OP c", then=Handler.until_gone)) as server, RemoteModel(server.url) as model:
        pieces = []
        written = model.write("hello", GenerationConfig(stop=("STOP", "never")), show=pieces.append)
        assert (written.text, written.finish_reason, "".join(pieces)) == ("a b ", "stop", "a b ")
        assert server.gone.acquire(timeout=10)


def test_what_may_be_a_stop_string_and_is_none_is_text():
    with serving(lambda handler: handler.say("a ST")) as server, RemoteModel(server.url) as model:
        assert model.write("hello", GenerationConfig(stop=("ST !",))).text == "a ST "


def broken(reason=None):
    "A step that promises more than it sends."

    def step(handler):
        handler.begin(Content_Length="100000")
        handler.event("whole", reason)

    return step


def test_a_stream_that_breaks_after_its_reason_is_whole():
    with serving(broken("stop")) as server, RemoteModel(server.url, retries=0) as model:
        written = model.write("hello", show=lambda _: None)
        assert (written.text, written.tokens) == ("whole", None)


def test_the_first_use_asks_once_which_server_it_is():
    with serving() as server, RemoteModel(server.url) as model:
        assert server.seen == []
        model.write("a")
        model.write("b")
        assert [path for path, _, asked in server.seen if asked is None] == ["/openapi.json", "/v1/models"]
        assert (model.model, model.server) == ("parrot", "vllm")


def test_a_server_that_is_named_is_not_asked():
    with serving() as server, RemoteModel(server.url, model="parrot", server="vllm") as model:
        model.write("a")
        assert [path for path, *_ in server.seen] == ["/v1/completions"]


@pytest.mark.parametrize(
    ("owner", "field", "value"),
    [("vllm", "top_k", -1), ("sglang", "min_p", 0.0), ("llamacpp", "repeat_penalty", 1.0), ("me", "top_k", None)],
)
def test_settings_are_said_in_the_servers_words(owner, field, value):
    listing = [{"id": "parrot", "owned_by": owner}]
    with serving(listing=listing) as server, RemoteModel(server.url) as model:
        model.write("hello")
        assert server.posts()[0].get(field) == value


def test_a_setting_that_may_get_lost_is_refused_before_it_is_sent():
    with serving(listing=[{"id": "parrot", "owned_by": "me"}]) as server, RemoteModel(server.url) as model:
        for settings in (GenerationConfig(repetition_penalty=1.1), GenerationConfig(do_sample=True, top_k=3)):
            with pytest.raises(InputError, match="not part of OpenAI's protocol"):
                model.write("hello", settings)
            with pytest.raises(InputError, match="not part of OpenAI's protocol"):
                next(model.write_all(["hello"], settings))
        assert server.posts() == []


# what is tried again


def test_two_failures_and_then_an_answer_are_an_answer():
    with serving(status(500), status(503)) as server, RemoteModel(server.url) as model:
        assert model.write("hello", show=lambda _: None).text == "one two three "
        assert len(server.posts()) == 3


def test_retry_after_is_followed(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    first = lambda handler: handler.answer(429, {}, Retry_After="7")
    with serving(first) as server, RemoteModel(server.url) as model:
        model.write("hello")
    assert waits[0] == 7.0


def test_a_failure_that_stays_is_an_error_after_the_last_try():
    with serving(*[status(503, "still loading")] * 3) as server, RemoteModel(server.url, retries=2) as model:
        with pytest.raises(RemoteError, match="503: still loading"):
            model.write("hello")
        assert len(server.posts()) == 3


def test_half_a_stream_is_begun_again_when_nothing_was_shown():
    with serving(stream("on"), stream("one "), stream()) as server, RemoteModel(server.url) as model:
        assert model.write("hello").text == "one two three "
        assert len(server.posts()) == 4
    with serving(stream()) as server, RemoteModel(server.url) as model:
        assert model.write("hello", show=lambda _: None).text == "one two three "


def test_half_a_stream_is_an_error_when_a_piece_was_shown():
    with serving(stream("on")) as server, RemoteModel(server.url) as model:
        with pytest.raises(RemoteError, match="the stream must say why the text ends, got the end after 2 characters"):
            model.write("hello", show=lambda _: None)
        assert len(server.posts()) == 1


def test_a_broken_connection_is_half_a_stream():
    with serving(broken(), broken()) as server, RemoteModel(server.url) as model:
        with pytest.raises(RemoteError, match="got RemoteProtocolError after 5 characters"):
            model.write("hello", show=lambda _: None)
        assert model.write("hello").text == "one two three "


def test_half_a_stream_again_and_again_is_an_error():
    with serving(*[stream("on")] * 2) as server, RemoteModel(server.url, retries=1) as model:
        with pytest.raises(RemoteError, match="must say why the text ends"):
            model.write("hello")
        assert len(server.posts()) == 2


def test_a_server_that_is_down_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with RemoteModel(url, retries=0) as model:
        assert not model.is_up()
        for call in (lambda: model.write("hello"), lambda: next(model.write_all(["hello"])), model.models):
            with pytest.raises(RemoteError, match=f"must be the address of a running server, {url}/v1, got ConnectErr"):
                call()


@pytest.mark.parametrize("step", [Handler.until_gone, stream(then=Handler.until_gone)])
def test_silence_is_an_error(step):
    with serving(step) as server, RemoteModel(server.url, timeout=0.3, retries=0) as model:
        with pytest.raises(RemoteError, match=r"must have news within 0\.3 s, got 'silence'"):
            model.write("hello")
        assert server.gone.acquire(timeout=10)


def test_silence_after_a_piece_is_not_waited_for_twice():
    with serving(stream("a", then=Handler.until_gone)) as server, RemoteModel(server.url, timeout=0.3) as model:
        with pytest.raises(RemoteError, match="must have news within"):
            model.write("hello", show=lambda _: None)
        assert len(server.posts()) == 1


def test_a_server_that_is_loading_is_not_up():
    with serving() as server, RemoteModel(server.url) as model:
        assert model.is_up()
    with serving() as server, RemoteModel(server.url) as model:
        server.RequestHandlerClass = type("Loading", (Handler,), {"do_GET": status(503)})
        assert not model.is_up()


# what is refused


@pytest.mark.parametrize("chat", [False, True])
def test_a_refused_setting_is_named(chat):
    words = "repetition_penalty must be in (0, 2]"
    with serving(status(400, words)) as server, RemoteModel(server.url) as model:
        with pytest.raises(RemoteError, match="400: repetition_penalty must") as caught:
            model.write(CHAT if chat else "hello", GenerationConfig(repetition_penalty=5.0))
        assert caught.value.argument == "repetition_penalty"
        assert len(server.posts()) == 1


def test_fields_have_the_names_of_settings():
    with serving(status(400, "'max_tokens' is too large: 64")) as server, RemoteModel(server.url) as model:
        with pytest.raises(RemoteError) as caught:
            model.write("hello")
        assert caught.value.argument == "max_new_tokens"


def test_an_error_in_the_middle_of_a_stream_is_told():
    def trouble(handler):
        handler.line(json.dumps({"error": "out of memory"}))

    message = "the stream must go on until the text ends, got out of memory"
    with serving(stream("a", then=trouble)) as server, RemoteModel(server.url) as model, refusing(message):
        model.write("hello")


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"choices": 3}', '{"choices": [{"text": 7}]}'])
def test_what_is_not_the_protocol_is_an_error(line):
    step = lambda handler: (handler.begin(), handler.line(line))
    with serving(step) as server, RemoteModel(server.url) as model, refusing("the answer must be JSON of OpenAI's"):
        model.write("hello")


@pytest.mark.parametrize("body", [b"{", b"<html>", b"[]", b'{"data": [1]}', b"null"])
def test_what_is_no_list_of_models_is_an_error(body):
    listing = lambda handler: handler.answer(200, body)
    with serving(listing=listing) as server, RemoteModel(server.url) as model, refusing("the answer must be JSON"):
        model.write("hello")


def test_another_reason_is_an_error():
    step = lambda handler: handler.say(reason="content_filter")
    with (
        serving(step) as server,
        RemoteModel(server.url) as model,
        refusing("must end by stop or length, got 'content_"),
    ):
        model.write("hello")


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_key(code):
    with serving(status(code, f"{KEY} is wrong")) as server, RemoteModel(server.url, api_key=KEY) as model:
        with pytest.raises(RemoteError, match=f"api_key must be one that .* takes, got 'status {code}'"):
            model.write("hello")
        assert server.seen[-1][1]["Authorization"] == f"Bearer {KEY}"


def everything(error):
    "An error, what it came from, and all that hangs on them."
    seen, todo = [], [error]
    while todo:
        one = todo.pop()
        if one is not None and one not in seen:
            seen.append(one)
            todo += [one.__cause__, one.__context__]
    return " ".join(f"{one} {one!r} {vars(one)}" for one in seen)


def test_the_key_is_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    echo = [status(code, f"I was told {KEY}") for code in (400, 401, 404, 422, 500)]
    echo += [lambda handler: (handler.begin(), handler.line(json.dumps({"error": KEY})))]
    echo += [lambda handler: (handler.begin(), handler.line(f"{{ {KEY}"))]
    with serving(*echo) as server, RemoteModel(server.url, retries=0) as model:
        for _ in echo:
            with pytest.raises(TruthGPTError) as caught:
                model.write("hello")
            assert KEY not in everything(caught.value)
        assert server.seen[-1][1]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in repr(model) + caplog.text
    for key in (f"{KEY}\n", f"{KEY}é", f" {KEY}"):
        with pytest.raises(InputError) as caught:
            RemoteModel("http://127.0.0.1", api_key=key)
        assert KEY not in everything(caught.value)
    for url in (f"http://me:{KEY}@host", f"http://host?key={KEY}"):
        with pytest.raises(InputError) as caught:
            RemoteModel(url)
        assert KEY not in everything(caught.value)


def test_a_wrong_name_is_refused_with_the_nearest():
    several = [{"id": name, "owned_by": "vllm"} for name in ("qwen3-8b", "llama-70b")]
    with serving(listing=several) as server:
        with RemoteModel(server.url, model="qwen3_8b") as model:
            for _ in range(2):
                with pytest.raises(InputError, match="mean 'qwen3-8b'"):
                    model.write("hello")
        with RemoteModel(server.url) as model, pytest.raises(InputError, match="There are: qwen3-8b, llama-70b"):
            model.write("hello")
        assert server.posts() == []
        with RemoteModel(server.url, model="llama-70b") as model:
            assert model.write("hello").text
            assert model.models() == ["qwen3-8b", "llama-70b"]


def test_a_name_that_is_refused_by_the_server():
    words = "The model `other` does not exist."
    listing = [{"id": "others", "owned_by": "me"}]
    with serving(status(404, words), listing=listing) as server, RemoteModel(server.url, model="other") as model:
        with pytest.raises(InputError) as refusal:
            model.write("hello")
        assert "the server has, got 'other'. Did you mean 'others'" in str(refusal.value)


def test_an_alias_is_a_name():
    listing = [{"id": "model.gguf", "owned_by": "llamacpp", "aliases": ["small"]}]
    with serving(listing=listing) as server, RemoteModel(server.url, model="small") as model:
        assert model.write("hello").text


def test_a_server_without_a_list_needs_a_name():
    with serving(listing=status(404)) as server:
        with (
            RemoteModel(server.url) as model,
            pytest.raises(InputError, match="Pass model=, and check base_url"),
        ):
            model.write("hello")
        with RemoteModel(server.url, model="any") as model:
            assert model.write("hello").text


def test_a_missing_endpoint_says_what_to_use_instead():
    missing = [lambda handler: handler.answer(404, {"detail": "Not Found"})] * 2
    with serving(*missing) as server, RemoteModel(server.url) as model:
        with pytest.raises(RemoteError, match=r"must be a list of messages, as there is no .*/v1/completions"):
            model.write("hello")
        with pytest.raises(RemoteError, match="must be a string"):
            model.write(CHAT)


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"timeout": "1"}, {"retries": -1}, {"concurrency": 0}, {"model": ""}]
)
def test_wrong_arguments(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
        RemoteModel("http://127.0.0.1", **wrong)
    with pytest.raises(InputError, match="Did you mean 'vllm'"):
        RemoteModel("http://127.0.0.1", server="vlm")


# what is ended


def test_stopping_in_the_middle_closes_the_connection():
    with serving(stream("a", "b", then=Handler.until_gone)) as server, RemoteModel(server.url) as model:
        shown = []
        written = model.write("hello", show=shown.append, stopped=lambda: len(shown) == 2)
        assert (written.text, written.finish_reason, written.tokens) == ("ab", "cancelled", None)
        assert server.gone.acquire(timeout=10)


def test_stopping_a_silent_server_closes_the_connection():
    with serving(Handler.until_gone) as server, RemoteModel(server.url) as model:
        assert model.write("hello", stopped=lambda: bool(server.posts())).finish_reason == "cancelled"
        assert server.gone.acquire(timeout=10)


def test_an_error_of_the_caller_closes_the_connection():
    with serving(stream("a", then=Handler.until_gone)) as server, RemoteModel(server.url) as model:
        with pytest.raises(ZeroDivisionError):
            model.write("hello", show=lambda _: 1 / 0)
        assert server.gone.acquire(timeout=10)


@pytest.fixture
def heeding_ctrl_c():
    "A shell that starts a command in the background lets it ignore Ctrl-C, and Python keeps that."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(handler):
    _thread.interrupt_main()
    handler.until_gone()


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_a_text():
    with serving(interrupting) as server, RemoteModel(server.url) as model:
        with pytest.raises(KeyboardInterrupt):
            model.write("hello")
        assert server.gone.acquire(timeout=10)
        assert model.write("hello").text == "one two three "


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_a_batch():
    script = [Handler.until_gone, Handler.until_gone, interrupting]
    with serving(*script) as server, RemoteModel(server.url, concurrency=3) as model:
        with pytest.raises(KeyboardInterrupt):
            list(model.write_all(["a", "b", "c", "d"]))
        for _ in script:
            assert server.gone.acquire(timeout=10)
        assert len(server.posts()) == 3


def test_closing_the_model_ends_what_is_under_way():
    with serving(Handler.until_gone) as server:
        model = RemoteModel(server.url)
        errors = []

        def write():
            try:
                model.write("hello")
            except RemoteError as error:
                errors.append(str(error))

        worker = threading.Thread(target=write)
        worker.start()
        while not server.posts():
            time.sleep(0.01)
        model.close()
        worker.join(10)
        assert errors == ["RemoteModel must stay open until the text is there, got 'closed'. Make another one."]
        assert server.gone.acquire(timeout=10)
        with pytest.raises(RemoteError, match="must be open"):
            model.write("hello")


def test_a_model_that_is_dropped_leaves_no_thread():
    def lines():
        return {thread for thread in threading.enumerate() if thread.name == "truthgpt_nb.remote"}

    before = lines()
    with serving() as server:
        model = RemoteModel(server.url)
        model.write("hello")
        (mine,) = lines() - before
        del model
        mine.join(10)
        assert not mine.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_has_a_line_of_its_own():
    code = """
import os, sys
from truthgpt_nb.remote import RemoteModel
from truthgpt_nb.text import TextGenerator
model = RemoteModel(sys.argv[1])
model.write("before")
if pid := os.fork():
    sys.exit(os.waitpid(pid, 0)[1])
assert model.write("after").text == "one two three "
"""
    with serving() as server:
        subprocess.run([sys.executable, "-c", code, server.url], check=True, timeout=60)


# many


def test_many_come_as_they_are_done_with_their_place():
    def echo(handler):
        handler.say(handler.asked["prompt"])

    with serving(*[echo] * 50) as server, RemoteModel(server.url, concurrency=7) as model:
        texts = dict(model.write_all(f"number {n}" for n in range(50)))
        assert {n: one.text for n, one in texts.items()} == {n: f"number {n} " for n in range(50)}


def test_a_slow_one_does_not_hold_up_the_others():
    release = threading.Event()

    def slow(handler):
        release.wait(10)
        handler.say()

    with serving(slow) as server, RemoteModel(server.url, concurrency=2) as model:
        several = model.write_all(list("abcde"))
        first = [next(several)[0] for _ in range(4)]
        release.set()
        assert sorted([*first, next(several)[0]]) == [0, 1, 2, 3, 4]
        assert sum(server.posts()[0]["prompt"] == "abcde"[place] for place in first) == 0


def test_prompts_are_read_only_as_far_as_needed_and_closing_ends_the_rest():
    read = []

    def prompts():
        for n in range(10_000):
            read.append(n)
            yield f"prompt {n}"

    with serving() as server, RemoteModel(server.url, concurrency=4) as model:
        several = model.write_all(prompts())
        assert read == []
        for count in range(1, 20):
            next(several)
            assert len(read) <= count + 4
        several.close()
        assert len(read) <= 23


def test_closing_a_batch_closes_its_connections():
    script = [Handler.say, Handler.until_gone, Handler.until_gone, Handler.until_gone]
    with serving(*script) as server, RemoteModel(server.url, concurrency=3) as model:
        several = model.write_all(["a", "b", "c", "d", "e"])
        next(several)
        while len(server.posts()) < 4:
            time.sleep(0.01)
        several.close()
        for _ in range(3):
            assert server.gone.acquire(timeout=10)
        assert len(server.posts()) == 4


def test_an_error_of_one_is_its_own():
    prompts = ["a", "", "c", CHAT, 7]
    with serving(status(400, "not you")) as server, RemoteModel(server.url, concurrency=1) as model:
        outcomes = dict(model.write_all(prompts))
    assert isinstance(outcomes[0], RemoteError)
    assert isinstance(outcomes[1], InputError)
    assert isinstance(outcomes[4], InputError)
    assert [outcomes[place].text for place in (2, 3)] == ["one two three "] * 2


def test_one_text_is_no_list():
    with (
        RemoteModel("http://127.0.0.1:9") as model,
        pytest.raises(InputError, match="prompts must be a list of prompts"),
    ):
        next(model.write_all("hello"))


# the same calls as of a model in this process


def echo(handler):
    handler.say(f"{handler.asked.get('prompt') or handler.asked['messages'][0]['content']} it is")


@pytest.fixture
def parrot(tmp_path):
    with serving(*[echo] * 30) as server:
        generator = TextGenerator.remote(server.url, cache_dir=tmp_path, concurrency=3)
        yield server, generator
        generator.cache.close()
        generator.model.close()


def test_texts_of_a_server_are_cached_and_the_same_is_asked_once(parrot):
    server, generator = parrot
    assert generator.generate(["a", "b", "a"], 5) == ["a it is ", "b it is ", "a it is "]
    assert sorted(asked["prompt"] for asked in server.posts()) == ["a", "b"]
    one = generator.run("b", 5)
    assert (one.cached, one.text, one.token_count, one.tokens) == (True, "b it is ", 3, [])
    assert generator.chat(CHAT, 5) == generator.chat(CHAT, 5) == "hello it is "
    assert generator.generate("b", 6) == "b it is "  # another number of tokens is another answer
    assert len(server.posts()) == 4
    assert json.loads(json.dumps(one.to_dict()))["token_count"] == 3


def test_a_stream_of_a_server(parrot):
    server, generator = parrot
    stream = generator.stream("a", 5)
    assert list(stream) == ["a ", "it ", "is "]
    assert stream.result.text == "a it is " and generator.run("a", 5).cached
    assert "".join(generator.stream(CHAT, 5)) == "hello it is "
    assert len(server.posts()) == 2


def test_closing_a_stream_of_a_server_closes_the_connection(parrot):
    server, generator = parrot
    server.script[:] = [stream("a ", "b ", then=Handler.until_gone)]
    for piece in generator.stream("x", 5):
        assert piece == "a "
        break
    assert server.gone.acquire(timeout=10)
    assert generator.stats().puts == 0


def test_many_for_a_server_are_taken_as_there_is_room(parrot):
    _, generator = parrot
    taken = []

    def prompts():
        for n in range(20):
            taken.append(n)
            yield f"number {n}" if n != 7 else ""

    answers, most = {}, 0
    for place, answer in generator.each(prompts(), 5):
        answers[place] = answer
        most = max(most, len(taken) - len(answers))
    assert most <= 3
    assert isinstance(answers.pop(7), InputError)
    assert {place: one.text for place, one in answers.items()} == {n: f"number {n} it is " for n in answers}
    assert len(answers) == 19


def test_tasks_for_a_server(parrot):
    server, generator = parrot
    busy, most, lock = [], [], threading.Lock()

    def slowly(handler):
        with lock:
            busy.append(1)
            most.append(len(busy))
        time.sleep(0.02)
        with lock:
            busy.pop()
        echo(handler)

    server.script[:] = [slowly] * 12

    async def main():
        return await asyncio.gather(*(generator.agenerate(f"n{n}", 5) for n in range(12)), generator.agenerate("n3", 5))

    assert asyncio.run(main()) == [*(f"n{n} it is " for n in range(12)), "n3 it is "]
    assert len(server.posts()) == 12 and max(most) <= 3


def test_a_text_that_broke_off_is_begun_again_unless_its_pieces_were_shown(parrot):
    server, generator = parrot
    server.script[:] = [stream("half "), echo]
    assert generator.generate("a", 5) == "a it is "
    server.script[:] = [stream("half ")]
    with refusing("the stream must say why the text ends"):
        list(generator.stream("b", 5))
    server.script[:] = [status(400, "min_p is unknown")]
    with refusing("min_p must be what the server takes"):
        generator.generate("c", 5, do_sample=True, min_p=0.1, seed=1)


def test_what_is_only_of_a_model_in_this_process(parrot):
    _, generator = parrot
    for call in (lambda: generator.engine, lambda: generator.reference("a")):
        with pytest.raises(InputError, match="engine is of a model in this process"):
            call()
    with pytest.raises(InputError, match="tokenizer and engine are for a model in this process"):
        TextGenerator(generator.model, tokenizer="x")
    for prompt, message in (("", "must not be empty"), (3, "must be a string"), ("\ud800", "must be valid Unicode")):
        with pytest.raises(InputError, match=message):
            generator.generate(prompt)


# a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "The address of a `transformers serve` with tiny-english, which has got a chat template, and its folder."
    folder = tmp_path_factory.mktemp("served") / "tiny-english"
    shutil.copytree(embedded_models()["tiny-english"], folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}Yes,")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", start, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log, url, patience = folder.parent / "log", f"http://127.0.0.1:{port}", time.monotonic() + 400
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], env=os.environ | own, stdout=file, stderr=file)
    try:
        with RemoteModel(url, retries=0) as model:
            while not model.is_up():
                assert process.poll() is None and time.monotonic() < patience, log.read_text()
                time.sleep(0.2)
        yield url, folder
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def real(served):
    with RemoteModel(served[0]) as model:
        yield model


@pytest.fixture(scope="module")
def alone(served):
    "What transformers' own generate writes with the same weights."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server: on a busy machine two wait for each other
    tokenizer = AutoTokenizer.from_pretrained(served[1])
    model = AutoModelForCausalLM.from_pretrained(served[1])

    def write(prompt, count, special=True, **settings):
        row = tokenizer(prompt, add_special_tokens=special, return_tensors="pt")
        ids = model.generate(**row, max_new_tokens=count, do_sample=False, **settings)[0, row.input_ids.shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True)

    yield write
    torch.set_num_threads(threads)


PROMPTS = ["The captain looked at the", "My dear sister,", "It was a cold morning, and"]


def test_greedy_text_of_a_real_server_is_that_of_generate(real, alone):
    for prompt in PROMPTS:
        pieces = []
        written = real.write(prompt, GenerationConfig(max_new_tokens=24), show=pieces.append)
        assert (written.text, written.tokens) == (alone(prompt, 24), 24)
        assert "".join(pieces) == written.text
    assert (real.server, real.model) == ("transformers", None)


def test_many_from_a_real_server(real, alone):
    texts = dict(real.write_all(PROMPTS, GenerationConfig(max_new_tokens=12)))
    assert [texts[place].text for place in range(3)] == [alone(prompt, 12) for prompt in PROMPTS]


def test_a_generator_of_a_real_server(real, alone, tmp_path):
    generator = TextGenerator(real, cache_dir=tmp_path)
    assert generator.generate([*PROMPTS, PROMPTS[0]], 12) == [alone(prompt, 12) for prompt in [*PROMPTS, PROMPTS[0]]]
    assert "".join(generator.stream(PROMPTS[1], 12)) == alone(PROMPTS[1], 12)
    assert generator.run(PROMPTS[2], 12).cached and generator.stats().puts == 3
    generator.cache.close()


def test_a_real_chat(real, alone):
    message = {"role": "user", "content": "Did you see the captain?"}
    written = real.write([message], GenerationConfig(max_new_tokens=12))
    assert written.text == alone("Did you see the captain?\nYes,", 12, special=False)


def test_a_real_server_draws_by_the_settings(real, alone):
    greedy = alone(PROMPTS[0], 16)
    drawn = [
        real.write(PROMPTS[0], GenerationConfig(max_new_tokens=16, do_sample=True, temperature=1.5, seed=seed)).text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy not in drawn
    narrow = GenerationConfig(max_new_tokens=16, do_sample=True, temperature=1.5, top_k=1)
    assert real.write(PROMPTS[0], narrow).text == greedy
    certain = GenerationConfig(max_new_tokens=16, do_sample=True, temperature=1.5, min_p=1.0)
    assert real.write(PROMPTS[0], certain).text == greedy
    penalty = GenerationConfig(max_new_tokens=40, repetition_penalty=1.5)
    assert (
        real.write(PROMPTS[0], penalty).text == alone(PROMPTS[0], 40, repetition_penalty=1.5) != alone(PROMPTS[0], 40)
    )


def test_seeded_prompts_do_not_disturb_each_other(real):
    settings = GenerationConfig(max_new_tokens=8, do_sample=True, seed=3)
    texts = dict(real.write_all(PROMPTS, settings))
    assert [texts[place].text for place in range(3)] == [real.write(prompt, settings).text for prompt in PROMPTS]


def test_a_real_text_ends_before_the_stop_string(real, alone):
    text = alone(PROMPTS[0], 24)
    word = text.split()[4]
    written = real.write(PROMPTS[0], GenerationConfig(max_new_tokens=24, stop=(word,)))
    assert (written.text, written.finish_reason) == (text[: text.index(word)], "stop")


def test_a_real_server_that_was_given_another_model(served):
    with RemoteModel(served[0], model="other") as model, pytest.raises(InputError, match="Server is pinned to"):
        model.write("hello")


def test_what_this_package_says_of_transformers_serve(served):
    "The peculiarities that the notebook names; when one is gone, the notebook is to be changed."
    import openai

    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as plain:

        def text(**fields):
            made = plain.completions.create(model=str(served[1]), prompt=PROMPTS[0], max_tokens=24, **fields)
            return made.choices[0].text

        greedy = text()
        assert text(temperature=5.0) == greedy
        for field in ("top_k", "min_p", "repetition_penalty"):
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                text(extra_body={field: 1})
            assert field in str(caught.value.body)
        word = greedy.split()[4]
        assert word in text(stop=[word])
        with pytest.raises(openai.InternalServerError):
            plain.models.list()
