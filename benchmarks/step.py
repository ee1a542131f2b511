"""CPU seconds, seconds and peak memory of one ScaleBiO step on a language model, beside plain PyTorch loops.

The loops are what one writes first: `AutoModelForCausalLM` with `labels=`, batches padded to their longest row with an
attention mask, logits at every position.

three passes    the step of this library written plainly, as the authors' code has it: lower loss of z, lower loss of y,
                upper loss of y, and an AdamW step for each model; two blocks train
fine-tuning     one pass over as many rows, and an AdamW step; all weights train
lisa            the same; two blocks train

All see the same rows, of which each is an instruction and an answer as in Alpaca. Each case runs in processes of its own, in
turn (a, b, c, a, b, c, ...), so that a change in the machine's speed hits all of them, and peaks of memory are their own.
By default the model is a random Llama of 8 layers, which takes a minute on one core.

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

ROWS, BATCH, MICRO, LENGTH = 64, 8, 4, 128
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
    """Instruction rows of 30 to 100 words, of which the last third is the answer."""
    made, text = [], words()
    for i in range(ROWS):
        start = (offset * ROWS + i) * 110
        part = text[start : start + 30 + (i * 37) % 71]
        cut = 2 * len(part) // 3
        made.append({"instruction": " ".join(part[:cut]), "input": "", "output": " ".join(part[cut:])})
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
        TorchBackend(dtype=dtype, device="cpu", micro_batch_size=MICRO),  # type: ignore[arg-type]
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


def load(p: Any, dtype: str, *, whole: bool) -> tuple[Any, torch.optim.Optimizer]:
    """A model and its optimizer. whole: train all weights, not two blocks alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(p._files.path, dtype=getattr(torch, dtype))
    model.requires_grad_(whole)
    layers = model.model.layers
    for place in BLOCKS:
        layers[int(place * len(layers))].requires_grad_(True)
    return model, torch.optim.AdamW((q for q in model.parameters() if q.requires_grad), lr=1e-5)


def padded(tables: Any, sampler: Any, t: int) -> Iterable[tuple[dict[str, torch.Tensor], int]]:
    """Micro-batches with their sources."""
    picked = [tables[source].row(row) for source, row in sampler.batch(t, 0)]
    for start in range(0, BATCH, MICRO):
        part = picked[start : start + MICRO]
        longest = max(len(ids) for ids, _ in part)
        ids, mask = torch.zeros(MICRO, longest, dtype=torch.long), torch.zeros(MICRO, longest, dtype=torch.long)
        labels = torch.full((MICRO, longest), -100)
        for i, (tokens, marked) in enumerate(part):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.from_numpy(tokens), 1
            labels[i, : len(tokens)] = torch.where(torch.from_numpy(marked), ids[i, : len(tokens)], -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}, start // MICRO


def three_passes(p: Any, dtype: str) -> Callable[[int], None]:
    """The step of this library in a plain loop."""
    (y, of_y), (z, of_z) = load(p, dtype, whole=False), load(p, dtype, whole=False)
    logits = torch.zeros(2, requires_grad=True)

    def step(t: int) -> None:
        lower = list(padded(list(p._train.values()), p._lower_sampler, t))
        upper = list(padded(list(p._targets.values()), p._upper_sampler, t))
        for model, data, scale, weighted in ((z, lower, -PENALTY, True), (y, lower, PENALTY, True), (y, upper, 1.0, False)):
            for batch, source in data:
                weight = torch.softmax(logits, 0)[source] if weighted else 0.5
                (scale * weight * model(**batch).loss).backward()
        for optimizer in (of_y, of_z):
            optimizer.step()
            optimizer.zero_grad()

    return step


def one_pass(p: Any, dtype: str, *, whole: bool) -> Callable[[int], None]:
    """A step of fine-tuning in a plain loop."""
    model, optimizer = load(p, dtype, whole=whole)

    def step(t: int) -> None:
        for batch, _ in padded(list(p._train.values()), p._lower_sampler, t):
            (0.5 * model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CASES: dict[str, Callable[[Any, str], Callable[[int], None]]] = {
    "ours": ours,
    "three passes": three_passes,
    "fine-tuning": lambda p, dtype: one_pass(p, dtype, whole=True),
    "lisa": lambda p, dtype: one_pass(p, dtype, whole=False),
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
