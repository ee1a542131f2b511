"""Runs under a launcher: worker.py CASE DIRECTORY. What it finds out goes into DIRECTORY; the tests look there."""

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from bilevel import LISA, Backend, InputError
from bilevel.pieces import PieceFile
from bilevel_backends.deepspeed_backend import DeepSpeedBackend
from bilevel_backends.fsdp_backend import FSDPBackend
from tests.bilevel_backends.distributed.alone import skip_no_collective
from tests.bilevel_backends.distributed.cases import LONG, ROUNDS, SOLVER, Regularized, Sentences, run


def backend_of(kind: str, **settings: Any) -> Backend:
    fields: dict[str, Any] = {"dtype": "float32", **settings}
    return FSDPBackend(**fields) if kind == "fsdp" else DeepSpeedBackend(zero_stage=int(kind[-1]), **fields)  # type: ignore[arg-type]


SWITCHES = 15
KINDS = ("zero0", "zero1", "zero2", "zero3", "fsdp")
OF_EXPERTS = [kind for kind in KINDS if kind != "fsdp" or hasattr(FSDPModule, "set_reduce_scatter_unused_params")]
"""Before torch 2.13, all processes of FSDP must use the same parameters, as its backend says."""
EQUAL: dict[str, dict[str, Any]] = {
    **{f"{kind}-whole": {} for kind in KINDS},
    # zero0 reduces gradients at the step, as zero1 does
    **{f"{kind}-micro": {"micro_batch_size": 2} for kind in ("zero1", "zero2", "zero3", "fsdp")},
    **{
        f"{kind}-recomputed": {"micro_batch_size": 4, "activation_checkpointing": True, "sync_each_micro_batch": False}
        for kind in ("zero2", "zero3", "fsdp")
    },
    "zero1-offload": {"offload_optimizer": True},
    "zero3-offload": {"offload_optimizer": True, "offload_parameters": True},
    "zero3-persistent": {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 20}}},
    "zero3-nothing-persistent": {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    "fsdp-offload": {"offload_parameters": True},
}


def equal(where: Path) -> None:
    """The same run in every way; and bfloat16, which only has to work and to come near."""
    if os.environ["WORLD_SIZE"] == "1":
        skip_no_collective()
    for name, settings in EQUAL.items():
        run(backend_of(name.split("-")[0], **settings), where / name)
    for kind in KINDS:
        backend = backend_of(kind, dtype="bfloat16")
        note_at_end(backend, where / f"{kind}-bfloat16-{os.environ['RANK']}.json")
        run(backend, where / f"{kind}-bfloat16", steps=LONG)
        run(backend_of(kind), where / f"{kind}-rounds", solver=ROUNDS, steps=LONG)
        run(backend_of(kind, micro_batch_size=4, dtype="float64"), where / f"{kind}-regularized", problem=Regularized())


def groups(where: Path) -> None:
    """Four processes, which hold two copies of what they split; also what each has of the weights in bfloat16."""
    for kind in ("zero1", "zero2", "zero3", "fsdp"):
        run(backend_of(kind, shard_group=2, micro_batch_size=2), where / kind)
        backend = backend_of(kind, shard_group=2, dtype="bfloat16")
        note_at_end(backend, where / f"{kind}-bfloat16-{os.environ['RANK']}.json")
        run(backend, where / f"{kind}-bfloat16", steps=4)
    if os.environ["RANK"] == "0":
        shutil.copytree(where / "fsdp", where / "resumed")
        shutil.rmtree(where / "resumed" / "checkpoints" / "step-00000008")
    torch.distributed.barrier()
    run(backend_of("fsdp", shard_group=2, micro_batch_size=2), where / "resumed", resume=True)


def experts(where: Path) -> None:
    """The rows of each process go through one of two experts."""
    for kind in OF_EXPERTS:
        run(backend_of(kind, dtype="float64"), where / kind, problem=Sentences(experts=True))


def note_at_end(backend: Any, file: Path) -> None:
    """When the run ends, write the hashes of what this process has of every variable, and of what it computes with it."""
    close = backend.close

    def note() -> None:
        seen = {}
        for v in backend._variables:
            split = backend.placement(2).split_parameters and v.name != "x"
            held = {} if split else v.module.state_dict()
            with torch.no_grad():
                output = v() if v.name == "x" else v(torch.arange(10, device=backend._device)[None])
                v.sharding.reshard()
            digest = hashlib.sha256()
            for tensor in [*held.values(), output]:
                digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
            seen[v.name] = digest.hexdigest()
        file.write_text(json.dumps(seen))
        close()

    backend.close = note


def resume(where: Path) -> None:
    """Go on: from our own checkpoints, from one of another number of processes, from another backend's.

    Those after 4 steps are written while the next steps are taken ("late").
    """
    for kind in ("zero1", "zero3", "fsdp"):
        for start in ("same", "torch") if kind == "zero1" else ("same", "late", "torch"):
            output = where / f"{kind}-from-{start}"
            source = where / "torch" if start == "torch" else where / kind
            if start == "same":
                backend = backend_of(kind)
                write_late(backend, lambda: time.sleep(0.5))
                run(backend, source, steps=5)
            if os.environ["RANK"] == "0":
                shutil.copytree(source, output)
                if start == "late":
                    shutil.rmtree(output / "checkpoints" / "step-00000005")
            torch.distributed.barrier()
            with reads() as sizes:
                run(backend_of(kind), output, resume=True)
            (where / f"{output.name}-{os.environ['RANK']}.json").write_text(json.dumps(sum(sizes)))
    run(backend_of("zero2"), where / "half", steps=5)  # for one process to go on with

    def fail() -> None:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device", "z-00002-of-00002.safetensors")

    backend = backend_of("fsdp")
    write_late(backend, fail)
    try:
        run(backend, where / "full", problem=Sentences(pause=0.05))
    except OSError as error:
        (where / f"full-{os.environ['RANK']}.txt").write_text(str(error))


def write_late(backend: Any, before: Callable[[], None]) -> None:
    """Do something before the files of a checkpoint are written in the background."""
    save = backend.save

    def save_late(directory: Path, variables: Any, *, copy: bool) -> Callable[[], Any]:
        write = save(directory, variables, copy=copy)

        def write_now() -> Any:
            if copy:
                before()
            return write()

        return write_now

    backend.save = save_late


@contextmanager
def reads() -> Iterator[list[int]]:
    """The bytes of every tensor, or stretch of one, that is read from a checkpoint meanwhile."""
    read, sizes = PieceFile.read, []

    def noted(self: PieceFile, name: str, places: range) -> torch.Tensor:
        found = read(self, name, places)
        sizes.append(found.nbytes)
        return found

    PieceFile.read = noted  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        PieceFile.read = read  # type: ignore[method-assign]


def switches(where: Path) -> None:
    """Many switches: time, bytes, hooks and memory."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        backend, problem = backend_of(kind), Sentences()
        backend.start(0)
        state = SOLVER.init(problem, backend)
        z = state.replicas["z"]
        seconds, sizes, hooks, memory = [], [], [], []
        for t in range(SWITCHES):
            blocks = LISA(blocks=1, period=1).at(t, z.blocks, 0)
            before = backend.weights(z)
            started = time.perf_counter()
            for replica in state.replicas.values():
                backend.activate(replica, blocks)
            seconds.append(time.perf_counter() - started)
            SOLVER.step(t, state, problem, backend)
            frozen = set(z.blocks.parameters(z.blocks.names - blocks))
            after = backend.weights(z)
            assert all(torch.equal(before[name], after[name]) for name in frozen & before.keys()), (
                f"{kind}: a frozen block moved"
            )
            sizes.append(backend.optimizer_bytes(z))
            module: Any = z.module  # type: ignore[attr-defined]
            hooks.append(sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters()))
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        found[kind] = {
            "seconds": sorted(seconds)[SWITCHES // 2], "sizes": sizes, "hooks": hooks, "growth_kb": memory[-1] - memory[SWITCHES // 3],
        }  # fmt: skip
        backend.close()
    (where / f"switches-{os.environ['RANK']}.json").write_text(json.dumps(found))


def language_models(where: Path) -> None:
    """Real architectures, made from stored weights; settings.json says where they and their data are."""
    from tests.bilevel_backends.distributed.language import WHOLE, reweight

    for family, settings in json.loads((where / "settings.json").read_text()).items():
        for kind in ("zero2", "zero3", "fsdp", *(("zero0", "zero1") if family in WHOLE else ())):
            backend = backend_of(kind, micro_batch_size=2, activation_checkpointing=kind != "zero2")
            if family != "bert":
                reweight(backend, settings, where / f"{family}-{kind}")
                continue
            try:
                reweight(backend, settings, where / f"{family}-{kind}")
            except InputError as error:
                (where / f"{family}-{kind}-{os.environ['RANK']}.txt").write_text(str(error))


def fine_tuning(where: Path) -> None:
    """Models whose weights no process reads whole, with and without adapters."""
    from bilevel_llm.model.files import ModelFiles
    from tests.bilevel_backends.distributed.language import TUNINGS, reweight, tune

    def refuse(*args: Any) -> None:
        raise AssertionError("the model was loaded whole")

    ModelFiles.load_model = refuse  # type: ignore[assignment,method-assign]
    settings = json.loads((where / "settings.json").read_text())
    for name, lora in TUNINGS.items():
        for kind in ("zero2", "zero3", "fsdp"):
            backend = backend_of(kind, micro_batch_size=2, activation_checkpointing=kind != "zero2")
            tune(backend, settings, lora, where / f"{name}-{kind}")
    for kind in KINDS:
        nothing_persistent = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        of_kind = {"config": nothing_persistent} if kind == "zero3" else {}
        backend = backend_of(kind, micro_batch_size=2, activation_checkpointing=kind != "zero2", **of_kind)
        note_sharing(backend, where / f"sharing-{kind}-{os.environ['RANK']}.json")
        reweight(backend, settings, where / f"reweighting-{kind}", TUNINGS["lora"])


def note_sharing(backend: Any, file: Path) -> None:
    """When the run ends, write which parameters y and z hold once, and which ones each has by itself."""
    close = backend.close

    def note() -> None:
        y, z = (next(v for v in backend._variables if v.name == name) for name in "yz")
        same = {
            name: y.sharding.local(name).data_ptr() == z.sharding.local(name).data_ptr() for name in y.sharding.parameters
        }
        file.write_text(json.dumps(same))
        close()

    backend.close = note


CASES: dict[str, Callable[[Path], None]] = {
    "equal": equal,
    "groups": groups,
    "experts": experts,
    "resume": resume,
    "switches": switches,
    "language_models": language_models,
    "fine_tuning": fine_tuning,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    CASES[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # without the process group's farewell, which warns where it was not destroyed
