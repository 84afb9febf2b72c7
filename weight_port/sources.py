"""Files with PyTorch weights: safetensors without torch, pickles through torch with ``weights_only``."""

import dataclasses
import hashlib
import importlib
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import atomic_path
from xdim_jax.nets.weights import write_arrays

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # keys under which training scripts put a state_dict


@dataclasses.dataclass(frozen=True)
class Source:
    """Arrays by PyTorch name, and the record of where they came from: file name and SHA-256."""

    state: dict[str, np.ndarray]
    record: dict[str, Any]


def read_source(path: Path) -> Source:
    """Reads a safetensors file or a pickled state_dict, whichever it is by its content.

    Raises:
        UserError: missing, truncated, neither of the two, or a pickle of more than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--from-file: cannot read {path}: {error.strerror}") from error
    if start[8:9] == b"{":
        state = _read_safetensors(path)
    elif start[:2] == b"PK" or start[:1] == b"\x80":
        state = _read_pickle(path)
    else:
        raise UserError(
            f"--from-file: {path} is neither safetensors nor a PyTorch file (it begins with {start[:8]!r}); expected "
            "model.safetensors of a timm model, or a .pth with a state_dict"
        )
    return Source(state, {"file": path.name, "sha256": digest})


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, "np") as file:
            ported = "xdim_jax" in (file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"--from-file: {path} is not a whole safetensors file ({error}); download it again") from error
    if ported:
        raise UserError(f"--from-file: {path} is ported already; to go on from it use --source=xdim, or --to-torch")
    return {n: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for n, a in arrays.items()}


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    torch = import_torch(f"{path} is a PyTorch file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--from-file: {path} is a pickle of more than tensors (a whole module, as the released DS-Net encoder "
            "is), which runs code when it is opened. Where you trust it, save its tensors first, with its class at "
            "hand: torch.save(torch.load(file, weights_only=False).state_dict(), 'net.pth')"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"--from-file: {path} is not a whole PyTorch file ({first_line(error)}); download it again"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"--from-file: {path} holds no state_dict (names to tensors)")
    names = [str(n) for n in content]
    prefix = "module." if names and all(n.startswith("module.") for n in names) else ""  # DataParallel's
    return {str(n).removeprefix(prefix): _array(torch, t) for n, t in content.items()}


def _array(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_state(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state_dict, as safetensors or, for other suffixes, with ``torch.save``; whole or not at all."""
    if path.suffix == ".safetensors":
        write_arrays(path, state)
        return
    torch = import_torch(f"writing {path}")
    with atomic_path(path) as temporary:
        torch.save({n: torch.from_numpy(np.array(a)) for n, a in state.items()}, temporary)


def download(repository: str, filename: str = "model.safetensors") -> Path:
    """A file of the Hugging Face hub, from its cache where it lies there already.

    Raises:
        UserError: the hub cannot be reached, or has no such file.
    """
    import huggingface_hub  # half a second that only a download needs

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except Exception as error:  # many kinds: no network, no such file, a proxy's answer
        reason = first_line(error)
        raise UserError(
            f"cannot download {repository}/{filename} from the Hugging Face hub: {reason}. Where there is no network, "
            f"fetch https://huggingface.co/{repository}/resolve/main/{filename} elsewhere and give it by --from-file"
        ) from error


def import_torch(why: str) -> Any:
    """torch, or one error that says what it is needed for."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"{why}: that needs torch, pip install 'xdim_jax[port]'") from error


def import_timm() -> Any:
    """timm, or None where it is not installed.

    A CPU build of torch beside PyPI's torchvision (built for CUDA) refuses two of torchvision's operators when it is
    imported. timm calls neither, so their schemas are declared and the import tried again.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = importlib.import_module("torch").library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    try:
        return importlib.import_module("timm")
    except ImportError:
        return None


_KEPT: list[Any] = []  # a library that is collected takes its operators with it
