"""Model folders: whether one is complete, and the shape that its KV cache follows from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastgen_vllm.tools.inputs import InputError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")


@dataclass(frozen=True)
class ModelShape:
    """Attention of one model.

    Attributes:
        group_size: query heads that share one KV head.
        head_size: elements of one head's key, and of its value.
    """

    num_layers: int
    num_kv_heads: int
    group_size: int
    head_size: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values, all layers and KV heads together."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_size * dtype.itemsize

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read a Hugging Face config object; the text model's where the model has several.

        Raises:
            AttributeError: naming the field that the config lacks.
        """
        config = getattr(config, "text_config", None) or config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, kv_heads, heads // kv_heads, head_size)

    @classmethod
    def from_folder(cls, model: str | Path) -> ModelShape:
        """Read ``config.json`` of a model folder.

        Raises:
            InputError: the folder has no readable ``config.json``, or it lacks a field.
        """
        path = Path(model) / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_config(SimpleNamespace(**fields.get("text_config", fields)))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"The shape of the model cannot be read from {path}: {error}. "
                "Name the folder of a Hugging Face model."
            ) from None


def check_model(model: Path) -> None:
    """The folder has a config, weights and a tokenizer.

    Raises:
        InputError: one of them is missing or broken.
    """
    if not (model / "config.json").is_file():
        raise InputError(
            f"{model} is not a model folder, because it has no config.json. Name the folder of a "
            "Hugging Face model, or run scripts/setup.sh, which makes a small one in .cache/."
        )
    ModelShape.from_folder(model)
    for what, patterns in (("weights", WEIGHTS), ("tokenizer", TOKENIZERS)):
        if not any(any(model.glob(pattern)) for pattern in patterns):
            raise InputError(
                f"The model folder {model} has no {what}: none of its files is called "
                f"{' or '.join(patterns)}. Copy or download the missing files into it."
            )
    for weights in model.glob("*.safetensors"):
        _check_weights(weights)


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"The weights {path} cannot be read: {error}. Copy or download the file again."
        ) from None


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the tokenizers library raises plain exceptions
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"The tokenizer of {model} cannot be loaded: {reason} Copy or download its files again."
        ) from None


def context_length(model: str | Path) -> int | None:
    """Tokens that a model can attend to at once, where its ``config.json`` says so."""
    fields = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return fields.get("text_config", fields).get("max_position_embeddings")


def check_context(model: str | Path, num_tokens: int, what: str) -> None:
    """``what`` has ``num_tokens`` tokens, which the model must be able to attend to.

    Raises:
        InputError: they are too many.
    """
    limit = context_length(model)
    if limit is not None and num_tokens > limit:
        raise InputError(
            f"{what} needs {num_tokens} tokens, and the model {Path(model).name} attends to at "
            f"most {limit} (max_position_embeddings). Take less text, or ask for fewer tokens."
        )
