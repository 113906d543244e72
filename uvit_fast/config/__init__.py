"""The configuration: `schema.py` says what may be set, `reading.py` takes it from a YAML file and `--set`."""

from uvit_fast.config.reading import ConfigError, config_from, dump_config, load_config
from uvit_fast.config.schema import (
    CLIP,
    Config,
    DiffusionConfig,
    Factor,
    ModelConfig,
    SampleConfig,
    Section,
    TrainConfig,
    UNetConfig,
)

__all__ = [
    "CLIP",
    "Config",
    "ConfigError",
    "DiffusionConfig",
    "Factor",
    "ModelConfig",
    "SampleConfig",
    "Section",
    "TrainConfig",
    "UNetConfig",
    "config_from",
    "dump_config",
    "load_config",
]
