"""weight_port: both directions, every leaf accounted for, files of all kinds, and the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import weight_port
import xdim_jax
from tests import twins
from tests.parity import CASES, calibrated, ds_case, state_of, timm
from tests.random_weights import make_encoder
from weight_port import __main__ as command
from weight_port import authors, sources, timm_models
from weight_port.sources import Source, import_timm
from xdim_jax.base.errors import UserError
from xdim_jax.nets.inflate import Inflation
from xdim_jax.nets.layers import Depth
from xdim_jax.nets.weights import FORMAT, Weights, adapt_encoder, read_weights, write_arrays

SOURCE = {"file": "test", "sha256": "0"}
NAMES = ["tf_efficientnet_b0", "resnet18", "vgg16_bn", "convnext_tiny"]


@pytest.fixture(scope="module")
def states():
    """State of a timm model by architecture, with the batch norms' counters at work."""
    cache = {}

    def get(architecture):
        if architecture not in cache:
            cache[architecture] = state_of(calibrated(timm.create_model(architecture, pretrained=False, num_classes=7)))
        return cache[architecture]

    return get


@pytest.fixture(scope="module")
def b0(states, tmp_path_factory) -> Path:
    """tf_efficientnet_b0 as timm publishes it."""
    path = tmp_path_factory.mktemp("port") / "model.safetensors"
    save_file(states("tf_efficientnet_b0"), path)
    return path


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


# -- both directions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [pytest.param(n, marks=pytest.mark.slow) if "vgg" in n else n for n in NAMES])
def test_timm_and_back_is_the_identity(architecture, states, tmp_path):
    """Bit for bit, through files, classifier and counters included; and the file is read without torch."""
    state = states(architecture)
    save_file(state, tmp_path / "in.safetensors")
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    options = ["--source=timm", f"--model={architecture}", f"--from-file={tmp_path / 'in.safetensors'}", "--no-probe"]
    assert command.main([*options, f"--out={out}"]) == 0
    assert command.main(["--source=timm", "--to-torch", f"--from-file={out}", f"--out={back}"]) == 0
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == back.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(back, "np") as file:
        same({n: file.get_tensor(n) for n in file.keys()}, state)  # noqa: SIM118
    timm.create_model(architecture, pretrained=False, num_classes=7).load_state_dict(
        {n: torch.from_numpy(a) for n, a in state.items()}
    )


TWINS = {
    "encoder-b0": lambda: twins.Encoder("b0", 3),
    "encoder-b4": lambda: twins.Encoder("b4", 1),
    "encoder3d-b0": lambda: twins.Encoder("b0", 3, ndim=3),
    "omnianet-b0": lambda: twins.Omnia("b0", 1, 4),
    "omnianet-b4": lambda: twins.Omnia("b4", 1, 5),
    "dxnet": lambda: twins.dxnet("b0", 4, 3, norm="instance"),
    "dsnet": lambda: twins.DS("b0", 4, 3),
}


def test_every_released_network_is_tried():
    assert set(TWINS) == set(authors.NETWORKS)


@pytest.mark.parametrize("network", TWINS)
def test_authors_and_back_is_the_identity(network, tmp_path):
    """Bit for bit; channels, outputs, filters and norm are read off the file, and their code loads what comes back."""
    twin = twins.randomise(TWINS[network](), 0)
    state = state_of(twin)
    torch.save(twin.state_dict(), tmp_path / "net.pth")
    weights = weight_port.from_authors(network, tmp_path / "net.pth")
    same(weight_port.to_authors(weights), state)
    empty = type(weights)(weights.kind, weights.model, weights.arrays)  # as after training: nothing was kept
    back = weight_port.to_authors(empty)
    TWINS[network]().load_state_dict({n: torch.from_numpy(a) for n, a in back.items()})
    used = {n for n in state if "_head" not in n and "num_batches" not in n}
    same({n: back[n] for n in used}, {n: state[n] for n in used})


@pytest.mark.parametrize(
    ("twin", "network", "expected"),
    [
        (lambda: twins.Omnia("b0", 2, 7, filters=(8, 8, 8, 8, 4)), "omnianet-b0", (2, 7, "batch")),
        (lambda: twins.dxnet("b0", 1, 5, filters=(8,) * 5), "dxnet", (1, 5, "batch")),
        (lambda: twins.dxnet("b0", 4, 3, filters=(8,) * 5, norm="instance"), "dxnet", (4, 3, "instance")),
        (
            lambda: twins.dxnet("b0", 4, 3, filters=(8,) * 5, norm="instance_noaffine"),
            "dxnet",
            (4, 3, "instance_noaffine"),
        ),
    ],
)
def test_a_file_says_what_it_is_of(twin, network, expected):
    weights = authors.convert(Source(state_of(twin()), SOURCE), network)
    assert (weights.model["in_channels"], weights.model["out_channels"], weights.model["norm"]) == expected
    assert weights.model["filters"][0] == 8


def test_dsnet_file_says_what_it_is_of():
    twin = twins.DS("b0", 2, 6, planes_filters=(4, 6, 8, 10), images=3, affine=True, inner={"filters": (8,) * 5})
    model = authors.convert(Source(state_of(twin), SOURCE), "dsnet").model
    assert (model["in_channels"], model["out_channels"], model["images"], model["affine"]) == (2, 6, 3, True)
    assert model["filters"] == (4, 6, 8, 10) and model["inner"]["filters"] == (8,) * 5


def test_the_other_sides_names_load_strictly(states):
    """timm's weights into the authors' code's names and the reverse; and an inflated encoder: torch accepts each."""
    b0 = states("efficientnet_b0")
    from_timm = timm_models.convert(Source(b0, SOURCE), timm_models.parse_name("efficientnet_b0"))
    twin = twins.Encoder("b0", 3)
    twin.load_state_dict({n: torch.from_numpy(a) for n, a in weight_port.to_authors(from_timm).items()})
    twin = twins.randomise(twin, 0)
    from_authors = authors.convert(Source(state_of(twin), SOURCE), "encoder-b0")
    state = {n: torch.from_numpy(a) for n, a in weight_port.to_timm(from_authors).items()}
    model = timm.create_model("efficientnet_b0", pretrained=False)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(n.startswith(("conv_head", "bn2", "classifier")) for n in missing)
    section = {**from_authors.model, "ndim": 3, "depth": dataclasses.asdict(Depth())}
    deep, _ = adapt_encoder(from_authors, section, inflation=Inflation("mean"))
    twins.Encoder("b0", 3, ndim=3).load_state_dict(
        {n: torch.from_numpy(a) for n, a in weight_port.to_authors(deep).items()}
    )


def section_of(name, **changes):
    section = {**authors.NETWORKS[name], "in_channels": 1, "out_channels": 4, "norm": "batch", "filters": (8,) * 5}
    return section | changes


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            section_of("omnianet-b0", upsampling="transposed"),
            ["similar one is omnianet-b0", "upsampling is 'transposed' in the weights"],
        ),
        (
            section_of("dxnet", depth={"axis": 2, "padding": "edge", "squeeze": "volume", "strides": (2,) * 5}),
            ["depth.axis is 2"],
        ),
        (
            section_of("omnianet-b4", encoder={"name": "resnet18", "eps": 1e-3, "padding": "same"}),
            ["encoder.eps is 0.001", "resnet18"],
        ),
        (section_of("dxnet", deep_supervision=True), ["deep_supervision is True in the weights, False in"]),
    ],
)
def test_what_the_authors_code_does_not_compute_is_not_written_for_it(section, words):
    with pytest.raises(UserError) as error:
        weight_port.to_authors(Weights("network", section, {}))
    assert all(word in str(error.value) for word in words), error.value


def test_what_timm_does_not_compute_is_not_written_for_it(states):
    weights = timm_models.convert(
        Source(states("tf_efficientnet_b0"), SOURCE), timm_models.parse_name("tf_efficientnet_b0")
    )
    assert timm_models.matching_architectures(weights.model) == ["tf_efficientnet_b0"]
    with pytest.raises(UserError, match=r"timm .*: efficientnet_b0.*eps 0.01"):
        weight_port.to_timm(Weights("encoder", weights.model | {"eps": 0.01}, weights.arrays))
    with pytest.raises(UserError, match="batch norm, found: network, dsnet"):
        weight_port.to_timm(Weights("network", ds_case()[0], {}))


def test_channels_may_be_reordered(b0, tmp_path):
    """BGR for RGB: a map is applied although the number of channels stays."""
    out = tmp_path / "bgr.safetensors"
    options = ["--source=timm", "--model=tf_efficientnet_b0", f"--from-file={b0}", "--no-probe", f"--out={out}"]
    assert command.main([*options, "--channel-rule=map", "--channel-map=2,1,0"]) == 0
    with safe_open(b0, "np") as file:
        stem = file.get_tensor("conv_stem.weight").transpose(2, 3, 1, 0)
    np.testing.assert_allclose(read_weights(out).arrays["conv_stem.kernel"], stem[:, :, ::-1], rtol=1e-6)


def test_float16_files_compute_in_float32(states, tmp_path):
    state = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in states("resnet18").items()}
    save_file(state, tmp_path / "half.safetensors")
    out = tmp_path / "out.safetensors"
    assert (
        command.main(
            ["--source=timm", "--model=resnet18", f"--from-file={tmp_path / 'half.safetensors'}", f"--out={out}"]
        )
        == 0
    )
    assert all(f["relative"] < 1e-5 for f in json.loads(out.with_suffix(".json").read_text())["probes"][0]["features"])
    image = np.zeros((1, 32, 32, 3), np.float16)
    assert xdim_jax.load_model(out).features(image)[0].dtype == np.float32
    assert all(array.dtype == np.float32 for array in read_weights(out).arrays.values()), "sums are not in 16 bits"


# -- every leaf is accounted for --------------------------------------------------------------------------------------


def drop(state):
    return {n: a for n, a in state.items() if n != "blocks.3.1.se.conv_expand.bias"}


def add(state):
    return state | {"blocks.3.1.gate.weight": np.zeros(3, np.float32)}


def cut(state):
    return state | {"blocks.3.1.bn1.weight": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["only in the network (1): blocks.3.1.se.conv_expand.bias", "only in the source (0): none"]),
        (add, ["only in the source (1): blocks.3.1.gate.weight", "only in the network (0): none"]),
        (cut, ["shape (1): blocks.3.1.bn1.weight is (3,), expected (480,)"]),
    ],
)
def test_a_leaf_too_few_or_too_many_is_an_error(change, words, states):
    with pytest.raises(UserError) as error:
        timm_models.convert(
            Source(change(states("tf_efficientnet_b0")), SOURCE), timm_models.parse_name("tf_efficientnet_b0")
        )
    assert all(word in str(error.value) for word in words), error.value


def test_our_leaves_are_accounted_for_on_the_way_back(states):
    weights = timm_models.convert(Source(states("resnet18"), SOURCE), timm_models.parse_name("resnet18"))
    weights.arrays["gate"] = weights.arrays.pop("bn1.mean")
    with pytest.raises(UserError, match=r"only in the source \(1\): gate\n.*only in the network \(1\): bn1.mean"):
        weight_port.to_timm(weights)


def test_two_leaves_never_share_a_name():
    from weight_port.names import leaves
    from xdim_jax.nets.networks import build_abstract

    for make in CASES.values():
        section = make()[0]
        module, rename, _ = authors.structure(section)
        table = leaves(module, rename)
        assert len({leaf.torch_name for leaf in table}) == len(table) == len({leaf.name for leaf in table})
        assert build_abstract(section)


# -- names and the hub ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tf_efficientnet_b4.ns_jft_in1k", ("tf_efficientnet_b4", "ns_jft_in1k")),
        ("tf_efficientnet_b0_ns", ("tf_efficientnet_b0", "ns_jft_in1k")),
        ("tf_efficientnet_b7_ap", ("tf_efficientnet_b7", "ap_in1k")),
        ("resnet34.a1_in1k", ("resnet34", "a1_in1k")),
        ("vgg19_bn", ("vgg19_bn", "")),
    ],
)
def test_timm_names(name, expected):
    assert timm_models.parse_name(name) == expected


def test_every_architecture_is_timms():
    """Its own list; and the conventions are those of timm's layers."""
    for architecture, (encoder, convention) in timm_models.ARCHITECTURES.items():
        assert architecture in timm.list_models(), architecture
        if architecture.endswith(("b1", "b2", "b3", "b5", "b6", "b7")):
            continue
        model = timm.create_model(architecture, pretrained=False)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.LayerNorm)]
        assert {m.eps for m in norms} == {convention["eps"]}, architecture
        same = any(type(m).__name__ == "Conv2dSame" for m in model.modules())
        assert same == (convention["padding"] == "same"), architecture
        assert encoder.removesuffix("_bn") in architecture


@pytest.mark.quick
def test_normalisation_is_timms():
    """For every training of every architecture that timm knows."""
    names = [timm_models.TimmName(*n.partition(".")[::2]) for n in timm.list_pretrained()]
    known = [name for name in names if name.architecture in timm_models.ARCHITECTURES]
    assert {name.architecture for name in known} > {"tf_efficientnet_b0", "tf_efficientnet_lite0", "resnet18"}
    for name in known:
        config = timm.get_pretrained_cfg(name.full)
        assert timm_models.input_normalisation(name) == {"mean": list(config.mean), "std": list(config.std)}, name


def test_the_hub_is_asked_for_the_right_file(monkeypatch, b0):
    asked = []

    def fetch(repository, filename, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        asked.append((repository, filename))
        return str(b0)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    weights = weight_port.from_timm("tf_efficientnet_b0_ns")
    assert asked == [("timm/tf_efficientnet_b0.ns_jft_in1k", "model.safetensors")]
    assert weights.source["model"] == "tf_efficientnet_b0.ns_jft_in1k" and len(weights.source["sha256"]) == 64
    assert weights.source["input"]["mean"] == [0.485, 0.456, 0.406]
    assert (weights.model["padding"], weights.model["eps"]) == ("same", 1e-3)
    with pytest.raises(UserError, match=r"tag.* tf_efficientnet_b0.ns_jft_in1k"):
        weight_port.from_timm("tf_efficientnet_b0")


@pytest.mark.quick
def test_a_file_in_the_cache_of_the_hub_needs_no_network(monkeypatch, b0):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names, local_files_only: str(b0))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *a, **o: pytest.fail("asked the hub"))
    assert sources.download("timm/tf_efficientnet_b0.ns_jft_in1k") == b0


@pytest.mark.quick
def test_without_a_network_the_message_says_how_to_go_on(monkeypatch):
    def ask(url, timeout):
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    with pytest.raises(
        UserError, match=r"cannot download .*: Name or service not known\. .*resolve/main/.*--from-file"
    ):
        weight_port.from_timm("tf_efficientnet_b0.ns_jft_in1k")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {f"module.{n}": t for n, t in s.items()}]
)
def test_pickles_in_the_usual_wrappings(wrap, tmp_path):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.num_batches_tracked": torch.tensor(3)}
    torch.save(wrap(state), tmp_path / "net.pth")
    found = sources.read_source(tmp_path / "net.pth").state
    assert found.keys() == state.keys() and found["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_bfloat16_becomes_float32(suffix, tmp_path):
    from safetensors.torch import save_file as save_torch

    path = tmp_path / f"net.{suffix}"
    (save_torch if suffix == "safetensors" else torch.save)(
        {"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, path
    )
    array = sources.read_source(path).state["a"]
    assert array.dtype == np.float32 and array.tolist() == [1.5, -2.0]


def make_bad_files(folder, b0):
    whole = b0.read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"a": torch.zeros(1000)}, folder / "whole.pth")
    (folder / "truncated.pth").write_bytes((folder / "whole.pth").read_bytes()[:700])
    torch.save({"a": torch.zeros(1000)}, folder / "whole.pth", _use_new_zipfile_serialization=False)
    (folder / "legacy.pth").write_bytes((folder / "whole.pth").read_bytes()[:20])  # torch says EOFError, and no word
    (folder / "text.pth").write_text("not weights at all\n")
    (folder / "empty.pth").write_bytes(b"")
    torch.save(torch.nn.Conv2d(1, 1, 1), folder / "module.pth")
    torch.save([torch.zeros(1)], folder / "list.pth")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper": Path("x")}, folder / "checkpoint.pth")
    (folder / "short.pth").write_bytes(b"\x80\x02c")
    torch.save({"a": torch.eye(2).to_sparse()}, folder / "sparse.pth")
    torch.save({"a": torch.zeros(2, dtype=torch.float8_e5m2)}, folder / "float8.pth")
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.float8_e5m2)}, folder / "float8.safetensors")


BAD_FILES = {
    "missing.pth": "cannot read .*missing.pth: No such file",
    "truncated.safetensors": "truncated.safetensors is not a complete safetensors file",
    "truncated.pth": "truncated.pth is not a complete PyTorch file",
    "legacy.pth": r"legacy.pth is not a complete PyTorch file \(.*Error\)",
    "text.pth": "neither a safetensors nor a PyTorch file .*b'not weig'",
    "empty.pth": "neither a safetensors nor a PyTorch file",
    "module.pth": r"more than tensors.*torch.save\(torch.load\(file, weights_only=False\).state_dict\(\)",
    "list.pth": "list.pth contains no state_dict",
    "checkpoint.pth": r"more than tensors.*\[.state_dict.\] instead",
    "short.pth": "short.pth is (damaged|not a complete)",
    "sparse.pth": "sparse.pth cannot be read .*dense arrays",
    "float8.pth": "float8.pth cannot be read .*16, 32 or 64-bit",
    "float8.safetensors": "float8.safetensors cannot be read .*16, 32 or 64-bit",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_message(name, b0, tmp_path):
    make_bad_files(tmp_path, b0)
    with pytest.raises(UserError, match=BAD_FILES[name]):
        sources.read_source(tmp_path / name)


def test_a_moving_average_of_the_weights_is_preferred(tmp_path):
    """As timm does; the entry is recorded."""
    both = {"model": {"a": torch.zeros(1)}, "model_ema": {"module.a": torch.ones(1)}}
    raw = both["model"]
    averaged = {"n_averaged": torch.tensor(3), "module.a": torch.ones(1)}  # of torch.optim.swa_utils.AveragedModel
    options = {"decay": 0.99, "module": {"a": torch.ones(1)}}  # of another program: no state_dict
    for content, value, entry in (
        (both, 1, "model_ema"),
        (both | {"model_ema": averaged}, 1, "model_ema"),
        (both | {"model_ema": options}, 0, "model"),
        ({"state_dict": raw}, 0, "state_dict"),
        (raw, 0, None),
    ):
        torch.save(content, tmp_path / "net.pth")
        found = sources.read_source(tmp_path / "net.pth")
        assert list(found.state) == ["a"] and found.state["a"] == value and found.record.get("entry") == entry


def test_a_tag_that_timm_does_not_know_is_the_users_own():
    import_timm()
    assert timm_models.input_normalisation(timm_models.parse_name("resnet50.my_own_weights")) is None


def test_weights_that_are_not_finite_are_not_converted(b0, tmp_path):
    with safe_open(b0, "np") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state["blocks.2.0.bn1.running_var"][3] = np.inf
    save_file(state, tmp_path / "bad.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["--source=timm", f"--from-file={tmp_path / 'bad.safetensors'}", "--model=tf_efficientnet_b0"]
    with pytest.raises(UserError, match=r"1 arrays have values .*blocks\.2\.0\.bn1\.var"):
        command.main([*arguments, f"--out={out}", "--no-probe"])
    assert not out.exists()


@pytest.mark.parametrize(
    "change", [{"kind": "foo"}, {"model": []}, {"model": {"name": "efficientnet_toy"}}, {"source": None}]
)
def test_a_header_that_is_damaged(change, tmp_path):
    record = {"format": FORMAT, "kind": "encoder", "model": make_encoder().model, "source": {}} | change
    write_arrays(tmp_path / "a.safetensors", {"a": np.zeros(1)}, {"xdim_jax": json.dumps(record)})
    with pytest.raises(UserError, match=r"header of .*a\.safetensors is damaged"):
        read_weights(tmp_path / "a.safetensors")


# -- the command ------------------------------------------------------------------------------------------------------


def port(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "weight_port", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_help_explains_itself():
    text = port("--help")
    for word in ("--source", "--inflate", "--to-torch", "centre", "examples:", "tf_efficientnet_b0.ns_jft_in1k"):
        assert word in text


@pytest.mark.parametrize(
    ("rule", "layers", "inexact"),
    [("mean", "blocks.6.*=centre", True), ("mean", "*=centre", False), ("centre", "blocks.6.*=mean", True)],
)
def test_zeros_along_depth_are_reported_if_a_kernel_reaches_them(b0, tmp_path, rule, layers, inexact):
    words = ["--source=timm", "--model=tf_efficientnet_b0.ns_jft_in1k", f"--from-file={b0}", "--no-probe"]
    port(*words, f"--inflate={rule}", f"--inflate-layer={layers}", f"--out={tmp_path / 'e.safetensors'}")
    assert json.loads((tmp_path / "e.json").read_text())["zero_padding"] is inexact


def test_the_command_ports_inflates_and_reports(b0, tmp_path):
    out = tmp_path / "enc.safetensors"
    text = port(
        *("--source=timm", "--model=tf_efficientnet_b0.ns_jft_in1k", f"--from-file={b0}", "--inflate=mean"),
        *("--axis=depth", "--depth-padding=edge", "--channels=4", "--inflate-layer=blocks.6.*=centre", f"--out={out}"),
    )
    report = json.loads(out.with_suffix(".json").read_text())
    assert f"wrote      {out}" in text
    flat, deep = report["probes"]
    assert "timm" in flat["against"] and all(f["relative"] < 1e-5 for f in flat["features"])
    assert "2D encoder" in deep["against"] and all(f["relative"] < 1e-5 for f in deep["features"])
    assert report["arrays"]["blocks.6.0.conv_dw.kernel"] == {"done": "centre", "shape": [3, 3, 3, 1, 1152]}
    assert report["arrays"]["conv_stem.kernel"] == {"done": "channels by cycle then mean", "shape": [3, 3, 3, 4, 32]}
    assert report["unused"] == {}  # the classifier that came along is 2D
    assert not report["zero_padding"], "edge"
    assert report["source"]["sha256"] == read_weights(out).source["sha256"]
    weights = read_weights(out)
    assert weights.model["depth"] == {"axis": 0, "padding": "edge", "squeeze": "volume", "strides": (2,) * 5}
    assert set(report["arrays"]) == set(weights.arrays)


@pytest.mark.slow
def test_the_command_moves_a_network_there_and_back(tmp_path):
    twin = twins.randomise(twins.dxnet("b0", 4, 3, filters=(8,) * 5), 0)
    torch.save(twin.state_dict(), tmp_path / "net.pth")
    port(
        "--source=authors",
        "--network=dxnet",
        f"--from-file={tmp_path / 'net.pth'}",
        f"--out={tmp_path / 'a.safetensors'}",
    )
    port("--source=authors", "--to-torch", f"--from-file={tmp_path / 'a.safetensors'}", f"--out={tmp_path / 'b.pth'}")
    same({n: t.numpy() for n, t in torch.load(tmp_path / "b.pth", weights_only=True).items()}, state_of(twin))


MISUSES = {
    "a part back to torch": (
        ["--source=authors", "--to-torch", "--part=encoder", "--from-file={b0}", "--out=x.pth"],
        ["--to-torch does not change weights", "--part"],
    ),
    "unknown model": (
        ["--source=timm", "--model=tf_efficientnet_b9", "--out=x.safetensors"],
        ["unknown model", "known: tf_"],
    ),
    "another network": (
        ["--source=timm", "--model=tf_efficientnet_b4", "--from-file={b0}", "--out=x.safetensors"],
        ["as --model=tf_efficientnet_b4) do not fit the network", "only in the network (", "with another shape ("],
    ),
    "another source": (
        ["--source=authors", "--network=dxnet", "--from-file={b0}", "--out=x.safetensors"],
        ["conv.weight with 5 axes in model.safetensors", "missing; the file has", "omnianet-b0"],
    ),
    "several": (
        ["--source=authors", "--out=x.pth", "--inflate-layer=a=mean"],
        [
            "needs --network: encoder-b0",
            "--from-file is missing",
            "ends with .safetensors",
            "--inflate-layer has no effect without --inflate",
        ],
    ),
    "not ported": (
        ["--source=xdim", "--from-file={b0}", "--out=x.safetensors"],
        ["no xdim_jax header", "python -m weight_port"],
    ),
    "no workdir": (["--source=xdim", "--from-file={tmp}", "--out=x.safetensors"], ["is not the workdir of a run"]),
    "strides": (
        ["--source=timm", "--model=tf_efficientnet_b0", "--from-file={b0}", "--out={tmp}/x.safetensors", "--no-probe"]
        + ["--inflate=mean", "--depth-strides=2,2"],
        ["--depth-strides=2,2: depth strides are 5 numbers, each 1 or 2"],
    ),
    "rule": (
        ["--source=timm", "--model=tf_efficientnet_b0", "--from-file={b0}", "--out={tmp}/x.safetensors", "--no-probe"]
        + ["--inflate=mean", "--inflate-layer=blocks.*=half"],
        ["unknown inflation rule 'half'; known: mean"],
    ),
    "channel map": (
        ["--source=timm", "--model=tf_efficientnet_b0", "--from-file={b0}", "--out={tmp}/x.safetensors", "--no-probe"]
        + ["--channels=4", "--channel-rule=map", "--channel-map=0,1,2"],
        ["the channel map (0, 1, 2)", "for each of 4 channels"],
    ),
    "unused flags": (
        ["--source=xdim", "--model=resnet18", "--network=dxnet", "--from-file={b0}", "--out=x.safetensors"]
        + ["--depth-strides=9", "--axis=width", "--channel-map=0"],
        [
            "--depth-strides has no effect without --inflate",
            "--axis has no effect",
            "--model is only for reading with --source=timm",
        ]
        + ["--network is only for reading with --source=authors", "--channel-map and --channel-rule=map must"],
    ),
    "unwritable": (
        [
            "--source=timm",
            "--model=tf_efficientnet_b0",
            "--from-file={b0}",
            "--out=/proc/x/enc.safetensors",
            "--no-probe",
        ],
        ["cannot write /proc/x/enc.safetensors"],
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_one_clear_message(misuse, b0, tmp_path, monkeypatch):
    arguments, words = MISUSES[misuse]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **o: pytest.fail("asked the hub"))
    with pytest.raises(UserError) as error:
        command.main([a.format(b0=b0, tmp=tmp_path) for a in arguments])
    assert all(word in str(error.value) for word in words), error.value
    assert not list(tmp_path.glob("*.safetensors")) and not Path("x.safetensors").exists()


def test_misuse_ends_with_status_2(b0, tmp_path):
    text = port("--source=timm", "--model=resnet18", f"--from-file={b0}", f"--out={tmp_path / 'x.safetensors'}", code=2)
    assert text.startswith("error: ") and "model.safetensors (as --model=resnet18) do not fit" in text


def test_safetensors_are_ported_without_torch(b0, tmp_path):
    """torch and timm may be absent altogether: importing them raises."""
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "from weight_port.__main__ import main\n"
        f"main(['--source=timm', '--model=tf_efficientnet_b0.ns_jft_in1k', '--from-file={b0}', "
        f"'--out={tmp_path / 'enc.safetensors'}'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "probe      skipped: torch and timm " in done.stdout
    assert read_weights(tmp_path / "enc.safetensors").model["name"] == "efficientnet_b0"


def test_jax_is_not_changed_by_importing_the_port():
    assert jax.config.jax_enable_x64 is False
