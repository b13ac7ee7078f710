"""Packed documents cannot see each other: each gives what it gives alone in a row, and nothing else moves it."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from helpers import KERNELS, reduced

from pgolf.data.batch import Batch
from pgolf.kernels._op import paths
from pgolf.model.config import BigramConfig, EmbedConfig, ModelConfig, SmearConfig, TrigramConfig, ValueResidualConfig
from pgolf.model.gpt import GPT
from pgolf.presets import PRESETS

VOCAB = 48
LENGTH = 24
LENGTHS = ((9, 1, 2, 12), (3, 21))  # of the documents in each of two rows; their first tokens meet every hash
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BASE = reduced(PRESETS["kitchen_sink_v2"]().model, VOCAB)
NEIGHBOURS = replace(  # everything that looks at tokens before, and the values of the first layer
    BASE,
    embed=EmbedConfig(
        vocab_size=VOCAB,
        tied=False,
        bigram=BigramConfig(rows=32, dim=8, trigram=True),
        trigram=TrigramConfig(rows=32, dim=8),
        smear=SmearConfig(),
    ),
    attn=replace(BASE.attn, value_residual=ValueResidualConfig()),
)
LINEAR_HASH = replace(BASE, embed=EmbedConfig(vocab_size=VOCAB, bigram=BigramConfig(rows=32, dim=8, hash="mul1009")))
MODELS = {name: reduced(build().model, VOCAB) for name, build in PRESETS.items()}
MODELS |= {"all neighbours": NEIGHBOURS, "mul1009": LINEAR_HASH}


def awake(cfg: ModelConfig) -> GPT:
    """A model in which nothing is zero."""
    model = GPT(cfg, train_length=LENGTH).init_weights(0)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=gen))
    return model.to(DEVICE)


def spans() -> list[tuple[int, int, int]]:
    """(row, start, end) of each document."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [(row, end - n, end) for n, end in zip(lengths, ends, strict=True)]
    return found


def packed(padding: int = 0, seed: int = 0) -> Batch:
    """Two rows of documents, positions counted in each, cu_seqlens filled up with `padding` empty documents."""
    gen = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(0, VOCAB, (2, 2, LENGTH), generator=gen).unbind()
    positions = torch.cat([torch.arange(n) for lengths in LENGTHS for n in lengths]).view(2, LENGTH)
    ends = torch.tensor([0, *(row * LENGTH + end for row, _, end in spans()), *[2 * LENGTH] * padding])
    return Batch(ids, targets, positions, ends.int()).to(DEVICE)


def alone(b: Batch, row: int, start: int, end: int) -> Batch:
    """One document in a row of its own."""
    return Batch(b.ids[row : row + 1, start:end], b.targets[row : row + 1, start:end])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_packed_document_scores_as_if_alone(name):
    model, b = awake(MODELS[name]), packed(padding=3)
    nats = model(b)[0]
    whole = model(replace(b, cu_seqlens=None))[0]
    for row, start, end in spans():
        want = model(alone(b, row, start, end))[0][0]
        torch.testing.assert_close(nats[row, start:end], want, rtol=0, atol=1e-5)
        assert start == 0 or (whole[row, start:end] - want).abs().max() > 1e-3  # there is something to leak


@torch.no_grad()
def test_the_front_s_kernel_scores_the_same(kernels_on):
    model, b = awake(NEIGHBOURS), packed(padding=3)
    with paths(**dict.fromkeys(KERNELS, "reference")):
        want = model(b)[0]
        with paths(bigram="triton"):
            torch.testing.assert_close(model(b)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", range(6))
@torch.no_grad()
def test_another_document_moves_no_bit(changed):
    model, b = awake(NEIGHBOURS), packed()
    before = model(b)[0]
    row, start, end = spans()[changed]
    b.ids[row, start:end] = (b.ids[row, start:end] + 1) % VOCAB
    same = model(b)[0] == before
    assert not same[row, start:end].any()
    same[row, start:end] = True
    assert same.all()


def test_gradients_are_the_sum_of_the_documents():
    model, b = awake(NEIGHBOURS), packed()
    model(b)[0].sum().backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    sum(model(alone(b, *span))[0].sum() for span in spans()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_empty_documents_at_the_end_change_nothing_and_one_length_compiles_once():
    model = awake(NEIGHBOURS)
    torch._dynamo.reset()
    compiles = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda b: model(b)[0], backend=compiles, fullgraph=True, dynamic=False)
    for padding, merged in ((1, 0), (2, 1), (3, 2)):  # fewer documents, more padding, one length
        b = packed(padding, seed=padding)
        starts = b.cu_seqlens.tolist()
        del starts[1 : 1 + merged]
        b.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        assert len(starts) == 8
        nats = compiled(b)
        short = replace(b, cu_seqlens=b.cu_seqlens[: 7 - merged])
        assert torch.equal(model(b)[0], model(short)[0])
        torch.testing.assert_close(nats, model(b)[0], rtol=0, atol=1e-5)
    assert compiles.frame_count == 1


def test_calibration_counts_the_rows_that_documents_take():
    model, b = awake(NEIGHBOURS), packed()
    got = [rows for _, rows in model.embed.table_rows(b.ids, b.cu_seqlens)]
    assert len(got) == 3
    for row, start, end in spans():
        want = [rows for _, rows in model.embed.table_rows(alone(b, row, start, end).ids)]
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g[row, start:end], w[0])
