"""PyTorch against the exported graph, and the graph's own promises."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.training.networks import CONFIGS, chirps, random_network
from training.errors import QualityGateError
from training.export import check_agreement, export_graph, folded
from training.exported import agreement
from training.frontend import FrontendConfig
from training.inference import compare, cpu_session, run_graph
from training.recipes.quartznet_ctc.model import QuartzNet
from training.recipes.quartznet_ctc.network import QuartzNetCtc


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> tuple[object, onnx.ModelProto]:
    """A network and its graph."""
    model = random_network(CONFIGS[request.param])
    return model, export_graph(model, FrontendConfig())


def test_torch_and_onnx_agree(pair) -> None:  # type: ignore[no-untyped-def]
    model, graph = pair
    check = check_agreement(model, FrontendConfig(), graph, chirps(3))
    assert check.agreement.worst_log_prob < 1e-4
    assert check.agreement.same_best == 1.0


def test_a_padded_batch_gives_what_each_item_gives(pair) -> None:  # type: ignore[no-untyped-def]
    _, graph = pair
    session = cpu_session(graph.SerializeToString())
    clips = chirps(5, seed=3)
    alone = [run_graph(session, [clip])[0] for clip in clips]
    assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-4


def test_what_lies_beyond_an_item_does_not_matter(pair) -> None:  # type: ignore[no-untyped-def]
    """Rubbish instead of zeros in the padding changes nothing."""
    _, graph = pair
    session = cpu_session(graph.SerializeToString())
    clip = chirps(1)[0]
    padded = np.concatenate([clip, np.full(5000, 0.9, np.float32)])
    feeds = {"waveform": padded[None], "lengths": np.array([len(clip)])}
    log_probs, frames = session.run(["log_probs", "frame_lengths"], feeds)
    assert compare(run_graph(session, [clip]), [log_probs[0, : frames[0]]]).worst_log_prob < 1e-4


def test_every_convolution_is_two_dimensional_of_height_one(pair) -> None:  # type: ignore[no-untyped-def]
    model, graph = pair
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    assert len(convolutions) == sum(isinstance(module, nn.Conv1d) for module in model.modules())
    assert all(len(shapes[node.input[1]]) == 4 and shapes[node.input[1]][2] == 1 for node in convolutions)
    operators = {node.op_type for node in graph.graph.node}
    assert not operators & {"BatchNormalization", "Dropout", "STFT", "DFT", "If", "Loop"}


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 4000])
def test_any_length_goes_in(samples: int) -> None:
    session = cpu_session(
        export_graph(random_network(CONFIGS["quartznet"]), FrontendConfig()).SerializeToString()
    )
    log_probs = run_graph(session, [np.full(samples, 0.1, np.float32)])[0]
    assert len(log_probs) == (samples // 160 + 2) // 2
    assert np.isfinite(log_probs).all()


def test_silence_looks_the_same_all_along() -> None:
    """Digital silence has constant features: every frame away from the edges gets the same answer."""
    session = cpu_session(
        export_graph(random_network(CONFIGS["quartznet"]), FrontendConfig()).SerializeToString()
    )
    middle = run_graph(session, [np.zeros(32_000, np.float32)])[0][30:-30]
    assert np.abs(middle - middle[0]).max() < 1e-3


def test_a_graph_of_another_network_is_refused() -> None:
    graph = export_graph(random_network(CONFIGS["quartznet"], seed=1), FrontendConfig())
    with pytest.raises(QualityGateError, match="disagree"):
        check_agreement(random_network(CONFIGS["quartznet"], seed=2), FrontendConfig(), graph, chirps(1))


def spoiled() -> QuartzNet:
    """A network that a diverged training left: its answers are not numbers."""
    network = random_network(CONFIGS["quartznet"])
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    return network


def test_a_comparison_keeps_what_is_not_a_number() -> None:
    fine, broken = np.zeros((2, 3), np.float32), np.full((2, 3), np.nan, np.float32)
    for heard in ([fine, broken], [broken, fine]):
        found = compare([fine, fine], heard)
        assert np.isnan(found.worst_posterior)
        assert np.isnan(found.worst_log_prob)


def test_a_graph_whose_answers_are_not_numbers_is_refused() -> None:
    network = spoiled()
    graph = export_graph(network, FrontendConfig())
    with pytest.raises(QualityGateError, match="disagree"):
        check_agreement(network, FrontendConfig(), graph, chirps(1))
    with pytest.raises(QualityGateError, match="disagree"):
        agreement(QuartzNetCtc(network, FrontendConfig()), graph, chirps(1))


def test_folding_needs_running_statistics() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        folded(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1, track_running_stats=False))


def test_folding_is_exact() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
    norm.running_mean = torch.randn(4)
    norm.running_var = torch.rand(4) + 0.5
    weight, bias = folded(conv, norm.eval())
    values = torch.randn(2, 3, 5)
    torch.testing.assert_close(
        nn.functional.conv1d(values, weight, bias), norm(conv(values)), atol=1e-6, rtol=1e-5
    )
