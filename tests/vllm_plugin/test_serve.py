"""``vllm serve --attention-backend fastgen`` for real, asked through the OpenAI client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers.browser import CHROMIUM, browser
from helpers.engine import KOREAN, english
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def client(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model]
    command += ["--attention-backend", "fastgen", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "small", "--enforce-eager", "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--max-num-batched-tokens", "512"]
    command += ["--kv-cache-memory-bytes", str(256 << 20)]
    settings = {"recovery": 0.9, "min_prompt_tokens": 16, "debug": True, "page": True}
    command += ["--additional-config", json.dumps({"fastgen": settings})]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-4000:])
        for said in ("head pages of 16 tokens per block", "leave nothing in it"):
            about = f"FASTGEN: recovery 0.9, ladder adaptive.*{said}"
            assert len(re.findall(about, log.read_text())) == 1
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        assert server.poll() is None, "a request ended the server"
        assert "EngineDeadError" not in log.read_text()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> openai.types.Completion:
    return client.completions.create(
        model="small", prompt=prompt, temperature=0, max_tokens=12, **options
    )


@pytest.mark.engine
def test_serving(client: openai.OpenAI) -> None:
    plain = complete(client, english(1200))
    info = (plain.model_extra or {})["kv_transfer_params"]["fastgen"]
    assert 0 < info["kv_kept_ratio"] < 1 and info["vacated_blocks"] > 0

    streamed = client.completions.create(
        model="small", prompt=english(1200), temperature=0, max_tokens=12, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == plain.choices[0].text

    prompts = [english(900, "specialnames", 1000 * i) for i in range(7)] + [KOREAN]
    alone = [complete(client, p).choices[0].text for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = [r.choices[0].text for r in pool.map(lambda p: complete(client, p), prompts)]
    assert alone == together

    aborted = client.completions.create(
        model="small", prompt=english(1500), max_tokens=400, stream=True
    )
    next(iter(aborted))
    aborted.close()

    whole = complete(client, english(1200), extra_body={"vllm_xargs": {"fastgen_recovery": 1.0}})
    assert (whole.model_extra or {})["kv_transfer_params"]["fastgen"]["kv_kept_ratio"] == 1.0
    chat = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "What is 2 + 2?"}], max_tokens=8
    )
    assert chat.choices[0].message.content
    assert complete(client, english(1200)).choices[0].text == plain.choices[0].text


QUESTION = english(1200) + " What does this text say?"


def ask(
    client: openai.OpenAI, chat: bool, stream: bool, xargs: dict[str, Any], **options: Any
) -> tuple[str, dict[str, Any] | None]:
    """The answer to ``QUESTION``, and what the request tells of its KV cache."""
    shared = {
        "model": "small",
        "temperature": 0,
        "max_tokens": 12,
        "stream": stream,
        "extra_body": {"vllm_xargs": xargs},
        **options,
    }
    create: Any = client.chat.completions.create if chat else client.completions.create
    asked = {"messages": [{"role": "user", "content": QUESTION}]} if chat else {"prompt": QUESTION}
    answer = create(**asked, **shared)
    responses = list(answer) if stream else [answer]
    choices = [choice for response in responses for choice in response.choices]
    part = "delta" if stream else "message"
    texts = [getattr(choice, part).content if chat else choice.text for choice in choices]
    told = [(r.model_extra or {}).get("kv_transfer_params") for r in responses]
    (fastgen,) = [each["fastgen"] for each in told if each] or [None]
    return "".join(text or "" for text in texts), fastgen


@pytest.mark.engine
@pytest.mark.parametrize("chat", [False, True])
def test_every_override_works(client: openai.OpenAI, chat: bool) -> None:
    """Streamed, a request tells nothing, but gives the answer that it gives otherwise."""
    wholes: list[dict[str, Any]] = [
        {"fastgen_compress": False},
        {"fastgen_compress": 0},
        {"fastgen_recovery": 1},
        {"fastgen_kv_budget": 1},
        {"fastgen_kv_budget": True},  # which arrives as 1
    ]
    shares: list[dict[str, Any]] = [
        {},
        {"fastgen_compress": True},
        {"fastgen_recovery": 0.6},
        {"fastgen_kv_budget": 0.3},
        {"fastgen_kv_budget": 0.3, "fastgen_protect": [0, 40, 60, 80]},
        {"fastgen_kv_budget": 0.3, "fastgen_min_recovery": 0.9},
    ]
    ratios = {}
    for xargs in wholes + shares:
        answer, told = ask(client, chat, False, xargs)
        assert told is not None
        ratios[json.dumps(xargs)] = told["kv_kept_ratio"]
        assert ask(client, chat, True, xargs) == (answer, None)
    kept = [ratios[json.dumps(xargs)] for xargs in wholes + shares]
    assert kept[: len(wholes)] == [1.0] * len(wholes)
    default, compressed, recovery, budget, protected, floor = kept[len(wholes) :]
    assert 1 > default == compressed > recovery > 0.25 and 0.35 > budget > 0.28
    assert 1 > protected > budget and 1 > floor > budget


@pytest.mark.engine
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"fastgen_recovery": 3.0}, "request.fastgen_recovery: got 3"),
        ({"fastgen_kv_budget": 0}, "request.fastgen_kv_budget: got 0"),
        ({"fastgen_kv_budget": "0.5"}, "request.fastgen_kv_budget: got '0.5'"),
        ({"fastgen_compress": 2}, "request.fastgen_compress: got 2"),
        ({"fastgen_budget": 0.5}, "request.fastgen_budget: unknown key"),
        ({"fastgen_protect": "user"}, "request.fastgen_protect: got 'user'"),
        ({"fastgen_protect": [0, 100000]}, r"fastgen_protect: \[0, 100000\] goes beyond"),
        ({"fastgen_min_recovery": 0.5}, "fastgen_min_recovery: 0.5 goes with a budget"),
    ],
)
def test_wrong_override_is_an_error_of_the_request(
    client: openai.OpenAI, chat: bool, xargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, chat, False, xargs)
    # The headers, with HTTP 200, have gone before vLLM sees the request.
    with pytest.raises(openai.APIError, match=message) as streamed:
        ask(client, chat, True, xargs)
    assert type(streamed.value) is openai.APIError


def middle(answer: str) -> str:
    return answer[len(answer) // 2 :][:4]


@pytest.mark.engine
def test_request_that_a_stop_string_ends_tells_what_it_kept(client: openai.OpenAI) -> None:
    whole, told = ask(client, False, False, {})
    piece = middle(whole)
    answer, of_stopped = ask(client, False, False, {}, stop=[piece])
    assert whole.startswith(answer) and piece not in answer
    assert of_stopped == told and told is not None


@pytest.mark.engine
def test_seeded_prompt_in_chunks(client: openai.OpenAI) -> None:
    """vLLM rewinds the generator of a request whose prompt goes on, which CPUs cannot do."""
    prompt = english(3200)
    seeded: dict[str, Any] = {"n": 4, "seed": 7, "temperature": 1.0}
    first, second = (
        client.completions.create(model="small", prompt=prompt, max_tokens=8, **seeded)
        for _ in range(2)
    )
    assert first.usage is not None and first.usage.prompt_tokens > 512
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 4


def metrics(client: openai.OpenAI) -> dict[str, float]:
    """FastGen's, by name and reason."""
    page = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^fastgen:(\w+)\{(.*)\} (\S+)$", page, re.MULTILINE):
        if "_bucket" not in name and "_created" not in name:
            assert 'model_name="small"' in labels and 'engine="0"' in labels
            reason = re.search(r'reason="(\w+)"', labels)
            found[f"{name} {reason[1]}" if reason else name] = float(value)
    return found


@pytest.mark.engine
def test_metrics_add_up(client: openai.OpenAI) -> None:
    """To what requests tell themselves, streamed, stopped and aborted ones among them."""
    whole, told = ask(client, False, False, {})  # so that every metric is there
    assert told is not None
    before = metrics(client)
    summaries = [ask(client, False, False, {"fastgen_recovery": 0.5 + i / 20})[1] for i in range(8)]
    ask(client, False, True, {})
    ask(client, False, False, {}, stop=[middle(whole)])
    aborted = client.completions.create(model="small", prompt=QUESTION, max_tokens=400, stream=True)
    next(iter(aborted))
    aborted.close()
    summaries += [told] * 3
    for xargs in ({"fastgen_compress": False}, {"fastgen_recovery": 1}):
        ask(client, False, False, xargs)
    complete(client, "Hello")
    complete(client, "Hello")  # its end tells what the aborted one left untold
    after = metrics(client)
    changed = {name: value - before.get(name, 0.0) for name, value in after.items()}
    ratios = [each["kv_kept_ratio"] for each in summaries if each]
    assert len(ratios) == 11 == changed["kv_kept_ratio_count"] == changed["prompt_tokens_count"]
    assert changed["kv_kept_ratio_sum"] == pytest.approx(sum(ratios))
    vacated = sum(each["vacated_blocks"] for each in summaries if each)
    assert changed["vacated_blocks_total"] == vacated > 0
    slots = 18 * changed["prompt_tokens_sum"] / 11  # 18 heads, and the prompts are one
    evicted = sum(slots * (1 - ratio) for ratio in ratios)
    assert changed["evicted_slots_total"] == pytest.approx(evicted)
    assert changed["prompts_kept_whole_total asked"] == 2
    assert changed["prompts_kept_whole_total short"] == 2
    assert after["kv_held_bytes"] == after["kv_saved_bytes"] == after["free_pages"] == 0


@pytest.mark.engine
@pytest.mark.skipif(CHROMIUM is None, reason="it takes a Chromium")
def test_page(client: openai.OpenAI, tmp_path: Path) -> None:
    """It loads, follows what happens, and shows a request's heads when that is clicked."""
    server = str(client.base_url).removesuffix("/v1/")
    ask(client, False, False, {})
    with browser(tmp_path / "profile") as page:
        page.show(f"{server}/fastgen", 1100, 1500)
        page.wait_for("document.querySelectorAll('#requests tr').length > 0")
        newest = "document.querySelector('#requests tr td').textContent"
        before = page.value(newest)
        _, told = ask(client, False, False, {"fastgen_recovery": 0.7})
        assert told is not None
        page.wait_for(f"{newest} !== {json.dumps(before)}")
        row = (
            "[...document.querySelectorAll('#requests tr:first-child td')].map(c => c.textContent)"
        )
        kept = f"{told['kv_kept_ratio']:.0%}"
        assert page.value(f"{row}[2]") == kept
        assert page.value("document.getElementById('detail').hidden") is True
        page.value("document.querySelector('#requests tr').click()")
        cells = page.value(
            "[...document.querySelectorAll('#map rect title')].map(t => t.textContent)"
        )
        assert len(cells) == 18 and cells[-1].startswith("layer 5, KV head 2: ")
        legend = page.value("document.getElementById('kinds').textContent")
        assert all(f"{kind} ({count})" in legend for kind, count in told["policy_heads"].items())
        assert kept in page.value("document.getElementById('title').textContent")
        assert page.value("document.querySelectorAll('#places rect').length") == 64
        page.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        for width, scheme in ((400, "light"), (1100, "dark")):
            page.show(f"{server}/fastgen", width, 1500, scheme)
            page.wait_for("document.querySelectorAll('#requests tr').length > 1")
            assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []


@pytest.mark.engine
def test_client_of_the_examples(client: openai.OpenAI, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(english(1500), encoding="utf-8")
    command = [sys.executable, str(ROOT / "examples" / "client.py"), "--file", str(text)]
    command += ["--url", str(client.base_url), "--max-tokens", "4"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    kept = dict(re.findall(r"^(\w.*): (\d+)% kept$", said, re.MULTILINE))
    assert len(kept) == 5 and kept["everything"] == "100"
    assert int(kept["a tenth of the KV cache"]) < 25 < int(kept["nine tenths of the attention"])
