"""The small CNN's trunk as a transformers vision model, so that a job can name its folder as backbone.

Importing this module registers it; worker processes import it too, with the script that starts them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from benchmarks.networks import HIDDEN, Trunk


class SmallCnnConfig(PretrainedConfig):
    """What a vision encoder is asked for: channels, size, width."""

    model_type = "small-cnn"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_channels, self.image_size, self.hidden_size = 3, 32, HIDDEN


class SmallCnn(PreTrainedModel):
    """Images to features."""

    config_class = SmallCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallCnnConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk()
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: torch's own initial values are the ones the other systems begin with."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.trunk(pixel_values)
        return features


AutoConfig.register(SmallCnnConfig.model_type, SmallCnnConfig)
AutoModel.register(SmallCnnConfig, SmallCnn)


def save(folder: Path) -> Path:
    """A folder as save_pretrained writes one, without weights: random ones are asked for."""
    SmallCnnConfig().save_pretrained(folder)
    scale = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(scale))
    return folder
