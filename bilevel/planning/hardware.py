"""The machine for which a run is planned, and what is assumed about it."""

from dataclasses import dataclass

from bilevel.errors import InputError

GB = 1e9  # bytes. A card sold as "80 GB" has 85.5e9: the difference is what driver and error correction take, and some air


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind, in one machine (node) or in several alike.

    gpus: the number of GPUs; each has a process of its own.
    gpu_memory, cpu_memory: GB of 10^9 bytes; of each GPU, of each node. None: CPU memory is not checked.
    peak_tflops: what a GPU's matrix units can do in the run's precision, in 10^12 FLOP/s; 989 is bfloat16 on an H100 SXM.
    mfu: the share of it that matrix products and attention reach, apart from communication. 0.4 is usual for models of this
        size.
    link: bus bandwidth in GB/s of collectives inside a node, as nccl-tests report it ("busbw"). NVLink of an H100 can do
        450 each way; 300 is what a model of a step by hand assumed.
    node_link: the same over several nodes, for each GPU. 45 is what a network card of 400 Gbit/s for each GPU reaches if a
        collective is one ring; NCCL may use more rings, so measure it.
    gpus_per_node: the GPUs of a node. Processes with consecutive ranks share one.
    memory_bandwidth: GB/s of a GPU's memory that a copy reaches, reading and writing counted; two thirds of an H100's 3350.
        What is gathered is copied once more, out of a buffer.
    launch: seconds that the CPU takes to call one operation of torch: 8e-6 to 15e-6 were measured on a CPU.
    gather_launch: seconds that the CPU takes to gather a block, with the hooks of FSDP or DeepSpeed: half of what they took
        on a CPU that was busy otherwise.
    host_link: GB/s between a GPU and the CPU's memory, over PCIe.
    host_optimizer: GB/s of CPU memory that the CPU's optimizer step moves, all processes together.
    context: GB that CUDA, its libraries and kernels take on every GPU.
    communicator: GB of NCCL's own buffers, with several GPUs.
    fragmentation: the share of the allocator's memory that it cannot use.
    process: GB of CPU memory of a process that has loaded torch and CUDA, beside anything below.
    on_cpu: whether the CPU computes. Then `gpu_memory` is that of the machine, and all that a run holds has to fit into it.
    measured: whether `peak_tflops` and `launch` were measured in passes of the model at hand, see `bilevel.planning.here`.

    What follows `gpus_per_node` are assumptions for which the command has no option; see docs/explanation-memory.md.
    """

    gpus: int = 1
    gpu_memory: float = 80.0
    cpu_memory: float | None = None
    peak_tflops: float = 989.0
    mfu: float = 0.4
    link: float = 300.0
    node_link: float = 45.0
    gpus_per_node: int = 8
    memory_bandwidth: float = 2200.0
    launch: float = 10e-6
    gather_launch: float = 1e-3
    host_link: float = 25.0
    host_optimizer: float = 100.0
    context: float = 1.0
    communicator: float = 1.0
    fragmentation: float = 0.05
    process: float = 3.0
    on_cpu: bool = False
    measured: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "peak_tflops", "mfu", "link", "node_link", "gpus_per_node"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        if self.mfu > 1:
            raise InputError(f"--mfu is the share of the peak that is reached, at most 1, not {self.mfu}")
        if self.cpu_memory is not None and self.cpu_memory <= 0:
            raise InputError(f"--cpu-memory must be positive, not {self.cpu_memory}")
