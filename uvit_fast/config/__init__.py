"""The configuration: `schema.py` and its parts define the keys, `reading.py` reads YAML files and `--set`, `finding.py`
finds files by name.
"""

from uvit_fast.config.data import CLIP, Factor
from uvit_fast.config.finding import CONFIGS, ConfigError, config_names, find_config, is_config_name
from uvit_fast.config.networks import ModelConfig, UNetConfig
from uvit_fast.config.reading import config_from, dump_config, keys_named, load_config
from uvit_fast.config.schema import FP8_KEEP, Config, DiffusionConfig, SampleConfig, TrainConfig
from uvit_fast.config.section import Section

__all__ = [
    "CLIP",
    "CONFIGS",
    "Config",
    "ConfigError",
    "DiffusionConfig",
    "FP8_KEEP",
    "Factor",
    "ModelConfig",
    "SampleConfig",
    "Section",
    "TrainConfig",
    "UNetConfig",
    "config_from",
    "config_names",
    "dump_config",
    "find_config",
    "is_config_name",
    "keys_named",
    "load_config",
]
