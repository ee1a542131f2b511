import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from bilevel.errors import InputError
from bilevel_llm.data import chat
from bilevel_llm.data.chat import Encoded, Encoder, encode
from bilevel_llm.data.rows import Row, Turn

CHATML = """{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

GEMMA = """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}\
{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

# Qwen3: an empty block of thoughts stands before the last response only
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Phi-3: the end of the sequence stands behind the end of the last turn
PHI = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

# A template that needs a question before it writes a generation prompt
WANTS_A_USER = CHATML.replace(
    "{% if add_generation_prompt %}",
    "{% if add_generation_prompt %}{% set asked = (messages | selectattr('role', 'eq', 'user') | first).role | upper %}",
)

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]

QUESTION = Row((Turn("user", "Say hello"), Turn("assistant", "Hello there !")), "a:1")
TALK = Row((*QUESTION.turns, Turn("user", "Again"), Turn("assistant", "Hello you")), "a:2")
TOLD = Row((Turn("system", "Short ."), *QUESTION.turns), "a:3")


def words(
    template: str | None = None,
    *,
    adds_bos: bool = False,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    eos: str | None = "</s>",
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of a byte-level pre-tokenizer, with the space before them: 'Ġhello'."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [
            "Say hello", " Say hello", "Hello there ! Hello you Hello\n", "Again", " Again",
            "Short .", "system\n\n", "user\n\n", "assistant\n", "model\n", "Be kind.",
            "### Instruction:\n### Response:\n", " ### Instruction Response", "The capital is Paris .",
            "Paris . 26 Jul 2024 : ", "2024-07-26 \n",
            "[INST] Say hello [/INST] Hello there ! </s>",
        ],
        trainers.WordLevelTrainer(special_tokens=["<unk>", *SPECIAL]),
    )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


def tokens(encoded: Encoded, tokenizer) -> list[str]:
    found = tokenizer.convert_ids_to_tokens(encoded.ids)
    assert len(found) == len(encoded.labels)
    assert "<unk>" not in found, found
    return found


def labelled(encoded: Encoded, tokenizer) -> list[str]:
    return [token for token, label in zip(tokens(encoded, tokenizer), encoded.labels, strict=True) if label]


# ----------------------------------------------------------------------------------------------------- model templates


def test_chatml_labels_the_response_and_the_end_of_its_turn():
    tokenizer = words(CHATML)
    encoded = encode(QUESTION, tokenizer)
    expected = [
        ("<|im_start|>", False), ("system", False), ("Ċ", False), ("Be", False), ("Ġkind", False), (".", False),
        ("<|im_end|>", False), ("Ċ", False),
        ("<|im_start|>", False), ("user", False), ("Ċ", False), ("Say", False), ("Ġhello", False),
        ("<|im_end|>", False), ("Ċ", False),
        ("<|im_start|>", False), ("assistant", False), ("Ċ", False), ("Hello", True), ("Ġthere", True), ("Ġ!", True),
        ("<|im_end|>", True), ("Ċ", False),
    ]  # fmt: skip
    assert list(zip(tokens(encoded, tokenizer), encoded.labels, strict=True)) == expected
    assert encoded.notes == ()


def test_chatml_labels_every_response_of_a_conversation():
    tokenizer = words(CHATML)
    assert labelled(encode(TALK, tokenizer), tokenizer) == [
        "Hello", "Ġthere", "Ġ!", "<|im_end|>", "Hello", "Ġyou", "<|im_end|>"
    ]  # fmt: skip


@pytest.mark.parametrize("template", ["model", "plain"])
def test_a_masked_response_is_seen_but_not_labelled(template):
    tokenizer = words(CHATML)
    first, answer, *rest = TALK.turns
    masked = Row((first, Turn(answer.role, answer.text, masked=True), *rest), TALK.where)
    whole, part = (encode(row, tokenizer, template=template) for row in (TALK, masked))
    assert part.ids == whole.ids
    labels = labelled(whole, tokenizer)
    assert (
        labelled(part, tokenizer) == labels[labels.index("Ġ!") + 2 :]
    )  # without the first response and the end of its turn


def test_chatml_takes_the_rows_own_system_prompt():
    tokenizer = words(CHATML)
    encoded = encode(TOLD, tokenizer)
    assert tokens(encoded, tokenizer)[:6] == ["<|im_start|>", "system", "Ċ", "Short", "Ġ.", "<|im_end|>"]
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!", "<|im_end|>"]


def test_llama3_gets_one_beginning_of_sequence_though_template_and_tokenizer_write_it():
    tokenizer = words(LLAMA3, adds_bos=True)
    encoded = encode(QUESTION, tokenizer)
    assert tokens(encoded, tokenizer) == [
        "<s>", "<|start_header_id|>", "user", "<|end_header_id|>", "Ċ", "Ċ", "Say", "Ġhello", "<|eot_id|>",
        "<|start_header_id|>", "assistant", "<|end_header_id|>", "Ċ", "Ċ", "Hello", "Ġthere", "Ġ!", "<|eot_id|>",
    ]  # fmt: skip
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!", "<|eot_id|>"]


def test_a_beginning_of_sequence_that_the_models_template_does_not_write_is_not_added():
    tokenizer = words(CHATML, adds_bos=True)
    assert tokens(encode(QUESTION, tokenizer), tokenizer)[0] == "<|im_start|>"


def test_inst_labels_the_space_that_belongs_to_the_response():
    tokenizer = words(INST, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"))
    assert labelled(encode(TALK, tokenizer), tokenizer) == [
        "▁Hello", "▁there", "▁!", "▁", "</s>", "▁Hello", "▁you", "▁", "</s>"
    ]  # fmt: skip


def test_gemma_refusing_a_system_prompt_names_row_and_reason():
    tokenizer = words(GEMMA)
    assert labelled(encode(QUESTION, tokenizer), tokenizer) == ["Hello", "Ġthere", "Ġ!", "<end_of_turn>"]
    with pytest.raises(
        InputError, match=r"^a:3: .*\(roles: system, user, assistant\): System role not supported; .*template: plain"
    ):
        encode(TOLD, tokenizer)


def test_a_response_the_template_rewrites_later_is_left_out_and_noted():
    tokenizer = words(THINKING)
    encoded = encode(TALK, tokenizer)
    assert labelled(encoded, tokenizer) == [
        "<think>", "ĊĊ", "</think>", "Ċ", "Ċ", "Hello", "Ġyou", "<|im_end|>"
    ]  # fmt: skip
    assert encoded.notes == (chat.EARLIER_UNLABELLED,)
    assert encode(QUESTION, tokenizer).notes == ()


def test_what_follows_the_end_of_a_turn_is_not_labelled():
    tokenizer = words(PHI)
    encoded = encode(TALK, tokenizer)
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!", "<|end|>", "Hello", "Ġyou", "<|end|>"]
    assert tokens(encoded, tokenizer)[-3:] == ["<|end|>", "Ċ", "</s>"]
    assert encoded.notes == ()


def test_a_generation_prompt_the_conversation_does_not_contain_is_an_error():
    tokenizer = words(CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}")
    with pytest.raises(InputError, match=r"^a:1: .*generation prompt.*template: plain"):
        encode(QUESTION, tokenizer)


@pytest.mark.parametrize("told", [(), (Turn("system", "Short ."),)])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, WANTS_A_USER, "plain"])
def test_a_conversation_that_the_assistant_opens_is_learned_from_its_first_response(template, told):
    tokenizer = words(template)
    end = {CHATML: "<|im_end|>", LLAMA3: "<|eot_id|>", WANTS_A_USER: "<|im_end|>", "plain": "</s>"}[template]
    for row, responses in (
        (Row((*told, Turn("assistant", "Hello")), "a:4"), ["Hello", end]),
        (Row((*told, Turn("assistant", "Hello"), *QUESTION.turns), "a:4"), ["Hello", end, "Hello", "Ġthere", "Ġ!", end]),
    ):
        encoded = encode(row, tokenizer, template="plain" if template == "plain" else "model")
        assert labelled(encoded, tokenizer) == responses
        assert encoded.notes == ()


def test_turns_after_the_last_response_are_left_out():
    tokenizer = words(CHATML)
    assert encode(Row((*QUESTION.turns, Turn("user", "Again")), "a:5"), tokenizer) == encode(QUESTION, tokenizer)


def test_an_end_of_turn_token_within_a_response_does_not_end_it():
    tokenizer = words(CHATML)
    row = Row((Turn("user", "Say hello"), Turn("assistant", "Hello<|im_end|> there")), "a:6")
    assert labelled(encode(row, tokenizer), tokenizer) == ["Hello", "<|im_end|>", "Ġthere", "<|im_end|>"]


@pytest.mark.parametrize(("template", "thoughts"), [(CHATML, []), (THINKING, ["<think>", "ĊĊ", "</think>", "ĊĊ"])])
def test_an_empty_response_is_its_end_of_turn_token(template, thoughts):
    tokenizer = words(template)
    row = Row((Turn("user", "Say hello"), Turn("assistant", "")), "a:7")
    assert labelled(encode(row, tokenizer), tokenizer) == [*thoughts, "<|im_end|>"]


def test_a_template_without_an_end_of_turn_token_is_noted():
    tokenizer = words(CHATML.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    encoded = encode(QUESTION, tokenizer)
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!"]
    assert encoded.notes == (chat.NO_END,)


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_start_of_the_response_is_labelled_lest_it_lose_its_first_word(trim):
    template = CHATML.replace("assistant\n", "assistant ").replace("message.role }}\n", "message.role }} ")
    tokenizer = words(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    row = Row((Turn("user", "Again"), Turn("assistant", "Say hello")), "a:8")
    assert labelled(encode(row, tokenizer), tokenizer) == ["ĠSay", "Ġhello", "<|im_end|>"]
    one = Row((Turn("user", "Again"), Turn("assistant", "Say")), "a:8")
    assert labelled(encode(one, tokenizer), tokenizer) == ["ĠSay", "<|im_end|>"]


def test_a_character_of_many_tokens_is_labelled_whole():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    encoded = encode(Row((Turn("user", "é"), Turn("assistant", "😀")), "a:9"), fast)
    assert fast.decode([token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label]) == "😀</s>"
    assert sum(encoded.labels) == len("😀".encode()) + 1


@pytest.mark.parametrize(
    ("format", "written"), [("%d %b %Y", ["26", "ĠJul", "Ġ2024"]), ("%Y-%m-%d", ["2024", "-", "07", "-", "26"])]
)
def test_a_template_that_writes_the_date_gives_the_same_tokens_on_any_day(format, written):
    tokenizer = words("{{ strftime_now('" + format + "') }}\n" + CHATML)
    encoded = encode(QUESTION, tokenizer)
    assert tokens(encoded, tokenizer)[: len(written) + 1] == [*written, "Ċ"]
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!", "<|im_end|>"]
    assert encoded.notes == (chat.FIXED_DATE,)


# -------------------------------------------------------------------------------------------------- the plain template


def test_the_plain_template_writes_headers_and_labels_the_response_and_the_end_of_sequence():
    tokenizer = words()
    encoded = encode(QUESTION, tokenizer)
    assert tokenizer.decode(encoded.ids) == "### Instruction:\nSay hello\n\n### Response:\nHello there !</s>"
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!", "</s>"]


def test_the_plain_template_handles_system_prompts_and_many_turns():
    tokenizer = words()
    encoded = encode(Row((TOLD.turns[0], *TALK.turns), "a:10"), tokenizer)
    assert tokenizer.decode(encoded.ids) == (
        "Short .\n\n### Instruction:\nSay hello\n\n### Response:\nHello there !</s>"
        "\n\n### Instruction:\nAgain\n\n### Response:\nHello you</s>"
    )
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!", "</s>", "Hello", "Ġyou", "</s>"]


def test_the_plain_template_starts_with_the_beginning_of_sequence_the_tokenizer_adds():
    tokenizer = words(adds_bos=True)
    assert tokens(encode(QUESTION, tokenizer), tokenizer)[:2] == ["<s>", "###"]


def test_the_plain_template_can_be_chosen_over_the_models():
    tokenizer = words(CHATML)
    assert tokens(encode(QUESTION, tokenizer, template="plain"), tokenizer)[0] == "###"
    assert encode(QUESTION, tokenizer, template="model") == encode(QUESTION, tokenizer, template="auto")


def test_without_an_end_of_sequence_token_the_row_is_noted():
    tokenizer = words(eos=None)
    encoded = encode(QUESTION, tokenizer)
    assert labelled(encoded, tokenizer) == ["Hello", "Ġthere", "Ġ!"]
    assert encoded.notes == (chat.NO_END,)


def test_the_models_template_must_exist_to_be_chosen():
    with pytest.raises(InputError, match=r"no chat template.*template: plain"):
        encode(QUESTION, words(), template="model")


def test_an_unknown_template_is_an_error():
    with pytest.raises(InputError, match=r"unknown template 'plane'; did you mean 'plain'\?"):
        encode(QUESTION, words(), template="plane")


# ------------------------------------------------------------------------------------------------------------ raw rows


def raw(prompt: str, completion: str) -> Row:
    return Row((Turn("prompt", prompt), Turn("completion", completion)), "a:11")


def test_prompt_and_completion_label_the_completion_and_the_end_of_sequence():
    tokenizer = words(CHATML, adds_bos=True)
    encoded = encode(raw("The capital is", " Paris ."), tokenizer)
    assert tokens(encoded, tokenizer) == ["<s>", "The", "Ġcapital", "Ġis", "ĠParis", "Ġ.", "</s>"]
    assert labelled(encoded, tokenizer) == ["ĠParis", "Ġ.", "</s>"]


@pytest.mark.parametrize("trim", [False, True])
def test_no_token_covers_the_end_of_a_prompt_and_the_start_of_its_completion(trim):
    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    encoded = encode(raw("The capital is ", "Paris ."), tokenizer)
    assert tokens(encoded, tokenizer) == ["The", "Ġcapital", "Ġis", "Ġ", "Paris", "Ġ.", "</s>"]
    assert labelled(encoded, tokenizer) == ["Paris", "Ġ.", "</s>"]


def test_an_end_of_sequence_that_the_data_already_has_is_not_doubled():
    tokenizer = words()
    assert encode(raw("The capital is", " Paris</s>"), tokenizer) == encode(raw("The capital is", " Paris"), tokenizer)


def test_the_first_token_of_a_row_is_never_a_target():
    tokenizer = words()
    assert encode(raw("", "Paris ."), tokenizer).labels == [False, True, True]


@pytest.mark.parametrize(("adds_bos", "targets"), [(False, ["Ġ.", "</s>"]), (True, ["Paris", "Ġ.", "</s>"])])
def test_all_of_a_text_is_labelled_but_its_first_token(adds_bos, targets):
    tokenizer = words(CHATML, adds_bos=adds_bos)
    encoded = encode(Row((Turn("text", "Paris ."),), "a:12"), tokenizer)
    assert labelled(encoded, tokenizer) == targets
    assert encoded.labels[0] is False


# ---------------------------------------------------------------------------------------------------------- tokenizers


class Characters(PreTrainedTokenizer):
    """A slow tokenizer, of characters: it knows no offsets."""

    def __init__(self, **kwargs):
        self._characters = [chr(code) for code in range(128)]
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self._characters)

    def get_vocab(self):
        return {token: index for index, token in enumerate(self._characters)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._characters.index(token)

    def _convert_id_to_token(self, index):
        return self._characters[index]


def test_slow_tokenizers_are_labelled_as_fast_ones_are():
    row = Row((Turn("user", "Hi"), Turn("assistant", "Yo!"), Turn("user", "Hi"), Turn("assistant", "Yes")), "a:13")
    slow = Characters(eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], chat_template=CHATML)
    assert not slow.is_fast
    encoded = encode(row, slow)
    assert labelled(encoded, slow) == ["Y", "o", "!", "<|im_end|>", "Y", "e", "s", "<|im_end|>"]
    assert encoded.ids == slow.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in row.turns], return_dict=False
    )
    plain = encode(row, slow, template="plain")
    assert labelled(plain, slow) == ["Y", "o", "!", "<|im_end|>", "Y", "e", "s", "<|im_end|>"]


def test_how_a_tokenizer_cuts_and_pads_does_not_matter_and_is_left_alone():
    tokenizer = words(CHATML)
    expected = encode(QUESTION, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    before = tokenizer.backend_tokenizer.to_str()
    encoder = Encoder(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert encoder.encode([QUESTION, TALK]) == [expected, encode(TALK, words(CHATML))]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_tokens_are_those_of_the_tokenizers_own_chat_template():
    tokenizer = words(LLAMA3, adds_bos=True)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK.turns]
    assert encode(TALK, tokenizer).ids == tokenizer.apply_chat_template(messages, return_dict=False)


# ------------------------------------------------------------------------------------------- all of an answer is learned

# Qwen3: reasoning comes in a field, or before </think>, and is written for the last answer alone
REASONING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% set content = message.content %}{% set reasoning = message.reasoning_content or '' %}\
{% if not reasoning and '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}\
{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}\
{% if loop.last %}<think>
{{ reasoning }}
</think>

{% endif %}{{ content }}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# DeepSeek-R1: what an answer says before </think> is thrown away
FORGETS = CHATML.replace("message.content }}", "message.content.split('</think>')[-1] }}")

THOUGHTS = Turn("assistant", "Hello you", reasoning="Say hello")


def test_reasoning_in_a_field_of_its_own_is_learned_where_the_template_writes_it():
    tokenizer = words(REASONING)
    encoded = encode(Row((QUESTION.turns[0], THOUGHTS), "a:1"), tokenizer)
    assert tokenizer.decode([i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label]) == (
        "<think>\nSay hello\n</think>\n\nHello you<|im_end|>"
    )
    asked_again = encode(Row((QUESTION.turns[0], THOUGHTS, *QUESTION.turns), "a:1"), tokenizer)
    assert labelled(asked_again, tokenizer)[-4:] == ["Hello", "Ġthere", "Ġ!", "<|im_end|>"]
    assert asked_again.notes == (chat.EARLIER_UNLABELLED,)


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (CHATML, THOUGHTS),
        (None, THOUGHTS),
        (FORGETS, Turn("assistant", "<think> Say hello </think> Hello you")),
        (CHATML.replace("message.content }}", "message.content[:9] }}"), Turn("assistant", "Hello you Hello")),
        (CHATML.replace("message.content }}", "message.content | upper }}"), Turn("assistant", "Hello")),
    ],
)
def test_an_answer_of_which_the_template_loses_a_part_is_refused(template, turn):
    with pytest.raises(InputError, match=r"^a:1: the (chat|plain) template (does not write|has no place|leaves out)"):
        encode(Row((QUESTION.turns[0], turn), "a:1"), words(template))


def test_a_template_that_leaves_out_the_system_prompt_is_refused():
    template = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    with pytest.raises(InputError, match=r"^a:3: the chat template leaves out words of a turn of the role 'system'"):
        encode(TOLD, words(template))


@pytest.mark.parametrize("content", ["<think> Say hello </think> Hello you", "Hello you"])
def test_what_a_template_writes_anew_without_losing_a_word_is_learned(content):
    tokenizer = words(REASONING)
    answer = labelled(encode(Row((QUESTION.turns[0], Turn("assistant", content)), "a:1"), tokenizer), tokenizer)
    assert answer[0] == "<think>"
    assert answer[-3:] == ["Hello", "Ġyou", "<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_the_header_of_a_template_that_ignores_generation_prompts_is_not_learned(template):
    ignoring = template[: template.index("{% if add_generation_prompt %}")]
    expected = encode(TALK, words(template))
    encoded = encode(TALK, words(ignoring))
    assert (encoded.ids, encoded.labels, encoded.notes) == (expected.ids, expected.labels, ())


@pytest.mark.parametrize("header", ["", "<think>\n\n</think>\n\n"])
def test_an_added_token_in_an_answer_does_not_end_it(header):
    template = CHATML.replace("message.content }}<|im_end|>", "'" + header.replace("\n", "\\n") + "' ~ message.content }}")
    tokenizer = words(template.replace("<|im_start|>", ""))
    row = Row((Turn("user", "Say hello"), Turn("assistant", "Hello</think> there !")), "a:6")
    encoded = encode(row, tokenizer)
    assert labelled(encoded, tokenizer)[-4:] == ["Hello", "</think>", "Ġthere", "Ġ!"]
    assert encoded.notes == (chat.NO_END,)


def test_an_answer_that_holds_the_templates_own_words_ends_where_it_ends():
    tokenizer = words(CHATML)
    for text in ("assistant\nHello", "Hello<|im_end|>\n<|im_start|>user\nAgain", "<|im_end|>", " Hello ", "Hello\n"):
        encoded = encode(Row((*QUESTION.turns, QUESTION.turns[0], Turn("assistant", text)), "a:6"), tokenizer)
        ids = [i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label]
        assert tokenizer.decode(ids) == f"Hello there !<|im_end|>{text}<|im_end|>"


# ---------------------------------------------------------------------------------------- templates that mark the answers

MARKED = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
NO_PROMPT = MARKED[: MARKED.index("{% if add_generation_prompt %}")]
SPACED = MARKED.replace("assistant\n", "assistant ").replace("message.role }}\n", "message.role }} ")


@pytest.mark.parametrize("template", [MARKED, WITHOUT_END, NO_PROMPT, SPACED])
def test_the_labels_of_a_template_that_marks_answers_are_transformers_own_mask(template):
    tokenizer = words(template)
    opened = Row((Turn("assistant", "Hello"), *TALK.turns), "a:4")
    for row in (QUESTION, TALK, TOLD, opened):
        encoded = encode(row, tokenizer)
        messages = [{"role": turn.role, "content": turn.text} for turn in row.turns]
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert encoded.ids == expected["input_ids"]
        assert encoded.labels == list(map(bool, expected["assistant_masks"]))
        assert encoded.notes == ((chat.NO_END,) if template == WITHOUT_END else ())


def test_a_masked_answer_is_not_learned_although_the_template_marks_it():
    tokenizer = words(MARKED)
    turns = (TALK.turns[0], Turn("assistant", "Hello there !", masked=True), *TALK.turns[2:])
    assert labelled(encode(Row(turns, "a:2"), tokenizer), tokenizer) == ["Hello", "Ġyou", "<|im_end|>"]


def test_marks_that_are_not_one_for_each_answer_are_refused():
    template = MARKED.replace(
        "{{ message.content }}<|im_end|>{% endgen", "{% endgeneration %}{% generation %}{{ message.content }}{% endgen"
    )
    with pytest.raises(InputError, match=r"^a:1: the chat template marks 2 parts as generated, and there are 1 answers"):
        encode(QUESTION, words(template))


# ------------------------------------------------------------------------------------------------------------- long rows


@pytest.mark.parametrize(
    "row",
    [
        Row((Turn("text", "Paris . " * 50_000),), "a:1"),
        Row((Turn("user", "Again"), Turn("assistant", "Hello " * 50_000)), "a:1"),
    ],
)
def test_of_a_very_long_row_only_the_beginning_is_tokenized(row):
    tokenizer = words(CHATML)
    whole, part = encode(row, tokenizer), Encoder(tokenizer, max_length=16).encode([row])[0]
    assert len(part.ids) < 0.2 * len(whole.ids)
    assert (part.ids[:16], part.labels[:16], part.cut, whole.cut) == (whole.ids[:16], whole.labels[:16], True, False)


def test_a_response_far_behind_max_length_is_not_found_and_does_not_stop_others():
    far = Row((Turn("user", "Again " * 50_000), Turn("assistant", "Hello")), "a:1")
    encoded = Encoder(words(CHATML), max_length=16).encode([far, QUESTION])
    assert not any(encoded[0].labels)
    assert encoded[1] == encode(QUESTION, words(CHATML))
