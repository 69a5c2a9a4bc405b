"""Several processes that train as one, as torchrun and accelerate launch start them.

Each works on its slice of every batch, and their gradients are added up, so that all take the same
steps. Only the first one speaks and writes; what stops one stops all. Without a launcher there is
one process, which has the whole batch, waits for nobody and is the first.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Return how many processes train as one."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: str | None) -> Iterator[None]:
    """Join the processes of one launch; a failure of one is raised there and ends the others.

    Args:
        device: What --device says; on GPUs each process gets its own, as `cuda`.

    Raises:
        ValueError: the device cannot be shared out.
    """
    if "RANK" not in os.environ:
        yield
        return
    gpus = device != "cpu" and torch.cuda.is_available()
    # Tensors on GPUs travel by nccl; gloo, for those on the CPU, is also what `meet` uses.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        if device not in (None, "auto", "cpu", "cuda"):
            raise ValueError(f"--device of several processes must be cpu or cuda, got {device}")
        if gpus:
            _take_gpu(int(os.environ["LOCAL_RANK"]))
        yield
        meet()
    except Exception as error:
        meet(failure=2 if isinstance(error, ValueError) else 1)
        raise
    finally:
        dist.destroy_process_group()


def meet(note: object = None, failure: int = 0) -> list:
    """Wait for all processes, and return the note each of them brings.

    A process that fails brings its exit code instead, to whatever meeting the others come to next.

    Raises:
        SystemExit: another process has failed, and it (of several, the first) says why.
    """
    if not dist.is_initialized():
        return [note]
    brought: list = [None] * count()
    dist.all_gather_object(brought, (note, failure))
    failed = {rank: code for rank, (_, code) in enumerate(brought) if code}
    if failed and min(failed) != dist.get_rank():
        raise SystemExit(failed[min(failed)])
    return [note for note, _ in brought]


def share(batch: int) -> slice:
    """Return the rows of a batch that this process works on."""
    length = batch // count()
    begin = dist.get_rank() * length if dist.is_initialized() else 0
    return slice(begin, begin + length)


def slices(batch: int, most: int | None) -> list[slice]:
    """Return these rows in parts, at most `most` of them at once."""
    own = share(batch)
    most = most or batch
    return [slice(row, min(row + most, own.stop)) for row in range(own.start, own.stop, most)]


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all processes, which have equally many, without gradients."""
    if not dist.is_initialized():
        return rows
    meet()
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def add_up(gradients: Sequence[Tensor], numbers: dict[str, float]) -> None:
    """Replace gradients and numbers by their sums over all processes, in one exchange."""
    if not dist.is_initialized():
        return
    meet()
    values = gradients[0].new_tensor(list(numbers.values()))
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), values])
    dist.all_reduce(flat)
    *sums, values = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))
    numbers.update(zip(list(numbers), values.tolist(), strict=True))


def _take_gpu(number: int) -> None:
    """Make `cuda` mean the GPU of this number.

    Raises:
        ValueError: there are not so many here.
    """
    if number >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"there are more processes than GPUs here ({gpus}): one each")
    torch.cuda.set_device(number)
