"""Layer-wise pruning of large language models with ADMM: no training, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5    # the paper's method
    python admm_prune.py --model Qwen/Qwen3-8B --sparsity 0.6 --block-aware
    # Offline, with a small model from a package and the text of Python's help:
    python admm_prune.py --model smollm2 --calibration help --nsamples 3 --seqlen 512

For each linear layer with weight W and calibration inputs X, we look for a sparse W' that minimises

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X.

The default is the algorithm of "Fast and Effective Weight Update for Pruned Large Language Models"
(Vladimír Boža, TMLR 2024, arXiv 2401.02938), which the paper calls ADMM-Grad. `--block-aware` is
our extension, for any method. Its section can be skipped on a first reading.

The file is meant to be read from top to bottom. The solver comes first; it needs torch alone and is
made to be copied. Then come the baselines, and `prune_model`, which loops over the decoder blocks.
Then come block-aware pruning, and the machinery: how the inputs of layers are recorded, blocks
called one by one, the calibration text and the command line. eval_ppl.py measures perplexity; both
programs load models and texts with its functions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import eval_ppl

# ------------------------------------------------------------------------------------- solver


@torch.no_grad()
def prune_weight(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None, *,
    mask: Tensor | None = None, damping: float = 0.1, rho: float = 1.0, growing_steps: int = 15,
    frozen_steps: int = 5,
) -> Tensor:  # fmt: skip
    """Return a weight pruned with ADMM and gradual mask selection (paper, sections 3 and 4).

    The default hyperparameters are those of the paper.

    Args:
        weight: W, (out_features, in_features), any float dtype.
        gram: G = X^T X over all calibration tokens, (in_features, in_features).
        sparsity: share of zeros in the whole matrix, from 0 to below 1.
        pattern: (N, M) keeps N of every M consecutive entries of a row. It overrides `sparsity`.
        mask: (out_features, in_features) bool on the device of `weight`, True where an entry is
            kept. It overrides both, and all steps then only optimise the values of these entries.
        damping: this share of the mean diagonal of the scaled Gram matrix is added to its diagonal;
            at least 0.
        rho: ADMM's penalty, for features that are scaled to norm 1; above 0.
        growing_steps: steps in which the share of zeros grows to its final value; at least 1.
        frozen_steps: last steps, in which the mask stays the same.

    Returns: the pruned weight, in the shape and dtype of `weight`.
    Raises: ValueError if an argument is invalid.
    """
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"gram is {tuple(gram.shape)}, but in_features is {weight.shape[1]}")
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"mask is {tuple(mask.shape)}, but weight is {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight must be of a float dtype, got {weight.dtype}")
    if rho <= 0 or growing_steps <= 0 or damping < 0 or frozen_steps < 0:
        raise ValueError("rho and growing_steps must be > 0, damping and frozen_steps >= 0")
    gram = gram.float()
    # ADMM has two copies of W0, the scaled weight: V reconstructs the outputs, and Z has the zeros.
    # U, the scaled dual variable, is the sum of V - Z over the steps so far.
    #
    # Feature j is divided by its norm d_j, so that one rho suits all features, and column j of W is
    # multiplied by it. The first mask thus ranks |W_ij| d_j.
    d = feature_norms(gram)  # (in,)
    A_rho = (gram / d).div_(d[:, None])  # (in, in)
    A_rho.diagonal().add_(damping * A_rho.diagonal().mean())  # A, the scaled and damped Gram matrix
    A_rho.diagonal().add_(rho)  # A + rho I
    L = torch.linalg.cholesky(A_rho)  # A + rho I = L L^T
    del A_rho  # frees memory, as much as G has
    # The paper has V = (W0 A + rho (Z - U)) (A + rho I)^-1. With W0 A = W0 (A + rho I) - rho W0,
    # this is V = W0 + (Z - U - W0) R.
    R = torch.cholesky_inverse(L).mul_(rho)  # rho (A + rho I)^-1
    del L
    W0 = weight.float() * d  # (out, in)

    # Each step computes
    # Z, the matrix with the required zeros that is nearest to Y = V + U;
    # U = Y - Z, which is 0 where an entry is kept, and else pushes V to 0, harder with each step;
    # V, which minimises tr((V - W0) A (V - W0)^T) + rho ||V - Z + U||^2.
    V = W0
    U = torch.zeros_like(W0)
    kept = mask
    for step in range(1, growing_steps + frozen_steps + 1):
        Y = U.add_(V)  # in place, as `sub_` below, since a new matrix would take memory
        if mask is None and step <= growing_steps:
            progress = 1 - (1 - step / growing_steps) ** 3  # paper, section 4
            kept = select_mask(Y, sparsity, pattern, progress)
        Z = torch.where(kept, Y, 0)
        U = Y.sub_(Z)
        # On a GPU, TF32 rounds both factors to 11 bits. Emulated on a CPU, this changes the error
        # of a layer by less than 0.5 %. For a torch before 2.9, leave out the `with`.
        with torch.backends.flags(fp32_precision="tf32"):
            V = W0 + (Z - U - W0) @ R
    return (torch.where(kept, V, 0) / d).to(weight.dtype)


def feature_norms(gram: Tensor) -> Tensor:
    """Return the norms of the input features, (in_features,), each at least 3 % of their mean.

    The paper has no such floor. Without it, features that are almost never active could get huge
    weights: N:M has to keep N of each M, and the pruned weight is divided by these norms.
    """
    norms = gram.diagonal().sqrt()
    return norms.clamp(min=0.03 * float(norms.mean()) + 1e-12)  # 1e-12: all of them may be 0


def select_mask(
    values: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None,
    progress: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return a mask, (out, in) bool, that is True where an entry of `values` is kept.

    The mask is False at the round(sparsity * numel) smallest magnitudes of the whole matrix, not of
    each row. With a pattern (N, M), which overrides `sparsity`, it is False at all entries but the
    N largest of each group of M. With a `progress` below 1, it is False only at this share of them,
    which are the smallest ones of the whole matrix.

    Raises: ValueError if sparsity or pattern is invalid.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    scores = values.abs()
    if pattern is not None:
        N, M = pattern
        if not 0 < N <= M:
            raise ValueError(f"pattern must be (N, M) with 0 < N <= M, got {pattern}")
        if scores.shape[1] % M:
            raise ValueError(f"in_features={scores.shape[1]} is not divisible by {M=}")
        sparsity = 1 - N / M
        groups = scores.unflatten(1, (-1, M))  # (out, in / M, M)
        # With infinity as their scores, the N largest of each group are not among the smallest.
        scores = groups.scatter(2, groups.argsort(descending=True)[..., :N], torch.inf)
    zeros = round(progress * sparsity * scores.numel())
    smallest = scores.flatten().topk(zeros, largest=False, sorted=False).indices
    mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    mask[smallest] = False
    return mask.view(values.shape)


# -------------------------------------------------------------------------- baselines and error


@torch.no_grad()
def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None
) -> Tensor:
    """Return a weight pruned with SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

    As in the released code, 1 % of the mean diagonal is added to the diagonal of the Gram matrix,
    the mask is selected for 128 columns at a time, or for one group of a pattern, and features that
    were never active lose all their weights, even beyond the sparsity asked for.
    """
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"gram is {tuple(gram.shape)}, but in_features is {weight.shape[1]}")
    select_mask(weight[:1], sparsity, pattern)  # raises a ValueError, with the true in_features
    W = weight.float().clone()  # (out, in)
    diagonal = gram.float().diagonal()
    W[:, diagonal == 0] = 0
    H = gram.float().diagonal_scatter(diagonal + (0.01 * diagonal.mean() + 1e-12))  # (in, in)
    # Columns are pruned from left to right, and those further right make up for each error. With
    # the upper triangular factor C of H^-1 = C^T C, the inverse of H[j:, j:] is C[j:, j:]^T
    # C[j:, j:]. Removing an entry w of column j thus costs (w / C_jj)^2, and changes the columns
    # from j on by -(w / C_jj) C[j, j:] (their equation 3).
    C = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    width = pattern[1] if pattern else 128
    for start in range(0, W.shape[1], width):
        end = start + width
        columns = W[:, start:end]  # a view
        corner = C[start:end, start:end]
        mask = select_mask(columns / corner.diagonal(), sparsity, pattern)
        errors = torch.zeros_like(columns)  # w / C_jj
        for j in range(columns.shape[1]):
            errors[:, j] = (columns[:, j] * ~mask[:, j]) / corner[j, j]
            columns[:, j:] -= errors[:, j, None] * corner[j, j:]
        columns *= mask  # rounding may have left tiny values
        W[:, end:] -= errors @ C[start:end, end:]  # one product for all errors is faster
    return W.to(weight.dtype)


@torch.no_grad()
def wanda(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None
) -> Tensor:
    """Keep the largest |W| ||x|| of each row, or of each group of a pattern.

    ||x|| is the norm of an input feature (Sun et al., ICLR 2024, arXiv 2306.11695).
    """
    if gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"gram is {tuple(gram.shape)}, but in_features is {weight.shape[1]}")
    if pattern is None:
        # Each row is one group, of which at least one entry is kept.
        pattern = (max(weight.shape[1] - round(sparsity * weight.shape[1]), 1), weight.shape[1])
    scores = weight.float() * gram.diagonal().float().sqrt()
    return torch.where(select_mask(scores, sparsity, pattern), weight, 0)


@torch.no_grad()
def magnitude(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None
) -> Tensor:
    """Keep the largest |W| of the whole matrix, or of each group of a pattern."""
    return torch.where(select_mask(weight, sparsity, pattern), weight, 0)


METHODS = {
    "admm-grad": prune_weight,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "magnitude": magnitude,
}


def measure_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Return ||X W^T - X W'^T||^2 / ||X W^T||^2 with `weight` W, `pruned` W' and `gram` X^T X."""
    W = weight.float()
    delta = W - pruned.float()
    lost = ((delta @ gram.float()) * delta).sum()
    return float(lost / ((W @ gram.float()) * W).sum().clamp(min=1e-30))


# ------------------------------------------------------------------------------ pruning a model


def leave_routers_dense(index: int, name: str) -> dict | None:
    """Return None for the routers of mixtures of experts, which leaves them dense, else {}.

    Routers are small and choose the experts.
    """
    routers = {"router", "gate", "shared_expert_gate", "router_gate"}
    return {} if routers.isdisjoint(name.split(".")) else None


# The caller may have enabled autocast to 16 bits, or inference mode, which permits no gradients.
@torch.inference_mode(False)
@torch.no_grad()
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def prune_model(
    model: transformers.PreTrainedModel, tokens: Tensor, prune: Callable[..., Tensor],
    sparsity: float | None = None, *, block_aware: bool = False,
    device: torch.device | str | None = None,
    options: Callable[[int, str], dict | None] = leave_routers_dense,
) -> list[dict]:  # fmt: skip
    """Prune the linear layers inside the decoder blocks of a causal LM, in place.

        prune_model(model, tokens, sparsegpt, sparsity=0.6)

    By default, all layers of a block are pruned for the inputs that they have while the block is
    dense and the blocks before it are pruned.

    These stay dense: layers that `options` leaves dense, experts that no token reaches, and weights
    that are sliced, or used in other ways than X W^T, such as those of convolutions.

    Args:
        model: a Hugging Face decoder-only model. It is moved to the host, set to evaluation mode,
            and switched to eager experts. After an exception it may be pruned in part.
        tokens: calibration tokens, (sequences, seqlen) int64.
        prune: the method, one of this file or your own. prune(weight, gram) gets a weight,
            (out_features, in_features), and the Gram matrix of its inputs, (in_features,
            in_features), both float32, and returns the pruned weight. It must not change the Gram
            matrix in place, since the error is measured with it.
        sparsity: share of zeros, handed to `prune` for each layer. With `block_aware`, it is that
            of each block, whose layers get different shares (`divide_zeros`). A "sparsity" from
            `options` takes precedence. Default: `prune` is called without it.
        block_aware: whether to prune with our extension, `prune_block_aware`.
        device: where to compute; the blocks visit it in turn. Default: CUDA if there is a GPU.
        options: gets the number of a block and the name of a layer in it, such as "mlp.down_proj".
            It returns further keyword arguments of `prune`, such as {"sparsity": 0.7}, or None to
            leave the layer dense. Yours replaces the default, which leaves routers dense.

    Returns: a list with a dict for each pruned layer: the number of the "block", the "name" of the
        layer in it, its "shape", (out_features, in_features), its "sparsity" (share of zeros), its
        "error" (`measure_error`, from the dense weight), and "num_tokens" that reached it.
    Raises: ValueError if the model or an argument does not fit, or if a layer cannot be pruned.
        Errors of a method pass through, with notes that name the block and the layer.
    """
    check_prunable(model, tokens)
    if sparsity is not None:
        prune = partial(prune, sparsity=sparsity)
    device = eval_ppl.select_device(device)
    model.cpu().eval()
    # The inputs of experts cannot be recorded inside fused kernels.
    model.set_experts_implementation("eager")
    # A `BlockCall` calls a block by itself. The check compares this with the model's own forward.
    calls = record_and_check_calls(model, tokens, device)
    # Hidden states of each sequence before the current block, in the pruned and the dense model.
    states = states_before_blocks(model, tokens, device)
    dense_states = states if block_aware else None
    results = []
    for call in tqdm(calls, "pruning blocks"):
        with eval_ppl.annotate_errors(f"while pruning block {call.index}"):
            call.block.to(device)  # not with `moved`, which would undo the pruning
            if block_aware:
                block_results, dense_states = prune_block_aware(
                    call, states, dense_states, prune, options, sparsity
                )
            else:
                layers = collect_layers(call, states)
                block_results = prune_layers(call.index, layers, prune, options)
            results += block_results
            states = [call(before).to(before.device) for before in states]  # with pruned weights
            call.block.cpu()
    if not results:
        raise ValueError(f"no layer of {type(model).__name__} was pruned")
    return results


class Layer:
    """A linear layer, or one matrix of an expert, with sums over its calibration tokens."""

    def __init__(self, weight: Tensor):
        in_features = weight.shape[1]
        self.weight = weight  # W, a view of the weight in the model, (out_features, in_features)
        self.num_tokens = 0
        self.gram = weight.new_zeros(in_features, in_features, dtype=torch.float32)  # X^T X

    def add(self, X: Tensor) -> None:
        """Add inputs X, (tokens, in_features) float32, to the sums."""
        self.num_tokens += len(X)
        # TF32 is exact for inputs that the model computed in 16 bits; others are rounded.
        with torch.backends.flags(fp32_precision="tf32"):
            self.gram.addmm_(X.T, X)


def collect_layers(
    call: BlockCall, states: list[Tensor], leave_out: str | None = None
) -> dict[str, Layer]:
    """Return the layers of a block by name, with their sums over all sequences.

    `states` are the hidden states of each sequence before the block. `leave_out`, unless it is
    None, is the name of a layer to skip.
    """
    layers = {}
    for before in states:
        _, products = call.record(before)  # a `Product` by name of layer
        products.pop(leave_out, None)
        for name in list(products):
            if name not in layers:
                layers[name] = Layer(products[name].weight)
            layers[name].add(products.pop(name).X)  # `pop`, so that X is freed
    return layers


def prune_layers(
    index: int, layers: dict[str, Layer], prune: Callable, options: Callable,
    sparsities: Mapping[str, float] = {}, row_scales: Mapping[str, Tensor] = {},
) -> list[dict]:  # fmt: skip
    """Prune layers of block `index` in place, one after the other, and return their results.

    `layers` is emptied, so that the sums of a layer are freed before the next one is pruned.

    The last two arguments, by name of layer, are for block-aware pruning. `row_scales`,
    (out_features, 1), multiply the rows of the weight that `prune` gets, and divide its result.
    """
    results = []
    for name in list(layers):
        layer = layers.pop(name)
        arguments = options(index, name)
        if arguments is None:  # stays dense
            continue
        if name in sparsities:
            arguments = {"sparsity": sparsities[name]} | arguments
        with eval_ppl.annotate_errors(f"layer {name}"):
            result = prune_layer(layer, partial(prune, **arguments), row_scales.get(name, 1.0))
        results.append({"block": index, "name": name} | result)
    return results


def prune_layer(layer: Layer, prune: Callable, row_scales: Tensor | float) -> dict:
    """Prune a layer in place. Return its result, but for the block and the name."""
    if not layer.gram.isfinite().all():
        raise ValueError("the inputs are NaN or infinite")
    # A copy, which the method may change, and contiguous, since GPT-2 has its weights transposed.
    weight = layer.weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    weight *= row_scales
    pruned = prune(weight, layer.gram)
    if pruned.shape != layer.weight.shape or not pruned.is_floating_point():
        raise ValueError(
            f"the method returned {tuple(pruned.shape)} {pruned.dtype}, "
            f"but the weight is {tuple(layer.weight.shape)} torch.float32"
        )
    pruned = (pruned / row_scales).to(layer.weight.dtype)
    if not pruned.isfinite().all():
        raise ValueError(f"the pruned weights are NaN or overflow {pruned.dtype}")
    error = measure_error(layer.weight, pruned, layer.gram)
    layer.weight.copy_(pruned)
    return {
        "shape": tuple(pruned.shape),
        "sparsity": int((pruned == 0).sum()) / pruned.numel(),
        "error": error,
        "num_tokens": layer.num_tokens,
    }


# --------------------------------------------------------------------------- block-aware pruning


def prune_block_aware(
    call: BlockCall, states: list[Tensor], dense_states: list[Tensor], prune: Callable,
    options: Callable, sparsity: float | None,
) -> tuple[list[dict], list[Tensor]]:  # fmt: skip
    """Prune the layers of a block so that the hidden states after it change little.

    First, the zeros are divided among the layers (`divide_zeros`), unless `sparsity` is None.

    The *closing layer* of a block is the layer whose output the block adds, unchanged, to the
    hidden states at its end, "mlp.down_proj" in a LLaMA. The other layers are pruned first, each
    row scaled by how far it moves the hidden states after the block (`probe_block`). The hidden
    states then differ from those of the dense model. The closing layer is corrected for this
    difference (`correct_weight`), and pruned.

    There is no closing layer if a norm or a multiplier follows the last layer, as in Gemma 3, or if
    stacked experts alone close the block, as in Mixtral. DeepSeek-V3 has one, in its shared expert.
    Stacked experts have the sparsity of the block, and no row scales.

    `states` and `dense_states` are the hidden states of each sequence before the block, in the
    model that is being pruned and in the dense model. Return the results of `prune_layers`, and the
    hidden states of the dense model after the block.
    """
    with eval_ppl.annotate_errors("in the probe, a backward pass through the block"):
        row_scales, scores, closing_name = probe_block(call, dense_states)
    scores = {name: x for name, x in scores.items() if options(call.index, name) is not None}
    sparsities = {}
    if sparsity is not None and scores:
        sparsities = divide_zeros(scores, sparsity)
    del scores  # frees memory, as much as the block has in float32
    dense_after = [call(before).to(before.device) for before in dense_states]
    layers = collect_layers(call, states, leave_out=closing_name)
    results = prune_layers(call.index, layers, prune, options, sparsities, row_scales)
    if closing_name is not None and options(call.index, closing_name) is not None:
        closing_layer, EtX = collect_closing_layer(call, closing_name, states, dense_after)

        def prune_corrected(weight, gram, **arguments):
            return prune(correct_weight(weight, gram, EtX), gram, **arguments)

        layers = {closing_name: closing_layer}
        results += prune_layers(call.index, layers, prune_corrected, options, sparsities)
    return results, dense_after


def divide_zeros(scores: dict[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return a sparsity for each layer of a block, such that the block has `sparsity`.

    All entries of the layers are ranked together by their `scores` (`probe_block`). The smallest
    ones, a share of `sparsity`, would be zero if the layers had one threshold. Each layer goes half
    of the way from `sparsity` to its share of these zeros.
    """
    # A sample of at most 16 million entries is enough, and takes little memory. Its step is odd, so
    # that it does not fall on the same columns in each row.
    step = (1 + sum(x.numel() for x in scores.values()) // 2**24) | 1
    samples = [x.flatten()[::step] for x in scores.values()]
    mask = select_mask(torch.cat(samples), sparsity)
    parts = mask.split([len(sample) for sample in samples])
    return {
        name: (sparsity + int((~part).sum()) / len(part)) / 2
        for name, part in zip(scores, parts, strict=True)
    }


def collect_closing_layer(
    call: BlockCall, name: str, states: list[Tensor], dense_after: list[Tensor]
) -> tuple[Layer, Tensor]:
    """Return the closing layer of a block with its sums, and E^T X, (out_features, in_features).

    E is the difference of the hidden states after the block, dense model minus pruned model, and
    E^T X, float32, is summed over all sequences. The closing layer is still dense.
    """
    layer = None
    for before, target in zip(states, dense_after, strict=True):
        after, products = call.record(before)
        product = products.pop(name)
        products.clear()  # frees the inputs of the other layers
        if layer is None:
            layer = Layer(product.weight)
            EtX = torch.zeros_like(product.weight, dtype=torch.float32)
        layer.add(product.X)
        E = (target.to(after.device).float() - after.float()).flatten(0, -2)
        with torch.backends.flags(fp32_precision="tf32"):
            EtX.addmm_(E.T, product.X)
    return layer, EtX


@torch.no_grad()
def correct_weight(weight: Tensor, gram: Tensor, EtX: Tensor) -> Tensor:
    """Return W corrected so that its output X W^T partly offsets an error E.

    E, (tokens, out_features), is what each output lacks. A ridge regression of E on X is added:

        W + E^T X (G + diag(d^2))^-1

    Since d are the norms of the features (`feature_norms`), the ridge is as large as the diagonal
    of G itself. With a tenth of this ridge, SmolLM2's WikiText-2 perplexity at 60 % zeros in each
    layer was 44.5 instead of 42.2. QEP (Arai and Ichikawa, NeurIPS 2025, arXiv 2504.09629) and
    GPTAQ (Li et al., ICML 2025) correct all layers by such a formula before quantisation, each for
    the error of its own output.

    `weight` W and `EtX` E^T X are (out_features, in_features), and `gram` is G = X^T X, in float32.
    """
    d = feature_norms(gram)
    L = torch.linalg.cholesky(gram.diagonal_scatter(gram.diagonal() + d**2))  # of G + diag(d^2)
    return weight + torch.cholesky_solve(EtX.T, L).T


def probe_block(
    call: BlockCall, dense_states: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], str | None]:
    """Return row scales and scores of the layers of a dense block, and its closing layer's name.

    The probe is a backward pass through the block, for the first 8 of `dense_states`, the hidden
    states of the dense model before the block. In place of the gradient of a loss, it starts from
    random signs z_k, 1 or -1, one at each entry h_k of the hidden states after the block.

    The row scales r, (out_features, 1), say how far an error at an output of a layer moves the
    hidden states after the block:

        r_i = sqrt(s_i + mean(s)),

    where g is the gradient at output i, and s_i is the sum of g^2 over all tokens. For an output y,
    the expected value of g^2 is sum_k (dh_k/dy)^2 (Hutchinson, 1990). The mean, over the outputs of
    the layer, keeps r above 0. Perplexities are similar without it.

    A method gets r W in place of W, and its result is divided by r. So rows that matter more keep
    more entries, if the method ranks entries of different rows together. With a pattern, all rows
    keep equally many, and r only changes the order in which ADMM prunes entries.

    The scores, (out_features, in_features), say how far the removal of an entry moves the hidden
    states: |W_ij| r_i ||x_j||. Here ||x_j|| is the norm of input j, up to a common factor.

    The closing layer is the last layer, in the order of calls, whose gradient equals the signs: a
    sum passes gradients on unchanged. The name is None if no layer qualifies.
    """
    gradient_squares = defaultdict(float)  # name -> s, (out_features,)
    input_squares = defaultdict(float)  # name -> sum of the sequences' mean squares, (in_features,)
    weights = {}
    closing_name = None
    # The signs differ between sequences, not between blocks. They are drawn on the host, so that a
    # GPU gets the same ones.
    generator = torch.Generator().manual_seed(0)
    for dense_state in dense_states[:8]:
        before = dense_state.detach().requires_grad_()
        with torch.enable_grad():
            after, products = call.record(before)
        for name in products:
            weights[name] = products[name].weight
            input_squares[name] += products[name].X.square().mean(0)
        # An edge stands for the output of a layer, which the block may change in place.
        edges = {name: p.edge for name, p in products.items() if p.edge is not None}
        products.clear()  # frees the copies of all X before the backward pass
        bits = torch.randint(2, after.shape, generator=generator, dtype=torch.int8, device="cpu")
        signs = 2 * bits.to(after) - 1
        # A block of only experts has no edges. Autograd refuses an empty list, hence `before`.
        gradients = torch.autograd.grad(after, [*edges.values(), before], signs, allow_unused=True)
        for name, gradient in zip(edges, gradients[:-1], strict=True):
            if gradient is not None:  # None: the output is not used
                g = gradient.float().flatten(0, -2)  # (tokens, out_features)
                gradient_squares[name] += g.square().sum(0)
                if torch.equal(g, signs[0].float()):  # the block adds this output as it is
                    closing_name = name  # the last such layer stays
    row_scales = {
        name: (s + s.mean()).sqrt()[:, None]
        for name, s in gradient_squares.items()
        if s.any()  # not so if a layer moves nothing, such as Doge's dt_proj before training
    }
    scores = {
        name: weights[name].float().abs() * r * input_squares[name].sqrt()
        for name, r in row_scales.items()
    }
    return row_scales, scores, closing_name


# -------------------------------------------------------------------------- inputs of the layers


@dataclass
class Product:
    """A product X W^T within a block."""

    weight: Tensor  # W, a view of the weight in the model, (out_features, in_features)
    X: Tensor  # (tokens, in_features) float32; a copy, since the block may change it in place
    edge: torch.autograd.graph.GradientEdge | None  # None without gradients, and for experts


def identity_of(weight: Tensor) -> tuple[int, int]:
    """Return what identifies a weight: its address and its number of entries.

    W.T is a new tensor with the same two. A slice such as W[:10] has fewer entries.
    """
    return weight.data_ptr(), weight.numel()


class ProductRecorder(torch.overrides.TorchFunctionMode):
    """While entered, records the products with the weights of a block by name, in order of calls.

    Weights are those of linear modules and of experts: transformers stacks the experts of a mixture
    in one parameter, (experts, ..., ...), whose products hooks would not see. PyTorch calls
    `__torch_function__` in place of each function of torch, such as `linear`, but not in place of
    those that such a function calls in turn. Products with parts of a weight are not recorded.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.products: dict[str, Product] = {}
        self.linear_names = {
            identity_of(module.weight): name
            for name, module in block.named_modules()
            # Conv1D is the linear layer of GPT-2. A weight that a module computes anew in each
            # forward is not a parameter.
            if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))
            and isinstance(module.weight, nn.Parameter)
        }
        experts = {
            identity_of(expert): f"{name}.{index}"
            for name, parameter in block.named_parameters()
            # By this heuristic, a parameter of three dimensions, none of them 1, is a stack of
            # experts. Mamba's convolution, (channels, 1, width), would be thousands of them.
            if parameter.ndim == 3 and min(parameter.shape) > 1
            for index, expert in enumerate(parameter)
        }
        self.names = self.linear_names | experts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        # x @ w, x.matmul(w) and torch.matmul(x, w) have the same __name__. Factors that are keyword
        # arguments are not seen.
        match function.__name__, args:
            case "linear", (x, W, *_):
                self.add(x, W, output)
            # Before x, addmm has the bias. `mT` needs two dimensions.
            case "addmm" | "mm" | "bmm" | "matmul", (*_, x, WT) if WT.ndim > 1:
                self.add(x, WT.mT, output)
        return output

    def add(self, x: Tensor, W: Tensor, output: Tensor) -> None:
        """Add the product x W^T = output, if W, (out_features, in_features), is a weight.

        x is (..., in_features). Llama 4 multiplies all its experts at once: then x is (experts,
        tokens, in_features), where a row is 0 if the token goes elsewhere, and W is a stack,
        (experts, out_features, in_features). Stacks that are multiplied in other shapes stay dense.
        """
        if x.numel() == 0:  # an expert may have no tokens
            return
        identity = identity_of(W)
        if W.ndim == x.ndim == 3 and len(W) == len(x) and identity_of(W[0]) in self.names:
            for rows, expert in zip(x, W, strict=True):
                self.add(rows[rows.any(-1)], expert, output)
        elif W.ndim == 2 and identity in self.names:
            name = self.names[identity]
            if name in self.products:
                raise ValueError(f"a block cannot be pruned if it calls {name} more than once")
            X = x.detach().reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
            has_edge = output.requires_grad and identity in self.linear_names
            edge = torch.autograd.graph.get_gradient_edge(output) if has_edge else None
            self.products[name] = Product(W, X, edge)


# ---------------------------------------------------------------------------- calls of the blocks


@dataclass
class BlockCall:
    """A decoder block, and what the model hands to it besides the hidden states, such as masks.

    The arguments of the first sequence serve for all, which `record_and_check_calls` checks.
    """

    index: int  # of the block
    block: nn.Module
    args: tuple  # positional arguments after the hidden states
    kwargs: dict

    def __call__(self, before: Tensor) -> Tensor:
        """Return the hidden states of one sequence after the block, on the device of the block.

        `before` are those before it, (1, seqlen, hidden_size), on any device.
        """
        # A copy, since a block may change its input in place.
        hidden = before.to(next(self.block.parameters()).device, copy=True)
        return states_of(self.block(hidden, *self.args, **self.kwargs))

    def record(self, before: Tensor) -> tuple[Tensor, dict[str, Product]]:
        """Return the hidden states after the block, and its products by name of layer."""
        with ProductRecorder(self.block) as recorder:
            return self(before), recorder.products


def states_of(output: Tensor | tuple) -> Tensor:
    """Return the hidden states in the output of a block."""
    return output if isinstance(output, Tensor) else output[0]


def check_prunable(model: transformers.PreTrainedModel, tokens: Tensor) -> None:
    """Raise a ValueError if `prune_model` cannot take the model or the tokens."""
    if model.config.is_encoder_decoder:
        raise ValueError("the model has an encoder: take a decoder-only model")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model has quantised weights: load its full weights")
    if any(hasattr(module, "base_layer") for module in model.modules()):  # as peft wraps a layer
        raise ValueError("the model has adapters, such as LoRA: merge them into its weights")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError("the model lies on several devices: load it without device_map")
    uses = Counter(tensor.data_ptr() for tensor in model.state_dict().values())
    if any(uses[p.data_ptr()] > 1 for p in eval_ppl.find_blocks(model).parameters() if p.ndim > 1):
        raise ValueError(
            "the model uses a weight of a block in several places: give each place its own"
        )
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"tokens must be (sequences, seqlen), not empty, got {tuple(tokens.shape)}"
        )
    eval_ppl.check_fits(model.config, tokens.shape[1], int(tokens.max()))


class StopForward(Exception):
    """Ends the forward of a model before its first block."""


def states_before_blocks(
    model: transformers.PreTrainedModel, tokens: Tensor, device: torch.device
) -> list[Tensor]:
    """Return the hidden states of each sequence before block 0, on the device or on the host."""
    states = []
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0  # bytes
    # Block-aware pruning has three sets of hidden states at once. They stay on a GPU if they fit in
    # a third of its free memory; the rest is for a block and its solver.
    room_for_a_set = free / 9

    def stop(block, args):
        on_device = len(tokens) * args[0].nbytes <= room_for_a_set
        states.append(args[0] if on_device else args[0].cpu())
        raise StopForward

    with (
        eval_ppl.annotate_errors("while computing the hidden states before block 0"),
        # This hook comes before that of `offload_blocks`, which would move block 0 to the device.
        eval_ppl.find_blocks(model)[0].register_forward_pre_hook(stop),
        eval_ppl.offload_blocks(model, device),
    ):
        for ids in tokens.split(1):
            with suppress(StopForward):
                model(ids.to(device), use_cache=False)
    return states


def record_calls(
    model: transformers.PreTrainedModel, ids: Tensor, device: torch.device
) -> tuple[list[BlockCall], list[Tensor]]:
    """Return the calls of all blocks for one sequence, (1, seqlen), in the model's own forward.

    Also return the model's own hidden states: before block 0, after block 0, after block 1, ...
    Raise a ValueError unless the model calls its blocks one after the other.
    """
    blocks = list(eval_ppl.find_blocks(model))
    calls = []
    states_by_block = states_before_blocks(model, ids, device)  # so far, those before block 0

    def keep(block, args, kwargs, output):
        calls.append(BlockCall(len(calls), block, args[1:], kwargs))
        states_by_block.append(states_of(output).to("cpu", copy=True))

    with (
        eval_ppl.annotate_errors(
            f"in {type(model).__name__} of transformers {transformers.__version__}"
        ),
        eval_ppl.offload_blocks(model, device),
        ExitStack() as hooks,
    ):
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(keep, with_kwargs=True))
        model(ids.to(device), use_cache=False)
    if [call.block for call in calls] != blocks:
        raise ValueError(f"the model does not call its {len(blocks)} blocks one after the other")
    return calls, states_by_block


def record_and_check_calls(
    model: transformers.PreTrainedModel, tokens: Tensor, device: torch.device
) -> list[BlockCall]:
    """Return the calls of all blocks for the first sequence.

    Raise a ValueError unless each block, called by itself with the model's own hidden states before
    it, gives the model's own hidden states after it, for two sequences.
    """
    calls, first = record_calls(model, tokens[:1], device)
    # The last sequence is reversed, so that it differs from the first even if it is the only one.
    _, second = record_calls(model, tokens[-1:].flip(1), device)
    # On a CPU, the difference is 0. The tolerance allows for another order of summation.
    tolerance = 5e-3 if model.dtype in (torch.float16, torch.bfloat16) else 5e-5
    for call in tqdm(calls, "checking blocks"):
        # As in pruning, both sequences go through a block before the next one. This exposes data
        # that a block leaves in an attribute for a later one.
        with (
            eval_ppl.annotate_errors(f"while checking block {call.index}"),
            eval_ppl.moved(eval_ppl.tensors_of(call.block), device),
        ):
            # Recording raises a ValueError if a layer is called twice.
            after = [call.record(states[call.index])[0].cpu() for states in (first, second)]
        expected = torch.cat([first[call.index + 1], second[call.index + 1]]).float()
        if not expected.isfinite().all():
            raise ValueError(f"the hidden states after block {call.index} are NaN or infinite")
        # Relative to each token, since some have hidden states hundreds of times larger.
        distances = (torch.cat(after).float() - expected).norm(dim=-1)  # (2, seqlen)
        difference = float((distances / expected.norm(dim=-1).clamp(min=1e-30)).mean())
        if not difference <= tolerance:  # also true for NaN
            raise ValueError(
                "the model cannot be pruned block by block: the hidden states after block "
                f"{call.index} differ by {difference:.2g} if it is called alone"
            )
    return calls


# ------------------------------------------------------------------------------ calibration text


def calibration_tokens(
    source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0,
    bos_id: int | None = None,
) -> Tensor:  # fmt: skip
    """Return calibration tokens, (nsamples, seqlen) int64; the same seed gives the same tokens.

    For "c4", they are a random crop of each of `nsamples` random documents longer than `seqlen`,
    from the first file of C4's train split. These are the tokens of SparseGPT's, Wanda's
    and Boža's code for the same seed and tokenizer. For other texts, read by `eval_ppl.read_text`
    as the split "train", they are random windows, which may overlap.

    `bos_id`, unless it is None, takes the place of the first token of each sequence.

    Raises: ValueError if there is too little text; OSError if it cannot be read.
    """
    if source == "c4":
        with eval_ppl.annotate_errors(
            "while reading c4; --calibration FILE takes a text file instead"
        ):
            rows = datasets.load_dataset(
                "allenai/c4",
                data_files={"train": "en/c4-train.00000-of-01024.json.gz"},  # 0.3 GB
                split="train",
            )
        randint = random.Random(seed).randint  # drawn in the order of SparseGPT and Wanda
        sequences = []
        for _ in range(1000 * nsamples):  # gives up if fewer than 1 in 1000 documents are long
            ids = eval_ppl.tokenize(tokenizer, rows[randint(0, len(rows) - 1)]["text"])
            if len(ids) > seqlen:
                start = randint(0, len(ids) - seqlen - 1)
                sequences.append(ids[start : start + seqlen])
            if len(sequences) == nsamples:
                break
    else:
        ids = eval_ppl.tokenize(tokenizer, eval_ppl.read_text(source, "train"))
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(max(len(ids) - seqlen, 0) + 1, (nsamples,), generator=generator)
        sequences = [ids[start : start + seqlen] for start in starts]
    if len(sequences) < nsamples or len(sequences[0]) < seqlen:
        raise ValueError(f"{source} lacks text for {nsamples} sequences of {seqlen} tokens")
    tokens = torch.stack(sequences)
    if bos_id is not None:
        tokens[:, 0] = bos_id
    return tokens


# ---------------------------------------------------------------------------------- command line


def prune_and_save(args: argparse.Namespace) -> None:
    """Prune the model of the command line, and save it in a new folder.

    Tokenizer and configurations are saved before a layer is pruned: if that fails, no work is lost.
    model.safetensors, or its index, appears only once all weights are written, so that a folder
    that can be loaded has the whole model.
    """
    method = f"{args.method}-block-aware" if args.block_aware else args.method
    amount = "{}of{}".format(*args.pattern) if args.pattern else args.sparsity
    stem = Path(args.model).resolve().name.removesuffix(".gguf")
    folder = Path(f"{stem}-{method}-{amount}") if args.save is None else args.save
    with eval_ppl.annotate_errors(
        "choose another --save (a run that was killed leaves a folder without model.safetensors "
        "and without its index)"
    ):
        folder.mkdir()
    try:
        model, report = load_and_prune(args, folder)
        model.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # no whole model is in it
        raise
    (folder / "pruning_report.json").write_text(json.dumps(report, indent=2, default=str))
    matrices = [
        parameter
        for name, parameter in eval_ppl.find_blocks(model).named_parameters()
        if parameter.ndim > 1 and "bias" not in name  # the biases of experts are stacked, too
    ]
    zeros = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    print(
        f"{zeros:.2%} of the weights in the blocks are zero, in {len(report['layers'])} layers; "
        f"wrote {folder}; next: python eval_ppl.py --model {folder}"
    )


def load_and_prune(
    args: argparse.Namespace, folder: Path
) -> tuple[transformers.PreTrainedModel, dict]:
    """Return the pruned model of the command line, and a report.

    The model has the dtypes in which it was loaded. If a CPU computed in float32, the errors in the
    report are those before the last rounding.
    """
    device = eval_ppl.select_device(args.device)
    tokenizer, bos_id = eval_ppl.load_tokenizer(args.model, args.seqlen, args.bos)
    tokenizer.save_pretrained(folder)
    print(
        f"pruning {args.model} into {folder} on {device},",
        f"with {args.nsamples} x {args.seqlen} tokens of {', '.join(args.calibration)}",
        f"(BOS in each: {bos_id is not None})",
        flush=True,
    )
    count = math.ceil(args.nsamples / len(args.calibration))
    by_text = [
        calibration_tokens(source, tokenizer, count, args.seqlen, args.seed, bos_id)
        for source in args.calibration
    ]
    # The texts take turns, so that the first sequences, which the probe uses, cover all.
    tokens = torch.stack(by_text, dim=1).flatten(0, 1)[: args.nsamples]
    model = eval_ppl.load_model(args.model, args.dtype)
    model.config.save_pretrained(folder)
    if model.can_generate():
        # For some old models, transformers before 5.11 raises here, before they are pruned.
        model.generation_config.save_pretrained(folder)
    if sum(p.nbytes for p in model.parameters()) > shutil.disk_usage(folder).free:
        raise ValueError(f"the disk of {folder} has no room for the model")
    # A checkpoint may mix dtypes. Each tensor gets back its own in the end.
    loaded_dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if args.dtype == "auto" and device.type == "cpu":
        model.float()  # a CPU is three to four times as slow in 16 bits
    dtype = model.dtype
    layers = prune_model(
        model,
        tokens,
        partial(METHODS[args.method], pattern=args.pattern),
        args.sparsity,
        block_aware=args.block_aware,
        device=device,
    )
    restore_dtypes(model, loaded_dtypes)
    for name, parameter in eval_ppl.find_blocks(model).named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"block {name} overflows {parameter.dtype}: use --dtype float32")
    return model, {
        "arguments": vars(args)
        | {
            "bos": bos_id,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "dtype": dtype,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "gpu_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "layers": layers,
    }


def restore_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Convert the parameters and buffers of a model, by name, in place, so that ties stay."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])


def parse_pattern(text: str) -> tuple[int, int]:
    """Return (N, M) for the text "N:M"; raise an ArgumentTypeError unless 0 < N <= M."""
    N, _, M = text.partition(":")
    if not (N.isdecimal() and M.isdecimal() and 0 < int(N) <= int(M)):
        raise argparse.ArgumentTypeError(f"must be N:M with 0 < N <= M, got {text}")
    return int(N), int(M)


def main() -> None:
    cli = argparse.ArgumentParser(
        description="Set a share of the weights in the blocks of a causal language model to zero, "
        "adapt the others, and save the model in a new folder, with a report of each layer's error."
    )
    cli.add_argument("--model", required=True, help=eval_ppl.MODEL_HELP)
    amount = cli.add_mutually_exclusive_group()
    amount.add_argument(
        "--sparsity",
        type=float,
        default=0.5,
        help="share of zeros in each layer, or, with --block-aware, in each block; default: 0.5",
    )
    amount.add_argument("--pattern", type=parse_pattern, metavar="N:M", help="keep N of M entries")
    cli.add_argument(
        "--method", choices=METHODS, default="admm-grad", help="default: admm-grad, the paper's"
    )
    cli.add_argument(
        "--block-aware",
        action="store_true",
        help="prune for the hidden states after each block, and divide its zeros among its layers; "
        "recommended",
    )
    cli.add_argument(
        "--calibration",
        nargs="+",
        default=["c4"],
        help="one or more of c4 (the default), wikitext2, help (Python's own, offline) and text "
        "files, which take turns",
    )
    cli.add_argument(
        "--nsamples", type=int, default=128, help="calibration sequences; default: 128"
    )
    cli.add_argument("--seed", type=int, default=0, help="draws the sequences; default: 0")
    cli.add_argument(
        "--save", type=Path, help="new output folder; default: named by model, method and amount"
    )
    eval_ppl.add_common_arguments(cli)
    args = cli.parse_args()
    if not 0 <= args.sparsity < 1:
        cli.error(f"--sparsity must be at least 0 and below 1, got {args.sparsity}")
    if args.pattern is not None:
        args.sparsity = None
    if (
        len({Path(source).resolve() for source in args.calibration}) < len(args.calibration)
        or args.nsamples < len(args.calibration)
        or args.seqlen < 2
        or not 0 <= args.seed < 2**63
    ):
        cli.error(
            "each text of --calibration must be given once, --nsamples must be at least their "
            "number, --seqlen at least 2, and --seed at least 0 and below 2**63"
        )
    with eval_ppl.exit_without_traceback("admm_prune.py"):
        prune_and_save(args)


if __name__ == "__main__":
    main()
