"""``vllm serve --attention-backend fastgen`` for real, asked through the OpenAI client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from helpers.engine import KOREAN, english


@pytest.fixture(scope="module")
def client(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model]
    command += ["--attention-backend", "fastgen", "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--served-model-name",
        "small",
        "--max-model-len",
        "2048",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    command += ["--kv-cache-memory-bytes", str(256 << 20)]
    settings = {"recovery": 0.9, "min_prompt_tokens": 16, "debug": True}
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
        assert log.read_text().count("FASTGEN: recovery 0.9, ladder adaptive") == 1
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) is not None
    finally:
        server.kill()
        server.wait()


def complete(client: openai.OpenAI, prompt: str, **options: object) -> openai.types.Completion:
    return client.completions.create(
        model="small", prompt=prompt, temperature=0, max_tokens=12, **options
    )


@pytest.mark.engine
def test_serving(client: openai.OpenAI) -> None:
    plain = complete(client, english(1200))
    info = plain.model_extra["kv_transfer_params"]["fastgen"]
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
    assert whole.model_extra["kv_transfer_params"]["fastgen"]["kv_kept_ratio"] == 1.0
    with pytest.raises(openai.BadRequestError, match="fastgen_recovery: got 3"):
        complete(client, "Hello", extra_body={"vllm_xargs": {"fastgen_recovery": 3.0}})
    chat = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "What is 2 + 2?"}], max_tokens=8
    )
    assert chat.choices[0].message.content
    assert complete(client, english(1200)).choices[0].text == plain.choices[0].text
