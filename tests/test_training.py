"""The step, the loop, checkpoints and the record, each alone."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from tests import conftest
from tests.conftest import TOY_MODEL, damage_checkpoint, records, small_state
from tests.small_runs import use_three_convolutions
from xdim_jax.base import log, signals
from xdim_jax.base.config import load_config
from xdim_jax.base.errors import UserError
from xdim_jax.data import regions
from xdim_jax.inference import output
from xdim_jax.nets import networks
from xdim_jax.nets.functional import split_model
from xdim_jax.runs import checkpoint
from xdim_jax.runs.records import METRICS_FILE, close_recorder, open_recorder, record
from xdim_jax.runs.state import TrainState, init_state
from xdim_jax.training import loop, loss, optim, step, step_metrics, validation

pytestmark = pytest.mark.quick

RECIPE = load_config("brats_dxnet:scratch", [])
OPTIM, LOSS = RECIPE.optim.to_dict(), RECIPE.loss.to_dict()
BRATS = output.Output("sigmoid", regions.BRATS, regions.TISSUES)
PLANE = output.Output("sigmoid", regions.Regions({"one": (1,)}), ("background", "one"))


def count(state, batch, key):
    """A step that only counts; its training score is 0.25."""
    numbers = {name: jnp.float32(0.5) for name in ("loss", "grad_norm", "update_norm")}
    return state._replace(step=state.step + 1), numbers | {"score": jnp.full(3, 0.25)}


def make_run(workdir, **options):
    return conftest.make_run(workdir, count, ("WT", "TC", "ET"), **options)


def blank_batch():
    return {"image": np.zeros((1, 1, 1, 1, 1), np.float32), "digest": np.zeros(1, np.uint32)}


def blank_batches():
    while True:
        yield blank_batch()


def finish(run, stream, value=0.0):
    try:
        loop.fit(run, small_state(value, 0), loop.Progress([0.0] * 3, [0] * 3), stream, validated=False)
    finally:
        close_recorder(run.recorder)
        checkpoint.close(run.checkpoints)


@pytest.mark.parametrize(("gate", "every", "steps"), [(0.2, 1, [4, 8, 12]), (0.2, 2, [8, 12]), (0.3, 1, [12])])
def test_validation_waits_for_the_training_score_and_comes_at_the_end(tmp_path, gate, every, steps):
    """Paper, Sect. 3.1.3; the training score is 0.25 here."""
    finish(make_run(tmp_path, config={"validate_after_score": gate, "validate_every": every}), blank_batches())
    assert [r["step"] for r in records(tmp_path, "validation")] == steps


def test_a_training_score_of_zero_does_not_delay_validation(tmp_path):
    """With ``validate_after_score=0`` validation begins with the first epoch."""
    run = conftest.make_run(tmp_path, hopeless, ("WT", "TC", "ET"), config={"validate_after_score": 0.0})
    finish(run, blank_batches())
    assert [r["step"] for r in records(tmp_path, "validation")] == [4, 8, 12]


def hopeless(state, batch, key):
    state, metrics = count(state, batch, key)
    return state, metrics | {"score": 0 * metrics["score"]}


def test_the_slow_weights_are_validated_and_kept(tmp_path):
    seen = []

    def validate(weights, stop):
        seen.append(np.asarray(weights[0]["w"]))
        return validation.ValidationResult({"WT": 0.5, "TC": 0.5, "ET": 0.5}, {}, {})

    finish(make_run(tmp_path, validate=validate), blank_batches(), value=4.0)
    np.testing.assert_array_equal(seen, np.full((3, 4), 2.0))
    params, _, source = checkpoint.load_weights(tmp_path, {"w": jnp.zeros(4)}, {"n": {"mean": jnp.zeros(2)}})
    np.testing.assert_array_equal(params["w"], 2.0)
    assert source == "best validation, step 4", "an equal score later does not replace it"


def test_the_best_weights_are_whole_when_the_validation_is_on_record(tmp_path, monkeypatch):
    """Else a kill between the two would leave a run that believes it is validated and has no best weights."""
    found = []
    original = record

    def look(recorder, kind, step, values):
        if kind == "validation":
            found.append(sorted(p.name for p in (tmp_path / "best").iterdir()))
        original(recorder, kind, step, values)

    monkeypatch.setattr(loop, "record", look)
    finish(make_run(tmp_path), blank_batches())
    assert found == [["4"]] * 3


def test_an_unreadable_file_does_not_lose_the_steps_before_it(tmp_path):
    def stream():
        for _ in range(6):
            yield blank_batch()
        raise UserError("broken.nii.gz")

    with pytest.raises(UserError, match="broken"):
        finish(make_run(tmp_path), stream())
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    state, progress = checkpoint.restore_latest(checkpoints, small_state(0.0, 0), print)
    checkpoint.close(checkpoints)
    assert int(state.step) == 6 and progress["score_steps"] == [2] * 3


# -- step ---------------------------------------------------------------------------------------------------------


def make_state(model=TOY_MODEL, optimiser=OPTIM):
    graphdef, params, stats = split_model(networks.build(model, seed=0))
    tx = optim.make_optimizer(optimiser, lambda count: 1e-3)
    state = init_state(optim.init_params(optimiser, params), stats, tx)
    return graphdef, tx, jax.tree.map(jnp.copy, state)


class Linear(nnx.Module):
    """Per-voxel linear map: small enough to differentiate by hand."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.array([[0.5], [-0.25]]))
        self.use_running_average = False

    def __call__(self, image, rngs=None, levels=False):
        logits = image @ self.kernel[...]
        return [logits] if levels else logits


def test_the_norm_is_that_of_all_arrays(rng):
    tree = {"a": rng.normal(size=(3, 4)), "b": [rng.normal(size=(100, 100)), rng.normal(size=())]}
    expected = np.linalg.norm(np.concatenate([np.ravel(x) for x in (tree["a"], *tree["b"])]))
    for part in (tree, {"a": tree["a"]}, {"b": tree["b"][:1]}):
        leaves = jax.tree.leaves(part)
        found = step._norm(jax.tree.map(jnp.asarray, part))
        assert float(found) == pytest.approx(np.sqrt(sum((x**2).sum() for x in leaves)), rel=1e-6)
    assert float(step._norm(jax.tree.map(jnp.asarray, tree))) == pytest.approx(expected, rel=1e-6)


def test_step_follows_the_gradient_and_reports_the_score():
    graphdef, params, stats = split_model(Linear())
    tx = optax.sgd(0.1)
    train = step.make_train_step(
        graphdef, lambda z, g, annotated, voxels: (jnp.mean((z - g) ** 2), {"part": jnp.sum(z)}), PLANE, tx
    )
    image = np.array([[1.0, 2.0], [3.0, 1.0]]).reshape(1, 2, 2)
    batch = {"image": jnp.asarray(image), "label": jnp.array([[0, 1]])}
    state, metrics = train(init_state(params, stats, tx), batch, jax.random.key(0))
    # logits 0 and 1.25 against 0 and 1: gradient = mean of 2 (z - g) x
    np.testing.assert_allclose(state.params["kernel"][:, 0], [0.5 - 0.1 * 0.75, -0.25 - 0.1 * 0.25], rtol=1e-6)
    assert int(state.step) == 1
    assert float(metrics["loss"]) == pytest.approx(0.25**2 / 2)
    assert float(metrics["grad_norm"]) == pytest.approx(math.hypot(0.75, 0.25))
    np.testing.assert_allclose(metrics["score"], [1.0])


class TwoLevels(Linear):
    """Logits at full resolution, and their values at every other pixel as the coarser level."""

    def __call__(self, image, rngs=None, levels=False):
        logits = image @ self.kernel[...]
        return [logits, logits[:, ::2, ::2]] if levels else logits


def test_deep_supervision_weighs_levels_by_halves():
    graphdef, params, stats = split_model(TwoLevels())
    tx = optax.sgd(0.1)
    seen = []

    def loss(z, g, annotated, voxels):
        seen.append(g.shape)
        return jnp.mean(jnp.abs(z - g)), {}

    train = step.make_train_step(graphdef, loss, PLANE, tx)
    image = np.zeros((1, 4, 4, 2), np.float32)  # logits 0: the losses are the means of the masks
    label = np.zeros((1, 4, 4), np.int32)
    label[0, 1, 1] = label[0, 3, 3] = 1  # of the coarse grid's centres (1, 1), (1, 3), (3, 1), (3, 3)
    _, metrics = train(init_state(params, stats, tx), {"image": image, "label": label}, jax.random.key(0))
    assert seen == [(1, 4, 4, 1), (1, 2, 2, 1)]
    assert float(metrics["loss"]) == pytest.approx((2 / 16 + 0.5 * 2 / 4) / 1.5)


def test_the_same_step_gives_the_same_bits_and_another_step_another_drop_path(monkeypatch):
    use_three_convolutions(monkeypatch.setattr, drop=0.5)
    graphdef, tx, state = make_state()
    train = jax.jit(
        step.make_train_step(
            graphdef,
            loss.make_loss(LOSS, "sigmoid", 3),
            BRATS,
            tx,
        )
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(1, 8, 8, 8, 4)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 2, (1, 8, 8, 8)), jnp.uint8),
    }
    key = jax.random.key(0)
    a, first = train(state, batch, key)
    b, again = train(state, batch, key)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)) and first["loss"] == again["loss"]
    losses = {float(train(state._replace(step=jnp.int32(s)), batch, key)[1]["loss"]) for s in range(8)}
    assert len(losses) == 2, "with and without the one residual branch"


@pytest.mark.parametrize(("asked_at", "log_every"), [(2, 100), (3, 2), (4, 100), (5, 2)])
def test_wherever_a_stop_is_asked_for_no_step_is_lost(tmp_path, asked_at, log_every):
    """The signal comes while the batch of a step is waited for; epochs have 4 steps."""
    stop = signals.StopRequest()

    def stream():
        for at in range(1, 100):
            if at == asked_at:
                stop.signal = 15
            yield blank_batch()

    validations = []

    def validate(weights, stop):
        validations.append(1)
        if stop.signal:
            raise validation.InterruptedValidationError
        return validation.ValidationResult({"WT": 0.5, "TC": 0.5, "ET": 0.5}, {}, {})

    run = make_run(tmp_path, validate=validate, stop=stop, config={"log_every": log_every})
    loop.fit(run, small_state(1.0, 0), loop.Progress([0.0] * 3, [0] * 3), stream(), validated=False)
    restored = checkpoint.restore_latest(run.checkpoints, small_state(0.0, 0), print)
    close_recorder(run.recorder)
    checkpoint.close(run.checkpoints)
    assert restored is not None and int(restored[0].step) == asked_at
    in_epoch = asked_at % 4
    assert restored[1]["score_steps"] == [in_epoch] * 3 and restored[1]["score_sum"] == [0.25 * in_epoch] * 3
    assert len(validations) == (asked_at >= 4)
    assert [r["step"] for r in records(tmp_path, "validation")] == ([4] if asked_at > 4 else [])


# -- checkpoints --------------------------------------------------------------------------------------------------


def save_states(workdir, steps):
    checkpoints = checkpoint.open_checkpoints(workdir)
    for at in steps:
        checkpoint.save_latest(checkpoints, small_state(float(at), at), {"score_steps": at})
    checkpoint.close(checkpoints)


def test_latest_state_comes_back_whole(tmp_path):
    save_states(tmp_path, (1, 2, 3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    state, progress = checkpoint.restore_latest(checkpoints, small_state(0.0, 0), print)
    checkpoint.close(checkpoints)
    assert isinstance(state, TrainState) and isinstance(state.params, optax.LookaheadParams)
    assert int(state.step) == 3 and progress == {"score_steps": 3}
    np.testing.assert_array_equal(state.params.fast["w"], 3.0)
    np.testing.assert_array_equal(state.params.slow["w"], 1.5)


def test_weights_are_saved_after_the_state_that_is_being_written(tmp_path, monkeypatch):
    """Two saves at once meet at each other's barriers when there are several processes."""
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    save, under_way = checkpoints.best.save, []

    def watched(*arguments, **options):
        under_way.append(checkpoints.latest.is_saving_in_progress())
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoints.best, "save", watched)
    state = small_state(1.0, 1)._replace(opt_state={"mu": jnp.zeros(10**7)})
    checkpoint.save_latest(checkpoints, state, {})
    assert checkpoints.latest.is_saving_in_progress(), "40 MB are not written at once"
    checkpoint.save_best(checkpoints, 1, {"w": jnp.ones(2)}, {}, 0.5)
    checkpoint.close(checkpoints)
    assert under_way == [False]
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["1"]


def test_a_damaged_checkpoint_is_moved_aside_with_a_warning(tmp_path):
    save_states(tmp_path, (1, 2))
    damage_checkpoint(tmp_path / "checkpoints" / "2")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # a kill in the middle of a save
    warnings = []
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    state, _ = checkpoint.restore_latest(checkpoints, small_state(0.0, 0), warnings.append)
    assert int(state.step) == 1
    assert "checkpoint 2" in warnings[0] and "damaged-checkpoint-2" in warnings[1]
    checkpoint.save_latest(checkpoints, small_state(7.0, 2), {})  # step 2 is reached again
    checkpoint.close(checkpoints)
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    again, _ = checkpoint.restore_latest(checkpoints, small_state(0.0, 0), warnings.append)
    checkpoint.close(checkpoints)
    np.testing.assert_array_equal(again.params.fast["w"], 7.0)
    assert not list((tmp_path / "checkpoints").glob("*tmp"))


@pytest.mark.parametrize("process", [0, 1])
def test_process_0_alone_moves_what_is_damaged_in_a_shared_folder(process, tmp_path, monkeypatch):
    """All processes read the folder, and wait until the damaged checkpoint is moved."""
    save_states(tmp_path, (1, 2))
    damage_checkpoint(tmp_path / "checkpoints" / "2")
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    waits, warnings = [], []
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waits.append)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), small_state(0.0, 0))
    state, _ = checkpoint._restore(checkpoints.latest, target, warnings.append, shared=True)
    monkeypatch.undo()
    checkpoint.close(checkpoints)
    assert int(state.step) == 1 and len(waits) == 1
    assert (tmp_path / "damaged-checkpoint-2").is_dir() == (process == 0)
    assert len(warnings) == (2 if process == 0 else 0)


def test_when_no_checkpoint_can_be_read_nothing_is_started_anew(tmp_path):
    save_states(tmp_path, (1, 2))
    for at in ("1", "2"):
        damage_checkpoint(tmp_path / "checkpoints" / at)
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"steps \[2, 1\]"):
        checkpoint.restore_latest(checkpoints, small_state(0.0, 0), lambda line: None)
    checkpoint.close(checkpoints)
    assert checkpoint.exists(tmp_path)


def test_best_weights_are_those_of_the_best_score(tmp_path):
    checkpoints = checkpoint.open_checkpoints(tmp_path)
    for at, score in ((1, 0.5), (2, 0.9), (3, 0.7)):
        checkpoint.save_best(checkpoints, at, {"w": jnp.full(4, float(at))}, {}, score)
    checkpoint.close(checkpoints)
    params, _, source = checkpoint.load_weights(tmp_path, {"w": jnp.zeros(4)}, {})
    np.testing.assert_array_equal(params["w"], 2.0)
    assert source == "best validation, step 2"


def test_without_a_validation_the_slow_weights_of_the_latest_state_are_used(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_weights(tmp_path, {}, {})
    save_states(tmp_path, (4,))
    params, stats, source = checkpoint.load_weights(tmp_path, {"w": jnp.zeros(4)}, {"n": {"mean": jnp.zeros(2)}})
    np.testing.assert_array_equal(params["w"], 2.0)
    np.testing.assert_array_equal(stats["n"]["mean"], 4.0)
    assert source == "latest state, step 4"
    with pytest.raises(UserError, match=r"params\.w .*\(4,\).*\(5,\)"):
        checkpoint.load_weights(tmp_path, {"w": jnp.zeros(5)}, {"n": {"mean": jnp.zeros(2)}})


# -- record -------------------------------------------------------------------------------------------------------


def test_record_forgets_what_lies_beyond_the_resumed_step(tmp_path):
    recorder = open_recorder(tmp_path, 0, writes=True)
    for at in (1, 2, 3):
        record(recorder, "train", at, {"loss": 1.0 / at})
    close_recorder(recorder)
    with open(tmp_path / METRICS_FILE, "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    recorder = open_recorder(tmp_path, 2, writes=True)
    record(recorder, "train", 3, {"loss": 9.0})
    close_recorder(recorder)
    entries = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in entries] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7830, "2 h 10 min"),
        (273_000, "3 d 3 h"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds, text):
    assert log.duration(seconds) == text


def test_a_loss_that_is_not_finite_stops_with_its_step():
    def steps(*losses, **other):
        return [{"loss": x, "grad_norm": 1.0, "update_norm": 1.0} | other for x in losses]

    with pytest.raises(UserError, match=r"step 12 \(last losses: 0.9, 0.8, nan\)"):
        step_metrics.check_finite(13, steps(0.8, math.nan, 0.5), [0.9])
    with pytest.raises(UserError, match="step 13"):
        step_metrics.check_finite(13, steps(0.8, update_norm=math.inf), [])
    assert step_metrics.check_finite(4, steps(4.0, 3.0), [9.0, 8.0, 7.0, 6.0, 5.0]) == [7.0, 6.0, 5.0, 4.0, 3.0]
