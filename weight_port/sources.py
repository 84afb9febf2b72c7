"""Reading, writing and downloading files with PyTorch weights.

Safetensors files are read without torch. Pickles are read by torch with ``weights_only``, so no code in them is run.
"""

import dataclasses
import hashlib
import importlib
import pickle
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.files import atomic_path
from xdim_jax.nets.weights import write_arrays

# keys under which training scripts store a state_dict; a moving average of the weights is preferred, as in timm
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")

_FLOATS = "expected dense arrays of 16, 32 or 64-bit floating-point numbers; convert them first"

HUB_SECONDS = 4.0  # time to wait for the first answer of the Hugging Face hub


@dataclasses.dataclass(frozen=True)
class Source:
    """The contents of a weights file.

    Attributes:
        state: Arrays by PyTorch name.
        record: Origin of the arrays, for reports; contains at least ``file`` (name) and ``sha256``, and ``entry`` if
            the arrays are below a key of the file, such as ``model_ema``.
    """

    state: dict[str, np.ndarray]
    record: dict[str, Any]


def read_source(path: Path) -> Source:
    """Read a safetensors file or a pickled state_dict. The format is recognised by the content of the file.

    Raises:
        UserError: The file is missing, truncated or in another format, or is a pickle that contains more than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--from-file: cannot read {path}: {error.strerror}") from error
    entry = ""
    if start[8:9] == b"{":
        state = _read_safetensors(path)
    elif start[:2] == b"PK" or start[:1] == b"\x80":
        state, entry = _read_pickle(path)
    else:
        raise UserError(
            f"--from-file: {path} is neither a safetensors nor a PyTorch file (it begins with {start[:8]!r}); expected "
            "model.safetensors of a timm model, or a .pth with a state_dict"
        )
    return Source(state, {"file": path.name, "sha256": digest} | ({"entry": entry} if entry else {}))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, "np") as file:
            converted = "xdim_jax" in (file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"--from-file: {path} is not a complete safetensors file ({error}); download it again"
        ) from error
    except (TypeError, AttributeError) as error:  # a type that NumPy does not have, e.g. float8
        raise UserError(f"--from-file: {path} cannot be read ({first_line(error)}): {_FLOATS}") from error
    if converted:
        raise UserError(
            f"--from-file: {path} is a file of xdim_jax already; give --source=xdim to adapt it, or --to-torch to "
            "convert it to PyTorch"
        )
    return {n: a.astype(np.float32) if a.dtype.name in ("bfloat16", "float16") else a for n, a in arrays.items()}


def _read_pickle(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays, and the name of the entry that contains them; empty if the file is a state_dict."""
    torch = import_torch(f"reading the PyTorch file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--from-file: {path} is damaged, or a pickle that contains more than tensors, such as a whole module or "
            "the options of a training. Loading it runs code from the file. If you trust the file, save its tensors in "
            "a program that can import its classes: torch.save(torch.load(file, weights_only=False).state_dict(), "
            "'net.pth'), or [\"state_dict\"] instead of .state_dict() if it is the checkpoint of a training"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise UserError(
            f"--from-file: {path} is not a complete PyTorch file ({first_line(error)}); download it again"
        ) from error
    entry = ""
    while key := _wrapper(torch, content):
        content, entry = content[key], f"{entry}.{key}".strip(".")
    if isinstance(content, Mapping):
        content = {name: value for name, value in content.items() if name != "n_averaged"}  # of torch's AveragedModel
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"--from-file: {path} contains no state_dict (a mapping from names to tensors)")
    names = [str(n) for n in content]
    prefix = "module." if names and all(n.startswith("module.") for n in names) else ""  # added by DataParallel
    try:
        return {str(n).removeprefix(prefix): _array(torch, t) for n, t in content.items()}, entry
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, float8 or empty (meta) tensors
        raise UserError(f"--from-file: {path} cannot be read ({first_line(error)}): {_FLOATS}") from error


def _wrapper(torch: Any, content: Any) -> str:
    """Return the key under which a training script stored a state_dict; empty if there is none."""
    for key in _WRAPPERS if isinstance(content, Mapping) else ():
        inner = content.get(key)
        tensors = isinstance(inner, Mapping) and all(isinstance(v, torch.Tensor) for v in inner.values())
        if tensors or (isinstance(inner, Mapping) and not key.endswith("_ema")):
            return key
    return ""


def _array(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def write_state(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write a state_dict atomically: as safetensors if the suffix is .safetensors, else with ``torch.save``.

    Raises:
        UserError: The file cannot be written, or torch is needed and not installed.
    """
    if path.suffix == ".safetensors":
        write_arrays(path, state)
        return
    torch = import_torch(f"writing {path}")
    with atomic_path(path) as temporary:
        torch.save({n: torch.from_numpy(np.array(a)) for n, a in state.items()}, temporary)


def download(repository: str, filename: str = "model.safetensors") -> Path:
    """Return the local path of a file on the Hugging Face hub, which is downloaded unless it is in the local cache.

    Args:
        repository: Name of the repository, e.g. ``timm/tf_efficientnet_b0.ns_jft_in1k``.
        filename: Name of the file.

    Raises:
        UserError: The hub has no such file, or does not answer within `HUB_SECONDS`.
    """
    import huggingface_hub  # imported here because it takes half a second

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename, local_files_only=True))
    except FileNotFoundError:
        pass  # not in the cache
    try:
        _ask_hub(repository, filename)
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except Exception as error:  # many types: no network, no such file, an answer of a proxy
        raise UserError(
            f"cannot download {repository}/{filename} from the Hugging Face hub: {first_line(error).rstrip('.')}. "
            f"If this machine has no network, download https://huggingface.co/{repository}/resolve/main/{filename} "
            "elsewhere, and give the file with --from-file"
        ) from error


def _ask_hub(repository: str, filename: str) -> None:
    """Request the metadata of a file once, because the hub's library retries a failed download for half a minute.

    Raises:
        Exception: As raised by the hub's library, or TimeoutError if there is no answer within `HUB_SECONDS`.
    """
    import huggingface_hub

    errors: list[Exception] = []

    def ask() -> None:
        try:
            url = huggingface_hub.hf_hub_url(repository, filename)
            huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # the timeout above does not limit the DNS lookup
    thread.start()
    thread.join(HUB_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {HUB_SECONDS:g} s")
    if errors:
        raise errors[0]


def import_torch(why: str) -> Any:
    """Import torch.

    Args:
        why: Subject of the error message, e.g. "reading the PyTorch file net.pth".

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"{why} needs torch: pip install 'xdim_jax[port]'") from error


def import_timm() -> Any:
    """Import timm; return None if it is not installed.

    With a CPU build of torch, the import of PyPI's torchvision (built for CUDA) fails, because two of its operators are
    not defined. timm calls neither of them, so their schemas are declared, and the import is repeated.
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


_KEPT: list[Any] = []  # prevents garbage collection, which would remove the declared operators
