"""Settings of the model. No torch here: `train_gpt.py --help` reads these files and must answer in under a second.

A feature is on when its section is there and off when the field is `None`, so that off leaves no orphan knobs.
Field order is execution order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ACTIVATION_NAMES = ("relu2", "leaky_relu2", "gelu2", "silu2", "swiglu", "star_relu", "star_relu_glu")
# Far above anything useful: a slip of the finger must not ask for a model that takes hours to describe
MAX_LAYERS, MAX_WIDTH, MAX_ROWS, MAX_MULT = 1000, 2**16, 2**24, 256


@dataclass(frozen=True)
class BigramConfig:
    """Hashed bigram embedding: `x += scale * P @ table[hash(t, t-1)]`, before the input norm."""

    rows: int = 2048  # table rows; row rows-1 is kept for position 0 (hash "xor")
    dim: int = 128  # table width
    scale_init: float = 0.05  # start of the learned scale
    hash: str = "xor"  # "xor": (36313 x_t ^ 27191 x_{t-1}) mod (rows-1); "mul1009": (1009 x_{t-1} + x_t) mod rows
    trigram: bool = False  # also look up (x_t, x_{t-1}, x_{t-2}) in the same table

    def problems(self) -> list[str]:
        out = []
        if not 2 <= self.rows <= MAX_ROWS:
            out.append(f"rows={self.rows} must be in 2..{MAX_ROWS}")
        if not 1 <= self.dim <= MAX_WIDTH:
            out.append(f"dim={self.dim} must be in 1..{MAX_WIDTH}")
        if self.hash not in ("xor", "mul1009"):
            out.append(f"hash={self.hash!r} must be xor or mul1009")
        if self.trigram and self.hash != "xor":
            out.append("trigram=true needs hash=xor")
        return out


@dataclass(frozen=True)
class TrigramConfig:
    """Hashed trigram embedding with a table of its own: (17911 x_{t-2} + 36313 x_{t-1} + 27191 x_t) mod (rows-1)."""

    rows: int = 2048  # table rows
    dim: int = 48  # table width
    scale_init: float = 0.02  # start of the learned scale

    def problems(self) -> list[str]:
        ok = 2 <= self.rows <= MAX_ROWS and 1 <= self.dim <= MAX_WIDTH
        return [] if ok else [f"rows={self.rows} must be in 2..{MAX_ROWS}, dim={self.dim} in 1..{MAX_WIDTH}"]


@dataclass(frozen=True)
class SmearConfig:
    """SmearGate: `x_t <- (1-G) x_t + G x_{t-1}`, `G = sigmoid(gate)`, after the input norm."""

    init: float = 0.0  # logit of G: 0 starts at G = 0.5


@dataclass(frozen=True)
class EmbedConfig:
    vocab_size: int = 1024  # must be the SentencePiece model's
    tied: bool = True  # the head reads the token table
    tied_init_std: float = 0.005  # token table's std when tied; untied tables start at N(0, 1)
    bigram: BigramConfig | None = None
    trigram: TrigramConfig | None = None
    smear: SmearConfig | None = None

    def problems(self) -> list[str]:
        # hashes multiply ids by at most 51,497 in int32
        return [] if 2 <= self.vocab_size <= 41700 else [f"vocab_size={self.vocab_size} must be in 2..41700"]


@dataclass(frozen=True)
class SkipConfig:
    """U-Net skips from encoder to decoder layers, last in first out."""

    gated: bool = False  # x <- G x + (1-G) (w skip), G = sigmoid(gate); plain: x <- x + w skip


@dataclass(frozen=True)
class PlanConfig:
    """Which layer runs when and what it is joined with; `pgolf.model.plan.build` turns it into steps."""

    num_layers: int = 9  # blocks
    encoder_layers: int = -1  # -1: half of the layers, rounded down
    skips: SkipConfig | None = field(default_factory=SkipConfig)  # U-Net joins from encoder to decoder

    @property
    def n_encoder(self) -> int:
        return self.num_layers // 2 if self.encoder_layers < 0 else self.encoder_layers

    def problems(self) -> list[str]:
        out = []
        if not 1 <= self.num_layers <= MAX_LAYERS:
            out.append(f"num_layers={self.num_layers} must be in 1..{MAX_LAYERS}")
        if self.encoder_layers > self.num_layers:
            out.append(f"encoder_layers={self.encoder_layers} must be at most num_layers={self.num_layers}")
        return out


@dataclass(frozen=True)
class RopeConfig:
    base: float = 10000.0  # rotary base
    dims: int = 0  # rotated channels of a head; 0 = all
    # NTK: if the training length T exceeds this, base *= (T / ntk_reference) ** (r / (r - 2)); 0 = off. The base is
    # fixed at build time from the *training* length, so evaluating at another length keeps the angles.
    ntk_reference: int = 0

    def problems(self) -> list[str]:
        out = []
        if self.base <= 1:
            out.append(f"base={self.base} must be above 1")
        if self.dims < 0 or self.dims % 2:
            out.append(f"dims={self.dims} must be even and not negative (pairs are rotated)")
        return out


@dataclass(frozen=True)
class ValueEmbedConfig:
    """Value embeddings: `v += s_layer * s * P @ table[t]` at the listed layers; one shared table."""

    dim: int = 128  # table width
    layers: tuple[int, ...] = (9, 10)  # which layers add it, from 0

    def problems(self) -> list[str]:
        out = [] if 1 <= self.dim <= MAX_WIDTH else [f"dim={self.dim} must be in 1..{MAX_WIDTH}"]
        if not self.layers or min(self.layers) < 0:
            out.append(f"layers={self.layers} must name at least one layer, counted from 0")
        return out


@dataclass(frozen=True)
class ValueResidualConfig:
    """Mixes the first layer's values into later layers. "add": v + sigmoid(a) v0; "mix": l0 v0 + l1 v."""

    mode: str = "add"  # add or mix

    def problems(self) -> list[str]:
        return [] if self.mode in ("add", "mix") else [f"mode={self.mode!r} must be add or mix"]


@dataclass(frozen=True)
class XsaConfig:
    """Exclusive self-attention: removes from each head's output its projection on the position's own value."""

    last_n: int = 4  # the last n layers of the plan

    def problems(self) -> list[str]:
        return [] if self.last_n >= 1 else [f"last_n={self.last_n} must be at least 1 (or set the section to none)"]


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key/value heads; query head h reads h // (num_heads / num_kv_heads)
    qk_gain_init: float = 1.5  # start of the learned gain on normed queries: logits are at most gain * sqrt(head width)
    rope: RopeConfig = field(default_factory=RopeConfig)
    value_embed: ValueEmbedConfig | None = None  # site qkv
    value_residual: ValueResidualConfig | None = None  # site qkv
    xsa: XsaConfig | None = None  # inside the attention op

    def problems(self) -> list[str]:
        if self.num_heads < 1 or self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            return [f"num_heads={self.num_heads} must be a positive multiple of num_kv_heads={self.num_kv_heads}"]
        return []


@dataclass(frozen=True)
class MlpConfig:
    mult: float = 2.0  # hidden = mult * dim; swiglu: floor(2 mult dim / 3)
    hidden: int = 0  # explicit hidden width; 0 = from mult
    activation: str = "relu2"  # relu2, leaky_relu2, gelu2, silu2, swiglu, star_relu or star_relu_glu
    leaky_slope: float = 0.5  # of leaky_relu2: f(u) = (u if u >= 0 else slope u) ** 2

    def hidden_width(self, dim: int) -> int:
        if self.hidden:
            return self.hidden
        return int(2 * self.mult * dim / 3) if self.activation == "swiglu" else int(self.mult * dim)

    def problems(self) -> list[str]:
        out = []
        if self.activation not in ACTIVATION_NAMES:
            out.append(f"activation={self.activation!r} must be one of {', '.join(ACTIVATION_NAMES)}")
        if not 0 < self.mult <= MAX_MULT or not 0 <= self.hidden <= MAX_MULT * MAX_WIDTH:
            most = MAX_MULT * MAX_WIDTH
            out.append(f"mult={self.mult} must be positive, at most {MAX_MULT}; hidden={self.hidden} in 0..{most}")
        return out


@dataclass(frozen=True)
class ResidLambdaConfig:
    """Learned scalars on the residual stream: h = l0 u + a Attn, y = l1 h + b MLP."""

    init: float = 1.1**0.5  # start of both
    frozen: bool = False  # PR #1130's optimiser for them was never stepped: true reproduces that


@dataclass(frozen=True)
class BackoutConfig:
    """Subtracts `init`-initialised beta times the output of `layer` before the final norm."""

    layer: int = 7  # whose output is subtracted
    init: float = 0.1  # start of beta


@dataclass(frozen=True)
class WiringConfig:
    parallel: bool = False  # y = u + a Attn(n) + b MLP(n), n = norm(u)
    sandwich_norm: bool = False  # norm on the attention output; sequential blocks only
    ln_scale: bool = False  # both norms of block i times 1 / sqrt(i + 1)
    resid_lambdas: ResidLambdaConfig | None = None
    backout: BackoutConfig | None = None


@dataclass(frozen=True)
class InitConfig:
    kind: str = "uniform"  # hidden matrices: "uniform" (torch's Kaiming) or "orthogonal" (gain 1)
    side_scale: bool = False  # bigram / value-embedding projections times 1 / sqrt(2 L) (scripts without banks)

    def problems(self) -> list[str]:
        ok = self.kind in ("uniform", "orthogonal")
        return [] if ok else [f"kind={self.kind!r} must be uniform or orthogonal"]


@dataclass(frozen=True)
class ModelConfig:
    dim: int = 512  # width of the residual stream
    softcap: float = 30.0  # logits <- softcap * tanh(logits / softcap)
    norm_eps: float = 2.0**-23  # RMS norm; explicit, because torch's default depends on its version
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    attn: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    wiring: WiringConfig = field(default_factory=WiringConfig)
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def head_dim(self) -> int:
        return self.dim // self.attn.num_heads

    def problems(self) -> list[str]:
        out = []
        if self.attn.num_heads < 1:
            return out  # attn says so, and nothing below can be computed
        if not 2 <= self.dim <= MAX_WIDTH:
            out.append(f"dim={self.dim} must be in 2..{MAX_WIDTH}")
        if self.dim % self.attn.num_heads or self.head_dim % 2:
            out.append(f"dim={self.dim} must be an even multiple of attn.num_heads={self.attn.num_heads}")
        if self.attn.rope.dims > self.head_dim:
            out.append(f"attn.rope.dims={self.attn.rope.dims} must be at most the head width {self.head_dim}")
        if self.softcap <= 0:
            out.append(f"softcap={self.softcap} must be positive")
        layers = self.plan.num_layers
        if self.attn.xsa and self.attn.xsa.last_n > layers:
            out.append(f"attn.xsa.last_n={self.attn.xsa.last_n} must be at most plan.num_layers={layers}")
        if self.attn.value_embed and max(self.attn.value_embed.layers, default=0) >= layers:
            out.append(f"attn.value_embed.layers={self.attn.value_embed.layers} must be below plan.num_layers={layers}")
        if self.wiring.backout and not 0 <= self.wiring.backout.layer < layers:
            out.append(f"wiring.backout.layer={self.wiring.backout.layer} must be in 0..{layers - 1}")
        if self.wiring.sandwich_norm and self.wiring.parallel:
            out.append("wiring.sandwich_norm has no place in parallel blocks: set one of the two to false")
        return out


@dataclass(frozen=True)
class MileConfig:
    """Entropy-weighted cross-entropy: weight max((1 - exp(-H)) ** gamma, clamp_min), H the prediction's entropy.

    gamma rises linearly to `gamma` until progress `peak_frac`, then falls linearly to 0.
    """

    gamma: float = 0.75  # peak exponent
    clamp_min: float = 0.2  # smallest weight
    peak_frac: float = 0.4  # progress at the peak

    def problems(self) -> list[str]:
        return [] if 0 < self.peak_frac < 1 else [f"peak_frac={self.peak_frac} must lie between 0 and 1"]


@dataclass(frozen=True)
class HeadDiversityConfig:
    """coef * mean((S - I)^2), S the Gram matrix of the normalised groups of block 0's output projection."""

    coef: float = 1e-4  # weight of the term
    groups: str = "rows"  # "rows": output channels, as published; "columns": the heads themselves

    def problems(self) -> list[str]:
        ok = self.groups in ("rows", "columns")
        return [] if ok else [f"groups={self.groups!r} must be rows or columns"]


@dataclass(frozen=True)
class CoefConfig:
    """Weight of a regularising term."""

    coef: float = 1e-4  # weight of the term


@dataclass(frozen=True)
class LossConfig:
    """Training objective. Nothing here touches an evaluation: validation is always the plain cross-entropy."""

    mile: MileConfig | None = None
    head_diversity: HeadDiversityConfig | None = None
    z_loss: CoefConfig | None = None  # coef * mean(logsumexp(z)^2)
    logit_penalty: CoefConfig | None = None  # coef * mean(z^2)
    label_smooth: float = 0.0  # share of the target spread evenly over the vocabulary
    focal_gamma: float = 0.0  # mean((1 - exp(-CE))^gamma CE)

    def problems(self) -> list[str]:
        out = [] if 0 <= self.label_smooth < 1 else [f"label_smooth={self.label_smooth} must be in [0, 1)"]
        if self.focal_gamma and self.label_smooth:
            out.append("focal_gamma and label_smooth exclude each other: set one to 0")
        if self.focal_gamma and self.mile:
            out.append("focal_gamma and mile both reweight tokens: set one off")
        return out
