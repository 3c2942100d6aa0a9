"""Model folders: the shape of a model, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.models import ModelShape, check_context, check_model, load_tokenizer

LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        (LLAMA, ModelShape(32, 8, 4, 128)),
        ({**LLAMA, "head_dim": 64}, ModelShape(32, 8, 4, 64)),
        ({**LLAMA, "head_dim": None, "num_key_value_heads": None}, ModelShape(32, 32, 1, 128)),
        ({"vision_config": {}, "text_config": LLAMA}, ModelShape(32, 8, 4, 128)),
    ],
)
def test_shape_of_a_folder_and_of_a_config(
    fields: dict[str, Any], shape: ModelShape, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ModelShape.from_folder(tmp_path) == shape
    nested = {k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in fields.items()}
    assert ModelShape.from_config(SimpleNamespace(**nested)) == shape


def test_shape_of_a_hugging_face_config(whole_model: str) -> None:
    from transformers import AutoConfig

    shape = ModelShape.from_config(AutoConfig.from_pretrained(whole_model))
    assert shape == ModelShape.from_folder(whole_model) == ModelShape(30, 3, 3, 64)
    assert shape.num_heads == 9
    assert shape.kv_bytes_per_token(torch.bfloat16) == 23_040
    assert shape.kv_bytes_per_token(torch.float32) == 46_080


def copy_of(model: str, folder: Path) -> Path:
    """A model folder of links, whose files can be taken away one by one."""
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    return folder


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "is not a model folder"),
        ("config.json", "{", "shape of the model cannot be read"),
        ("config.json", "[]", "shape of the model cannot be read"),
        ("config.json", '{"num_hidden_layers": 2}', "no attribute 'num_attention_heads'"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", "version https://git-lfs", "weights .* cannot be read"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
def test_broken_folders(
    model: str, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    broken = copy_of(model, tmp_path / "broken")
    check_model(broken)
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    with pytest.raises(InputError, match=message):
        check_model(broken)


def test_a_broken_tokenizer(model: str, tmp_path: Path) -> None:
    broken = copy_of(model, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer of .*broken cannot be loaded"):
        load_tokenizer(broken)


def test_texts_beyond_the_context(model: str) -> None:
    check_context(model, 8192, "The prompt")
    with pytest.raises(InputError, match=r"The prompt needs 8193 tokens, .* at most 8192"):
        check_context(model, 8193, "The prompt")
