"""CPU seconds, seconds and peak memory of one ScaleBiO step on a language model, beside plain PyTorch loops.

The loops are what one writes first: `AutoModelForCausalLM`, batches padded to their longest row with an attention mask,
logits at every position.

authors' way    the step of this library as the authors' code has it: lower loss of z, lower loss of y, upper loss of y, and
                an AdamW step for each model; two blocks, the embedding, the final norm and the head train
fine-tuning     one pass over as many rows, and an AdamW step; all weights train
lisa            the same; two blocks train
floor           nothing but the matrix products with weights that our step cannot do without: every distinct token once, the
                head at labels alone, gradients down to the lowest block that trains

All see the same rows, of which each is an instruction and an answer, as long as in Alpaca, behind the system prompt of a
chat template. Each case runs in processes of its own, in turn (a, b, c, a, b, c, ...), so that a change in the machine's
speed hits all of them, and peaks of memory are their own. By default the model is a random Llama of 8 layers, which takes
five minutes on one core.

Usage: python benchmarks/step.py [--model smollm2-135m] [--dtype bfloat16] [--steps 3] [--rounds 3] [--threads 1]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROWS, BATCH, LENGTH = 64, 8, 128
BLOCKS = (0.3, 0.69)  # where in the stack of blocks the two that train are: blocks 9 and 20 of 30
PENALTY = 10.0
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant, who answers questions and follows instructions.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words() -> list[str]:
    """Python's documentation, word by word."""
    return " ".join(topics[name] for name in sorted(topics)).replace("*", "").split()


def rows(offset: int) -> list[dict[str, str]]:
    """Instruction rows: 5 to 14 words that ask and 5 to 87 that answer."""
    made, text = [], words()
    for i in range(ROWS):
        start = (offset * ROWS + i) * 102
        asked, answered = 5 + i % 10, 5 + (i * 37) % 83
        question, answer = text[start : start + asked], text[start + asked : start + asked + answered]
        made.append({"instruction": " ".join(question), "input": "", "output": " ".join(answer)})
    return made


def small_model(directory: Path) -> str:
    """A random Llama of 8 layers with a vocabulary of 16,000 tokens, which is learned from the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([" ".join(words())], learn)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16_000, num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, **sizes
        )
    ).save_pretrained(directory)
    return str(directory)


def problem(model: str, directory: Path) -> Any:
    """The reweighting problem that all cases take their rows from."""
    from bilevel_llm.data.settings import Source, ValidationSet
    from bilevel_llm.reweighting.problem import LLMReweighting

    for offset, name in enumerate(("a", "b", "validation")):
        (directory / f"{name}.json").write_text(json.dumps(rows(offset)))
    return LLMReweighting(
        model=model,
        sources=[Source(name, str(directory / f"{name}.json")) for name in ("a", "b")],
        validation=[ValidationSet(str(directory / "validation.json"))],
        max_length=LENGTH,
        batch_size=BATCH,
    )


def ours(p: Any, dtype: str) -> Callable[[int], None]:
    """A step of this library."""
    from bilevel import ScaleBiO
    from bilevel_backends.torch_backend import TorchBackend

    solver, backend = (
        ScaleBiO(warmup=0),
        TorchBackend(dtype=dtype, device="cpu"),  # type: ignore[arg-type]
    )
    backend.start(seed=0)
    state = solver.init(p, backend)
    y = next(iter(state.replicas.values()))
    with torch.no_grad():
        p.examine(lambda what, batch: {name: float(value) for name, value in what(y, batch).items()})
    for replica in state.replicas.values():
        repeated = replica.blocks.repeated
        backend.activate(replica, frozenset(repeated[int(place * len(repeated))] for place in BLOCKS))

    def step(t: int) -> None:
        solver.step(t, state, p, backend)

    return step


def load(p: Any, dtype: str, *, frozen: Callable[[Any], Iterable[torch.nn.Module]]) -> tuple[Any, torch.optim.Optimizer]:
    """A model and its optimizer. frozen: the parts of the model that do not train, but for the two blocks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(p._files.path, dtype=getattr(torch, dtype))
    for part in frozen(model):
        part.requires_grad_(False)
    for layer in trained(model):
        layer.requires_grad_(True)
    return model, torch.optim.AdamW((q for q in model.parameters() if q.requires_grad), lr=1e-5)


def trained(model: Any) -> list[torch.nn.Module]:
    """The two blocks that train."""
    layers = model.model.layers
    return [layers[int(place * len(layers))] for place in BLOCKS]


def padded(tables: Iterable[Any], sampler: Any, t: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A padded batch, and the source of every row."""
    tables = list(tables)
    picked = [(source, *tables[source].row(row)) for source, row in sampler.batch(t, 0)]
    longest = max(len(ids) for _, ids, _ in picked)
    ids, mask = torch.zeros(BATCH, longest, dtype=torch.long), torch.zeros(BATCH, longest, dtype=torch.long)
    labels = torch.full((BATCH, longest), -100)
    for i, (_, tokens, marked) in enumerate(picked):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.from_numpy(tokens), 1
        labels[i, : len(tokens)] = torch.where(torch.from_numpy(marked), ids[i, : len(tokens)], -100)
    sources = torch.tensor([source for source, _, _ in picked])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, sources


def row_losses(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of every row, from logits at every position."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    shifted = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), shifted, reduction="none")
    return losses.sum(1) / (shifted != -100).sum(1)


def authors(p: Any, dtype: str) -> Callable[[int], None]:
    """The step of this library in a plain loop; LISA as the authors have it freezes blocks alone."""
    (y, of_y), (z, of_z) = (load(p, dtype, frozen=lambda model: model.model.layers) for _ in "yz")
    weights = torch.zeros(2, requires_grad=True)
    of_x = torch.optim.AdamW([weights], lr=1e-2)

    def step(t: int) -> None:
        lower, source = padded(p._train.values(), p._lower_sampler, t)
        upper, _ = padded(p._targets.values(), p._upper_sampler, t)
        for model, scale in ((z, -PENALTY), (y, PENALTY)):
            weight = torch.softmax(weights, 0)[source] / (BATCH / 2)
            torch.dot(scale * weight, row_losses(model, **lower)).backward()  # type: ignore[no-untyped-call]
        row_losses(y, **upper).mean().backward()  # type: ignore[no-untyped-call]
        for optimizer in (of_y, of_z, of_x):
            optimizer.step()
            optimizer.zero_grad()

    return step


def one_pass(p: Any, dtype: str, *, frozen: Callable[[Any], Iterable[torch.nn.Module]]) -> Callable[[int], None]:
    """A step of fine-tuning in a plain loop."""
    model, optimizer = load(p, dtype, frozen=frozen)

    def step(t: int) -> None:
        batch, _ = padded(p._train.values(), p._lower_sampler, t)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def floor(p: Any, dtype: str) -> Callable[[int], None]:
    """The matrix products of our step with random numbers: of the tokens with weights, forward and backward."""
    from bilevel import Shard

    p.packed = True
    model, _ = load(p, dtype, frozen=lambda model: [model])
    layers, lowest = list(model.model.layers), int(BLOCKS[0] * len(model.model.layers))

    def linear(weight: torch.Tensor, tokens: int, *, passes_on: bool, trains: bool) -> None:
        inputs, slopes = (torch.full((tokens, size), 0.01, dtype=weight.dtype) for size in reversed(weight.shape))
        torch.mm(inputs, weight.t())
        if passes_on:
            torch.mm(slopes, weight)
        if trains:
            torch.mm(slopes.t(), inputs)

    def step(t: int) -> None:
        shard = Shard(0)
        lower, upper = p.lower_batch(t, shard), p.upper_batch(t, shard)
        for batch in (*lower, *lower, *upper):
            tokens = len(batch.packing.row)
            for number, layer in enumerate(layers):
                for name, weight in layer.named_parameters():
                    if weight.dim() == 2:
                        first = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
                        passes_on = number > lowest or (number == lowest and not first)
                        linear(weight, tokens, passes_on=passes_on, trains=weight.requires_grad)
            linear(model.get_output_embeddings().weight, len(batch.targets), passes_on=True, trains=False)

    return lambda t: torch.no_grad()(step)(t)


CASES: dict[str, Callable[[Any, str], Callable[[int], None]]] = {
    "ours": ours,
    "authors' way": authors,
    "fine-tuning": lambda p, dtype: one_pass(p, dtype, frozen=lambda model: []),
    "lisa": lambda p, dtype: one_pass(p, dtype, frozen=lambda model: [model]),
    "floor": floor,
}


def measure(case: str, model: str, dtype: str, steps: int) -> dict[str, float]:
    """Medians over steps after a first one, and the process's peak memory."""
    with tempfile.TemporaryDirectory() as directory:
        step = CASES[case](problem(model, Path(directory)), dtype)
        step(0)
        cpu, wall = [], []
        for t in range(1, steps + 1):
            started = time.process_time(), time.perf_counter()
            step(t)
            cpu.append(time.process_time() - started[0])
            wall.append(time.perf_counter() - started[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"cpu": median(cpu), "wall": median(wall), "gigabytes": peak}


def main() -> None:
    """Run all cases in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as in a recipe, a model with the parts of a Llama; by default a small random one")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options.case, options.model, options.dtype, options.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or small_model(Path(directory))
        for _ in range(options.rounds):
            for case, results in found.items():
                command = [sys.executable, __file__, "--case", case, "--model", model, "--dtype", options.dtype]
                command += ["--steps", str(options.steps), "--threads", str(options.threads)]
                shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append(json.loads(shown.splitlines()[-1]))
    what = f"{options.model or 'small Llama'} in {options.dtype}"
    title = f"{what}, {BATCH} rows of at most {LENGTH} tokens, threads: {options.threads}"
    table = Table("case", "CPU seconds a step", "seconds a step", "peak GB", "CPU, over ours", title=title)
    for case, results in found.items():
        ratios = [one["cpu"] / own["cpu"] for one, own in zip(results, found["ours"], strict=True)]
        numbers = [median(one[key] for one in results) for key in ("cpu", "wall", "gigabytes")]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(case, *(f"{number:.3g}" for number in numbers), spread)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
