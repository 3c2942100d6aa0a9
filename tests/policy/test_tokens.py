import pytest
from transformers import AutoTokenizer

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.tokens import CLASS_BITS, is_punctuation, token_classes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",", True),
        (" ...", True),
        ("。", True),
        ("「", True),
        ("“", True),
        ("…", True),
        ("·", True),
        ("가", False),
        ("다.", False),
        ("$", False),
        ("", False),
        ("  ", False),
        ("�", False),
    ],
)
def test_punctuation_is_unicode(text: str, expected: bool) -> None:
    assert is_punctuation(text) is expected


def test_classes_of_a_real_tokenizer(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    classes = token_classes(tokenizer, len(tokenizer) + 100, ["the"])
    ids = (classes & CLASS_BITS["special"]).nonzero().flatten().tolist()
    special = {tokenizer.convert_ids_to_tokens(i) for i in ids}
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "the"} <= special
    for text, expected in ((",", True), ("and", False), ("<|im_end|>", False)):
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        assert bool(classes[token] & CLASS_BITS["punctuation"]) is expected, text
    assert classes.shape == (len(tokenizer) + 100,)


def test_extra_special_token_must_be_one_token(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(FastGenConfigError, match="'two words' is 2 tokens"):
        token_classes(tokenizer, len(tokenizer), ["two words"])
