"""Perplexity of a causal LM on WikiText-2, C4 or a text file, one decoder block at a time.

    python eval_ppl.py --model facebook/opt-6.7b
    python eval_ppl.py --model opt-6.7b-admm-grad-0.5 --dataset wikitext2 --seqlen 2048

The protocol of the published tables (GPTQ, SparseGPT, Wanda): the rows of the test split joined
by blank lines and tokenised once, windows of `seqlen` tokens that do not overlap, the last partial
one dropped, and the exponential of the mean negative log-likelihood. Blocks visit the GPU one at a
time, as in pruning, so the model may be larger than its memory.
"""

import argparse
import math
import sys
import time

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import admm_prune as ap


def perplexity(model: nn.Module, tokens: Tensor, device: torch.device | str | None = None) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first.

    Args:
        model: a Hugging Face decoder-only model, on the host; a block at a time visits `device`.
        tokens: (windows, seqlen) int64.
        device: where the blocks run; default as in `find_device`.

    Raises:
        ValueError: a window's likelihood is NaN or infinite.
    """
    device = ap.find_device(device)
    losses = []
    with ap.BlockRunner(model, tokens, device) as runner:
        for index in runner.visit(tqdm(runner.blocks, "perplexity", unit="block", disable=None)):
            runner.run(index, keep=True)
        for row, window in enumerate(tokens.to(device)):  # (seqlen,)
            loss = F.cross_entropy(runner.logits(row)[:-1].float(), window[1:])
            if not loss.isfinite():
                raise ValueError(f"window {row} has a loss of {loss.item()}")
            losses.append(loss.item())
    return math.exp(sum(losses) / len(losses))


def load_windows(source: str, tokenizer, seqlen: int = 2048, limit: int | None = None) -> Tensor:
    """The evaluation tokens, (windows, seqlen) int64.

    Args:
        source: "wikitext2" (test split), "c4" (the first 1100 validation documents, 256 windows,
            as in SparseGPT) or the path of a text file.
        limit: the first so many windows only.

    Raises:
        ValueError: the text cannot be read or has fewer than `seqlen` tokens.
    """
    with ap.explain(f"cannot read the text {source}"):
        if source == "c4":
            stream = datasets.load_dataset("allenai/c4", "en", split="validation", streaming=True)
            text = " ".join(document["text"] for document in stream.take(1100))
            limit = min(limit or 256, 256)
        else:
            text = ap.load_text(source, "test")
    ids = ap.tokenize(tokenizer, text)
    count = min(len(ids) // seqlen, limit or len(ids))
    if count == 0:
        raise ValueError(f"{source} has {len(ids)} tokens, but one window needs {seqlen}")
    return ids[: count * seqlen].view(count, seqlen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a causal language model.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--dataset", default="wikitext2", help="wikitext2, c4 or a text file")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--limit", type=int, help="the first so many windows only")
    parser.add_argument("--device", help="default: cuda, then mps, then cpu")
    parser.add_argument(
        "--dtype", choices=ap.DTYPES, default="auto", help="default: the checkpoint's"
    )
    args = parser.parse_args()
    if args.seqlen < 2 or (args.limit is not None and args.limit < 1):
        parser.error("--seqlen must be at least 2 and --limit at least 1")
    began = time.perf_counter()
    try:
        device = ap.find_device(args.device)
        config, tokenizer = ap.load_config_and_tokenizer(args.model)
        seqlen = ap.cap_seqlen(args.seqlen, config)
        windows = load_windows(args.dataset, tokenizer, seqlen, args.limit)
        result = perplexity(ap.load_model(args.model, args.dtype, device), windows, device)
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
