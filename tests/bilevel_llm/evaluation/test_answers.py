from fractions import Fraction

import pytest

from bilevel_llm.evaluation.answers import final_answer, normalize, number, same_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # GSM8K
        ("16 - 3 - 4 = 9 eggs.\n9 * 2 = 18\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### $3.50", "3.50"),
        ("#### 42%", "42"),
        ("####7", "7"),
        ("#### 18\n\n### Instruction:\nWhat is 4 + 5?\n#### 9", "18"),
        ("#### 5 because 2 + 3 is 5", "5"),
        ("#### 12 apples.", "12"),
        ("#### 1 1/2", "1\\frac{1}{2}"),
        # a sentence
        ("So 6 * 7 = 42. The answer is 42.", "42"),
        ("The answer is: 42 apples", "42"),
        ("The final answer is 3.5.", "3.5"),
        ("The answer is $1,250.75 in all.", "1250.75"),
        ("The answer to the question is **72**.", "72"),
        ("Answer: 12", "12"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("The answer is that John has 5 apples.", "5"),
        ("The answer is yes.", "yes"),
        ("The answer is (B).", "(B)"),
        ("The answer is $x^2+1$.", "x^2+1"),
        # MATH
        ("Thus $\\boxed{7}$.", "7"),
        ("\\boxed{1} and then \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("so the answer is $\\boxed{\\frac{1}{2}}$, since the answer is not 3", "\\frac{1}{2}"),
        ("$\\boxed{\\left( 1, \\dfrac{3}{4} \\right)}$", "(1,\\frac{3}{4})"),
        ("\\boxed{\\frac{a}{\\sqrt{b}}}", "\\frac{a}{\\sqrt{b}}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\text{even}}", "even"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("\\boxed{\\frac{1}{2}\\text{ hour}}", "\\frac{1}{2}"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{50\\%}", "50"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{3,\\!456}", "3456"),
        ("\\boxed{1{,}000}", "1000"),
        ("\\boxed{\\frac12}", "\\frac{1}{2}"),
        ("\\boxed{\\sqrt3}", "\\sqrt{3}"),
        ("\\boxed{2\\pi}", "2\\pi"),
        ("\\boxed{5x}", "5x"),
        ("\\boxed 7$", "7"),
        ("\\fbox{8}", "8"),
        # the last number
        ("9 eggs at 2 dollars make 18 dollars", "18"),
        ("10 - 12 = -2", "-2"),
        ("it took 5-3 hours", "3"),
        ("He paid $1,250.75 in all", "1250.75"),
        ("It is about 3/4", "3/4"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("0.25", "0.25"),
    ],
)  # fmt: skip
def test_the_final_answer_is_found(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["", "I do not know", "\\boxed{unclosed", "#### "])
def test_there_may_be_none(text: str) -> None:
    assert final_answer(text) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000.0"),
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac{1}{2}", "1/2"),
        ("\\frac12", ".5"),
        ("-\\frac{3}{4}", "-0.75"),
        ("\\frac{-3}{4}", "-3/4"),
        ("1 1/2", "1.5"),
        ("1\\frac{1}{2}", "\\frac{3}{2}"),
        ("-1\\frac{1}{2}", "-1.5"),
        ("50\\%", "50"),
        ("$18", "18.00"),
        ("18 dollars", "\\$18"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("\\text{Even}", "even"),
        ("\u22125", "-5"),
        ("90^{\\circ}", "90 degrees"),
        ("1234567890123456789", "1,234,567,890,123,456,789"),
    ],
)
def test_what_means_the_same_is_the_same(one: str, other: str) -> None:
    assert same_answer(normalize(one), normalize(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("18", "17"), ("5", "-5"), ("0.33", "1/3"), ("2\\pi", "2"), ("5x", "5"), ("(1,2)", "(2,1)"), ("(1,2)", "12"),
        ("1/0", "2/0"), ("\\sqrt{3}", "3"), ("x^2", "x^3"), ("2 + 3", "2"), ("3:30", "3"),
    ],
)  # fmt: skip
def test_what_differs_is_not(one: str, other: str) -> None:
    assert not same_answer(normalize(one), normalize(other))


def test_nothing_is_no_answer() -> None:
    assert not same_answer(None, None)
    assert not same_answer("1", None)


@pytest.mark.parametrize("text", ["#### " + "7" * 5000, "7" * 5000, "\\boxed{1/" + "7" * 5000 + "}", "1 " * 5000])
def test_the_endless_digits_of_a_model_that_repeats_itself_are_an_answer_but_not_the_right_one(text: str) -> None:
    assert not same_answer("7", final_answer(text))


def test_a_percentage_is_not_its_fraction() -> None:
    assert not same_answer(normalize("50\\%"), normalize("0.5"))


def test_numbers_are_exact() -> None:
    assert number("0.1") == Fraction(1, 10)
    assert number("9007199254740993") == Fraction(9007199254740993)  # not a float's
    assert number("x") is None
    assert number("1/0") is None
