"""Small models and streams for test-time training."""

import copy

import numpy as np
import torch

from pgolf.dist import Dist
from pgolf.eval.base import evaluate
from pgolf.eval.neural import Neural
from pgolf.eval.stats import Collector
from pgolf.model.config import AttentionConfig, BigramConfig, EmbedConfig, InitConfig, ModelConfig, PlanConfig
from pgolf.model.gpt import GPT

VOCAB, WIDTH = 64, 16
CFG = ModelConfig(
    dim=16,
    embed=EmbedConfig(vocab_size=VOCAB, bigram=BigramConfig(rows=32, dim=4)),
    plan=PlanConfig(num_layers=2),
    attn=AttentionConfig(num_heads=2, num_kv_heads=1),
    init=InitConfig(kind="orthogonal"),
)


def small_model(seed=1, cfg=CFG, **kw):
    """A model whose every weight is awake: no zero that a gradient could hide behind."""
    model = GPT(cfg, train_length=WIDTH, **kw).init_weights(seed)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=gen))
    return model


def random_stream(n, seed=0, documents=()):
    """n tokens, BOS (1) at 0 and at `documents` and nowhere else."""
    tokens = np.random.default_rng(seed).integers(2, VOCAB, n)
    tokens[[0, *documents]] = 1
    return tokens.astype(np.uint16)


def changed_behind(tokens, t):
    """Other tokens from t + 1 on, BOS among them: targets up to t - 1 and the inputs of target t are the same."""
    out = tokens.copy()
    out[t + 2 :] = np.random.default_rng(9).integers(1, 8, len(out) - t - 2)
    return out


def byte_counts(ids, targets):
    return (targets % 4) + (targets != 1)


def run(evaluator, tokens, model=None, dist=None, **kw):
    """(EvalResult, nats (T,) of this rank's targets) with a model of its own, which must come out as it went in."""
    model = copy.deepcopy(model) if model is not None else small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    stats = Collector(len(tokens) - 1)
    try:
        result = evaluate(evaluator, Neural(model), tokens, byte_counts, dist or Dist(), readers=[stats], **kw)
    finally:
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        assert asked == [p.requires_grad for p in model.parameters()]
    return result, stats.nats
