"""Our networks against PyTorch: timm's own layers, and twins written independently of the JAX code (tests/twins.py).

Two bounds: in float64 a relative error of at most 1e-10, which is the proof that both compute the same function; and in
float32 at most ten times the distance that PyTorch's own float32 has from its float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests import twins
from tests.parity import (
    CASES,
    CONVENTIONS,
    SLOW_CASES,
    calibrated,
    ds_case,
    relative,
    state_of,
    timm,
    to_last,
    unet_case,
)
from weight_port import authors, names
from weight_port.probe import timm_features
from weight_port.timm_models import ARCHITECTURES
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.nets.weights import abstract_encoder, flatten, replace_leaves

EXACT = 1e-10


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two workers share two cores
    yield
    torch.set_num_threads(threads)


class Ours:
    """Our network (abstract) with the weights of a PyTorch state, as jitted functions of dicts by PyTorch name."""

    def __init__(self, module, rename, unused, state):
        self.table = {leaf.torch_name: leaf for leaf in names.leaves(module, rename)}
        self.arrays, _ = names.import_state(state, module, rename, unused, "the twin")
        self.graphdef, params, stats = split_model(module)
        self.params, self.stats = replace_leaves(params, self.arrays), replace_leaves(stats, self.arrays)
        self._evaluate = jax.jit(lambda p, s, x: self._call(p, s, x, False, {})[0])
        self._gradients = jax.jit(jax.grad(self._loss, has_aux=True))

    def by_torch_name(self, *trees):
        leaves = {}
        for tree in trees:
            leaves |= flatten(tree)
        return {
            n: names.to_torch_layout(np.asarray(leaves[t.name]), t.layout)
            for n, t in self.table.items()
            if t.name in leaves
        }

    def evaluate(self, image, **options):
        """Output in evaluation mode."""
        if options:
            return self._run(lambda p, s, x: self._call(p, s, x, False, options)[0], image)
        return jax.tree.map(np.asarray, self._evaluate(self.params, self.stats, image))

    def train(self, image, **options):
        """Output in training mode, and the running statistics after it."""
        output, stats = self._run(lambda p, s, x: self._call(p, s, x, True, options), image)
        return output, self.by_torch_name(stats)

    def gradients(self, image, cotangents):
        """Logits, gradients of ``sum(logits * cotangents)``, and statistics, in training mode."""
        grads, (logits, stats) = self._gradients(self.params, self.stats, image, cotangents)
        return np.asarray(logits), self.by_torch_name(grads), self.by_torch_name(stats)

    def _loss(self, params, stats, image, cotangents):
        logits, new = self._call(params, stats, image, True, {})
        return jnp.sum(logits * cotangents), (logits, new)

    def _run(self, function, *args):
        return jax.tree.map(np.asarray, jax.jit(function)(self.params, self.stats, *args))

    def _call(self, params, stats, image, training, options):
        model = nnx.merge(self.graphdef, params, stats)
        model.train() if training else model.eval()
        output = model(image, rngs=nnx.Rngs(dropout=0), **options)
        return output, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


# -- the encoder against timm -------------------------------------------------------------------------------------


def timm_model(architecture):
    if architecture == "tf_efficientnet_toy":
        make = timm.models.efficientnet._gen_efficientnet
        options = {"bn_eps": 1e-3, "pad_type": "same"}
        model = make("tf_efficientnet_b0", channel_multiplier=0.25, depth_multiplier=0.3, pretrained=False, **options)
        return calibrated(model)
    return calibrated(timm.create_model(architecture, pretrained=False, num_classes=7))


def encoder_of(architecture, model):
    name, convention = ARCHITECTURES[architecture]
    section = {"name": name, "in_channels": 3, "ndim": 2, "norm": "batch", **convention}
    module = abstract_encoder(section)
    unused = ("conv_head.", "bn2.", "classifier.", "fc.", "head.", "pre_logits.")
    return name, Ours(module, lambda path: path, unused, state_of(model))


def features_of(model, name, image, *, training):
    """timm's features, and the running statistics after the pass."""
    model.train(training)
    with torch.no_grad():
        features = timm_features(model, name, torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    stats = {n: a for n, a in state_of(model).items() if "running" in n}
    return [None if f is None else to_last(f.numpy()) for f in features], stats


# B0 and B4, which the paper uses, and one member of each other kind of block are compared in full; of the other members
# names and shapes (tests/test_port.py) and the first stages
DEFAULT = [("tf_efficientnet_b0", (63, 96))]
SLOW = [
    ("efficientnet_b0", (65, 64)),
    ("tf_efficientnet_b4", (65, 71)),
    ("tf_efficientnet_lite0", (63, 65)),
    ("efficientnet_lite0", (64, 71)),
    ("resnet18", (64, 65)),
    ("resnet50", (64, 64)),
    ("vgg16_bn", (64, 64)),
    ("convnext_tiny", (64, 96)),
]


_BOTH = (np.float64, np.float32)
_ALSO_FLOAT32 = ("tf_efficientnet_b0", "tf_efficientnet_b4")


@pytest.mark.parametrize(
    ("architecture", "size"), [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_encoder_is_timms(architecture, size):
    """Five features in evaluation and training mode, and the running statistics after one step.

    Rounding errors in float32 are compared for B0 and B4.
    """
    image = np.random.default_rng(0).normal(size=(2, *size, 3))
    reference, results = timm_model(architecture), {}
    start = {n: t.clone() for n, t in reference.state_dict().items()}
    for dtype in _BOTH if architecture in _ALSO_FLOAT32 else _BOTH[:1]:
        tensor_type = torch.float64 if dtype is np.float64 else torch.float32
        with jax.enable_x64(dtype is np.float64):
            model = reference.to(tensor_type)
            model.load_state_dict(start)
            name, ours = encoder_of(architecture, model)
            x = image.astype(dtype)
            for training in (False, True):
                theirs = features_of(model, name, x, training=training)
                mine = ours.train(x) if training else (ours.evaluate(x), theirs[1])
                results[dtype, training] = (mine, theirs)
    for training in (False, True):
        (mine64, theirs64), (mine32, theirs32) = (results.get((t, training), (None, None)) for t in _BOTH)
        for level, exact in enumerate(theirs64[0]):
            if exact is None:
                assert mine64[0][level] is None
                continue
            assert exact.dtype == mine64[0][level].dtype == np.float64
            assert relative(mine64[0][level], exact) < EXACT, f"feature {level}, training {training}"
            if mine32:
                bound = 10 * relative(theirs32[0][level], exact)
                assert relative(mine32[0][level], exact) <= bound, f"feature {level}, training {training}, float32"
        if training and mine64[1]:  # ours hold the layers that features pass; timm's head has statistics too
            for leaf, value in mine64[1].items():
                assert relative(value, theirs64[1][leaf]) < EXACT, leaf
                assert not np.array_equal(value, start[leaf].numpy()), f"{leaf} was not updated"
            if mine32:
                worst = [max(relative(run[1][n], theirs64[1][n]) for n in mine64[1]) for run in (mine32, theirs32)]
                assert worst[0] <= 10 * worst[1]


FIRST = ["tf_efficientnet_b1", "tf_efficientnet_lite0", "resnet18", "convnext_tiny"]
SLOW_FIRST = [*(f"tf_efficientnet_b{i}" for i in (2, 3, 5, 6, 7)), *(f"tf_efficientnet_lite{i}" for i in (1, 2, 3, 4))]
SLOW_FIRST += ["efficientnet_b4", "resnet34", "vgg19_bn"]


@pytest.mark.parametrize("architecture", [*FIRST, *(pytest.param(a, marks=pytest.mark.slow) for a in SLOW_FIRST)])
def test_the_first_stages_of_an_encoder_are_timms(architecture):
    """The first two features, in float64; XLA leaves out the stages behind them."""
    image = np.random.default_rng(0).normal(size=(1, 33, 32, 3))
    model = twins.randomise(timm.create_model(architecture, pretrained=False, num_classes=0), 0).double()
    with jax.enable_x64(True):
        name, ours = encoder_of(architecture, model)
        theirs, _ = features_of(model, name, image, training=False)
        mine = ours._run(lambda p, s, x: ours._call(p, s, x, False, {})[0][:2], image)
    for found, exact in zip(mine, theirs[:2], strict=True):
        assert (found is None) == (exact is None)
        assert exact is None or relative(found, exact) < EXACT


def test_features_are_taken_where_the_paper_takes_them():
    """timm's own ``features_only`` begins with the first block, the paper's networks with the stem."""
    model = timm_model("tf_efficientnet_b0").eval()
    other = timm.create_model("tf_efficientnet_b0", pretrained=False, features_only=True)
    assert list(other.feature_info.channels()) == [16, 24, 40, 112, 320]
    with torch.no_grad():
        found = timm_features(model, "efficientnet_b0", torch.zeros(1, 3, 64, 64))
    assert [f.shape[1] for f in found] == [32, 24, 40, 112, 320]


@pytest.mark.parametrize(
    ("architecture", "convention"), [("efficientnet_b0", "authors"), ("tf_efficientnet_b0", "timm")]
)
@pytest.mark.parametrize("training", [False, True])
def test_the_twins_encoder_is_timms(architecture, convention, training):
    """What the whole networks' twins are built on, in PyTorch alone: the same five features, bit for bit."""
    model = timm_model(architecture).double()
    twin = twins.Encoder("b0", 3, **CONVENTIONS[convention]).double()
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        path = {"conv_head": "conv_head", "bn2": "norm_head"}.get(path) or authors.rename_encoder(path)
        if path != "classifier":
            state[f"{path}.{leaf}"] = tensor.clone()
    twin.load_state_dict(state)
    image = np.random.default_rng(0).normal(size=(2, 65, 96, 3))
    expected = features_of(model, "efficientnet_b0", image, training=training)[0]
    with torch.no_grad():
        found = twin.train(training)(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(to_last(mine.numpy()), theirs)


# -- whole networks against their twins ---------------------------------------------------------------------------


def make_ours(section, twin):
    module, rename, prefix = authors.structure(section)
    return Ours(module, rename, (f"{prefix}conv_head.", f"{prefix}norm_head."), state_of(twin))


def torch_gradients(twin, image, cotangents):
    twin.train()
    twin.zero_grad()
    logits = twin(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    (logits * torch.from_numpy(np.moveaxis(cotangents, -1, 1).copy())).sum().backward()
    grads = {n: p.grad.numpy() for n, p in twin.named_parameters() if p.grad is not None}
    return to_last(logits.detach().numpy()), grads, {n: a for n, a in state_of(twin).items() if "running" in n}


def worst(found, exact, leaves):
    """Largest relative error over some leaves."""
    return max(relative(found[n], exact[n]) for n in leaves)


def vanishing(exact):
    """Leaves whose gradient is zero but for rounding, as that of a bias which only meets another norm."""
    top = max(np.abs(a).max() for a in exact.values())
    return {n for n, a in exact.items() if np.abs(a).max() < 1e-12 * top}, top


QUICK_CASES = ("omnianet",)
ALSO_FLOAT32 = ("omnianet", "dxnet", "dsnet 128")


def marked(values, quick):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("case", marked([*CASES, *SLOW_CASES], QUICK_CASES))
def test_network_is_its_twin(case):
    """Evaluation logits; in training mode logits, the gradient of every parameter, statistics after a step.

    In float32 the gradients of one image in three have to agree. Where rounding moves one argument of a ReLU across
    zero, the gradients of all layers before it change by a thousandth or more; this happens to PyTorch as well.
    """
    section, reference, shape = (CASES | SLOW_CASES)[case]()
    twins.randomise(reference, 0)
    start = {n: t.clone() for n, t in reference.state_dict().items()}
    if case not in ALSO_FLOAT32:
        compare_with_twin(section, reference, start, shape, {}, seed=0, dtypes=_BOTH[:1])
        return
    errors, ours = [], {}
    while not errors or min(errors)[0] > 10 * min(theirs for _, theirs in errors):
        assert len(errors) < 3, f"errors of ours and of PyTorch: {errors}"
        errors.append(compare_with_twin(section, reference, start, shape, ours, seed=len(errors), dtypes=_BOTH))


def compare_with_twin(section, reference, start, shape, built, *, seed, dtypes):
    """Compare all; return the errors of the float32 gradients of one image, ours and PyTorch's, without a comparison.

    ``built`` keeps our network of each dtype for the next image. Without float32 among ``dtypes``, return None.
    """
    rng = np.random.default_rng(seed)
    image, cotangents = rng.normal(size=shape), rng.normal(size=(*shape[:-1], 3))
    runs = {}
    for dtype in dtypes:
        with jax.enable_x64(dtype is np.float64):
            twin = reference.to(torch.float64 if dtype is np.float64 else torch.float32)
            twin.load_state_dict(start)
            if dtype not in built:
                built[dtype] = make_ours(section, twin)
            ours = built[dtype]
            x, c = image.astype(dtype), cotangents.astype(dtype)
            twin.eval()
            with torch.no_grad():
                theirs = to_last(twin(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy())
            runs[dtype] = (ours.evaluate(x), *ours.gradients(x, c)), (theirs, *torch_gradients(twin, x, c))
    (eval64, logits64, grads64, stats64), (exact_eval, exact_logits, exact_grads, exact_stats) = runs[np.float64]
    assert set(grads64) == set(exact_grads)
    assert relative(eval64, exact_eval) < EXACT
    assert relative(logits64, exact_logits) < EXACT
    zero, top = vanishing(exact_grads)
    assert len(zero) < len(exact_grads) / 4
    assert all(np.abs(grads64[n]).max() < 1e-12 * top for n in zero)
    leaves = set(exact_grads) - zero
    assert worst(grads64, exact_grads, leaves) < EXACT
    assert set(stats64) == {n for n in exact_stats if "norm_head" not in n}
    if stats64:
        assert worst(stats64, exact_stats, stats64) < EXACT
    if np.float32 not in runs:
        return None
    (eval32, logits32, grads32, _), (their_eval, their_logits, their_grads, _) = runs[np.float32]
    assert relative(eval32, exact_eval) <= 10 * relative(their_eval, exact_eval)
    assert relative(logits32, exact_logits) <= 10 * relative(their_logits, exact_logits)
    return worst(grads32, exact_grads, leaves), worst(their_grads, exact_grads, leaves)


@pytest.mark.slow
def test_dsnets_batch_of_two_is_two_batches_of_one():
    section, twin, shape = ds_case(128, 2)
    with jax.enable_x64(True):
        ours = make_ours(section, twins.randomise(twin.double(), 0))
        image = np.random.default_rng(0).normal(size=shape)
        both = ours.evaluate(image)
        for sample in (0, 1):
            assert relative(both[sample], ours.evaluate(image[sample : sample + 1])[0]) < 1e-12


@pytest.mark.parametrize("name", ["omnianet", "dxnet"])
def test_deep_supervision_heads_are_the_twins(name):
    section, twin, shape = unet_case(name, deep_supervision=True)
    twins.randomise(twin.double(), 0)
    image = np.random.default_rng(0).normal(size=shape)
    with jax.enable_x64(True), torch.no_grad():
        ours = make_ours(section, twin).evaluate(image, levels=True)
        theirs = twin.eval()(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    assert len(ours) == len(theirs) == 5
    assert [o.shape[1] for o in ours] == [shape[1] // 2**i for i in range(5)]
    for mine, exact in zip(ours, theirs, strict=True):
        assert relative(mine, to_last(exact.numpy())) < EXACT


# -- mutations: what the bounds above would catch -------------------------------------------------------------------


def transposed(state):
    name = "encoder.enc2.0.conv_dw.weight"
    return state | {name: np.swapaxes(state[name], -1, -2).copy()}


def swapped(state):
    a, b = "encoder.enc1.0.bn1.weight", "encoder.enc1.0.bn2.weight"
    assert state[a].shape == state[b].shape
    return state | {a: state[b], b: state[a]}


MUTATIONS = {
    "transposed kernel": (transposed, {}),
    "swapped leaves": (swapped, {}),
    "eps": (dict, {"eps": 1e-3}),
    "padding": (dict, {"padding": "same"}),
}


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_mutations_are_seen(mutation):
    """The same comparison as above, with one thing wrong: far beyond the bound; and below it with nothing wrong."""
    change, options = MUTATIONS.get(mutation, (dict, {}))
    section, twin, shape = unet_case("omnianet")
    twins.randomise(twin.double(), 0).eval()
    section = section | {"encoder": section["encoder"] | options}
    module, rename, prefix = authors.structure(section)
    image = np.random.default_rng(0).normal(size=shape)
    with jax.enable_x64(True), torch.no_grad():
        ours = Ours(module, rename, (f"{prefix}conv_head.", f"{prefix}norm_head."), change(state_of(twin)))
        error = relative(
            ours.evaluate(image), to_last(twin(torch.from_numpy(np.moveaxis(image, -1, 1).copy())).numpy())
        )
    assert (error > 1e-4) if mutation else (error < EXACT)


def test_every_network_is_compared():
    assert {case().__getitem__(0)["name"] for case in CASES.values()} == set(networks.NETWORKS)
