"""Which checkpoints a fine-tune goes on from: those that hold what its own libraries write, and nothing else.

A checkpoint of DeepSpeed's is a folder of pickles, which are read without torch's own guard (`weights_only`), and a run
directory may lie where others write. So the globals that each pickle names are read first, and nothing is run for it.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from bt_ray.errors import TrainingError
from bt_ray.lm.weights import PICKLES

# What is in a checkpoint beside what torch itself takes for safe (tensors, their storages and dtypes, OrderedDict, ...).
WRITTEN = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "numpy._core.multiarray._reconstruct",  # the state of numpy's random numbers
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
    }
)
NEVER_READ = ("training_args.bin",)  # transformers writes it and reads it nowhere
LATEST = "latest"  # DeepSpeed's file that names the folder to read
# Of a file that is refused anyway.
_SHOWN_BYTES, _SHOWN_NAMES, _SHOWN_CHARS = 1 << 20, 3, 250
_MALFORMED = (ValueError, RuntimeError, EOFError, IndexError, UnpicklingError, struct.error)


def pickle_by_value() -> None:
    """Have DeepSpeed's enum written as its class and value: some versions of Python (3.11.2) name `getattr` for it, with
    which a pickle can do anything."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))


def check_checkpoint(folder: Path, root: Path) -> None:
    """Raise TrainingError unless the checkpoint `folder` lies in `root` and reading it can run nobody's code.

    Refused are links, a name that leads out of the folder, a file that `torch.save` does not write, and one that names
    a function or class other than those of a trainer's own state. No file is unpickled to find out.
    """
    problem = _outside(folder, root) or next(_problems(folder), None)
    if problem:
        shown = problem.encode("unicode_escape").decode()[:_SHOWN_CHARS]  # names may be anything, control characters too
        raise TrainingError(
            f"fine-tune: the checkpoint {folder} is not read: {shown}. Reading it could run anyone's code: "
            f"find out who wrote it, then delete {root} and run again: training begins anew."
        )


class BestIsChecked:
    """For a trainer of transformers: the best checkpoint, which it loads at its end, is looked through first.

    It is hours old by then, or was there before this fine-tune began.
    """

    state: Any
    args: Any

    def _load_best_model(self) -> None:
        check_checkpoint(Path(self.state.best_model_checkpoint), Path(self.args.output_dir))
        super()._load_best_model()  # type: ignore[misc]


def _outside(folder: Path, root: Path) -> str | None:
    if folder.is_symlink():
        return "it is a symbolic link"
    return None if folder.resolve().parent == root.resolve() else f"it does not lie in {root}"


def _problems(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        for path in [Path(where, name) for name in sorted([*folders, *files])]:
            name = path.relative_to(folder)
            if path.is_symlink():
                yield f"{name} is a symbolic link"
            elif not (path.is_file() or path.is_dir()):
                yield f"{name} is no regular file"
            elif path.is_file() and path.suffix in PICKLES and path.name not in NEVER_READ and (problem := _foreign(path)):
                yield f"{name} {problem}"
    latest = folder / LATEST
    if latest.is_file() and not _names_a_folder(latest):
        yield f"its file {LATEST} names no folder of the checkpoint"


def _names_a_folder(latest: Path) -> bool:
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    return tag in {path.name for path in latest.parent.iterdir() if path.is_dir()}


def _foreign(path: Path) -> str | None:
    """What is wrong with a file that torch would unpickle, or None."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - WRITTEN)
    except _MALFORMED as error:  # another format, or opcodes that torch.save has no use for
        why = (str(error).splitlines() or ["it is cut"])[0][:100]
        names = _plain_globals(path)
        return f"is none that torch.save writes ({why})" + (f", and names {_shown(names)}" if names else "")
    return f"names {_shown(foreign)}, which no trainer writes there" if foreign else None


def _shown(names: list[str]) -> str:
    return ", ".join(name[:80] for name in sorted(set(names))[:_SHOWN_NAMES])


def _plain_globals(path: Path) -> list[str]:
    """The globals that a pickle names that lies in no archive of torch's, as far as it can be followed."""
    with path.open("rb") as file:
        data = io.BytesIO(file.read(_SHOWN_BYTES))
    names: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except _MALFORMED:
        pass  # what was read until there is shown
    return names
