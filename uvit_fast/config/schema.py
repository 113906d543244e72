"""The YAML schema: a class per section. Every key is typed, documented with its unit, and read somewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from uvit_fast.config.data import DataConfig, LatentConfig
from uvit_fast.config.networks import ModelConfig, UNetConfig, kind_of_network
from uvit_fast.config.plans import CachedLayers
from uvit_fast.config.section import LocalPath, Names, Section, absolute, fits_a_file_system
from uvit_fast.runtime.text import shown

FP8_KEEP: tuple[str, ...] = ("in_blocks.0.attn",)  # see docs/fp8.md


class DiffusionConfig(Section):
    """The noise process (paper, Appendix) and what the network learns of it: by default, as in the paper, eps at
    uniform times.
    """

    schedule: Literal["vp", "sd", "flow", "flow_sit"] = Field(
        description="vp: continuous variance preserving. sd: Stable Diffusion's 1000 steps. flow: the linear path, "
        "the network receives 1000 t. flow_sit: the same for networks in SiT's convention, such as DC-AE's USiT, which "
        "receive 1 - t."
    )
    prediction: Literal["eps", "v", "x0", "velocity"] = Field(
        "eps",
        description="What the network predicts: eps, v = alpha eps - sigma x_0, x_0, or a flow's velocity. "
        "Default: velocity for flows, otherwise eps.",
    )
    time: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="Distribution of training times t in [0, 1] (0: data); logit_normal: SD3's."
    )
    time_mean: float = Field(0.0, ge=-10, le=10, description="Mean of log(t / (1 - t)), with logit_normal.")
    time_std: float = Field(1.0, gt=0, le=10, description="Standard deviation of log(t / (1 - t)), with logit_normal.")
    time_shift: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="Training times become k t / (1 + (k - 1) t); above 1: noisier. For sampling: sample.shift.",
    )
    weighting: Literal["none", "min_snr"] = Field(
        "none",
        description="Weight of each sample's loss; min_snr: min(SNR, gamma) on the error in x_0 (Hang et al. 2023).",
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="Min-SNR's gamma.")

    @model_validator(mode="before")
    @classmethod
    def _what_is_usual(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("schedule") in ("flow", "flow_sit"):
            return {"prediction": "velocity", **section}
        return section

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if self.prediction == "velocity" and not self.flow:
            raise ValueError(
                f"prediction velocity is a flow's: expected eps, v or x0 with schedule {self.schedule}, "
                "or schedule flow"
            )
        if self.time == "uniform" and (self.time_mean, self.time_std) != (0.0, 1.0):
            raise ValueError("time_mean and time_std are of time logit_normal; expected it, or neither of them")
        if self.weighting == "none" and self.min_snr_gamma != 5.0:
            raise ValueError("min_snr_gamma is of weighting min_snr; expected it, or no gamma")
        return self

    @property
    def meaning(self) -> dict[str, str]:
        """What decides the meaning of the network's weights; the rest is how they are learned."""
        return {"schedule": self.schedule, "prediction": self.prediction}

    @property
    def flow(self) -> bool:
        """Whether the path is linear."""
        return self.schedule in ("flow", "flow_sit")


class SampleConfig(Section):
    """How samples are drawn, in training previews and by `uvit-fast sample`."""

    sampler: Literal["dpm_fast", "dpmpp_fast", "dpmpp_2m", "euler_maruyama", "euler", "heun"] = Field(
        description="DPM-Solver singlestep, DPM-Solver++ singlestep, DPM-Solver++ 2M (multistep), Euler-Maruyama for "
        "vp, or Euler or Heun for flows."
    )
    steps: int = Field(50, ge=1, le=10**5, description="Network evaluations per sample (NFE).")
    spacing: Literal["time", "logsnr", "karras"] | None = Field(
        None,
        description="Times of the DPM-Solvers: uniform in t, in log-SNR, or Karras et al.'s. Default: logsnr for vp, "
        "else time.",
    )
    shift: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="For flows: times uniform in t become k t / (1 + (k - 1) t), as in SD3; above 1: more noisy ones.",
    )
    guidance_scale: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="The paper's s in cond + s (cond - uncond); diffusers' guidance_scale is 1 + s. 0: no guidance.",
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0),
        description="First and last time t in [0, 1] (0: data) with guidance (Kynkaanniemi et al. 2024); elsewhere one "
        "branch runs.",
    )
    precision: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="Precision of the blocks' matrix products when sampling on a GPU: bf16, or e4m3 (compute "
        "capability 9.0, U-ViT).",
    )
    fp8_keep: Names = Field(
        FP8_KEEP,
        description="With fp8, what stays in bf16: a block, as out_blocks.-1, its attn, mlp or skip_linear, as "
        "in_blocks.0.mlp, or a pattern; []: nothing.",
    )
    cache: CachedLayers = Field(
        "none",
        description="Layers that reuse their last output: none, a plan's file (.yaml, .json), or outer:N:K, which "
        "computes the K outermost blocks of each side always and the others in one of N evaluations; outer:N is "
        "outer:N:1.",
    )
    prompts: tuple[str, ...] = Field(
        (), description="For text models: the prompts of previews and, by default, of `sample`."
    )

    @model_validator(mode="after")
    def _in_order(self) -> SampleConfig:
        if not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval: expected 0 <= first <= last <= 1, got {self.guidance_interval}")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """The optimisation (paper, Appendix, Table 1)."""

    iterations: int = Field(gt=0, description="Optimizer steps.")
    init: LocalPath | None = Field(
        None,
        description="Weights that a new run and its EMA start from: .pth, .safetensors, a run or a pipeline.",
    )
    init_replace: Names = Field(
        (),
        description="Parts of `init` to replace: label_emb (except its null row), null_label, pos_embed "
        "(interpolated), or other parameters and modules by name (initialised anew): patch_embed, decoder_pred, "
        "final_layer, ...",
    )
    trainable: Names = Field(
        ("all",),
        min_length=1,
        description="all, or names of the trainable parameters and modules, with * and ?: [label_emb, '*.norm?']; "
        "the others are frozen.",
    )
    batch_size: int = Field(gt=0, le=10**7, description="Images per optimizer step, over all GPUs.")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="Images per forward pass on one GPU. Default: batch_size / GPUs, no gradient accumulation.",
    )
    lr: float = Field(2e-4, gt=0, description="Learning rate after warm-up.")
    warmup_steps: int = Field(5000, ge=0, description="Steps of linear warm-up from 0; the rate then stays constant.")
    weight_decay: float = Field(0.03, ge=0, description="AdamW's weight decay, on every parameter.")
    betas: tuple[Beta, Beta] = Field((0.99, 0.99), description="AdamW's betas, in [0, 1).")
    grad_clip: float = Field(0.0, ge=0, description="Largest gradient norm; 0: no clipping.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Decay of the weights' EMA, per step.")
    p_uncond: float = Field(0.0, ge=0, le=1, description="Probability of training a sample without its condition.")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU.")
    zero_stage: Literal[1, 2, 3] = Field(
        2, description="DeepSpeed ZeRO stage: shard the optimizer, gradients, parameters."
    )
    offload_optimizer: bool = Field(False, description="Master weights, moments, EMA and AdamW in the host's memory.")
    activation_memory_gb: float | None = Field(
        None,
        gt=0,
        description="With selective checkpointing: GB (10^9 bytes) per GPU for activations; blocks keep what fits.",
    )
    cuda_graphs: bool = Field(
        True, description="On a GPU, forward and backward as CUDA graphs; for ZeRO stages 1 and 2, without compile."
    )
    compile: bool = Field(False, description="torch.compile around the kernels; for ZeRO stages 1 and 2.")
    max_refused: int = Field(20, gt=0, description="Consecutive steps without a finite gradient that end a run.")
    spike_deviations: float = Field(
        6.0,
        ge=0,
        description="Standard deviations above the recent losses from which a loss is logged as a spike; 0: never.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initialisation, data order, noise and timesteps.")
    log_every: int = Field(50, gt=0, le=10**6, description="Steps between two rows of scalars.")
    checkpoint_every: int = Field(
        10000, gt=0, description="Steps between two checkpoints; the last step always has one."
    )
    keep_checkpoints: int = Field(3, gt=0, description="How many of the newest checkpoints to keep.")
    keep_every: int = Field(0, ge=0, description="Also keep checkpoints at multiples of this many steps; 0: none.")
    wandb: bool = Field(False, description="Log to Weights & Biases too.")
    sample_every: int = Field(0, ge=0, description="Steps between two sample grids; 0: none while training.")


class EvaluateConfig(Section):
    """Evaluations of the EMA weights while training; the best weights stay in the run's folder best/."""

    every: int = Field(gt=0, description="Steps between two evaluations; the last step always has one.")
    held_out: int | str | None = Field(
        None,
        description="Images not trained on, whose loss is measured: a number of images of the data, or a path to data "
        "like those at data.path.",
    )
    samples: int | None = Field(
        None,
        ge=0,
        le=10**8,
        description="Samples drawn per evaluation; published figures use 50000. 0: none. Default: 10000, or none with "
        "held_out.",
    )
    features: Literal["inception", "digits-fid"] = Field(
        "inception", description="inception: FID. digits-fid: with a small classifier trained on the training data."
    )
    reference: LocalPath | None = Field(
        None, description="Statistics (.npz) or images (folder or .npz). Default: the training data."
    )
    inception: LocalPath | None = Field(
        None, description="Inception's weight file. Default: among torch.hub's downloads."
    )

    @field_validator("held_out", mode="before")
    @classmethod
    def _number_or_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            return absolute(fits_a_file_system(value))
        if value is not None and not (isinstance(value, int) and 0 < value <= 10**8):
            raise ValueError(f"expected a number of images from 1 to {10**8}, or a path, got {shown(value)}")
        return value

    @model_validator(mode="after")
    def _something(self) -> EvaluateConfig:
        if self.drawn == 0 and self.held_out is None:
            raise ValueError("samples 0 leaves nothing to evaluate: expected samples to draw, or held_out")
        return self

    @property
    def drawn(self) -> int:
        """Samples drawn per evaluation."""
        if self.samples is None:
            return 10_000 if self.held_out is None else 0
        return self.samples


class Config(Section):
    """One experiment."""

    name: str = Field(min_length=1, max_length=100, description="Names the run's folder, runs/<name>.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is a GPU.")
    model: Annotated[
        Annotated[ModelConfig, Tag("U-ViT")] | Annotated[UNetConfig, Tag("U-Net")], Discriminator(kind_of_network)
    ]
    diffusion: DiffusionConfig
    train: TrainConfig
    sample: SampleConfig
    data: DataConfig
    evaluate: EvaluateConfig | None = Field(None, description="Present where samples are measured while training.")
    latent: LatentConfig | None = Field(None, description="Present when the network works on an autoencoder's latents.")

    @model_validator(mode="after")
    def _agrees(self) -> Config:
        if self.name in (".", "..") or "/" in self.name or not self.name.isprintable():
            raise ValueError(f"name: expected a folder's name, without /, got {shown(self.name)}")
        conditional = bool(self.model.num_classes or self.model.context_dim)
        if self.train.p_uncond > 0 and not conditional:
            raise ValueError("train.p_uncond needs a condition: set model.num_classes or model.context_dim")
        if self.model.num_classes == 1 and self.train.p_uncond > 0:
            raise ValueError(
                "model.num_classes 1 with train.p_uncond leaves no class, since the last label then means none: "
                "expected the number of classes and one more, or train.p_uncond 0"
            )
        if self.sample.guidance_scale > 0 and self.train.p_uncond == 0:
            raise ValueError("sample.guidance_scale needs a model trained with train.p_uncond > 0")
        selective = self.model.activation_checkpointing == "selective"
        if self.train.activation_memory_gb and not selective:
            raise ValueError("train.activation_memory_gb needs model.activation_checkpointing selective")
        if self.train.init_replace and not self.train.init:
            raise ValueError("train.init_replace needs train.init: without it all weights begin anew")
        if self.train.compile and self.train.zero_stage == 3:
            raise ValueError("train.compile needs train.zero_stage 1 or 2: stage 3 moves the weights between blocks")
        if self.sample.cache != "none" and not isinstance(self.model, ModelConfig):
            raise ValueError("sample.cache: a U-Net has no layers that are cached; expected cache none")
        if self.sample.prompts and not self.model.context_dim:
            raise ValueError("sample.prompts needs a model of text: set model.context_dim")
        if self.data.name in ("latents", "text_latents") and not self.latent:
            raise ValueError(f"data.name {self.data.name} needs the section latent: autoencoder and scale_factor")
        for key in ("scale_factor", "shift_factor"):
            each = getattr(self.latent, key, None)
            if isinstance(each, tuple) and len(each) != self.model.in_chans:
                raise ValueError(
                    f"latent.{key}: expected one number, or {self.model.in_chans}, as model.in_chans says; "
                    f"got {len(each)}"
                )
        if self.sample.sampler == "euler_maruyama" and self.diffusion.schedule != "vp":
            raise ValueError("sample.sampler euler_maruyama solves the VP-SDE: it needs diffusion.schedule vp")
        if self.sample.sampler in ("euler", "heun") and not self.diffusion.flow:
            raise ValueError(
                f"sample.sampler {self.sample.sampler} solves the ODE of a flow: it needs diffusion.schedule flow; "
                f"with {self.diffusion.schedule} expected one of the DPM-Solvers"
            )
        if self.sample.sampler in ("euler_maruyama", "euler", "heun") and self.sample.spacing:
            raise ValueError(f"sample.spacing is the DPM-Solvers'; {self.sample.sampler} has times of its own")
        if self.sample.shift != 1 and not (self.diffusion.flow and self.sample.spacing in (None, "time")):
            raise ValueError(
                "sample.shift moves times that are uniform in t, of a flow: "
                "it needs diffusion.schedule flow and no sample.spacing"
            )
        return self

    @property
    def null_label(self) -> int | None:
        """The label that means "no class": the last one, in models trained with label dropping."""
        return self.model.num_classes - 1 if self.model.num_classes and self.train.p_uncond > 0 else None
