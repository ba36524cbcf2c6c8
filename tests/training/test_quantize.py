"""Static INT8: what becomes an integer, that batches stay exact, and that the gate can refuse."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from tests.training.networks import CONFIGS, VOCABULARY, chirps, random_network
from training.errors import QualityGateError
from training.evaluate import ErrorRates, Utterance, error_rates, greedy_text
from training.export import export_graph
from training.frontend import FrontendConfig
from training.inference import Agreement, compare, cpu_session, run_graph
from training.qdq import Range, quantizable, quantize_graph
from training.quantize import Gate, Outcome, Trial, best_of, calibrate, float_ends, quantize


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """A float graph."""
    return export_graph(random_network(CONFIGS["quartznet"]), FrontendConfig())


@pytest.fixture(scope="module")
def int8(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same in INT8."""
    statistics = calibrate(graph, chirps(8))
    return quantize_graph(graph, {name: seen.extremes() for name, seen in statistics.items()}, float_ends)


def test_it_says_nearly_the_same(graph: onnx.ModelProto, int8: onnx.ModelProto) -> None:
    clips = chirps(6, seed=5)
    expected = [run_graph(cpu_session(graph.SerializeToString()), [clip])[0] for clip in clips]
    actual = [run_graph(cpu_session(int8.SerializeToString()), [clip])[0] for clip in clips]
    agreement = compare(expected, actual)
    assert agreement.same_best > 0.9
    assert 0 < agreement.worst_posterior < 0.2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_gives_what_each_item_gives(name: str) -> None:
    graph = export_graph(random_network(CONFIGS[name]), FrontendConfig())
    ranges = {key: seen.mean_extremes() for key, seen in calibrate(graph, chirps(4)).items()}
    session = cpu_session(quantize_graph(graph, ranges, float_ends).SerializeToString())
    clips = chirps(7, seed=9)
    alone = [run_graph(session, [clip])[0] for clip in clips]
    assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-4


def test_the_ends_stay_float_and_the_rest_is_bytes(int8: onnx.ModelProto) -> None:
    types = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in int8.graph.initializer}
    assert types["head.weight"] == np.float32
    assert types["blocks.0.layers.0.depthwise.weight"] == np.float32
    assert types["blocks.1.layers.0.depthwise.weight.quantized"] == np.int8
    assert types["blocks.1.layers.1.pointwise.bias.quantized"] == np.int32
    assert types["blocks.1.relu.zero"] == np.uint8


def test_weights_have_one_scale_per_output_channel(graph: onnx.ModelProto, int8: onnx.ModelProto) -> None:
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    name = "blocks.1.layers.0.pointwise.weight"
    scales = after[f"{name}.scales"]
    assert scales.shape == (16,)
    restored = after[f"{name}.quantized"].astype(np.float32) * scales[:, None, None, None]
    assert (np.abs(restored - before[name]) <= scales[:, None, None, None] / 2 + 1e-6).all()


def test_relus_disappear_into_their_quantizers(int8: onnx.ModelProto) -> None:
    relus = {node.name for node in int8.graph.node if node.op_type == "Relu"}
    assert relus == {"blocks.0.relu"}, "only the float first block keeps its own"


@pytest.mark.parametrize(("low", "high", "zero"), [(0.0, 2.55, 0), (-1.0, 1.55, 100), (0.5, 2.55, 0)])
def test_zero_is_held_exactly(low: float, high: float, zero: int) -> None:
    scale, point = Range(low, high).scale_and_zero()
    assert (float(scale), int(point)) == (pytest.approx(0.01), zero)


def test_a_missing_range_is_an_error(graph: onnx.ModelProto) -> None:
    names = quantizable(graph, float_ends)
    with pytest.raises(KeyError):
        quantize_graph(graph, {name: Range(0, 1) for name in names[1:]}, float_ends)


def test_calibration_needs_sound(graph: onnx.ModelProto) -> None:
    with pytest.raises(ValueError, match="at least one recording"):
        calibrate(graph, [])


def test_texts_are_compared_with_what_the_references_went_through() -> None:
    capitals = Vocabulary((SPACE_MARK, *"ABCD", BLANK_TOKEN), blank_id=5)
    network = random_network(CONFIGS["quartznet"])
    with torch.no_grad():
        network.head.bias[[0, capitals.blank_id]] = -9.0  # a network that knows nothing hears nothing
    graph = export_graph(network, FrontendConfig())
    session = cpu_session(graph.SerializeToString())
    clips = chirps(3)
    said = [greedy_text(run_graph(session, [clip])[0], capitals).lower() for clip in clips]
    assert any(said)
    gate = Gate(min_speed=0.0, max_wer_increase=9.0)
    pairs = list(zip(clips, said, strict=True))
    assert quantize(graph, capitals, clips, pairs, gate, plain=str.lower).float_rates.wer == 0.0


def test_every_way_is_tried_and_the_best_is_kept(graph: onnx.ModelProto) -> None:
    validation = [(clip, "ab cd") for clip in chirps(4, seed=2)]
    outcome = quantize(graph, VOCABULARY, chirps(4), validation, Gate(min_speed=0.0, max_wer_increase=9.0))
    assert {trial.method for trial in outcome.trials} == {"mean of extremes", "extremes", "99.99 percentile"}
    assert outcome.chosen is best_of(outcome.trials)
    assert outcome.table().count("(kept)") == 1


def trial(method: str, wrong: set[int], same_best: float, speed: float = 2.0) -> Trial:
    """Of a hundred clips of one word, those of these numbers were heard wrong."""
    heard = [Utterance("yes", "no" if number in wrong else "yes") for number in range(100)]
    agreement = Agreement(0.0, 0.0, same_best, 1)
    return Trial(method, onnx.ModelProto(), 1, agreement, heard, error_rates(heard), speed, 0.0)


@pytest.mark.parametrize(
    ("trials", "kept"),
    [
        ([trial("luckier", set(range(9)), 0.94), trial("nearer", set(range(10)), 0.97)], "nearer"),
        ([trial("better", set(), 0.94), trial("nearer", set(range(10)), 0.97)], "better"),
        ([trial("fast", {1}, 0.94, 3.0), trial("nearer", {1}, 0.97, 2.8)], "nearer"),
        ([trial("fast", {1}, 0.94, 3.0), trial("nearer", {1}, 0.97, 2.0)], "fast"),
        ([trial("slow", {1}, 0.97, 2.0), trial("fast", {1}, 0.97, 2.1)], "fast"),
    ],
)
def test_chance_does_not_choose(trials: list[Trial], kept: str) -> None:
    """What a hundred clips cannot tell apart, all their frames can."""
    assert best_of(trials).method == kept


@pytest.mark.parametrize(
    ("words", "wer", "said"),
    [
        (99, 0.2, ["Only 99 words"]),
        (100, 1.0, ["wrong about all"]),
        (8, 1.5, ["Only", "wrong"]),
        (100, 0.9, []),
    ],
)
def test_the_table_says_where_nothing_could_be_told_apart(words: int, wer: float, said: list[str]) -> None:
    rates = ErrorRates(utterances=9, words=words, wer=wer, wer_low=wer, wer_high=wer, cer=wer)
    agreement = Agreement(0.0, 0.0, 1.0, 1)
    one = Trial("one way", onnx.ModelProto(), 1, agreement, [], rates, 1.0, 0.0)
    lines = Outcome(rates, 1, (one,), one).table().splitlines()
    doubts = [line for line in lines if line and not line.startswith("|")]
    assert len(doubts) == len(said)
    for doubt, part in zip(doubts, said, strict=True):
        assert part in doubt


@pytest.mark.parametrize(
    ("gate", "problem"),
    [(Gate(min_speed=1e9), "speed"), (Gate(min_speed=0.0, max_wer_increase=-9.0), "WER")],
)
def test_the_gate_refuses_with_the_table(graph: onnx.ModelProto, gate: Gate, problem: str) -> None:
    validation = [(clip, "ab cd") for clip in chirps(2)]
    with pytest.raises(QualityGateError, match=problem) as caught:
        quantize(graph, VOCABULARY, chirps(2), validation, gate)
    assert "| INT8, extremes" in str(caught.value)
