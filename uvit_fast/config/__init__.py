"""The configuration: `schema.py` and `networks.py` say what may be set, `reading.py` reads it from a YAML file and `--set`,
`finding.py` knows the files by name.
"""

from uvit_fast.config.finding import CONFIGS, ConfigError, config_names, find_config, is_config_name
from uvit_fast.config.networks import ModelConfig, UNetConfig
from uvit_fast.config.reading import config_from, dump_config, load_config
from uvit_fast.config.schema import CLIP, FP8_KEEP, Config, DiffusionConfig, Factor, SampleConfig, TrainConfig
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
    "load_config",
]
