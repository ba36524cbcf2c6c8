"""Small random Conformers, and archives of them as NeMo writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from tests.training.archives import stored, write_archive
from training.conformer import ConformerConfig, ConformerCtc
from training.frontend import FrontendConfig, mel_filters

FRONTEND = FrontendConfig(features=80, window_samples=400)
PIECES = ["<unk>", "\u2581a", "b", "c", "\u2581Cd", "d", "\u2581", "e"]
FAST = ConformerConfig(width=32, layers=2, heads=4, inner=128, subsampling_channels=16)
CONFIGS = {
    "fastconformer": FAST,
    "conformer": replace(
        FAST, kernel=31, subsampling="striding", subsampling_factor=4, subsampling_channels=32
    ),
    "without biases": replace(FAST, bias=False, scale_input=False),
    "four frames a step": replace(FAST, upsample=4),
}


def random_conformer(
    config: ConformerConfig, outputs: int = len(PIECES) + 1, frontend: FrontendConfig = FRONTEND
) -> ConformerCtc:
    """Weights that make every part count, and normalisations that have seen data."""
    torch.manual_seed(0)
    model = ConformerCtc(config, outputs, frontend).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = 10.0 if parameter.dim() == 1 else parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def nemo_config(config: ConformerConfig) -> dict[str, Any]:
    """model_config.yaml as NeMo writes it."""
    return {
        "sample_rate": 16_000,
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 80,
            "n_fft": 512,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": 80,
            "feat_out": -1,
            "n_layers": config.layers,
            "d_model": config.width,
            "subsampling": config.subsampling,
            "subsampling_factor": config.subsampling_factor,
            "subsampling_conv_channels": config.subsampling_channels,
            "causal_downsampling": False,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": config.heads,
            "att_context_size": [-1, -1],
            "xscaling": config.scale_input,
            "use_bias": config.bias,
            "untie_biases": True,
            "conv_kernel_size": config.kernel,
            "conv_norm_type": "batch_norm",
            "conv_context_size": None,
        },
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
            "feat_in": config.width,
            "num_classes": len(PIECES),
            "vocabulary": PIECES,
        },
    }


def nemo_state(model: ConformerCtc, head: str = "decoder") -> dict[str, torch.Tensor]:
    """The weights under NeMo's names."""
    names = {
        "encoder.subsampling.layers.": "encoder.pre_encode.conv.",
        "encoder.subsampling.linear.": "encoder.pre_encode.out.",
        ".self_attn.q_proj.": ".self_attn.linear_q.",
        ".self_attn.k_proj.": ".self_attn.linear_k.",
        ".self_attn.v_proj.": ".self_attn.linear_v.",
        ".self_attn.o_proj.": ".self_attn.linear_out.",
        ".self_attn.relative_k_proj.": ".self_attn.linear_pos.",
        ".self_attn.bias_": ".self_attn.pos_bias_",
        ".conv.norm.": ".conv.batch_norm.",
        "ctc_head.": f"{head}.decoder_layers.0.",
    }
    state = {"preprocessor.featurizer.fb": torch.tensor(mel_filters(FRONTEND))[None].float()}
    for name, value in model.network.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = value
    return state


def archive_of(path: Path, model: ConformerCtc, config: dict[str, Any] | None = None, **more: Any) -> Path:
    given = config or nemo_config(model.config)
    state = more.get("state", nemo_state(model))
    members = {"model_config.yaml": yaml.safe_dump(given).encode(), "model_weights.ckpt": stored(state)}
    return write_archive(path, members)
