from tests.bilevel_llm.mixing.conftest import make_problem, make_run, tokenizer_only

__all__ = ["make_problem", "make_run", "tokenizer_only"]
