import pytest

from fsllm_client.trainer.normalise import Normalizer, normalise, same_answer


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("strip", "  Two Words\n", "Two Words"),
        ("lower", "  Two \n Words ", "two words"),
        ("number", "first 3, then 1,234.50 in all.", "1234.5"),
        ("number", "it is -7", "-7"),
        ("number", "-0.0", "0"),
        ("number", "100", "100"),
        ("number", "no digits", None),
        ("gsm8k", "2+2=4\n#### 1,080", "1080"),
        ("gsm8k", "#### 5 was wrong\n#### $12.00", "12"),
        ("gsm8k", "#### 72.", "72"),
        ("gsm8k", "the answer is 72", None),
        ("gsm8k", "#### ,.", None),
    ],
)
def test_normalise(how: Normalizer, text: str, expected: str | None) -> None:
    assert normalise(how, text) == expected


def test_no_answer_equals_nothing_not_even_no_answer() -> None:
    assert not same_answer("number", "none", "none")
    assert same_answer("number", "is 1,000", "1000")
    assert not same_answer("strip", "Yes", "yes")
