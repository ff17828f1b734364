"""Backward passes in segments: the exact one equals the plain one, the truncated one is what its name says."""

import pytest
import torch
from test_memory import Live

from receptance.models import RWKV, VERSIONS, State, apply_recipe
from receptance.training.batch import Batch
from receptance.training.loss import language_model_loss
from receptance.training.segments import exact_backward, spacing, truncated_backward

EXACT = 1e-10  # float64, relative to each gradient's largest element


def lively(version: str, dtype: torch.dtype = torch.float64) -> RWKV:
    """By the recipe, plus noise: its zeros would hide whole branches."""
    cls = VERSIONS[version]
    more = {} if version == "4" else {"head_size": 8}
    more |= {"version": version} if version.startswith("5") else {}
    model = cls(cls.Config.make(vocab_size=11, n_layer=2, n_embd=16, **more), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    apply_recipe(model, cls.recipe(model.config), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model.train()


def random_state(model: RWKV, rows: int) -> State:
    """Not zero, and asking for its gradient."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda x: torch.rand(x.shape, generator=generator, dtype=x.dtype) + 0.1
    state = {name: draw(x) for name, x in model.zero_state(rows).items()}
    return State({name: x.requires_grad_(name != "exp") for name, x in state.items()})


class Parts:
    """The two functions that a segmented backward pass calls, and how often it did."""

    def __init__(self, model: RWKV):
        self.model = model
        self.forwards = 0

    def advance(self, batch, state):
        self.forwards += 1
        return self.model.hidden(batch.tokens, state, lengths=None, resets=None, backend="auto")[1]

    def loss(self, batch, state):
        return self.model.loss(batch.tokens, batch.targets, state, logit_penalty=1e-4, total=batch.n_targets)


def data(rows=2, t=50):
    tokens = torch.randint(11, (rows, t + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: RWKV, state: State) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **{f"state {name}": x.grad for name, x in state.items() if x.grad is not None}}


def comparable(state: State) -> dict[str, torch.Tensor]:
    """RWKV-4's triples stand for an average and a weight; which exponent they use is up to the operator."""
    if "num" not in state:
        return dict(state)
    average, weight = state["num"] / state["den"], state["den"].log() + state["exp"]
    return {"att_shift": state["att_shift"], "ffn_shift": state["ffn_shift"], "average": average, "weight": weight}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= EXACT * x.abs().max().clamp(min=1e-30), name


@pytest.mark.parametrize("keep_every", [1, 3])
@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6", "7"])
def test_exact_segments_equal_the_plain_backward(version, keep_every):
    tokens, targets = data()
    plain, whole = lively(version), random_state(lively(version), 2)
    logits, end = plain.forward(tokens, whole)
    expected = language_model_loss(logits, targets)
    expected.backward()

    model, start = lively(version), random_state(plain, 2)
    parts = Parts(model)
    loss, after = exact_backward(
        parts.advance, parts.loss, Batch.of(tokens, targets), 7, state=start, keep_every=keep_every, offload=True
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same(gradients(model, start), gradients(plain, whole))
    assert_same(comparable(after), comparable(end.detach()))


@pytest.mark.parametrize("version", ["4", "7"])
def test_dropout_is_the_same_in_both_passes(version):
    """Otherwise the gradient would not be that of the loss which is returned."""
    tokens, targets = data(1, 20)
    model, other = lively(version), lively(version)
    model.dropout = other.dropout = 0.3
    torch.manual_seed(5)
    parts = Parts(model)
    loss, _ = exact_backward(parts.advance, parts.loss, Batch.of(tokens, targets), 6, keep_every=2)

    torch.manual_seed(5)
    state, total = None, torch.zeros(())
    for piece in Batch.of(tokens, targets).segments(6):
        part, state = Parts(other).loss(piece, state)
        total = total + part
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert_same(gradients(model, State({})), gradients(other, State({})))


def test_truncated_segments_cut_the_gradient_and_not_the_state():
    tokens, targets = data()
    model = lively("7")
    loss, _ = truncated_backward(Parts(model).loss, Batch.of(tokens, targets), 7)
    other = lively("7")
    state, total = None, 0.0
    for x, y in zip(tokens.split(7, 1), targets.split(7, 1)):
        logits, state = other.forward(x, state)
        total = total + language_model_loss(logits, y) * x.shape[1] / tokens.shape[1]
        state = state.detach()
    total.backward()
    assert_same(gradients(model, State({})), gradients(other, State({})))
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)


def test_a_tuned_initial_state_is_taught_through_all_segments():
    def with_state():
        config = VERSIONS["7"].Config.make(vocab_size=11, n_layer=2, n_embd=16, head_size=8)
        cls = VERSIONS["7"]
        model = cls(type(config)(**{**vars(config), "time_state": True}), dtype=torch.float64)
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        return model.train()

    tokens, targets = data()
    plain, model = with_state(), with_state()
    language_model_loss(plain.forward(tokens)[0], targets).backward()
    parts = Parts(model)
    exact_backward(parts.advance, parts.loss, Batch.of(tokens, targets), 9)
    assert plain.blocks[0].att.time_state.grad.abs().max() > 0
    assert_same(gradients(model, State({})), gradients(plain, State({})))


def test_forward_passes_are_as_promised():
    """One without a graph for all but the last segment; with spacing, once more for the borders in between."""
    tokens, targets = data(1, 64)
    for keep_every, expected in ((1, 15), (4, 15 + 12)):
        parts = Parts(lively("6"))
        exact_backward(parts.advance, parts.loss, Batch.of(tokens, targets), 4, keep_every=keep_every)
        assert parts.forwards == expected
    assert (spacing("sqrt", 100), spacing("device", 100), spacing("sqrt", 1)) == (10, 1, 1)


@pytest.mark.parametrize("version", ["4", "7"])
def test_memory_grows_by_a_state_per_segment_alone(version):
    """Four times the length: as many more states and tokens, and nothing else but a little bookkeeping."""
    model, peaks = lively(version, torch.float32), []
    for t in (128, 512):
        parts, (tokens, targets) = Parts(model), data(1, t)
        exact_backward(parts.advance, parts.loss, Batch.of(tokens, targets), 32)  # gradients exist from now on
        with Live() as live:
            exact_backward(parts.advance, parts.loss, Batch.of(tokens, targets), 32)
        peaks.append(live.peak)
    states = 12 * model.zero_state(1).nbytes
    random_states = 12 * torch.get_rng_state().nbytes
    assert peaks[1] - peaks[0] <= 1.01 * (states + random_states)
    assert peaks[0] > 10 * states  # of which the activations of a segment are most


def test_the_last_pass_alone_is_marked_for_averaging():
    tokens, targets = data(1, 20)
    marks = []

    class Around:
        def __init__(self, last):
            marks.append(last)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    parts = Parts(lively("4"))
    exact_backward(parts.advance, parts.loss, Batch.of(tokens, targets), 7, around=Around)
    truncated_backward(parts.loss, Batch.of(tokens, targets), 7, around=Around)
    assert marks == [False, False, True, False, False, True]
