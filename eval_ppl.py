"""Perplexity of a causal LM on WikiText-2, C4 or a text file, one decoder block at a time.

    python eval_ppl.py --model facebook/opt-6.7b
    python eval_ppl.py --model opt-6.7b-admm-grad-0.5 --dataset wikitext2 --seqlen 2048

The protocol of the published tables (GPTQ, SparseGPT, Wanda): the rows of the test split joined
by blank lines and tokenised once, windows of `seqlen` tokens that do not overlap, the last partial
one dropped, and the exponential of the mean negative log-likelihood. Blocks visit the GPU one at a
time, as in pruning, so the model may be larger than its memory. Below are the loading of models
and texts, which pruning shares.
"""

import argparse
import importlib.util
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")


def perplexity(model: nn.Module, tokens: Tensor, device: torch.device | str | None = None) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first.

    Args:
        model: a Hugging Face decoder-only model, on the host; a block at a time visits `device`.
        tokens: (windows, seqlen) int64.
        device: where the blocks run; default as in `find_device`.

    Raises:
        ValueError: a window's likelihood is NaN or infinite.
    """
    from admm_prune import BlockRunner  # here, since that module imports this one

    device, losses = find_device(device), []
    with BlockRunner(model, tokens, device) as runner:
        for index in runner.visit(tqdm(runner.blocks, "perplexity", unit="block", disable=None)):
            runner.run(index, keep=True)
        for row, window in enumerate(tokens.to(device)):  # (seqlen,)
            loss = F.cross_entropy(runner.logits(row)[:-1].float(), window[1:])
            if not loss.isfinite():
                raise ValueError(f"window {row} has a loss of {loss.item()}")
            losses.append(loss.item())
    return math.exp(sum(losses) / len(losses))


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids of the whole text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def load_text(source: str, split: str) -> str:
    """A split of WikiText-2, joined as for every published perplexity, or a text file."""
    if source != "wikitext2":
        return Path(source).read_text(encoding="utf-8")
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return "\n\n".join(rows["text"])


def load_windows(source: str, tokenizer, seqlen: int = 2048, limit: int | None = None) -> Tensor:
    """The evaluation tokens, (windows, seqlen) int64.

    Args:
        source: "wikitext2" (test split), "c4" (the first 1100 validation documents, 256 windows,
            as in SparseGPT) or the path of a text file.
        limit: the first so many windows only.

    Raises:
        ValueError: the text cannot be read or has fewer than `seqlen` tokens.
    """
    with explain(f"cannot read the text {source}"):
        if source == "c4":
            stream = datasets.load_dataset("allenai/c4", "en", split="validation", streaming=True)
            text = " ".join(document["text"] for document in stream.take(1100))
            limit = min(limit or 256, 256)
        else:
            text = load_text(source, "test")
    ids = tokenize(tokenizer, text)
    count = min(len(ids) // seqlen, limit or len(ids))
    if count == 0:
        raise ValueError(f"{source} has {len(ids)} tokens, but one window needs {seqlen}")
    return ids[: count * seqlen].view(count, seqlen)


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name, known to work; by default CUDA, then Apple's MPS, then the CPU."""
    name = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch names every backend that it knows
        raise ValueError(f"cannot use the device {name}: try cuda, mps or cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels written in Triton run on the current one
    return device


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


def check_config(config) -> None:
    """Raises a ValueError for the kinds of models that are not pruned."""
    if config.is_encoder_decoder:
        raise ValueError("this is an encoder-decoder model: only decoder-only ones are pruned")
    if getattr(config, "quantization_config", None):
        raise ValueError("this model is quantised: prune the original and quantise the result")
    if getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        raise ValueError("blocks of this model read the keys of others, so they cannot run alone")


def choose_dtype(name: str, config, device: torch.device) -> torch.dtype:
    """The dtype of that name; for "auto" the checkpoint's, but float32 on a CPU that is many times
    slower in 16 bits."""
    if name != "auto":
        return getattr(torch, name)
    dtype = config.dtype or torch.float32
    fast = dtype == torch.bfloat16 and "AVX512" in torch.backends.cpu.get_cpu_capability()
    if device.type == "cpu" and dtype != torch.float32 and not fast:
        print(
            f"{dtype} is slow on this CPU: computing and saving in float32, unless you set --dtype"
        )
        return torch.float32
    return dtype


def load_model(model: str, dtype: torch.dtype) -> nn.Module:
    """The causal LM, on the host; the weights of a GGUF are dequantised."""
    where = locate(model)
    gguf = where.get("gguf_file")
    if gguf and hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        where["quantization_config"] = transformers.GgufConfig(gguf, dequantize=True)
    with explain(f"cannot load {model}"):
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    if gguf:
        loaded.hf_quantizer = None  # plain weights from here on
    return loaded


def cap_seqlen(seqlen: int, config) -> int:
    """The sequence length, or what the model's positions allow if that is less."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and seqlen > limit:
        print(f"--seqlen {seqlen} is more than the model's {limit} positions: using {limit}")
        return limit
    return seqlen


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a causal language model.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--dataset", default="wikitext2", help="wikitext2, c4 or a text file")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--limit", type=int, help="the first so many windows only")
    parser.add_argument("--device", help="default: cuda, then mps, then cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's")
    args = parser.parse_args()
    if args.seqlen < 2 or (args.limit is not None and args.limit < 1):
        parser.error("--seqlen must be at least 2 and --limit at least 1")
    began = time.perf_counter()
    try:
        device = find_device(args.device)
        config, tokenizer = load_config_and_tokenizer(args.model)
        seqlen = cap_seqlen(args.seqlen, config)
        windows = load_windows(args.dataset, tokenizer, seqlen, args.limit)
        dtype = choose_dtype(args.dtype, config, device)
        result = perplexity(load_model(args.model, dtype), windows, device)
    except ValueError as error:
        sys.exit(f"eval_ppl.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval_ppl.py: interrupted")
    print(
        f"perplexity {result:.3f} on {args.dataset}: {len(windows)} windows of {seqlen}, "
        f"{windows.numel()} tokens, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
