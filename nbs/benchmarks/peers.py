"""One engine in a process of its own, for 05_peers.ipynb.

The first line of the input is a JSON object: engine, model, dtype, threads, settings, and loads, each a list of
requests [token ids, number of new tokens]. The answer is {"ready": seconds to load, "version": ...}. Each further line
names a load; the answer is {"seconds": ..., "tokens": [the new ones of each request]}. No token ends a text early.
"""

import json
import os
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version

STOPS = []  # what ends a program that an engine started


def torch_model(setup):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(setup["threads"])
    return AutoModelForCausalLM.from_pretrained(setup["model"], dtype=getattr(torch, setup["dtype"])).eval()


def generate(setup):
    "transformers, one request after the other."
    import torch
    from transformers import GenerationConfig

    model = torch_model(setup)

    def one(ids, count):
        model.generation_config = GenerationConfig(max_new_tokens=count, pad_token_id=0)  # no token ends a text
        row = torch.tensor([ids])
        return model.generate(row, attention_mask=torch.ones_like(row))[0, len(ids) :].tolist()

    return lambda requests: [one(*request) for request in requests]


def ours(setup):
    "The InferenceEngine of this package; `dtype` is its precision."
    from truthgpt_nb.configs import GenerationConfig
    from truthgpt_nb.engine import InferenceEngine

    config = {"precision": setup["dtype"], "prefix_bytes": 0}  # which would answer a repeated load
    engine = InferenceEngine(torch_model(setup | {"dtype": "float32"}), **config | setup["settings"])

    def run(requests):
        settings = [GenerationConfig(max_new_tokens=count) for _, count in requests]
        return [one.tokens for one in engine.generate_batch([ids for ids, _ in requests], settings, stop_ids=())]

    return run


def continuous(setup):
    "transformers' continuous batching, with one manager that stays."
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = torch_model(setup)
    plain = GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(plain, ContinuousBatchingConfig(**setup["settings"]))
    manager.start()

    def run(requests):
        names = [manager.add_request(ids, max_new_tokens=count, eos_token_id=-1) for ids, count in requests]
        done = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=600)
            if result is None:
                raise RuntimeError("no result for ten minutes")
            if result.error is not None:
                raise RuntimeError(result.error)
            if result.is_finished():
                done[result.request_id] = result.generated_tokens
        return [done[name] for name in names]

    return run


def vllm(setup):
    "vLLM, in this process and without its cache of prefixes, which would answer a repeated load."
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_USE_V1": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        setup["model"], dtype=setup["dtype"], skip_tokenizer_init=True, enable_prefix_caching=False, **setup["settings"]
    )

    def run(requests):
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        each = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for _, count in requests
        ]
        return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, each, use_tqdm=False)]

    return run


def ctranslate2(setup):
    """CTranslate2, in batches of about the same length.

    The steps of a batch begin where its shortest prompt ends, and it has one greatest length: so a callback ends each
    text at its own.
    """
    import ctranslate2

    size = setup["settings"]["batch"]
    generator = ctranslate2.Generator(setup["model"], compute_type=setup["dtype"], intra_threads=setup["threads"])
    with open(os.path.join(setup["model"], "vocabulary.json"), encoding="utf-8") as file:
        names = json.load(file)

    def together(requests):
        shortest = min(len(ids) for ids, _ in requests)
        steps = [len(ids) - shortest + count for ids, count in requests]
        results = generator.generate_batch(
            [[names[token] for token in ids] for ids, _ in requests],
            beam_size=1,
            sampling_topk=1,
            max_length=max(steps),
            end_token=[],
            include_prompt_in_result=False,
            callback=lambda step: step.step + 1 >= steps[step.batch_id],
        )
        return [result.sequences_ids[0] for result in results]

    def run(requests):
        order = sorted(range(len(requests)), key=lambda index: len(requests[index][0]))
        texts = {}
        for first in range(0, len(order), size):
            some = order[first : first + size]
            texts |= zip(some, together([requests[index] for index in some]), strict=True)
        return [texts[index] for index in range(len(requests))]

    return run


def over_http(address):
    "What runs requests on a server of llama.cpp: all at once, and the slots of the server are the batch."
    from concurrent.futures import ThreadPoolExecutor
    from urllib.request import Request, urlopen

    pool = ThreadPoolExecutor(64)

    def one(request):
        ids, count = request
        wanted = {"prompt": ids, "n_predict": count, "ignore_eos": True, "temperature": 0, "samplers": ["top_k"]}
        wanted |= {"top_k": 1, "return_tokens": True, "cache_prompt": False}
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}/completion", json.dumps(wanted).encode(), headers)) as answer:
            return json.load(answer)["tokens"]

    return lambda requests: list(pool.map(one, requests))


def llamacpp(setup):
    "llama.cpp's server through xllamacpp; keys and values in float32 for a float32 model."
    import xllamacpp

    slots = setup["settings"]["slots"]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = setup["model"], slots, 384 * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup["threads"]
    params.cache_prompt, params.cache_ram_mib, params.fit_params = False, 0, False
    if setup["dtype"] == "float32":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # faster, and closer
    server = xllamacpp.Server(params)
    run = over_http(server.listening_address)
    run.server = server  # lives as long
    return run


def llama_server(setup):
    "llama.cpp's own server program, built for this processor."
    import shutil
    import socket
    import subprocess
    import urllib.request

    program = shutil.which("llama-server")
    if program is None:
        raise RuntimeError("no llama-server on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots, kind = setup["settings"]["slots"], "f32" if setup["dtype"] == "float32" else "f16"
    options = {"model": setup["model"], "port": port, "parallel": slots, "ctx-size": 384 * slots, "cache-ram": 0}
    options |= {"threads": setup["threads"], "threads-batch": setup["threads"], "fit": "off"}
    options |= {"cache-type-k": kind, "cache-type-v": kind, "flash-attn": "off" if kind == "f32" else "auto"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen([program, *words, "--no-cache-prompt"], stdin=subprocess.DEVNULL)
    STOPS.append(process.kill)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return over_http(f"http://127.0.0.1:{port}")
        except OSError:
            if process.poll() is not None:
                raise RuntimeError("llama-server ended") from None
            time.sleep(0.1)


PACKAGES = {"generate": "transformers", "continuous": "transformers", "ours": "truthgpt_nb", "vllm": "vllm-cpu"}
PACKAGES |= {"ctranslate2": "ctranslate2", "llamacpp": "xllamacpp"}


def version_of(engine):
    "The package that an engine comes from, and its version."
    if engine not in PACKAGES:
        return ""
    try:
        return f"{PACKAGES[engine]} {version(PACKAGES[engine])}"
    except PackageNotFoundError:  # a checkout
        return PACKAGES[engine]


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    engine = globals()[setup["engine"]](setup)
    engine([([5, 6, 7], 2)])  # choose kernels, allocate
    answer(ready=time.perf_counter() - start, version=version_of(setup["engine"]))
    for line in sys.stdin:
        requests = [(ids, count) for ids, count in setup["loads"][line.strip()]]
        start = time.perf_counter()
        tokens = engine(requests)
        answer(seconds=time.perf_counter() - start, tokens=tokens)


if __name__ == "__main__":
    code = 1
    try:
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stop in STOPS:
            stop()
        sys.stderr.flush()
        os._exit(code)  # an engine's threads would keep the process
